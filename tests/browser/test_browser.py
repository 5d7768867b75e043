from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="make browser-test installs playwright")

from rlhf_cli.report.figures import curves  # noqa: E402
from rlhf_cli.report.html import write_html  # noqa: E402
from rlhf_cli.report.page import Page, Section, Table  # noqa: E402

pytestmark = pytest.mark.browser

POLICIES = ["kl_ppo beta=0.05 !", "pm", "dpo", "rpo", "a_folder_with_a_name_that_is_" + "long_" * 12]
VALUES = ["0.5", "0.05", "10.2", "\u22121.5", "–"]
HOSTILE = "</script><script>document.title = 'taken over'</script><img src=x onerror=alert(1)>"
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page with wide tables, wide figures, two sections and texts that try to break it."""
    folder = tmp_path_factory.mktemp("report")
    headers = ["policy", *(f"column {number}" for number in range(14))]
    rows = [[name, *[f"{value}\n±0.01"] * 14] for name, value in zip(POLICIES, VALUES, strict=True)]
    rows.append(["stopped\nfailed: out of memory", *["–"] * 14])
    table = Table(headers, rows, ["flagged", "", "", "reference", "", "failed"], ["what it says"] * 15)
    log = [{"step": step, "pm/tv": 0.5 - step / 100 + seed / 50} for step in range(0, 30, 5) for seed in (0, 1)]
    curves({"pm": log}, folder / "curves.png", ["pm/tv"])
    texts = {name: completions(name) for name in POLICIES[:3]}
    metrics = Table(["metric", "pm"], [["pm/tv", "0.1"], ["reward/mean", "0.5"]], ["", ""], ["key", ""])
    shown = Section("Survey world", table, ["! a note"], [("Curves", folder / "curves.png")], texts, metrics)
    page = Page("A report", "of runs", [shown, Section("Other", metrics)], [HOSTILE])
    write_html(page, folder / "report.html")
    return folder / "report.html"


def completions(name: str) -> list[dict[str, Any]]:
    texts = ["short", "", HOSTILE, "x" * 500, "\u0645\u0631\u062d\u0628\u0627", "last of all"]
    return [
        {"prompt": f"Prompt {number}?", "completion": text, "reward": 0.5, "tokens": 3, "ended": bool(sample)}
        | {"reference": f"reference {sample}", "reference_reward": -0.25}
        for number, text in enumerate(texts)
        for sample in (0, 1)
    ]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium here: make browser-test installs one")
        # Chromium's sandbox refuses to run as root, as containers do.
        args = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        started = playwright.chromium.launch(executable_path=found, args=args)
        yield started
        started.close()


@pytest.fixture
def visit(browser: Any, report: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that opens the report, offline; in the end nothing may have gone wrong or been asked for."""
    problems: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_report(size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Any:
        viewport = {"width": size[0], "height": size[1]}
        context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert problems == []
    assert {url for url in asked if not url.startswith("data:")} == {report.as_uri()}


def names(page: Any) -> list[str]:
    return page.locator("table").first.locator("tbody th .first").all_text_contents()


def test_hostile_text_does_nothing(visit: Callable[..., Any]) -> None:
    page = visit()
    assert page.title() == "A report"
    assert page.locator(".notes").first.inner_text() == HOSTILE
    page.locator(".browser select").select_option("2")
    assert page.locator(".column").nth(1).locator(".sample p").first.inner_text() == HOSTILE


def test_every_image_is_shown(visit: Callable[..., Any]) -> None:
    images = visit().locator("img")
    assert images.count() == 1
    assert images.first.evaluate("image => image.complete && image.naturalWidth") == 1800


def test_a_click_sorts_by_number_and_a_third_restores(visit: Callable[..., Any]) -> None:
    page = visit()
    before = names(page)
    header = page.locator("thead").first.get_by_role("button", name="column 3", exact=True)
    header.click()
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("column 3")
    # -1.5, 0.05, 0.5, 10.2, then those without a number as they were
    assert names(page) == [POLICIES[3], POLICIES[1], POLICIES[0], POLICIES[2], POLICIES[4], "stopped"]
    header.click()
    assert names(page) == [POLICIES[2], POLICIES[0], POLICIES[1], POLICIES[3], POLICIES[4], "stopped"]
    header.click()
    assert names(page) == before
    page.locator("thead").first.get_by_role("button", name="policy").press("Enter")
    assert names(page) == sorted(before), "the keyboard sorts too, words by letter"


def test_completions_can_be_walked_through(visit: Callable[..., Any]) -> None:
    page = visit()
    prompt, count = page.locator(".prompt"), page.locator(".count")
    before, after = page.get_by_role("button", name="Previous"), page.get_by_role("button", name="Next")
    assert prompt.inner_text() == "Prompt 0?"
    assert page.locator(".browser select").input_value() == "0"
    assert page.locator(".column h4").all_inner_texts() == ["reference", *POLICIES[:3]]
    assert before.is_disabled()
    assert page.locator(".columns").get_by_text("cut at the limit").count() == 3
    after.press("Enter")
    assert (prompt.inner_text(), count.inner_text()) == ("Prompt 1?", "2 of 6 prompts")
    assert page.locator(".sample .none").all_inner_texts() == ["(empty)"] * 6
    before.click()
    assert prompt.inner_text() == "Prompt 0?"
    page.locator(".browser select").select_option("5")
    assert prompt.inner_text() == "Prompt 5?"
    assert after.is_disabled()
    facts = page.locator(".column").nth(1).locator(".sample").first.inner_text()
    assert "reward 0.50" in facts
    assert "Δ +0.75" in facts
    assert "tokens 3" in facts


def test_completions_can_be_filtered_and_columns_hidden(visit: Callable[..., Any]) -> None:
    page = visit()
    search, prompt = page.locator(".browser input[type=search]"), page.locator(".prompt")
    search.fill("LAST of")
    assert prompt.inner_text() == "Prompt 5?"
    assert page.locator(".count").inner_text() == "1 of 1 prompts (of 6)"
    search.fill("nowhere")
    assert page.locator(".column").count() == 0
    assert page.locator(".count").inner_text() == "No prompt or completion holds these words."
    search.fill("")
    assert page.locator(".browser option").count() == 6
    page.get_by_label("pm", exact=True).uncheck()
    page.get_by_role("button", name="Next").click()
    shown = [head for head in page.locator(".column h4").all() if head.is_visible()]
    assert [head.inner_text() for head in shown] == ["reference", POLICIES[0], POLICIES[2]]


def test_metrics_can_be_filtered(visit: Callable[..., Any]) -> None:
    page = visit()
    page.get_by_text("All metrics (2)").click()
    page.locator("input.rows").fill("REWARD")
    rows = [row for row in page.locator("details.metrics tbody tr").all() if row.is_visible()]
    assert [row.inner_text().split()[0] for row in rows] == ["reward/mean"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_the_page_never_scrolls_sideways(visit: Callable[..., Any], size: tuple[int, int], scheme: str) -> None:
    page = visit(size, scheme)
    for number in range(6):
        page.locator(".browser select").select_option(str(number))
        assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 23, 26)")


def test_policies_stand_side_by_side_and_on_a_phone_one_below_the_other(visit: Callable[..., Any]) -> None:
    wide = [column.bounding_box() for column in visit(DESKTOP).locator(".column").all()]
    assert len({box["y"] for box in wide}) == 1
    assert len({box["x"] for box in wide}) == 4
    narrow = [column.bounding_box() for column in visit(PHONE).locator(".column").all()]
    assert len({box["x"] for box in narrow}) == 1
    assert len({box["y"] for box in narrow}) == 4
