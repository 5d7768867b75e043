from __future__ import annotations

import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from rlhf_cli.errors import RunError
from rlhf_cli.store import Store, check_folder, content_hash, identity_difference, read_json, write_json

IDENTITY = {"seed": 0, "model": {"layers": 2, "path": None}}


def publish(store: Store, stage: str, identity: dict) -> Path:
    with store.building(stage, identity) as building:
        (building.path / "weights").write_text("w")
        return building.publish()


def test_hash_ignores_order_number_type_and_sequence_type() -> None:
    assert content_hash({"a": 1, "b": (2, 3)}) == content_hash({"b": [2.0, 3], "a": 1.0})


def test_hash_of_a_known_identity() -> None:
    # printf '{"a":1,"b":null}' | sha256sum
    expected = "46e0ff59f6164548317489fbea1133a48f7a83c325c3535e44559c9619afb76b"
    assert content_hash({"b": None, "a": 1.0}) == expected


@pytest.mark.parametrize("other", [{"a": 2}, {"a": 1.5}, {"a": True}, {"a": None}, {"a": "1"}, {"b": 1}, {}])
def test_hash_tells_values_apart(other: dict) -> None:
    assert content_hash({"a": 1}) != content_hash(other)


def test_hash_refuses_what_json_cannot_hold() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        content_hash({"path": Path("x")})


def test_difference_names_three_keys_and_counts_the_rest() -> None:
    old = {"a": 1, "b": {"c": "x", "same": 0}, "d": 1, "e": 1}
    new = {"a": 2, "b": {"c": None, "same": 0.0}, "d": 2}
    text = identity_difference(old, new)
    assert text == 'a was 1, is now 2; b.c was "x", is now null; d was 1, is now 2; and 1 more'
    assert identity_difference({}, {"e": 1}) == "e was absent, is now 1"


def test_json_survives_a_crash_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def crash(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}


def test_a_published_stage_is_found_and_another_identity_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.find("sft", IDENTITY) is None
    folder = publish(store, "sft", IDENTITY)
    assert store.find("sft", IDENTITY) == folder
    assert (folder / "weights").read_text() == "w"
    assert store.find("sft", IDENTITY | {"seed": 1}) is None
    assert store.find("rm", IDENTITY) is None


def test_looking_up_creates_nothing(tmp_path: Path) -> None:
    assert Store(tmp_path / "store").find("sft", IDENTITY) is None
    assert not (tmp_path / "store").exists()


def test_a_published_stage_is_handed_out_ready(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = publish(store, "sft", IDENTITY)
    with store.building("sft", IDENTITY) as building:
        assert building.ready
        assert building.path == building.publish() == folder


def test_the_work_folder_survives_a_crash(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def crash() -> None:
        with store.building("sft", IDENTITY) as building:
            (building.path / "checkpoint-1").mkdir()
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        crash()
    assert store.find("sft", IDENTITY) is None
    with store.building("sft", IDENTITY) as building:
        assert not building.ready
        assert (building.path / "checkpoint-1").is_dir()


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"seed": 7}'])
def test_a_damaged_folder_never_counts_and_is_replaced(tmp_path: Path, content: str | None) -> None:
    store = Store(tmp_path)
    folder = publish(store, "sft", IDENTITY)
    (folder / "weights").write_text("damaged")
    (folder / "identity.json").unlink()
    if content is not None:
        (folder / "identity.json").write_text(content)
    assert store.find("sft", IDENTITY) is None
    assert publish(store, "sft", IDENTITY) == folder
    assert (folder / "weights").read_text() == "w"


def build_slowly(root: str, built: str, ready: object) -> str:
    ready.wait()  # type: ignore[attr-defined]
    with Store(Path(root)).building("sft", IDENTITY) as building:
        if not building.ready:
            with Path(built).open("a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(0.3)
            (building.path / "weights").write_text("w")
            building.publish()
        return str(building.path)


def test_of_many_processes_one_builds_and_all_get_its_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    built = tmp_path / "built"
    with context.Manager() as manager, context.Pool(3) as pool:
        ready = manager.Barrier(3)
        jobs = [(str(tmp_path / "store"), str(built), ready)] * 3
        folders = pool.starmap_async(build_slowly, jobs, chunksize=1).get(timeout=60)
    assert len(built.read_text().splitlines()) == 1
    assert set(folders) == {str(Store(tmp_path / "store").find("sft", IDENTITY))}


def hold(root: str, held: object, released: object) -> None:
    with Store(Path(root)).building("sft", IDENTITY) as building:
        held.set()  # type: ignore[attr-defined]
        released.wait(30)  # type: ignore[attr-defined]
        building.publish()


class Release(logging.Handler):
    """Lets the holder of the lock go on as soon as the waiting process has said that it waits."""

    def __init__(self, released: object) -> None:
        super().__init__()
        self.released = released

    def emit(self, record: logging.LogRecord) -> None:
        self.released.set()  # type: ignore[attr-defined]


def test_waiting_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("spawn")
    held, released = context.Event(), context.Event()
    handler = Release(released)
    logging.getLogger("rlhf_cli.store").addHandler(handler)
    process = context.Process(target=hold, args=(str(tmp_path), held, released))
    process.start()
    try:
        assert held.wait(30)
        with caplog.at_level(logging.WARNING), Store(tmp_path).building("sft", IDENTITY) as building:
            assert building.ready
    finally:
        released.set()
        process.join(30)
        logging.getLogger("rlhf_cli.store").removeHandler(handler)
    assert [record.getMessage() for record in caplog.records] == ["waiting for another process that trains the sft ..."]


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "store")
    assert store.find("sft", IDENTITY) is None
    with pytest.raises(RunError, match="store_dir=.* cannot be a folder.*file is a file"), store.building("sft", {}):
        pass


def test_a_root_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with (
        pytest.raises(RunError, match="store_dir=.* cannot be written.*no write permission"),
        Store(tmp_path / "store").building("sft", IDENTITY),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_the_system_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(RunError, match="cannot be created. Read-only file system. choose another store_dir"),
        Store(tmp_path / "store").building("sft", IDENTITY),
    ):
        pass


def test_a_folder_behind_a_dangling_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(RunError, match="run_dir=.* cannot be a folder"):
        check_folder(tmp_path / "link" / "run", "run_dir")
