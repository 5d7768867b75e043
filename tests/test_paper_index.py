"""docs/paper_index.md stays true: every function, test, key, default and metric it names exists as it says."""

from __future__ import annotations

import ast
import re
from dataclasses import is_dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from rlhf_cli.config import inputs, schema, validate
from rlhf_cli.config.catalog import Catalog
from rlhf_cli.metrics import glossary

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
BUILT, _, NOT_BUILT = PAGE.partition("\n## Not built yet\n")

NAME, DOTTED = r"[a-z_0-9]+", r"[a-z_0-9]+(?:\.[a-z_0-9]+)+"
KINDS = {
    "function": r"rlhf_cli(\.\w+)+",
    "test": r"tests/[\w/]+\.py(::\w+)?",
    "file": r"[\w/]+\.(md|py|yaml)",
    "default": rf"{DOTTED} = .+",
    "override": rf"{NAME}(/{NAME})?(\.{NAME})*=\S+",  # key=value, group=choice, group/inner=choice
    "key": DOTTED,
    "metric": rf"{NAME}(/{NAME})*",
    "release": r"\w+\(\)",  # a function of a paper's own code
}
CATALOG = Catalog("evaluate", None)  # has every group
SCHEMAS: dict[str, list[type]] = {
    "algo": [validate.algo_schema(name, CATALOG) for name in CATALOG.choices("algo")],
    "algo/constraint": [validate.PRIORS[name] for name in CATALOG.choices("algo/constraint")],
    "dataset": list(inputs.DATASETS.values()),
    "generation": [schema.GenerationConfig, schema.VllmGeneration],
    "judge": [schema.JudgeConfig],
    "model": [inputs.MadeModelConfig],
    "peft": list(inputs.PEFT.values()),
    "reward": [validate.reward_schema(name, CATALOG) for name in CATALOG.choices("reward")],
    "trainer": [schema.TrainerConfig],
}
NAMED_WHOLE = ("algo", "algo/constraint", "reward", "peft")  # groups of which every key is on the page
MATHEMATICS = ["algos/*.py", "rewards/*.py", "metrics/*.py"]
NO_EQUATION = {
    "rlhf_cli.algos.get",
    "rlhf_cli.algos.base.require_same_shape",
    "rlhf_cli.metrics.glossary.known",
    "rlhf_cli.metrics.glossary.describe",
    "rlhf_cli.metrics.glossary.rankable",
    "rlhf_cli.metrics.preference.preference_metrics",
    "rlhf_cli.rewards.get",
}


# -- reading the page and the repository -------------------------------------------------------------------------------


def spans(text: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"`([^`\n]+)`", text)))


def kind(span: str) -> str | None:
    return next((name for name, pattern in KINDS.items() if re.fullmatch(pattern, span)), None)


def of_kind(*names: str, text: str = PAGE) -> list[str]:
    return [span for span in spans(text) if kind(span) in names]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def defined(body: list[ast.stmt], name: str) -> list[ast.stmt] | None:
    """Return the body of the class or function (empty for a constant) called `name`, or None."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node.body
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return []
    return None


def function_exists(dotted: str) -> bool:
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if path.is_file():
            body: list[ast.stmt] | None = tree(path).body
            for name in parts[length:]:
                body = defined(body, name) if body is not None else None
            return body is not None
    return False


def test_exists(reference: str) -> bool:
    name, _, function = reference.partition("::")
    path = ROOT / name
    return path.is_file() and (not function or defined(tree(path).body, function) is not None)


test_exists.__test__ = False  # type: ignore[attr-defined]


def home(key: str) -> tuple[str, list[str]]:
    """Return the group of a dotted key, an inner group (algo/constraint) before its outer one, and the rest."""
    parts = key.split(".")
    inner = "/".join(parts[:2])
    return (inner, parts[2:]) if len(parts) > 2 and inner in SCHEMAS else (parts[0], parts[1:])


def has_key(dataclass: Any, parts: list[str]) -> bool:
    """Return whether a schema has the key that ends a path: a value, no block of them."""
    hint = get_type_hints(dataclass).get(parts[0])
    if len(parts) == 1 or not is_dataclass(hint):
        return len(parts) == 1 and hint is not None and not is_dataclass(hint)
    return has_key(hint, parts[1:])


def key_exists(span: str) -> bool:
    """Whether the key of `key`, `key=value`, `group=choice` or `key = default` exists."""
    key, _, value = (part.strip() for part in span.partition("="))
    group, parts = home(key)
    if not parts:
        return (ROOT / "conf" / group / f"{value}.yaml").is_file()
    return any(has_key(dataclass, parts) for dataclass in SCHEMAS.get(group, []))


def number(value: Any) -> Any:
    """Return what a yaml value means: PyYAML reads 6e-3 as text; of an interpolation, what stands by itself.

    That is the value on the survey world, of a model that says nothing, of training all weights.
    """
    found = re.fullmatch(r"\$\{(?:survey_or_text:([^,]+),.*|oc\.select:[^,]+,(.+)|scaled:(.+))\}", str(value))
    value = next((part for part in found.groups() if part), None) if found else value
    try:
        return value if isinstance(value, bool) or value is None else float(value)
    except ValueError:
        return value


@cache
def yaml_value(group: str, choice: str, parts: tuple[str, ...]) -> tuple[bool, Any]:
    """Return whether the choice's yaml has the key, and its value."""
    path = ROOT / "conf" / group / f"{choice}.yaml"
    value = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in parts:
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, number(value)


def wrong_defaults(text: str) -> list[str]:
    """Return the quoted defaults, `key = value` with or without (choices), that the yaml contradicts."""
    wrong = []
    for found in re.finditer(rf"`({DOTTED}) = ([^`]+)`(?: \(([a-z_0-9, ]+)\))?", text):
        key, quoted, named = found.groups()
        group, parts = home(key)
        every = [path.stem for path in (ROOT / "conf" / group).glob("*.yaml")]
        choices = named.split(", ") if named else [name for name in every if yaml_value(group, name, tuple(parts))[0]]
        values = [yaml_value(group, choice, tuple(parts)) for choice in choices]
        if not values or any(value != (True, number(yaml.safe_load(quoted))) for value in values):
            wrong.append(f"{found.group()}: {dict(zip(choices, values, strict=True))}")
    return wrong


def tables(text: str) -> list[list[list[str]]]:
    """Return every table of a text as rows of cells, the header first."""
    blocks = re.findall(r"(?:^\|.*\n)+", text + "\n", flags=re.MULTILINE)
    rows = [[line.strip("| ").split(" | ") for line in block.splitlines()] for block in blocks]
    return [[header, *body] for header, _, *body in rows]


def sources() -> list[Path]:
    return sorted(chain((ROOT / "rlhf_cli").rglob("*.py"), (ROOT / "conf").rglob("*.yaml")))


def cited_papers(text: str) -> set[str]:
    return set(re.findall(r"\b2\d{3}\.\d{5}\b|\b1\d{3}\.\d{5}\b", text))


# -- what must hold ----------------------------------------------------------------------------------------------------


def test_every_reference_is_of_a_kind_that_is_checked() -> None:
    assert [span for span in spans(PAGE) if kind(span) is None] == []
    assert {kind(span) for span in spans(PAGE)} == set(KINDS)


def test_functions_and_files_exist() -> None:
    assert [name for name in of_kind("function") if not function_exists(name)] == []
    assert [name for name in of_kind("file") if not (ROOT / name).is_file()] == []


def test_tests_exist() -> None:
    assert [reference for reference in of_kind("test") if not test_exists(reference)] == []


def test_config_keys_are_in_the_schema() -> None:
    assert [span for span in of_kind("key", "override", "default") if not key_exists(span)] == []


def test_defaults_are_those_of_the_yaml() -> None:
    assert wrong_defaults(PAGE) == []


def test_metrics_are_in_the_glossary() -> None:
    assert [key for key in of_kind("metric", text=BUILT) if not glossary.known(key)] == []


def test_every_row_has_as_many_cells_as_its_table() -> None:
    assert [row for header, *body in tables(PAGE) for row in body if len(row) != len(header)] == []


def test_every_equation_names_its_test() -> None:
    with_tests = [table for table in tables(BUILT) if table[0][-1] == "test"]
    assert len(with_tests) >= 6
    rows = [row for _, *body in with_tests for row in body]
    assert [row for row in rows if "`tests/" not in row[-1] and row[-1] != "none of its own"] == []


def test_all_mathematics_and_every_setting_of_algorithms_and_rewards_is_on_the_page() -> None:
    public = []
    for path in chain.from_iterable((ROOT / "rlhf_cli").glob(pattern) for pattern in MATHEMATICS):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        public += [f"{module}.{node.name}" for node in tree(path).body if isinstance(node, ast.FunctionDef)]
    public = [name for name in public if not name.rpartition(".")[2].startswith("_")]
    assert sorted(set(public) - NO_EQUATION - set(of_kind("function"))) == [], "add a row to docs/paper_index.md"
    named = {span.partition("=")[0].strip() for span in of_kind("key", "override", "default")}
    keys = {
        f"{group.replace('/', '.')}.{name}"
        for group in NAMED_WHOLE for config in SCHEMAS[group] for name, hint in get_type_hints(config).items()
        if name != "name" and not is_dataclass(hint)
    }  # fmt: skip
    assert {"algo.alpha", "algo.constraint.beta1", "reward.members"} <= keys
    assert sorted(keys - named) == [], "add them to docs/paper_index.md"
    choices = {f"{group}={name}" for group in NAMED_WHOLE for name in CATALOG.choices(group)}
    assert sorted(choices - set(of_kind("override"))) == [], "add them to docs/paper_index.md"


def test_every_paper_that_the_code_cites_is_on_the_page() -> None:
    cited = set().union(*(cited_papers(path.read_text(encoding="utf-8")) for path in sources()))
    assert sorted(cited - cited_papers(BUILT)) == []


def test_what_is_not_built_is_not_there() -> None:
    assert NOT_BUILT
    texts = [path.read_text(encoding="utf-8") for path in sources()]
    built = set().union(*map(cited_papers, texts)) & cited_papers(NOT_BUILT) - cited_papers(BUILT)
    assert built == set(), "the code cites them: move their rows out of 'Not built yet'"
    emitters = [path for path in sources() if path.suffix == ".py" and not path.name.startswith("glossary")]
    constants = {
        node.value for path in emitters for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }  # fmt: skip
    assert "pm/pair_tv" in constants
    assert constants & set(of_kind("metric", text=NOT_BUILT)) == set(), "move them out of 'Not built yet'"


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (function_exists, "rlhf_cli.algos.ppo.gae", "rlhf_cli.algos.ppo.gone"),
        (function_exists, "rlhf_cli.measure.pairs.PairMeasure.metrics", "rlhf_cli.measure.pairs.PairMeasure.gone"),
        (function_exists, "rlhf_cli.algos", "rlhf_cli.gone.ppo"),
        (test_exists, "tests/unit/test_golden.py::test_token_rewards", "tests/unit/test_golden.py::test_gone"),
        (test_exists, "tests/unit/test_golden.py", "tests/unit/test_gone.py"),
        (key_exists, "trainer.online.critic_learning_rate", "trainer.pairwise.critic_learning_rate"),
        (key_exists, "algo.alpha=null", "algo.alfa=null"),
        (key_exists, "reward=gold", "reward=golden"),
        (key_exists, "experiment=pm_opt-1.3b_hh", "experiment=pm_opt-1.3b"),
        (key_exists, "dataset.columns.choice", "dataset.columns.choose"),
        (key_exists, "reward.members", "reward.membres"),
        (key_exists, "algo/constraint=length", "algo/constraint=lenght"),
        (key_exists, "algo.constraint.beta1", "algo.constraint.members"),
        (key_exists, "algo.constraint.delta", "algo.constraint"),
    ],
)
def test_a_wrong_reference_is_seen(check: Any, right: str, wrong: str) -> None:
    assert check(right)
    assert not check(wrong)


@pytest.mark.parametrize(
    "text",
    [
        "`algo.beta = 1.5` (pm)",
        "`algo.beta = 1.0`",  # dpo and rpo have another
        "`algo.alpha = 0.02` (pm, dpo)",  # dpo has none
        "`trainer.sft.learning_rate = 6e-2` (survey)",
        "`algo.missing_eos_penalty = 0`",
        "`algo.betta = 1.0`",
        "`algo.constraint.beta1 = 20.0`",  # cosine has another
        "`algo.constraint.beta1 = 20.0` (fixed)",  # it has none
        "`reward.encoder = bert`",
    ],
)
def test_a_wrong_default_is_seen(text: str) -> None:
    assert wrong_defaults("`algo.beta = 1.0` (pm), `algo.constraint.beta1 = 20.0` (length)") == []
    assert len(wrong_defaults(text)) == 1
