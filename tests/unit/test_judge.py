"""The language model as judge, against a small server that speaks /chat/completions."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.config.schema import JudgeConfig
from rlhf_cli.errors import RunError
from rlhf_cli.measure.judge import Comparison, Judge, Verdict, check_judge, read_reply

KEY = "sk-test-1234567890"
Reply = str | tuple[int, dict[str, Any] | str]


class Endpoint:
    """A judge on this machine: `answer(first, second)` gives its reply, or a status with a body."""

    def __init__(self) -> None:
        self.answer: Callable[[str, str], Reply] = lambda first, second: "TIE"
        self.asked: list[tuple[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                endpoint.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that has hung up
        self.base_url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        (message,) = body["messages"]
        first, second = (
            re.search(f"<response_{name}>\n(.*)\n</response_{name}>", message["content"], re.DOTALL)[1] for name in "ab"
        )
        self.asked.append((first, second))
        self.bodies.append(body)
        self.keys.add(request.headers["Authorization"])
        reply = (404, {}) if request.path != "/v1/chat/completions" else self.answer(first, second)
        status, value = reply if isinstance(reply, tuple) else (200, completion(reply))
        text = value if isinstance(value, str) else json.dumps(value)
        request.send_response(status)
        request.send_header("Content-Type", "text/html" if isinstance(value, str) else "application/json")
        request.send_header("Content-Length", str(len(text.encode())))
        request.end_headers()
        request.wfile.write(text.encode())


def completion(text: str | None) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "judge-2030-01-01", "choices": [choice]}


def refused(status: int, message: str, **more: str) -> Reply:
    return status, {"error": {"message": message, "type": "invalid_request_error", **more}}


def longer(first: str, second: str) -> str:
    """Prefer the longer response, wherever it stands."""
    return "They differ in length.\nTIE" if len(first) == len(second) else "AB"[len(second) > len(first)]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    from openai._base_client import BaseClient

    monkeypatch.setattr(BaseClient, "_calculate_retry_timeout", lambda *_: 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def config(base_url: str, **more: Any) -> JudgeConfig:
    settings: dict[str, Any] = {"name": "openai", "model": "judge", "base_url": base_url, "key_env": "JUDGE_KEY"}
    return JudgeConfig(**(settings | {"prompts": 4, "retries": 1, "timeout_seconds": 5.0, "parallel": 2} | more))


ITEMS = [Comparison("why?", "because of rain", "rain"), Comparison("who?", "me", "nobody"), Comparison("x", "ab", "cd")]


# -- the number -------------------------------------------------------------------------------------------------------


def test_both_orders_are_asked_and_averaged(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = longer
    verdicts = Judge(config(endpoint.base_url), tmp_path).compare(ITEMS)
    assert verdicts == [Verdict(1.0), Verdict(0.0), Verdict(0.5)]
    orders = {(item.ours, item.theirs) for item in ITEMS} | {(item.theirs, item.ours) for item in ITEMS}
    assert len(endpoint.asked) == 6
    assert set(endpoint.asked) == orders
    assert all(body["temperature"] == 0 and body["model"] == "judge" for body in endpoint.bodies)


def test_win_rate_by_hand(endpoint: Endpoint, tmp_path: Path) -> None:
    """Wins 1, 0 and 1/2 over three prompts: mean 1/2; the bootstrap cannot leave [0, 1]."""
    endpoint.answer = longer
    metrics = Judge(config(endpoint.base_url), tmp_path).win_rate(ITEMS)
    assert metrics.pop("win_rate/llm/lo") >= 0
    assert metrics.pop("win_rate/llm/hi") <= 1
    rest = {"win_rate/llm_inconsistent": 0, "win_rate/llm_unreadable": 0}
    assert metrics == {"win_rate/llm": 0.5, "win_rate/llm/n": 3, **rest}


def test_a_judge_that_always_takes_the_first_decides_nothing(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda first, second: "A"
    metrics = Judge(config(endpoint.base_url), tmp_path).win_rate(ITEMS)
    assert [metrics[f"win_rate/llm{end}"] for end in ("", "_inconsistent")] == [0.5, 1.0]
    assert metrics["win_rate/llm/lo"] < 0.2  # three ties are little to go by
    assert metrics["win_rate/llm/hi"] > 0.8


def test_a_win_beside_a_tie_is_three_quarters_and_inconsistent(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda first, second: "A" if first == "me" else "TIE"
    assert Judge(config(endpoint.base_url), tmp_path).compare(ITEMS[1:2]) == [Verdict(0.75, consistent=False)]


def test_equal_and_empty_texts_are_ties_without_asking(endpoint: Endpoint, tmp_path: Path) -> None:
    judge = Judge(config(endpoint.base_url), tmp_path)
    metrics = judge.win_rate([Comparison("p", "same ", "same"), Comparison("p", "", " \n")])
    assert endpoint.asked == []
    assert {"win_rate/llm": 0.5, "win_rate/llm/n": 2}.items() <= metrics.items()
    assert metrics.keys() == {"win_rate/llm", "win_rate/llm/lo", "win_rate/llm/hi", "win_rate/llm/n"}
    judge.compare([Comparison("p", "", "something")])
    assert set(endpoint.asked) == {("(empty)", "something"), ("something", "(empty)")}


def test_an_unreadable_reply_is_a_tie_and_counted(
    endpoint: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ours (longer) first: a win; ours second: no verdict, 1/2. Share (1 + 1/2) / 2, and no sign of a position bias."""
    endpoint.answer = lambda first, second: "A" if len(first) > len(second) else "I cannot say."
    with caplog.at_level(logging.WARNING):
        metrics = Judge(config(endpoint.base_url), tmp_path).win_rate(ITEMS[:1])
    assert (metrics["win_rate/llm"], metrics["win_rate/llm_unreadable"]) == (0.75, 0.5)
    assert metrics["win_rate/llm_inconsistent"] == 0
    assert "1 of 2 replies of the judge end in no A, B or TIE" in caplog.text


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("A", "A"),
        ("Response A is polite.\n\nb\n", "B"),
        ("**Answer: B.**", "B"),
        ("[[A]]", "A"),
        ("More helpful: Response A", "A"),
        ("Both say it.\nTie", "TIE"),
        ("I prefer A over B", None),
        ("A\nThat is my verdict.", None),
        ("AB", None),
        ("", None),
    ],
)
def test_the_last_line_is_read(reply: str, answer: str | None) -> None:
    assert read_reply(reply) == answer


def test_texts_with_braces_are_sent_as_they_are(endpoint: Endpoint, tmp_path: Path) -> None:
    Judge(config(endpoint.base_url), tmp_path).compare([Comparison("{prompt}", "{first}", '{"a": 1}')])
    assert set(endpoint.asked) == {("{first}", '{"a": 1}'), ('{"a": 1}', "{first}")}


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_a_second_run_asks_nothing_and_another_model_everything(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = longer
    first = Judge(config(endpoint.base_url), tmp_path).compare([*ITEMS, ITEMS[0]])
    assert len(endpoint.asked) == 6
    assert Judge(config(endpoint.base_url + "/"), tmp_path).compare([*ITEMS, ITEMS[0]]) == first
    assert len(endpoint.asked) == 6
    Judge(config(endpoint.base_url, model="other"), tmp_path).compare(ITEMS[:1])
    assert len(endpoint.asked) == 8


def test_a_damaged_file_is_asked_again(endpoint: Endpoint, tmp_path: Path) -> None:
    judge = Judge(config(endpoint.base_url), tmp_path)
    judge.compare(ITEMS[:1])
    next((tmp_path / "judge").iterdir()).write_text("{")
    judge.compare(ITEMS[:1])
    assert len(endpoint.asked) == 3


def test_an_endpoint_that_dies_half_way_loses_nothing(endpoint: Endpoint, tmp_path: Path) -> None:
    alive = [*ITEMS[:2]]
    texts = {text for item in alive for text in (item.ours, item.theirs)}
    endpoint.answer = lambda first, second: longer(first, second) if first in texts else refused(503, "loading")
    cfg = config(endpoint.base_url, parallel=1, retries=0)
    with pytest.raises(RunError, match=r"did not answer\. HTTP 503: loading \(attempts: 1\)\. start it"):
        Judge(cfg, tmp_path).compare(ITEMS)
    kept = len(list((tmp_path / "judge").iterdir()))
    assert kept == len([asked for asked in endpoint.asked if asked[0] in texts]) > 0
    endpoint.answer, asked = longer, len(endpoint.asked)
    assert Judge(cfg, tmp_path).compare(ITEMS) == [Verdict(1.0), Verdict(0.0), Verdict(0.5)]
    assert len(endpoint.asked) - asked == 6 - kept


def test_the_reply_and_the_exact_model_can_be_read(endpoint: Endpoint, tmp_path: Path) -> None:
    Judge(config(endpoint.base_url), tmp_path).compare(ITEMS[:1])
    for path in (tmp_path / "judge").iterdir():
        kept = json.loads(path.read_text())
        assert (kept["model"], kept["answered_by"], kept["reply"]) == ("judge", "judge-2030-01-01", "TIE")
        assert "<prompt>\nwhy?\n</prompt>" in kept["question"]


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_failure_is_tried_again(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda first, second: refused(500, "oops") if len(endpoint.asked) == 1 else longer(first, second)
    assert Judge(config(endpoint.base_url, parallel=1), tmp_path).compare(ITEMS[:1]) == [Verdict(1.0)]
    assert len(endpoint.asked) == 3


def test_after_a_failure_the_rest_is_not_asked(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda first, second: refused(400, "no")
    with pytest.raises(RunError, match="refuses a request"):
        Judge(config(endpoint.base_url), tmp_path).compare([Comparison(str(n), "a", "b") for n in range(50)])
    assert len(endpoint.asked) < 50


def test_a_server_that_is_down(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.server.shutdown()
    endpoint.server.server_close()
    message = (
        r"http://127\.0\.0\.1:\d+/v1 did not answer\. .*refused.* \(attempts: 3\)\. start it, .* judge=none; the verd"
    )
    with pytest.raises(RunError, match=message) as caught:
        Judge(config(endpoint.base_url, retries=2), tmp_path).win_rate(ITEMS)
    assert "\n" not in str(caught.value)


def test_a_server_that_hangs(endpoint: Endpoint, tmp_path: Path) -> None:
    over = threading.Event()
    endpoint.answer = lambda first, second: "A" if over.wait(2) else "B"
    with pytest.raises(RunError, match=r"did not answer\. .*timed out.*attempts: 1.*raise judge\.timeout_seconds"):
        Judge(config(endpoint.base_url, timeout_seconds=0.05, retries=0), tmp_path).compare(ITEMS[:1])
    over.set()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"refuses the key\. HTTP 401\. set JUDGE_KEY to a key that may use judge; the verdicts"),
        (403, r"refuses the key\. HTTP 403\. set JUDGE_KEY"),
        (404, r"does not know the model judge, .*HTTP 404: bad \*\*\* \(attempts: 1\)\. check judge\.model, and"),
        (429, r"too many requests\. HTTP 429: bad \*\*\* \(attempts: 2\)\. wait, lower judge\.parallel"),
        (400, r"refuses a request\. HTTP 400: bad \*\*\* \(attempts: 1\)\. check judge\.model"),
    ],
)
def test_refusals_say_what_to_do_and_never_the_key(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, message: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    endpoint.answer = lambda first, second: refused(status, f"bad {KEY}")
    with pytest.raises(RunError, match=message) as caught:
        Judge(config(endpoint.base_url), tmp_path).compare(ITEMS)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "answer", [(200, "<html>hello</html>"), (200, {"error": "no"}), (200, completion("") | {"choices": []})]
)
def test_an_address_that_is_no_chat_endpoint(endpoint: Endpoint, tmp_path: Path, answer: Reply) -> None:
    endpoint.answer = lambda first, second: answer
    with pytest.raises(RunError, match=r"sent no chat completion\..* check judge\.base_url, which often ends in /v1"):
        Judge(config(endpoint.base_url), tmp_path).compare(ITEMS)
    assert list((tmp_path / "judge").iterdir()) == []


def test_an_option_that_the_model_does_not_take_is_left_out(
    endpoint: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def newer(first: str, second: str) -> Reply:
        extra = [name for name in ("max_tokens", "temperature") if name in endpoint.bodies[-1]]
        return refused(400, "no", param=extra[0], code="unsupported_parameter") if extra else longer(first, second)

    endpoint.answer = newer
    assert Judge(config(endpoint.base_url, parallel=1), tmp_path).compare(ITEMS[:1]) == [Verdict(1.0)]
    assert len(endpoint.asked) == 4
    assert "the judge does not take temperature" in caplog.text


def test_a_text_that_a_content_filter_stops_is_an_unreadable_reply(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.answer = lambda first, second: refused(400, "filtered", code="content_filter")
    assert Judge(config(endpoint.base_url), tmp_path).compare(ITEMS[:1]) == [Verdict(0.5, unreadable=2)]


# -- the key and the config -------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment_alone_and_is_written_nowhere(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    with caplog.at_level(logging.DEBUG):
        Judge(config(endpoint.base_url), tmp_path).win_rate(ITEMS)
    assert endpoint.keys == {f"Bearer {KEY}"}
    assert KEY not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6
    assert all(KEY not in path.read_text() for path in files)


def test_a_server_on_this_machine_gets_a_dummy_key(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    Judge(config(endpoint.base_url), tmp_path).compare(ITEMS[:1])
    assert endpoint.keys == {"Bearer no-key"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, r"judge=openai has no model\. judge\.model is null\. set judge\.model"),
        ({}, r"https://example\.com/v1 needs a key\. the environment variable JUDGE_KEY is not set\. set JUDGE_KEY"),
        ({"key_env": "sk-abc"}, r"judge\.key_env does not name an environment variable"),
        ({"base_url": "localhost:8000/v1"}, r"judge\.base_url is not an address\. .*http://localhost:8000/v1"),
        ({"base_url": "https://me:secret@example.com/v1"}, r"judge\.base_url is not an address"),
        ({"base_url": "https://example.com/v1?key=secret"}, r"judge\.base_url is not an address"),
        ({"base_url": ""}, r"judge\.base_url is not an address"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_beforehand(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(RunError, match=message) as caught:
        check_judge(config(**({"base_url": "https://example.com/v1"} | change)))
    assert "secret" not in str(caught.value)
    assert "sk-abc" not in str(caught.value)


def test_a_key_that_no_header_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-ключ")
    with pytest.raises(RunError, match="JUDGE_KEY is not plain ASCII"):
        check_judge(config("http://localhost:8000/v1"))


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000"])
def test_no_key_is_needed_on_this_machine(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    check_judge(config(f"http://{host}/v1"))
    check_judge(config(f"http://{host}/v1", key_env=""))


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RunError, match=r"openai is not installed\. pip install 'rlhf-cli\[judge\]'"):
        Judge(config("http://localhost/v1"), tmp_path)
    check_judge(config("", name="none", model=None))
