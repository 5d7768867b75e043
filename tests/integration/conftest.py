"""One store and one run of each algorithm for the whole session, made in this process on first use."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_jobs import ALGORITHMS, job

# A whole image of one black pixel.
PIXEL = b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost tiny tensors more than they gain, and would let results depend on the machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of everything the session makes: store/ and one folder a run."""
    return tmp_path_factory.mktemp("workshop")


@pytest.fixture(scope="session")
def store(workshop: Path) -> Path:
    """The store that the survey jobs of the session share."""
    return workshop / "store"


@pytest.fixture(scope="session")
def finished(workshop: Path, store: Path) -> Callable[[str], Path]:
    """Return a function that gives the run folder of an entry of ALGORITHMS, trained on first use."""
    from rlhf_cli.report import figures, pair_figures
    from rlhf_cli.stages import results

    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:  # real figures, even where a test goes without
                patch.setattr(results, "preference_bars", figures.preference_bars)
                patch.setattr(results, "curves", figures.curves)
                patch.setattr(results, "pair_figure", pair_figures.pair_figure)
                made[name] = job("align", *ALGORITHMS[name], run_dir=workshop / name, store=store)
        return made[name]

    return run


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing for a run: figures take half of a small job."""
    from rlhf_cli.stages import results, trust

    monkeypatch.setattr(trust, "trust_figure", lambda panels, path, **_: path.write_bytes(PIXEL))
    monkeypatch.setattr(results, "preference_bars", lambda rows, path, **_: path.write_bytes(PIXEL))
    monkeypatch.setattr(results, "curves", lambda lines, path, keys: path.write_bytes(PIXEL))
    monkeypatch.setattr(results, "pair_figure", lambda pairs, path: bool(path.write_bytes(PIXEL)))


@pytest.fixture
def small(tmp_path: Path, store: Path, no_figures: None) -> Callable[..., Path]:
    """Return a function that runs a small job of one test: small(command, *overrides, name="run")."""

    def run(command: str, *overrides: str, name: str = "run", **places: Any) -> Path:
        return job(command, *overrides, **{"run_dir": tmp_path / name, "store": store, **places})

    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gains the trainer's name whenever anything is trained."""
    import transformers

    names: list[str] = []
    train = transformers.Trainer.train

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(type(self).__name__)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "train", noted)
    return names
