"""`rlhf generate`: what a policy answers, beside its reference."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from tqdm.auto import tqdm

from rlhf_cli.errors import RunError, UserError
from rlhf_cli.report.answers import show
from rlhf_cli.stages.prompts import Asked, Prompt
from rlhf_cli.stages.session import quiet_libraries
from rlhf_cli.stages.speakers import Line, Speakers, gather, note
from rlhf_cli.store import write_text


def run(given: str, prompts: list[Prompt] | None, asked: Asked, out: Path | None = None) -> None:
    """Answer `prompts`, or what a person types where they are None, by the policy that `given` names.

    Args:
        given: a run folder, a model folder or a name of the Hub.
        prompts: what is asked.
        asked: how answers are sampled, and who answers.
        out: a .jsonl file that gets the answers; those to given prompts are printed otherwise.

    Raises:
        RunError: there is no such policy or reward model, or `out` cannot be written.
        DataError: a prompt is no conversation, or too long.
    """
    quiet_libraries()
    speakers = gather(given, asked)
    if prompts is None:
        converse(speakers, asked, out)
        return
    read = [speakers.encoded(prompt) for prompt in prompts]  # all, before the first is answered
    at_a_time, rows = max(1, speakers.batch // asked.samples), []
    quiet = out is None and sys.stdout.isatty()
    total = len(read) * asked.samples
    with tqdm(total=total, unit="answer", mininterval=1, delay=2, leave=False, disable=quiet) as bar:
        for first in range(0, len(read), at_a_time):
            lines = speakers.answers(read[first : first + at_a_time], asked.samples, asked.seed, first)
            if out is None:
                show(lines)
            rows += lines
            bar.update(len(lines))
    if out is not None:
        save(rows, out)
        note(f"{len(rows)} answers: {out}")


def save(lines: Sequence[Line], out: Path) -> None:
    """Write answers, one a line.

    Raises:
        RunError: the file cannot be written.
    """
    rows = [{key: value for key, value in line.items() if key != "samples"} for line in lines]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise RunError(f"--out {out} cannot be written", error.strerror or str(error), "choose another file") from error


def converse(speakers: Speakers, asked: Asked, out: Path | None) -> None:
    """Answer what a person types, a fresh conversation each line, until an empty line; `out` gets the answers too."""
    with suppress(ImportError):  # not on every system; arrow keys then edit the line
        import readline  # noqa: F401
    note("type a prompt; an empty line ends")
    said: list[Line] = []
    for turn in count():
        text = _typed()
        if not text:
            return
        try:
            lines = speakers.answers([speakers.encoded(text)], asked.samples, (asked.seed + turn) % 2**32)
            show(lines)
            said += lines
            if out is not None:
                save(said, out)
        except UserError as error:  # of this prompt; the next may do
            note(f"error: {error}")
        except KeyboardInterrupt:  # of this answer
            note("stopped; an empty line ends")


def _typed() -> str:
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        sys.stdout.write("\n")
        return ""
