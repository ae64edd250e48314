"""clients.py over loopback: what a request does for each thing that a server may do, and what of a
key goes where."""

import json
import logging
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest
from fake_api import KEY, chat, content, error

from blocks.dataset import BlocksSet
from experts import apis, clients, roster
from experts.roster import try_out
from training import presets
from training.console import UserError

ROOT = Path(__file__).resolve().parents[2]
COUNTING = BlocksSet("counting-train", 40)
STATE = COUNTING[0]
VENDORS_KEY = "sk-vendors-fedcba9876543210"
GOOD = "<think> a </think> <answer> 3 </answer>"
vendors = pytest.mark.parametrize("vendor", ["openai", "gemini"])


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for variable in ("OPENAI_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.setenv(variable, VENDORS_KEY)
    monkeypatch.setenv("EXPERT_API_KEY", KEY)


def started(expert, n: int = 4) -> list:
    """The first state's samples, asked for as a run does it."""
    try_out([expert], lambda: STATE, n)
    return expert.sample([STATE], n)[0]


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ------------------------------------------------------------------ refused parameters


def refusing(*names: str, status: int = 400):
    """A server that refuses these parameters, one at a time."""

    def behaviour(body):
        body = body.get("generationConfig", body)
        for name in names:
            if name in body and not (name in ("n", "candidateCount") and body[name] == 1):
                return error(status, f"Unsupported parameter: '{name}'")
        n = body.get("n") or body.get("candidateCount") or 1
        told = body.get("logprobs", False)
        return content([GOOD] * n) if "candidateCount" in body else chat([GOOD] * n, logprobs=told)

    return behaviour


@pytest.mark.parametrize("status", [400, 403, 422, 500])
@pytest.mark.parametrize(
    "names",
    [
        ("n",),
        ("logprobs",),
        ("max_completion_tokens",),
        ("max_completion_tokens", "max_tokens"),
        ("temperature",),
        ("logprobs", "n", "max_completion_tokens", "max_tokens", "temperature"),
    ],
    ids=str,
)
def test_what_a_server_refuses_is_left_out_from_then_on_and_told_once(
    serve, ask, caplog, status, names
):
    server = serve(refusing(*names, status=status))
    expert = ask(server.openai)
    expert.api.client.max_retries = 0  # of status 500; they only take time
    samples = started(expert)
    assert [sample.text for sample in samples] == [GOOD] * 4
    known = not {"logprobs", "temperature"} & set(names)
    assert all((sample.logp is not None) == known for sample in samples)
    last = server.bodies[-1]
    assert not set(names) - {"n"} & set(last) and last["n"] == (1 if "n" in names else 4)
    if names == ("max_completion_tokens",):
        assert last["max_tokens"] == 64
    asked, told = len(server.bodies), warnings_of(caplog)
    assert len(told) == len(names) and all("openai:tiny: the server" in line for line in told)
    expert.sample([COUNTING[1]], 4)
    assert len(server.bodies) == asked + (4 if "n" in names else 1)  # learnt
    assert warnings_of(caplog) == told


@pytest.mark.parametrize("names", [("candidateCount",), ("temperature", "maxOutputTokens")])
def test_gemini_leaves_out_what_is_refused_too(serve, ask, names):
    server = serve(refusing(*names))
    assert len(started(ask(server.gemini))) == 4
    last = server.bodies[-1]["generationConfig"]
    assert not set(names) - {"candidateCount"} & set(last)


def test_a_refusal_that_goes_on_costs_the_state_and_drops_nothing_for_good(serve, ask):
    def always(body):
        return error(400, "no image here, with or without logprobs, temperature and n")

    server = serve("good", always, "good")
    expert = ask(server.openai)
    assert len(started(expert)) == 4
    server.script = [always]
    assert expert.sample([COUNTING[1]], 4) == [[]]
    server.script = ["good"]
    assert [sample.logp is None for sample in expert.sample([COUNTING[2]], 4)[0]] == [False] * 4
    assert set(server.bodies[-1]) >= {"logprobs", "temperature", "n", "max_completion_tokens"}


def test_a_length_limit_that_is_too_high_is_told_and_not_dropped(serve, ask):
    server = serve(
        error(400, "max_tokens is too large: 64. This model supports at most 32 completion tokens")
    )
    with pytest.raises(UserError, match="too large: 64"):
        started(ask(server.openai))
    assert len(server.bodies) == 1


def test_an_error_in_a_reply_of_status_200_is_an_error(serve, ask):
    wrapped = {"error": {"message": "logprobs are not supported", "code": 400}}
    server = serve(lambda body: wrapped if body.get("logprobs") else "good")
    assert [sample.logp for sample in started(ask(server.openai))] == [None] * 4


# ------------------------------------------------------------------ refused prompts


FILTERED = (
    400,
    {},
    {"error": {"message": "triggered the content management policy", "code": "content_filter"}},
)
BLOCKED = {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}}


@pytest.mark.parametrize(
    "vendor, behaviour", [("openai", FILTERED), ("gemini", BLOCKED), ("gemini", FILTERED)]
)
@pytest.mark.parametrize("densities", [False, True])
def test_a_refused_prompt_is_n_blocked_answers_and_never_asked_again(
    serve, ask, caplog, vendor, behaviour, densities
):
    server = serve(behaviour)
    expert = ask(getattr(server, vendor), densities=densities and vendor == "openai")
    assert started(expert) == [] and len(server.bodies) == 1  # the first prompt of a run
    for i in range(1, 8):
        assert expert.sample([COUNTING[i]], 4) == [[]]
    assert len(server.bodies) == 8 and not expert.off and expert.in_a_row == 0
    counts = expert.metrics()
    assert "failures" not in counts and "states_without" not in counts and counts["blocked"] == 36
    assert {entry["text"] for entry in expert.cache.entries()} == {None}
    again = ask(getattr(server, vendor))
    assert again.sample([STATE], 4) == [[]] and len(server.bodies) == 8
    assert not [line for line in warnings_of(caplog) if "only the density of its own" not in line]


# ------------------------------------------------------------------ odd replies of status 200


def odd(**fields):
    """n answers whose body has these fields, or their choices where the name is one of a choice."""

    def behaviour(body):
        made = chat([GOOD] * body["n"], logprobs=body.get("logprobs", False))
        for name, value in fields.items():
            for place in (
                made["choices"] if name in ("message", "logprobs", "finish_reason") else [made]
            ):
                place[name] = value
        return made

    return behaviour


@pytest.mark.parametrize(
    "fields",
    [
        {"usage": "plenty"},
        {"usage": None},
        {"usage": {"prompt_tokens": -5, "completion_tokens": 10**30}},
        {"model": None},
        {"model": {"a": 1}},
        {"model": "\ud83d"},
        {"finish_reason": None},
        {"finish_reason": {"x": 1}},
        {"logprobs": "none"},
        {"logprobs": {"content": [{"token": GOOD, "logprob": None}]}},
        {"message": {"content": [{"type": "text", "text": GOOD}]}},
        {"message": {"content": GOOD, "refusal": 3, "reasoning_content": ["x"]}},
        {"id": None, "object": 3, "created": "x"},
    ],
)
def test_odd_replies_are_used_as_far_as_they_can_be(serve, ask, fields):
    expert = ask(serve(odd(**fields)).openai, price="1,1")
    assert [sample.text for sample in started(expert)] == [GOOD] * 4
    assert expert.cache.faults() == [] and len(expert.cache.entries()) == 4
    counts = expert.metrics()
    assert counts.get("unpriced", 0) == ("usage" in fields) and "failures" not in counts


@pytest.mark.parametrize(
    "fields",
    [
        {"usageMetadata": "plenty"},
        {"usageMetadata": {"promptTokenCount": -5, "totalTokenCount": 10**30}},
        {"modelVersion": {"a": 1}},
        {"unheardOf": [1]},
        {
            "candidates": [
                {"content": {"parts": [{"text": GOOD}]}, "finishReason": "NEVER_HEARD_OF"}
            ]
            * 4
        },
        {
            "candidates": [
                {
                    "content": {"parts": [{"text": "hm", "thought": True}, {"text": GOOD}]},
                    "finishReason": "STOP",
                }
            ]
            * 4
        },
    ],
)
def test_geminis_replies_that_its_sdk_cannot_hold_are_used_all_the_same(serve, ask, fields):
    expert = ask(serve({**content([GOOD] * 4), **fields}).gemini)
    assert [sample.text for sample in started(expert)] == [GOOD] * 4


@vendors
def test_half_a_surrogate_pair_becomes_the_replacement_character(serve, ask, vendor):
    text = "<think> \ud83d </think> <answer> 3 </answer>"
    body = chat([text], logprobs=False) if vendor == "openai" else content([text])
    (sample,) = started(ask(getattr(serve((200, {}, json.dumps(body))), vendor)), 1)
    assert sample.text == text.replace("\ud83d", "\ufffd")


@vendors
@pytest.mark.parametrize(
    "body",
    [
        "",
        "null",
        "3",
        "[]",
        '"text"',
        "{}",
        '{"choices": null, "candidates": null}',
        '{"choices": [], "candidates": []}',
        '{"choices": [null, 3], "candidates": [null, 3]}',
        '{"choices": [{}]}',
        '{"choices": [{"message": "x"}]}',
        '{"error": "busy"}',
        "[" * 3000,
        '{"choices": {"a": 1}, "candidates": {"a": 1}}',
    ],
)
def test_replies_without_an_answer_cost_the_state_and_nothing_more(serve, ask, vendor, body):
    server = serve("good", (200, {}, body))
    expert = ask(getattr(server, vendor))
    assert len(started(expert)) == 4
    assert expert.sample([COUNTING[1]], 4) == [[]]
    assert expert.metrics()["failures"] == 1
    server.script = ["good"]
    assert len(expert.sample([COUNTING[1]], 4)[0]) == 4


def raising(error: Exception):
    def call(*arguments):
        raise error

    return call


def test_whatever_goes_wrong_in_a_request_costs_its_state_only(serve, ask, monkeypatch, caplog):
    expert = ask(serve().openai, expert_failures=99)
    assert len(started(expert)) == 4
    for wrong in (RecursionError("deep"), MemoryError(), OverflowError("large"), KeyError(3)):
        for owner, name in ((expert.api, "call"), (expert.cache, "put")):
            with monkeypatch.context() as broken:
                broken.setattr(owner, name, raising(wrong))
                assert expert.sample([COUNTING[1]], 4) == [[]]
    assert len(expert.sample([COUNTING[1]], 4)[0]) == 4
    assert "OverflowError: large" in caplog.text


def test_a_density_that_is_missing_leaves_that_answer_out_only(serve, ask, caplog):
    def one_null(body):
        made = chat([GOOD] * body["n"])
        made["choices"][0]["logprobs"]["content"][2]["logprob"] = None
        return made

    expert = ask(serve(one_null).openai, densities=True)
    assert len(started(expert)) == 3 and "density is unknown are left out" in caplog.text
    assert [answer.logp is None for answer in expert.cache.get(only(expert), 4)] == [
        True,
        False,
        False,
        False,
    ]


def only(expert) -> str:
    (request,) = {entry["request"] for entry in expert.cache.entries()}
    return request


# ------------------------------------------------------------------ the length limit


def thinking(vendor: str, text: str | None = None):
    """Replies that the limit cut before the first letter."""
    if vendor == "openai":
        return lambda body: chat([text] * body["n"], finish="length", logprobs=False)
    return lambda body: content(
        [text] * body["generationConfig"]["candidateCount"], finish="MAX_TOKENS"
    )


@vendors
def test_a_model_that_thinks_its_whole_limit_away_is_told_at_the_start(serve, ask, caplog, vendor):
    expert = ask(getattr(serve(thinking(vendor)), vendor))
    assert started(expert) == []
    (line,) = [line for line in warnings_of(caplog) if "--expert-tokens" in line]
    assert f"{vendor}:tiny" in line and "64 tokens" in line


@vendors
def test_a_model_that_begins_to_is_told_after_some_states_in_a_row(serve, ask, caplog, vendor):
    server = serve("good")
    expert = ask(getattr(server, vendor), expert_failures=3)
    assert len(started(expert)) == 4
    server.script = [thinking(vendor, "" if vendor == "openai" else None)]
    for i in range(1, 8):
        assert "--expert-tokens" not in caplog.text or i > 3
        assert expert.sample([COUNTING[i]], 4) == [[]]
    assert caplog.text.count("--expert-tokens") == 1


# ------------------------------------------------------------------ keys


@pytest.mark.parametrize(
    "url, variable",
    [
        ("https://api.openai.com/v1", "OPENAI_API_KEY"),
        ("https://eu.api.openai.com/v1", "OPENAI_API_KEY"),
        ("https://API.OpenAI.com/v1", "OPENAI_API_KEY"),
        ("https://generativelanguage.googleapis.com", "GEMINI_API_KEY"),
        ("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
        ("http://api.openai.com/v1", "EXPERT_API_KEY"),
        ("https://api.openai.com.evil.example/v1", "EXPERT_API_KEY"),
        ("https://notapi.openai.com/v1", "EXPERT_API_KEY"),
        ("https://me.openai.azure.com/openai/v1", "EXPERT_API_KEY"),
        ("https://api.deepseek.com", "EXPERT_API_KEY"),
        ("http://127.0.0.1:8000/v1", "EXPERT_API_KEY"),
    ],
)
def test_a_key_goes_to_its_vendor_only(monkeypatch, url, variable):
    for other in ("OPENAI_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY", "EXPERT_API_KEY"):
        monkeypatch.setenv(other, f"key-of-{other}")
    assert apis.key_of("openai", url) == f"key-of-{variable}"
    monkeypatch.delenv(variable)
    if variable == "EXPERT_API_KEY":
        assert apis.key_of("openai", url) == apis.NO_KEY  # a server may do without
    elif variable == "OPENAI_API_KEY":
        with pytest.raises(ValueError, match=variable):
            apis.key_of("openai", url)


@vendors
def test_another_server_sees_no_key_of_a_vendors(serve, ask, monkeypatch, vendor):
    for variable in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(variable, f"{variable.lower()}-{VENDORS_KEY}")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {VENDORS_KEY}")
    server = serve()
    assert len(started(ask(getattr(server, vendor)))) == 4
    assert KEY in str(server.headers) and VENDORS_KEY not in str(server.headers)


@pytest.mark.parametrize(
    "key", ["sk-ab\ncd", "sk-ab cd", "sk-äbcd", "sk-ab\u200bcd", "sk-ab\x00cd", "sk\tab"]
)
@pytest.mark.parametrize(
    "variable, spec",
    [
        ("OPENAI_API_KEY", "openai:gpt-x"),
        ("GEMINI_API_KEY", "gemini:gemini-x"),
        ("EXPERT_API_KEY", "openai:m@http://127.0.0.1:9/v1"),
    ],
)
def test_a_key_with_odd_characters_is_refused_without_being_shown(monkeypatch, key, variable, spec):
    monkeypatch.setattr(os, "environ", {**os.environ, variable: key})
    with pytest.raises(ValueError, match=variable) as told:
        roster.expert_specs(spec)
    assert "sk" not in str(told.value) and "cd" not in str(told.value)


@vendors
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_takes_a_key_or_a_prompt_to_another_server(serve, ask, vendor, status):
    other = serve()
    place = f"http://localhost:{other.port}/v1/chat/completions"
    server = serve((status, {"Location": place}, {}))
    with pytest.raises(UserError, match=f"redirects to http://localhost:{other.port}") as told:
        started(ask(getattr(server, vendor)))
    assert other.bodies == [] and len(server.bodies) == 1 and KEY not in str(told.value)


@vendors
def test_a_redirect_on_the_same_server_is_followed(serve, ask, vendor):
    server = serve((307, {"Location": "/elsewhere"}, {}), "good")
    assert len(started(ask(getattr(server, vendor)))) == 4 and len(server.bodies) == 2


@vendors
@pytest.mark.parametrize("where", ["message", "code", "web page", "header"])
def test_no_echo_of_a_key_is_told(serve, ask, caplog, vendor, where):
    partial = f"{KEY[:9]}...{KEY[-4:]}"
    reply = {
        "message": error(401, f"wrong: {KEY} {partial} {KEY[:8]}******{KEY[-4:]}"),
        "code": (401, {}, {"error": {"code": KEY, "message": partial}}),
        "web page": (401, {}, f"<html><title>{KEY}</title></html>"),
        "header": (401, {"WWW-Authenticate": KEY}, {}),
    }[where]
    with pytest.raises(UserError) as told:
        started(ask(getattr(serve(reply), vendor)))
    for piece in (KEY, KEY[:12], KEY[-4:]):
        assert piece not in str(told.value) + caplog.text
    assert told.value.__cause__ is None


def test_who_sent_no_key_is_told_which_variable_takes_it(serve, ask, monkeypatch):
    monkeypatch.delenv("EXPERT_API_KEY")
    with pytest.raises(UserError, match="no key was sent: export EXPERT_API_KEY"):
        started(ask(serve(error(401, "who are you?")).openai))


# ------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    "spec",
    [
        "openai:m@ftp://h",
        "openai:m@http://h:abc",
        "openai:m@http://h:99999",
        "openai:m@http://",
        "openai:m@http:/h",
        "openai:m@http:h",
        "openai:m@//h/v1",
        "openai:m@h:8000/v1",
        "openai:m@127.0.0.1",
        "openai:m@127.0.0.1:80",
        "openai:m@localhost",
        "openai:m@api.example.com",
        "openai:m@",
        "openai:m@file:///etc/passwd",
        "openai:m@http://[::1",
        "openai:m@http://h:0/v1",
        "openai:m@http://a b/v1",
        "openai:m@HTTP://h:x",
        "gemini:m@ws://h",
        "openai:m@http://h:80:80",
        "openai:m@:8000",
    ],
)
def test_an_address_that_is_none_is_refused_and_not_part_of_a_name(spec):
    with pytest.raises(ValueError, match="is no address of a server: write (openai|gemini):MODEL"):
        apis.split_name(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "openai:m@http://u:secret@h/v1",
        "openai:m@http://u:secret@h:abc",
        "openai:m@ftp://u:secret@h",
        "openai:m@http://h/v1?key=secret",
        "openai:m@http://h#secret",
        "openai:m@u:secret@h:80",
    ],
)
def test_a_secret_in_an_address_is_refused_without_being_shown(spec):
    with pytest.raises(ValueError) as told:
        apis.split_name(spec)
    assert "secret" not in str(told.value)


@pytest.mark.parametrize(
    "spec, model, url",
    [
        ("openai:gpt-4o", "gpt-4o", "https://api.openai.com/v1"),
        ("openai:org/m:free@https://h.example/api/v1/", "org/m:free", "https://h.example/api/v1"),
        ("openai:@cf/org/m@http://h/v1", "@cf/org/m", "http://h/v1"),
        ("openai:m@001", "m@001", "https://api.openai.com/v1"),
        ("openai:m:7b@http://[::1]:80", "m:7b", "http://[::1]:80"),
        ("gemini:m@20240620@https://h", "m@20240620", "https://h"),
        ("openai:org/m@main", "org/m@main", "https://api.openai.com/v1"),
    ],
)
def test_names_with_an_at_sign_stay_names(spec, model, url):
    assert apis.split_name(spec)[1:] == (model, url)


# ------------------------------------------------------------------ servers that do not answer


@pytest.mark.parametrize(
    "name, says",
    [
        ("openai:m@http://127.0.0.1:1/v1", "connection refused"),
        ("gemini:m@http://127.0.0.1:1", "connection refused"),
        ("openai:m@http://no-such.invalid/v1", "unknown host no-such.invalid"),
        ("gemini:m@http://no-such.invalid", "unknown host no-such.invalid"),
    ],
)
def test_a_server_that_was_never_there_ends_the_run_with_its_innermost_cause(ask, name, says):
    with pytest.raises(UserError) as told:
        started(ask(name))
    assert str(told.value) == f"{name} does not answer: {says}"


@vendors
def test_tls_where_there_is_none_is_told(serve, ask, vendor):
    name = getattr(serve(), vendor).replace("http:", "https:")
    with pytest.raises(UserError, match=r"TLS: WRONG_VERSION_NUMBER \(it may speak http only\)$"):
        started(ask(name))


@vendors
def test_a_server_that_hangs_from_the_start_ends_the_run(serve, ask, vendor):
    with pytest.raises(UserError, match="does not answer: no answer within 1 s"):
        started(ask(getattr(serve("hang"), vendor), expert_deadline=1.0))


@vendors
def test_a_slow_first_answer_does_not_end_the_run(serve, ask, vendor):
    server = serve("hang", "good")
    assert len(started(ask(getattr(server, vendor), expert_deadline=1.0))) == 4


@vendors
@pytest.mark.parametrize(
    "proxy, says",
    [
        ("socks://127.0.0.1:1080", "cannot be used"),
        ("socks5://me:hunter22@127.0.0.1:1080", "SOCKS proxy needs the package"),
        ("http://me:hunter22@127.0.0.1:1", "connection refused by way of the proxy"),
    ],
)
def test_a_proxy_that_does_not_work_is_told_in_one_line(ask, monkeypatch, vendor, proxy, says):
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, proxy)
    with pytest.raises(UserError, match=says) as told:
        started(ask(f"{vendor}:m@http://h.invalid/v1"))
    assert "hunter22" not in str(told.value) and "\n" not in str(told.value)


def test_the_program_says_it_in_one_line_with_exit_code_2(tmp_path):
    command = [
        "ekipl.py",
        "--experts",
        "openai:m@http://127.0.0.1:1/v1",
        "--runs",
        tmp_path,
        "--cache",
        tmp_path / "c",
    ]
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and lines[-1] == (
        "ekipl.py: error: openai:m@http://127.0.0.1:1/v1 does not answer: connection refused"
    )
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------ time


@vendors
def test_a_body_that_drips_in_for_ever_ends_with_the_attempt(serve, ask, caplog, vendor):
    server = serve("good", "drip")
    expert = ask(getattr(server, vendor), expert_deadline=1.5)
    assert len(started(expert)) == 4
    job = expert.job(COUNTING[1], 4)
    begun = time.monotonic()
    with pytest.raises(clients.ApiError, match="not complete within 1.5 s") as told:
        job.result(timeout=20)
    assert 1.2 < time.monotonic() - begun < 4 and told.value.billed


@vendors
def test_the_retry_info_of_a_body_is_waited_for(serve, ask, vendor):
    times = []

    def limited(body):
        times.append(time.monotonic())
        info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "2.5s"}
        refusal = {"error": {"code": 429, "message": "quota", "details": [info]}}
        return (429, {}, refusal) if len(times) == 1 else "good"

    assert len(started(ask(getattr(serve(limited), vendor)))) == 4
    assert 2.5 <= times[1] - times[0] < 8


@vendors
def test_who_asks_for_a_longer_pause_than_two_minutes_is_not_waited_for(serve, ask, vendor):
    server = serve("good", error(429, "tomorrow", **{"Retry-After": "86400"}))
    expert = ask(getattr(server, vendor))
    assert len(started(expert)) == 4
    begun = time.monotonic()
    assert expert.sample([COUNTING[1]], 4) == [[]] and time.monotonic() - begun < 2
    assert len(server.bodies) == 2


@vendors
def test_errors_whose_body_is_a_list_or_a_text_are_read_and_retried(serve, ask, vendor):
    server = serve(
        (503, {}, [{"error": {"message": "busy"}}]), (429, {}, {"error": "busy"}), "good"
    )
    assert len(started(ask(getattr(server, vendor)))) == 4 and len(server.bodies) == 3


# ------------------------------------------------------------------ models


@pytest.mark.parametrize(
    "asked, answered, same",
    [
        ("gpt-4o", "gpt-4o", True),
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("openai/gpt-4o", "gpt-4o", True),
        ("gpt-4o", "openai/gpt-4o-2024-08-06", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o-2024-08-06", "gpt-4o-2024-11-20", False),
        ("gpt-4o-2024-08-06", "gpt-4o", True),
        ("gpt-4", "gpt-4.1", False),
        ("gpt-4", "gpt-4-0613", True),
        ("gemini-2.5-pro", "gemini-3.8-flash", False),
        ("gemini-2.5-pro", "models/gemini-2.5-pro-preview-06-05", True),
        ("gemini-2.5-flash", "gemini-2.5-flash-lite", False),
        ("gemini-2.5-flash", "gemini-2.5-flash-001", True),
        ("models/m", "M", True),
        ("org/m:free", "org/m", True),
        ("Qwen/Qwen2-VL-7B-Instruct", "/models/Qwen2-VL-7B-Instruct/", True),
        ("deployment", "gpt-4o", False),
        ("gpt-4o-latest", "gpt-4o-2024-11-20", False),
    ],
)
def test_a_version_of_a_model_is_the_model(asked, answered, same):
    assert apis.same_model(asked, answered) == same


@vendors
def test_another_model_than_asked_is_told_once_and_again_by_every_later_run(
    serve, ask, caplog, vendor
):
    def other(body):
        if vendor == "openai":
            return chat([GOOD] * body["n"], model="gpt-x-2030-01-01")
        return {**content([GOOD] * 4), "modelVersion": "gpt-x-2030-01-01"}

    server = serve(other)
    expert = ask(getattr(server, vendor))
    assert len(started(expert)) == 4
    expert.sample([COUNTING[1], COUNTING[2]], 4)
    (line,) = warnings_of(caplog)
    assert f"{vendor}:tiny: gpt-x-2030-01-01 answers, which is not the model asked for" in line
    assert {entry["model"] for entry in expert.cache.entries()} == {"gpt-x-2030-01-01"}
    caplog.clear()
    assert ask(getattr(server, vendor), offline=True).sample([STATE], 4)[0]
    assert warnings_of(caplog) == [line]


def test_a_model_that_changes_within_a_cache_is_told(serve, ask, caplog):
    server = serve(lambda body: chat([GOOD] * body["n"], model="tiny-2026-01-01"))
    expert = ask(server.openai)
    assert len(started(expert)) == 4 and warnings_of(caplog) == []
    server.script = [lambda body: chat([GOOD] * body["n"], model="tiny-2026-09-09")]
    expert.sample([COUNTING[1]], 4)
    expert.sample([COUNTING[2]], 4)
    (line,) = warnings_of(caplog)
    assert (
        "openai:tiny: its answers are of several models: tiny-2026-01-01, tiny-2026-09-09" in line
    )
    server.script = [FILTERED]  # no model answers
    expert.sample([COUNTING[3]], 4)
    assert len(warnings_of(caplog)) == 1


def test_a_retired_model_is_told_with_its_replacement():
    openai, gemini = apis.ENDPOINTS["openai"], apis.ENDPOINTS["gemini"]
    today = date(2026, 11, 25)
    assert apis.retirement("gemini-1.5-pro-002", gemini, today) == (
        True,
        "gemini-1.5-pro-002 is not served since 2025-09-29; its vendor names gemini-3.8-flash "
        "in its place",
    )
    gone, line = apis.retirement("gpt-4o", openai, today)
    assert not gone and "served until 2027-01-14" in line
    assert apis.retirement("gpt-4o", openai, date(2027, 1, 14))[0]
    assert apis.retirement("models/gemini-2.5-pro", gemini, date(2026, 12, 1))[0]
    assert apis.retirement("gpt-4o-2024-05-13", openai, today)[0]
    assert apis.retirement("gemini-3.8-flash", gemini, today) is None
    assert apis.retirement("gpt-4o", "http://127.0.0.1:8000/v1", today) is None  # somebody else's


def test_a_retired_model_ends_the_run_unless_its_answers_are_in_the_cache(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="gemini:gemini-1.5-pro is not served .* gemini-3.8-flash"):
        roster.expert_specs("gemini:gemini-1.5-pro")
    assert roster.expert_specs("gemini:gemini-1.5-pro", offline=True)


def test_the_models_of_the_papers_presets_have_a_price_and_an_end_that_is_known(monkeypatch):

    for spec in presets.PRESETS["counting-2b"]["experts"].split(","):
        _, model, url = apis.split_name(spec)
        assert apis.price_of(model) is not None
        gone = apis.retirement(model, url, date(2026, 12, 31))
        assert gone is None or not gone[0]
