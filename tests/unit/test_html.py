from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.report.html import PROMPTS, SAMPLES, embedded, numeric_columns, write_html
from rlhf_cli.report.page import Page, Section, Table

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=\"alert('2')\"> & ' \" \u202eright to left "
HOSTILE += "\N{SLIGHTLY SMILING FACE}" + "w" * 300
OUTSIDE = re.compile(r"https?:|//[a-z]|@import|url\(|javascript:", re.IGNORECASE)


def png(path: Path, width: int = 4, height: int = 3) -> Path:
    """Write a white PNG."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress((b"\0" + b"\xff" * width) * height)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def line(prompt: str, completion: str = "yes", **changes: Any) -> dict[str, Any]:
    head = {"prompt": prompt, "completion": completion, "reward": 0.5, "tokens": 2, "ended": True}
    return {**head, "reference": "no", "reference_reward": -0.25, **changes}


def table(rows: list[list[str]], emphasis: list[Any] | None = None) -> Table:
    headers = ["policy", "TV", "words"][: len(rows[0])]
    return Table(headers, rows, emphasis or [""] * len(rows), ["", "Total variation", ""][: len(rows[0])])


def page(folder: Path, words: str = "plain", completions: dict[str, Any] | None = None) -> Page:
    rows = [[f"pm {words}", "0.1\n±0.02", words], ["dpo !", "0.3", "text"], ["rpo", "–", "–"]]
    shown = table(rows, ["", "flagged", "failed"])
    texts = {f"pm {words}": [line(words, words)]} if completions is None else completions
    figures = [(f"A figure of {words}", png(folder / "figure.png", 1800, 680))]
    section = Section(f"Survey {words}", shown, [f"note {words}", "! dpo may have collapsed"], figures, texts, shown)
    return Page(f"Report {words}", words, [section, Section("Second", table([["sft", "0.5"]]))], [words])


class Reader(HTMLParser):
    """What a browser would see: elements with their attributes, text, and the content of scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.text: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.raw:
            self.raw[tag].append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem in self.raw:
            self.raw[str(self.cdata_elem)][-1] += data
        else:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> Any:
        return json.loads(next(raw for raw in self.raw["script"] if raw.lstrip().startswith('{"')))


def read(shown: Page, folder: Path) -> tuple[str, Reader]:
    write_html(shown, folder / "report.html")
    source = (folder / "report.html").read_text(encoding="utf-8")
    return source, Reader(source)


def test_the_page_is_one_file_without_an_outside_address(tmp_path: Path) -> None:
    source, reader = read(page(tmp_path), tmp_path)
    assert not OUTSIDE.search(re.sub(r"base64,[^\"]*", "", source))
    addresses = [
        (tag, str(value))
        for tag, attributes in reader.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href", "background")
    ]
    assert addresses
    assert all(value.startswith(("data:", "#")) for _, value in addresses), addresses
    assert {tag for tag, _ in reader.elements}.isdisjoint({"iframe", "object", "embed", "base", "video", "audio"})
    assert [item["href"] for item in reader.all("link")] == ["data:,"]


def test_the_browser_is_told_to_load_nothing(tmp_path: Path) -> None:
    _, reader = read(page(tmp_path), tmp_path)
    (policy,) = [item["content"] for item in reader.all("meta") if "http-equiv" in item]
    assert str(policy).startswith("default-src 'none'; img-src data:;")


def test_every_figure_is_inside_with_caption_and_size(tmp_path: Path) -> None:
    source, reader = read(page(tmp_path), tmp_path)
    (image,) = reader.all("img")
    head, _, data = str(image["src"]).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "figure.png").read_bytes()
    assert image["alt"] == "A figure of plain"
    assert "<figcaption>A figure of plain</figcaption>" in source
    assert (image["width"], image["height"]) == ("900", "340"), "200 pixels an inch are shown as 100"


def test_a_figure_that_is_no_png_is_refused(tmp_path: Path) -> None:
    shown = page(tmp_path)
    (tmp_path / "figure.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"figure.png is not a PNG"):
        write_html(shown, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    plain = read(page(tmp_path), tmp_path)[1]
    source, reader = read(page(tmp_path, HOSTILE), tmp_path)
    assert [tag for tag, _ in reader.elements] == [tag for tag, _ in plain.elements]
    assert not [name for _, attributes in reader.elements for name in attributes if name.startswith("on")]
    assert source.count("</script>") == len(reader.all("script"))
    text = " ".join(reader.text)
    for words in (f"Report {HOSTILE}", f"Survey {HOSTILE}", f"pm {HOSTILE}", f"note {HOSTILE}"):
        assert words in text
    assert reader.data["prompts"] == [HOSTILE]
    reference, policy = reader.data["columns"]
    assert policy["name"] == f"pm {HOSTILE}"
    assert policy["samples"][0][0]["text"] == HOSTILE


def test_addresses_in_completions_do_not_become_links(tmp_path: Path) -> None:
    words = 'see <a href="https://example.org">https://example.org</a>'
    _, reader = read(page(tmp_path, completions={"pm": [line(words, words)]}), tmp_path)
    assert all(str(item["href"]).startswith("#") for item in reader.all("a"))
    assert reader.data["columns"][1]["samples"][0][0]["text"] == words


def test_names_that_are_no_text_can_be_written(tmp_path: Path) -> None:
    source, _ = read(page(tmp_path, "bytes \udcff"), tmp_path)
    assert "bytes ?" in source


def test_rows_are_marked_and_the_marks_explained(tmp_path: Path) -> None:
    source, reader = read(page(tmp_path), tmp_path)
    rows = [item.get("class") for item in reader.all("tr")][1:4]
    assert rows == [None, "flagged", "failed"]
    assert "may have collapsed: beyond a bound of the collapse guard" in source
    assert "no numbers: the run has not finished" in source
    assert '<span class="first">0.1</span><small>±0.02</small>' in source
    calm = Page("t", "s", [Section("one", table([["pm", "0.1"]]))])
    assert "collapse guard" not in read(calm, tmp_path)[0]


def test_several_sections_are_listed_and_one_is_not(tmp_path: Path) -> None:
    shown = page(tmp_path)
    assert [item["href"] for item in read(shown, tmp_path)[1].all("a")] == ["#section-1", "#section-2"]
    assert read(Page("t", "s", shown.sections[:1]), tmp_path)[1].all("a") == []


def test_all_metrics_are_behind_a_summary(tmp_path: Path) -> None:
    source, reader = read(page(tmp_path), tmp_path)
    assert "<summary>All metrics (3)</summary>" in source
    assert not [item for item in reader.all("details") if "open" in item]


def test_columns_of_numbers_are_known() -> None:
    rows = [["pm 1", "0.1\n[0, 1]", "B"], ["dpo", "\u22121e-05", "+3.5%"], ["rpo", "inf", "–"], ["sft", "–", "nan"]]
    assert numeric_columns(table(rows)) == [False, True, True]
    assert numeric_columns(table([["pm", "–", "0.1 to 0.2"]])) == [False, False, True]
    stopped = table([["pm", "3", "a"], ["dpo", "failed, seed 3", "–"]], ["", "failed"])
    assert numeric_columns(stopped) == [False, True, False]


def test_the_reference_comes_first_and_samples_keep_their_order() -> None:
    lines = [line("a", "one"), line("b", "two"), line("a", "three", reference="maybe", reference_reward=0.1)]
    data = embedded({"pm": lines, "dpo": [line("b", "four", ended=False)]})
    assert data["prompts"] == ["b", "a"], "both policies answered b"
    assert [column["name"] for column in data["columns"]] == ["reference", "pm", "dpo"]
    reference, pm, dpo = (column["samples"] for column in data["columns"])
    assert [[one["text"] for one in of] for of in reference] == [["no"], ["no", "maybe"]]
    assert [[one["text"] for one in of] for of in pm] == [["two"], ["one", "three"]]
    assert [one["gain"] for one in pm[1]] == pytest.approx([0.75, 0.4])  # 0.5 + 0.25, 0.5 - 0.1
    assert dpo[0][0]["ended"] is False
    assert dpo[1] == []


def test_numbers_that_json_lacks_and_missing_ones_are_left_out(tmp_path: Path) -> None:
    odd = [line("a", "", reward=float("nan")), line("a", "x", reward=float("inf"), reference_reward=None)]
    odd.append({"prompt": "a", "completion": None, "reward": None})
    _, reader = read(page(tmp_path, completions={"pm": odd}), tmp_path)
    reference, policy = reader.data["columns"]
    assert [one["reward"] for one in policy["samples"][0]] == [None, None, None]
    assert [one["text"] for one in policy["samples"][0]] == ["", "x", ""]
    assert policy["samples"][0][2] == {"text": "", "reward": None, "gain": None, "tokens": None, "ended": True}
    assert [one["reward"] for one in reference["samples"][0]] == [-0.25, None], "the third line has no reference"


def test_runs_without_reference_samples_have_no_such_column() -> None:
    bare = {"prompt": "a", "completion": "b", "reward": 1.0}
    (column,) = embedded({"pm": [bare]})["columns"]
    assert column["name"] == "pm"
    reference = embedded({"pm": [bare], "dpo": [line("a")]})["columns"][0]
    assert [one["text"] for one in reference["samples"][0]] == ["no"], "taken from the policy that has it"


def test_what_is_embedded_is_limited_and_the_page_says_so(tmp_path: Path) -> None:
    many = [line(f"prompt {number}") for number in range(PROMPTS + 7) for _ in range(SAMPLES + 1)]
    source, reader = read(page(tmp_path, completions={"pm": many}), tmp_path)
    assert len(reader.data["prompts"]) == PROMPTS
    assert {len(of) for column in reader.data["columns"] for of in column["samples"]} == {SAMPLES}
    assert f"this page holds {PROMPTS} of {PROMPTS + 7} prompts and the first {SAMPLES} completions" in source
    assert "this page holds" not in read(page(tmp_path), tmp_path)[0]


def test_without_completions_there_is_no_browser(tmp_path: Path) -> None:
    source, reader = read(page(tmp_path, completions={"pm": []}), tmp_path)
    assert "<h3>Completions</h3>" not in source
    assert len(reader.all("script")) == 1
