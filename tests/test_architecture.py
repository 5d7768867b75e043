"""The arrows of CONTRIBUTING.md: imports go downwards, and each library is spoken to in one room only."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rlhf_cli"

# A room is a subpackage or a top-level module. A room may import itself and every room of a lower line.
TIERS = (
    {"cli", "cli_help", "jobs", "objective", "rank_job"},
    {"stages", "launch"},
    {"trainers", "measure", "data", "models", "run", "store", "hub", "tracking", "wandb_run", "report"},
    {"algos", "rewards", "metrics"},
    {"config"},
    {"ranks", "provenance"},
    {"errors"},
)
# Arrows between rooms of one line; none of them may point back.
SIDEWAYS = {
    ("cli", "jobs"),
    ("cli", "cli_help"),
    ("rank_job", "jobs"),
    ("jobs", "objective"),
    ("trainers", "models"),
    ("trainers", "run"),
    ("measure", "models"),
    ("measure", "data"),
    ("measure", "store"),
    ("data", "store"),
    ("models", "hub"),
    ("data", "hub"),
    ("run", "store"),
    ("run", "tracking"),
    ("tracking", "wandb_run"),
    ("rewards", "algos"),
    ("metrics", "algos"),
}
# Modules of another room that are found by name at run time: an algorithm's schema and record.
BY_NAME = {("launch", "rank_job"), ("launch", "cli"), ("config", "algos"), ("config", "rewards")}

PURE = {"algos", "rewards", "metrics"}
PURE_LIBRARIES = {"torch", "numpy", "scipy"}
FILE_MODULES = {"os", "io", "pathlib", "shutil", "tempfile", "gzip", "pickle", "sqlite3", "subprocess", "socket"}
FILE_MODULES |= {"urllib", "http"}
FILE_CALLS = {"open", "read_text", "write_text", "read_bytes", "write_bytes"}


@dataclass(frozen=True)
class Import:
    """One import: by whom, of what, on which line; `at_start` is False inside functions and for types alone."""

    module: str
    target: str
    line: int
    at_start: bool = True

    @property
    def library(self) -> str:
        return self.target.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def room(module: str) -> str:
    """Return the room of a dotted module name; the bare package (its version) is no room."""
    return (module.split(".") + [""])[1]


def sources(package: Path) -> dict[str, ast.Module]:
    """Return the syntax tree of every module below `package`, by dotted name."""
    trees = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return trees


def walk(node: ast.AST, at_start: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node below `node`, and whether it runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        types_alone = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        inside = at_start and not deferred and not types_alone
        yield child, inside
        yield from walk(child, inside)


def imports(trees: dict[str, ast.Module]) -> list[Import]:
    """Return all imports of all modules, those inside functions included."""
    found = []
    for module, tree in trees.items():
        for node, at_start in walk(tree):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}:{node.lineno} imports relatively; write the full name"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [name if name in trees or node.module == PACKAGE.name else str(node.module) for name in names]
            else:
                continue
            found += [Import(module, target, node.lineno, at_start) for target in dict.fromkeys(targets)]
    return found


def wrong_arrows(trees: dict[str, ast.Module]) -> list[str]:
    """Return the imports that go upwards, or sideways where no arrow is declared."""
    tier = {name: height for height, names in enumerate(TIERS) for name in names}
    wrong = []
    for entry in imports(trees):
        source, target = room(entry.module), room(entry.target)
        if entry.library != PACKAGE.name or source == target or target not in tier:
            continue
        if tier[source] > tier[target] or (tier[source] == tier[target] and (source, target) not in SIDEWAYS):
            wrong.append(f"{entry}: {source} may not import {target}")
    return wrong


def named_modules(trees: dict[str, ast.Module]) -> set[tuple[str, str]]:
    """Return (room, room) for every string that begins like a module of this package."""
    return {
        (room(module), room(node.value))
        for module, tree in trees.items()
        for node, _ in walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{PACKAGE.name}.")
    }


def import_cycle(trees: dict[str, ast.Module]) -> list[str]:
    """Return the modules of a cycle of imports that run when a module is imported; empty where there is none."""
    graph: dict[str, set[str]] = {module: set() for module in trees}
    for entry in imports(trees):
        if entry.at_start and entry.target in trees:
            graph[entry.module].add(entry.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return sources(PACKAGE)


def test_every_module_belongs_to_a_room(trees: dict[str, ast.Module]) -> None:
    rooms = {room(module) for module in trees} - {""}
    assert rooms == set().union(*TIERS), "name a new room in TIERS here and in CONTRIBUTING.md"


def test_imports_go_downwards(trees: dict[str, ast.Module]) -> None:
    assert wrong_arrows(trees) == []


def test_every_declared_sideways_arrow_is_used(trees: dict[str, ast.Module]) -> None:
    used = {(room(entry.module), room(entry.target)) for entry in imports(trees)}
    assert used >= SIDEWAYS, f"take the arrows that no import needs any more out of SIDEWAYS: {SIDEWAYS - used}"


def test_sideways_arrows_have_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for source, target in SIDEWAYS:
        graph.setdefault(source, set()).add(target)
    TopologicalSorter(graph).prepare()


def test_modules_found_by_name_are_the_declared_seams(trees: dict[str, ast.Module]) -> None:
    assert {pair for pair in named_modules(trees) if pair[0] != pair[1]} == BY_NAME


def test_no_import_cycles(trees: dict[str, ast.Module]) -> None:
    assert import_cycle(trees) == []


def test_only_trainers_import_trl(trees: dict[str, ast.Module]) -> None:
    assert [str(x) for x in imports(trees) if x.library == "trl" and room(x.module) != "trainers"] == []


def test_only_config_handles_omegaconf(trees: dict[str, ast.Module]) -> None:
    """Elsewhere configs are dataclasses. `jobs` hands sweeps to Hydra and sees its errors, not its containers."""
    allowed = {"hydra": {"config", "jobs"}, "omegaconf": {"config"}}
    wrong = [
        str(x)
        for x in imports(trees)
        if room(x.module) not in allowed.get(x.library, {room(x.module)}) and x.target != "omegaconf.errors"
    ]
    assert wrong == []


def test_mathematics_needs_tensors_alone(trees: dict[str, ast.Module]) -> None:
    pure = {module: tree for module, tree in trees.items() if room(module) in PURE}
    libraries = PURE_LIBRARIES | {PACKAGE.name} | set(sys.stdlib_module_names) - FILE_MODULES
    assert [str(x) for x in imports(pure) if x.library not in libraries] == []
    calls = [(module, node) for module, tree in pure.items() for node, _ in walk(tree) if isinstance(node, ast.Call)]
    names = {(module, getattr(call.func, "id", getattr(call.func, "attr", ""))) for module, call in calls}
    assert {(module, name) for module, name in names if name in FILE_CALLS} == set()


def test_no_room_for_leftovers(trees: dict[str, ast.Module]) -> None:
    """A module is named after what it does."""
    assert {module for module in trees if module.rpartition(".")[2] in {"utils", "util", "helpers", "misc"}} == set()


# -- the checks themselves see what they are for ----------------------------------------------------------------------


def _package(folder: Path, **modules: str) -> dict[str, ast.Module]:
    for name, text in modules.items():
        path = folder / PACKAGE.name / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return sources(folder / PACKAGE.name)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("algos__x", "from rlhf_cli.stages import align"),
        ("models__x", "def f():\n    import rlhf_cli.stages.align"),
        ("data__x", "from rlhf_cli.trainers.common import Log"),
        ("config__x", "from rlhf_cli import algos"),
    ],
    ids=["upwards", "inside a function", "sideways", "package attribute"],
)
def test_a_wrong_arrow_is_seen(tmp_path: Path, module: str, text: str) -> None:
    assert len(wrong_arrows(_package(tmp_path, **{module: text}))) == 1


def test_a_right_arrow_is_not(tmp_path: Path) -> None:
    text = "import torch\nfrom rlhf_cli import __version__\nfrom rlhf_cli.models.logps import kl"
    assert wrong_arrows(_package(tmp_path, trainers__x=text)) == []


def test_a_cycle_is_seen_only_where_imports_run_at_once(tmp_path: Path) -> None:
    later = "def f():\n    from rlhf_cli.models import a"
    types_alone = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rlhf_cli.models import a"
    forward = "from rlhf_cli.models.b import x"
    assert import_cycle(_package(tmp_path / "1", models__a=forward, models__b="import rlhf_cli.models.a")) != []
    assert import_cycle(_package(tmp_path / "2", models__a=forward, models__b=later)) == []
    assert import_cycle(_package(tmp_path / "3", models__a=forward, models__b=types_alone)) == []
