"""Uploading an export to the Hub."""

from __future__ import annotations

from pathlib import Path

from rlhf_cli import hub
from rlhf_cli.errors import ConfigError, RunError


def check(push: str | None, private: bool) -> None:
    """Refuse a name that no repository can have.

    Raises:
        ConfigError: naming it.
    """
    if push is None:
        if private:
            raise ConfigError("--private says how to push", "--push is not given", "Add --push USER/NAME")
        return
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(push)
    except HFValidationError as error:
        raise ConfigError(f"--push {push} is no name of a repository", str(error), "Write --push USER/NAME") from None


def upload(folder: Path, repository: str, private: bool) -> str:
    """Upload an export to a repository of the Hub, made if it is not there, and return its address.

    Raises:
        RunError: nobody is logged in, the Hub is out of reach, or it refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi, get_token

    stays = f"the export stays in {folder}"
    if not hub.reachable():
        todo = "check the network, and that HF_HUB_OFFLINE is not set; then run the command again"
        raise RunError(f"--push {repository}: the Hub is out of reach", stays, todo)
    if get_token() is None:
        todo = "log in with `hf auth login`, or set HF_TOKEN; then run the command again"
        raise RunError(f"--push {repository}: nobody is logged in to the Hub", stays, todo)
    try:
        api = HfApi()
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder)
    except Exception as error:  # a broken line shows in many ways, of other libraries too
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunError(f"--push {repository} failed: {reason}", stays, "then run the command again") from error
    return str(made)
