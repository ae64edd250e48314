"""Experts behind APIs, with the vendors' SDKs over loopback: what the trainer gets, what the log
says, what the cache holds, for each fault."""

import base64
import dataclasses
import io
import json
import math
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import in_two_processes
from fake_api import KEY, chat, content, error
from PIL import Image

import ekipl
import policy
from blocks.dataset import BlocksSet
from data import sets
from experts import api_expert, apis, collect, roster
from experts.api_expert import ApiExpert
from experts.cache import Cache, request_id
from experts.roster import make_experts
from sampling import Action, Sample, expert_action
from training import distributed, storage
from training.console import UserError

ROOT = Path(__file__).resolve().parents[2]
COUNTING = BlocksSet("counting-train", 100)
VENDORS_KEY = "sk-vendors-fedcba9876543210"
STATE, TWO_PICTURES = COUNTING[0], BlocksSet("transformation-train", 1)[0]


@pytest.fixture(autouse=True)
def planted_key(monkeypatch):
    for variable in ("OPENAI_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(variable, VENDORS_KEY)
    monkeypatch.setenv("EXPERT_API_KEY", KEY)  # the one that servers on loopback get
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)


vendors = pytest.mark.parametrize("vendor", ["openai", "gemini"])


def texts(samples: list[Sample]) -> list[str]:
    return [sample.text for sample in samples]


def good(count: int, start: int = 0) -> list[str]:
    return [f"<think> {i} </think> <answer> 3 </answer>" for i in range(start, start + count)]


# ------------------------------------------------------------------ success


@vendors
def test_n_answers_come_from_one_request_and_are_kept(serve, ask, vendor):
    server = serve()
    expert = ask(getattr(server, vendor), price="10,100")
    assert texts(expert.sample([STATE], 8)[0]) == good(8)
    assert len(server.bodies) == 1
    entries = expert.cache.entries()
    assert [entry["text"] for entry in entries] == good(8) and [
        entry["index"] for entry in entries
    ] == list(range(8))
    assert {entry["finish"] for entry in entries} == {"stop"}
    assert {entry["model"] for entry in entries} == {
        "tiny-2026-01-01" if vendor == "openai" else "tiny-001"
    }  # who answered
    (call,) = expert.cache.calls()
    assert (call["input_tokens"], call["output_tokens"]) == (
        100,
        20 if vendor == "openai" else 50,
    )  # thoughts are paid too
    counts = expert.metrics()
    assert counts["requests"] == 1 and counts["cost"] == pytest.approx(
        (10 * 100 + 100 * call["output_tokens"]) / 1e6
    )
    assert expert.cache.faults() == []


@vendors
def test_the_prompt_is_the_policys_images_first_and_nothing_more(serve, ask, vendor):
    server = serve()
    ask(getattr(server, vendor)).sample([TWO_PICTURES], 2)
    (body,) = server.bodies
    if vendor == "openai":
        (message,) = body["messages"]
        pictures = [
            part["image_url"]["url"].removeprefix("data:image/png;base64,")
            for part in message["content"][:-1]
        ]
        text, n, temperature = message["content"][-1]["text"], body["n"], body["temperature"]
    else:
        (message,) = body["contents"]
        pictures = [part["inlineData"]["data"] for part in message["parts"][:-1]]
        text, n, temperature = (
            message["parts"][-1]["text"],
            body["generationConfig"]["candidateCount"],
            body["generationConfig"]["temperature"],
        )
    assert message["role"] == "user" and (n, temperature) == (2, 1.0)
    assert (
        text
        == f"{TWO_PICTURES.question} {TWO_PICTURES.request}"
        == TWO_PICTURES.messages()[0]["content"][-1]["text"]
    )
    sent = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures]
    assert [image.tobytes() for image in sent] == [image.tobytes() for image in TWO_PICTURES.images]


@vendors
def test_a_second_expert_finds_all_in_the_cache_and_asks_only_for_more(serve, ask, vendor):
    server = serve()
    first = ask(getattr(server, vendor)).sample([STATE], 4, seed=1)
    expert = ask(getattr(server, vendor))
    assert (
        expert.sample([STATE], 4, seed=2) == first and len(server.bodies) == 1
    )  # whatever the seed
    assert expert.metrics()["cache_hits"] == 4
    assert expert.sample([STATE], 2) == [first[0][:2]] and len(server.bodies) == 1
    assert expert.sample([STATE], 6)[0][:4] == first[0] and len(server.bodies) == 2
    asked = server.bodies[1]
    assert (asked["n"] if vendor == "openai" else asked["generationConfig"]["candidateCount"]) == 2


def test_what_an_answer_depends_on_is_its_key(serve, ask):
    server, other = serve(), serve()
    base = ask(server.openai).content(STATE)
    (picture,) = STATE.images
    repainted = picture.copy()
    repainted.putpixel((63, 63), (1, 2, 3))
    contents = [
        ask(server.openai).content(replace(STATE, images=(repainted,))),
        ask(server.openai).content(replace(STATE, question="why ?")),
        ask(server.openai).content(COUNTING[1]),
        ask(other.openai).content(STATE),
        ask(server.gemini).content(STATE),
        ask(server.openai, expert_tokens=65).content(STATE),
    ]
    assert (
        all(content != base for content in contents)
        and ask(server.openai, expert_deadline=1.0).content(STATE) == base
    )
    assert ask(server.openai).content(
        replace(STATE, images=(picture.copy(),), id="x", answer="9")
    ) == base and KEY not in json.dumps(base)


@vendors
def test_fewer_candidates_than_asked_are_made_up_for(serve, ask, vendor):
    one = chat(good(1)) if vendor == "openai" else content(good(1))
    server = serve(one)
    expert = ask(getattr(server, vendor))
    assert len(expert.sample([STATE], 3)[0]) == 3 and len(server.bodies) == 3
    assert len(expert.cache.calls()) == 3 and len(expert.cache.entries()) == 3


@pytest.mark.parametrize(
    "vendor, message, refusals",
    [
        ("gemini", "Multiple candidates is not enabled for this model", 2),
        ("gemini", "Only one candidate can be specified", 1),
        ("openai", "Invalid value for 'n': only 1 is supported", 1),
        ("openai", "n is too large", 2),
    ],
)
def test_models_that_take_fewer_candidates_are_asked_again_for_the_rest(
    serve, ask, vendor, message, refusals
):
    def only_one(body):
        n = body["n"] if vendor == "openai" else body["generationConfig"]["candidateCount"]
        return "good" if n == 1 else error(400, message)

    server = serve(only_one)
    expert = ask(getattr(server, vendor))
    assert len(expert.sample([STATE], 4)[0]) == 4
    refused = len(server.bodies) - 4
    assert refused == refusals  # 4, and where no bound is named 2
    assert (
        len(expert.sample([COUNTING[1]], 4)[0]) == 4 and len(server.bodies) == 4 + refused + 4
    )  # it has learnt


def test_log_probs_are_the_density_of_that_sample_where_the_model_gives_them(serve, ask):
    server = serve(
        lambda body: (
            error(400, "logprobs are not supported with this model")
            if body.get("logprobs")
            else "good"
        )
    )
    told, untold = ask(serve().openai), ask(server.openai)
    assert [sample.logp for sample in told.sample([STATE], 2)[0]] == [-0.5 * 6] * 2  # six words
    assert [sample.logp for sample in untold.sample([STATE], 2)[0]] == [None, None] and len(
        server.bodies
    ) == 2
    assert [sample.logp for sample in untold.sample([COUNTING[1]], 2)[0]] == [
        None,
        None,
    ] and len(server.bodies) == 3
    own, others = Action([1], "a", told.name, expert_logp=-2.0), Action([1], "a", "policy")
    assert told.logp(STATE, own) == -2.0 and told.logp(STATE, others) == -math.inf


# ------------------------------------------------------------------ faults


@vendors
def test_429_is_tried_again_after_as_long_as_the_server_says(serve, ask, vendor):
    server = serve(error(429, "slow down", **{"Retry-After": "2"}), "good")
    expert, started = ask(getattr(server, vendor)), time.monotonic()
    assert texts(expert.sample([STATE], 2)[0]) == good(2)
    assert 2.0 <= time.monotonic() - started < 20 and len(server.bodies) == 2
    assert "failures" not in expert.metrics()


CUT = "cut"
FAULTS = {
    # what the server does, what the log says, how many requests
    "500s": (error(500, "overloaded"), "overloaded", 3),
    "malformed JSON": ((200, {}, '{"choi'), "JSON", 1),
    "a web page": ((200, {"Content-Type": "text/html"}, "<html>"), "", 1),
    "an empty object": ((200, {}, {}), "answer", 1),
    "another type": ((200, {}, [1, 2]), "", 1),
    "a cut connection": (CUT, "onnection", 3),
}


@vendors
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_the_state_its_expert_and_nothing_more(serve, ask, caplog, vendor, fault):
    behaviour, says, requests = FAULTS[fault]
    server = serve(behaviour)
    expert = ask(getattr(server, vendor))
    assert expert.sample([STATE], 4) == [[]]
    (line,) = [record.getMessage() for record in caplog.records]
    assert (
        f"{vendor}:tiny: 1 of 1 states go on without its actions" in line
        and says in line
        and "\n" not in line
        and len(line) < 400
    )
    assert len(server.bodies) == requests  # one layer of retries
    counts = expert.metrics()
    assert counts["failures"] == 1 and counts["states_without"] == 1
    assert expert.cache.entries() == expert.cache.calls() == []
    server.script = ["good"]
    assert len(expert.sample([STATE], 4)[0]) == 4  # the bad moment has passed


@vendors
@pytest.mark.parametrize("status", [401, 403, 404, 400])
def test_an_error_that_lasts_is_told_at_once_if_the_expert_never_answered(
    serve, ask, vendor, status
):
    server = serve(error(status, f"wrong key {KEY}"))
    with pytest.raises(UserError) as told:
        ask(getattr(server, vendor)).sample([STATE], 2)
    assert (
        f"{vendor}:tiny" in str(told.value)
        and "wrong key [key]" in str(told.value)
        and KEY not in str(told.value)
    )


@vendors
def test_a_key_that_is_withdrawn_later_does_not_stop_the_run(serve, ask, caplog, vendor):
    server = serve("good", error(401, f"wrong key {KEY}"))
    expert = ask(getattr(server, vendor))
    assert len(expert.sample([STATE], 2)[0]) == 2
    assert (
        expert.sample([COUNTING[1]], 2) == [[]]
        and "wrong key [key]" in caplog.text
        and KEY not in caplog.text
    )


@pytest.mark.parametrize(
    "vendor, behaviour, finish",
    [
        ("openai", chat([None, None], finish="content_filter"), "content_filter"),
        ("openai", chat(["", ""], finish="length"), "length"),
        ("gemini", content(["", ""], finish="SAFETY"), "safety"),
        ("gemini", content(["", ""], finish="MAX_TOKENS"), "max_tokens"),
        (
            "gemini",
            {
                "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"},
                "usageMetadata": {"promptTokenCount": 9, "totalTokenCount": 9},
            },
            "prompt_prohibited_content",
        ),
    ],
)
def test_a_blocked_answer_is_no_action_and_is_never_asked_for_again(
    serve, ask, vendor, behaviour, finish
):
    server = serve(behaviour)
    expert = ask(getattr(server, vendor))
    assert expert.sample([STATE], 2) == [[]] and expert.metrics()["blocked"] == 2
    assert [entry["finish"] for entry in expert.cache.entries()] == [finish] * 2
    assert expert.sample([STATE], 2) == [[]] and len(server.bodies) == 1


@vendors
def test_an_empty_answer_is_an_empty_action(serve, ask, vendor, blocks_policy):
    server = serve(chat([""]) if vendor == "openai" else content([""]))
    ((sample,),) = ask(getattr(server, vendor)).sample([STATE], 1)
    action = expert_action(blocks_policy, sample, "e", 10)
    assert action.text == "" and action.tokens == [blocks_policy.eos_id]


def test_an_answer_cut_by_the_api_has_no_eos(serve, ask, blocks_policy):
    server = serve(chat(["<think> 1 plus"], finish="length"))
    ((sample,),) = ask(server.openai).sample([STATE], 1)
    action = expert_action(blocks_policy, sample, "e", 10)
    assert (
        action.truncated
        and blocks_policy.eos_id not in action.tokens
        and action.text == "<think> 1 plus"
    )
    assert expert_action(blocks_policy, Sample("<|im_end|>", truncated=True), "e", 10).tokens == [
        blocks_policy.eos_id
    ]


@vendors
def test_a_server_that_never_answers_holds_a_step_no_longer_than_the_deadline(
    serve, ask, caplog, vendor
):
    server = serve("hang")
    expert, started = ask(getattr(server, vendor), expert_deadline=1.0), time.monotonic()
    assert expert.sample([COUNTING[i] for i in range(6)], 2) == [[]] * 6
    assert 1.0 <= time.monotonic() - started < 5.0
    assert "6 of 6 states go on without its actions: no answer within 1 s" in caplog.text
    # Five failures in a row: from now on no waiting at all.
    assert "switched off for 120 s after 5 failures in a row" in caplog.text
    started = time.monotonic()
    assert expert.sample([COUNTING[7]], 2) == [[]] and time.monotonic() - started < 0.9
    assert len(server.bodies) <= 4 * 3


def test_slow_answers_miss_their_step_and_are_kept(serve, ask, caplog):
    server = serve(lambda body: 2.0)
    expert = ask(server.openai, expert_deadline=1.5)
    expert.api.client.timeout = expert.api.timeout = 30  # only the step is impatient
    assert expert.sample([STATE], 2) == [[]] and "no answer within 1.5 s" in caplog.text
    time.sleep(1.5)
    assert texts(expert.sample([STATE], 2)[0]) == good(2) and len(server.bodies) == 1


def test_an_expert_is_switched_off_after_failures_in_a_row_and_comes_back(
    serve, ask, caplog, monkeypatch
):
    monkeypatch.setattr(api_expert, "PAUSE", 1.0)
    server = serve(error(500, "overloaded", **{"x-should-retry": "false"}))
    expert = ask(server.openai, expert_failures=3, expert_requests=1)
    assert expert.sample([COUNTING[i] for i in range(5)], 2) == [[]] * 5
    assert (
        len(server.bodies) == 3
        and caplog.text.count("switched off for 1 s after 3 failures in a row") == 1
    )
    time.sleep(1.1)
    server.script = ["good"]
    assert all(len(samples) == 2 for samples in expert.sample([COUNTING[i] for i in range(5)], 2))
    server.script = [error(500, "overloaded", **{"x-should-retry": "false"})]
    assert (
        expert.sample([COUNTING[9]], 2) == [[]] and not expert.off
    )  # successes start the count anew


def test_cached_answers_are_used_while_the_expert_is_off(serve, ask):
    server = serve()
    expert = ask(server.openai)
    known = expert.sample([STATE], 2)
    expert.off_until = time.monotonic() + 60
    assert expert.sample([STATE, COUNTING[1]], 2) == [known[0], []] and len(server.bodies) == 1


# ------------------------------------------------------------------ running ahead


def test_prefetched_answers_are_there_when_the_step_comes(serve, ask):
    server = serve(lambda body: 1.0)
    expert, started = ask(server.openai), time.monotonic()
    expert.prefetch([STATE, COUNTING[1]], 2)
    assert time.monotonic() - started < 0.9
    time.sleep(3)
    started = time.monotonic()
    assert [len(samples) for samples in expert.sample([STATE, COUNTING[1]], 2)] == [2, 2]
    assert time.monotonic() - started < 0.9 and len(server.bodies) == 2
    assert expert.metrics()["cache_hits"] == 0  # bought now, not found


def test_no_more_requests_at_a_time_than_allowed(serve, ask):
    now, most, lock = [0], [0], threading.Lock()

    def count(body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.2)
        with lock:
            now[0] -= 1
        return "good"

    ask(serve(count).openai, expert_requests=3).sample([COUNTING[i] for i in range(9)], 2)
    assert most[0] == 3


def test_a_process_ends_although_the_server_never_answers(serve, tmp_path):
    server = serve("hang")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from experts.roster import make_experts\n"
        "from types import SimpleNamespace; from blocks import BlocksSet\n"
        "s = SimpleNamespace(cache=sys.argv[2], offline=False, expert_tokens=9, "
        "expert_requests=2, expert_deadline=600, expert_failures=5, price='')\n"
        "make_experts(sys.argv[3], s)[0].prefetch([BlocksSet('counting-train', 1)[0]], 2); "
        "sys.stdin.readline()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, ROOT, tmp_path / "c.sqlite", server.openai],
        stdin=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not server.bodies and time.monotonic() < deadline:
        time.sleep(0.05)
    asked = time.monotonic()
    process.communicate("\n", timeout=100)  # the request is on its way, and ten minutes are allowed
    assert len(server.bodies) == 1 and process.returncode == 0 and time.monotonic() - asked < 60


# ------------------------------------------------------------------ offline, keys, names


def test_offline_answers_from_the_cache_and_names_the_first_missing_entry(serve, ask, monkeypatch):
    server = serve()
    bought = ask(server.openai).sample([STATE, COUNTING[1]], 3)
    monkeypatch.delenv("OPENAI_API_KEY")
    expert = ask(server.openai, offline=True)
    assert expert.sample([STATE, COUNTING[1]], 3) == bought
    with pytest.raises(
        UserError, match=f"no answer 0 of {server.openai} to state {COUNTING[2].id}"
    ):
        expert.sample([STATE, COUNTING[2], COUNTING[3]], 3)
    with pytest.raises(UserError, match=f"no answer 3 of .* to state {STATE.id}"):
        expert.sample([STATE], 4)
    assert len(server.bodies) == 2
    with pytest.raises(UserError, match="there is no cache"):
        ask(server.openai, offline=True, cache="/nowhere/cache.sqlite")


@pytest.mark.parametrize(
    "name, message",
    [
        ("openai:gpt-4o", "OPENAI_API_KEY"),
        ("gemini:gemini-3.8-flash", "GEMINI_API_KEY or GOOGLE_API_KEY"),
        ("openai:", "no model"),
        ("openai:@http://h/v1", "no model"),
        ("openai:m@http:///v1", "no address"),
        ("openai:m@http://user:secret@h/v1", "environment"),
        ("openai:m@http://h/v1?key=secret", "environment"),
        ("openai", "no expert 'openai'"),
        ("careful,openai:m@http://h/v1,openai:m@http://i/v1", "twice"),
    ],
)
def test_names_and_keys_are_checked_before_anything_is_loaded(monkeypatch, name, message):
    for variable in ("OPENAI_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.delenv(variable)
    with pytest.raises(ValueError, match=message) as told:
        roster.expert_specs(name)
    assert "secret" not in str(told.value)
    with pytest.raises(UserError, match=message):
        ekipl.check(ekipl.Config(experts=name), 1, False)


def test_google_api_key_does_as_well_and_ones_own_server_needs_none(monkeypatch):
    monkeypatch.delenv("GEMINI_API_KEY")
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)
    assert apis.key_of("gemini", apis.ENDPOINTS["gemini"]) == KEY
    for variable in ("OPENAI_API_KEY", "EXPERT_API_KEY"):
        monkeypatch.delenv(variable)
    assert roster.expert_specs("openai:org/model@http://127.0.0.1:8000/v1,quick") == [
        "openai:org/model@http://127.0.0.1:8000/v1",
        "quick",
    ]


def test_an_sdk_is_imported_for_its_own_experts_only(tmp_path):
    code = "import sys, ekipl; from experts.roster import make_experts\n"
    code += f"settings = ekipl.Config(cache={str(tmp_path / 'c.sqlite')!r})\n"
    code += "openai, gemini = 'openai:m@http://127.0.0.1:9/v1', 'gemini:m@http://127.0.0.1:9'\n"
    code += "packages = ('openai', 'google.generativeai', 'vllm')\n"
    code += "for names in ('none', 'careful,quick', openai, gemini):\n"
    code += "    make_experts(names, settings)\n"
    code += "    print([name for name in packages if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines() == [
        "[]",
        "[]",
        "['openai']",
        "['openai', 'google.generativeai']",
    ], done.stderr


def test_two_gemini_experts_keep_their_own_servers(serve, tmp_path):
    left, right = serve(answer="left"), serve(answer="right")
    settings = ekipl.Config(cache=str(tmp_path / "c.sqlite"))
    both = make_experts(f"{left.gemini},{right.gemini.replace('tiny', 'other')}", settings)
    assert [expert.sample([STATE], 1)[0][0].text for expert in both] == ["left", "right"]


# ------------------------------------------------------------------ money


def test_prices_and_cost():
    assert (
        apis.price_of("gpt-4o-2024-08-06")
        == apis.price_of("gpt-4o")
        != apis.price_of("gpt-4o-mini")
    )
    assert (
        apis.price_of("gpt-4o-audio") is None
        and apis.price_of("tiny") is None
        and apis.price_of("tiny", (1.0, 2.0)) == (1.0, 2.0)
    )
    assert (
        apis.dollars((2.5, 10.0), 1000, 100) == pytest.approx(0.0035)
        and apis.dollars(None, 1, 1) is None
        and apis.dollars((1, 1), None, 1) is None
    )
    assert apis.parse_price("2.5,10") == (2.5, 10.0) and apis.parse_price("") is None
    for wrong in ("2.5", "a,b", "1,2,3", "-1,2", "nan,1"):
        with pytest.raises(ValueError, match="--price"):
            apis.parse_price(wrong)


# ------------------------------------------------------------------ in training

SMALL = dict(
    states=12,
    batch_size=4,
    num_samples=2,
    group_size=3,
    micro_batch=2,
    max_new_tokens=12,
    eval_every=0,
    save_every=2,
    lr=1e-3,
    name="run",
    beta=0.0,
)


def config(tmp_path, names: str, **changes) -> ekipl.Config:
    return ekipl.Config(
        **{
            **SMALL,
            "runs": str(tmp_path),
            "cache": str(tmp_path / "cache.sqlite"),
            "experts": names,
            **changes,
        }
    )


def trained(configuration: ekipl.Config) -> tuple[list[dict], list[dict]]:
    path = ekipl.train(configuration, None, distributed.World.join("cpu"))
    return storage.read(path / "metrics.jsonl"), storage.read(path / "samples.jsonl")


def test_a_run_with_an_api_is_replayed_from_the_cache_without_a_request(serve, tmp_path):
    server = serve()
    first = trained(config(tmp_path, f"careful,{server.openai}", log_groups=4, price="1,1"))
    assert len(server.bodies) == 12 and sum(record["api/requests"] for record in first[0]) == 12
    assert (
        sum(record["api/cost"] for record in first[0]) == pytest.approx(12 * 120 / 1e6)
        and first[0][0]["api/latency"] > 0
    )
    assert {action["source"] for group in first[1] for action in group["actions"]} == {
        "policy",
        "careful",
        "openai:tiny",
    }
    second = trained(
        config(tmp_path, f"careful,{server.openai}", log_groups=4, name="again", offline=True)
    )
    assert len(server.bodies) == 12 and sum(record["api/cache_hits"] for record in second[0]) == 24
    assert second[1] == first[1]  # the same actions, rewards and advantages
    timeless = [
        [{k: v for k, v in r.items() if not k.startswith(("seconds/", "api/"))} for r in records]
        for records in (first[0], second[0])
    ]
    assert timeless[0] == timeless[1]


def test_requests_of_the_next_two_steps_run_while_the_first_one_trains(
    serve, tmp_path, monkeypatch
):
    server, update, seen = serve(), ekipl.update, []

    def slow_update(*arguments):
        deadline = time.monotonic() + 20
        while len(server.bodies) < 12 and time.monotonic() < deadline:
            time.sleep(0.05)
        seen.append(len(server.bodies))
        return update(*arguments)

    monkeypatch.setattr(ekipl, "update", slow_update)
    trained(config(tmp_path, server.openai, states=16))
    assert seen[0] == 12 and len(server.bodies) == 16  # of four steps, three


@pytest.mark.parametrize(
    "changes", [{}, {"updates_per_batch": 2}, {"estimator": "is"}, {"estimator": "snis"}], ids=str
)
def test_training_goes_on_while_an_api_fails_for_some_states(serve, tmp_path, changes):
    calls = iter(range(100))
    server = serve(
        lambda body: (
            "good"
            if next(calls) % 3 == 0
            else error(500, "overloaded", **{"x-should-retry": "false"})
        )
    )
    records, groups = trained(
        config(tmp_path, f"quick,{server.openai}", expert_failures=99, log_groups=4, **changes)
    )
    assert len(records) == 3 and sum(record["api/states_without"] for record in records) > 0
    assert {len(group["actions"]) for group in groups} == {4, 6}
    assert all(math.isfinite(record["loss"]) for record in records)


def test_training_goes_on_without_an_api_that_does_not_answer_any_more(serve, tmp_path, caplog):
    server, started = serve("good", "hang"), time.monotonic()  # but for its first state
    records, _ = trained(config(tmp_path, server.openai, expert_deadline=1.0, expert_failures=4))
    assert [record["api/states_without"] for record in records] == [3, 4, 4]
    assert [record["expert_share"] for record in records[1:]] == [0, 0]
    assert "switched off" in caplog.text and time.monotonic() - started < 150


def test_estimators_that_need_densities_stop_at_the_start_where_there_are_none(
    serve, tmp_path, caplog
):
    with pytest.raises(UserError, match="gemini:x reports none"):
        ekipl.check(config(tmp_path, "gemini:x", estimator="is"), 1, False)
    silent = serve(lambda body: chat(good(body["n"]), logprobs=False))
    with pytest.raises(UserError, match="openai:tiny reports no log-probs"):
        trained(config(tmp_path, silent.openai, estimator="is"))
    telling = serve()
    records, _ = trained(config(tmp_path, telling.openai, estimator="snis", name="telling"))
    assert "only the density of its own samples is known" in caplog.text
    assert len(telling.bodies) == 12  # the state that was asked to find out is one of training's
    assert all(record["weight_q95"] <= 2 + 1e-6 for record in records)


def flags_of(settings: dict, kind: type) -> list[str]:
    """The settings as flags, as far as a program has them."""
    known = {field.name for field in dataclasses.fields(kind)}
    kept = {name: value for name, value in settings.items() if name in known}
    return [f"--{name.replace('_', '-')}={value}" for name, value in kept.items()]


def test_no_key_is_written_anywhere(serve, tmp_path, monkeypatch, capfd, caplog):
    calls = iter(range(1000))

    def echo(body):  # the first ones and every third are answered; the others throw the key back
        number = next(calls)
        return (
            "good"
            if number < 2 or number % 3 == 0
            else error((500, 403)[number % 2], f"you sent {KEY}", **{"x-should-retry": "false"})
        )

    server = serve(echo)
    settings = {**SMALL, "runs": tmp_path, "cache": tmp_path / "c.sqlite"}
    names = f"{server.openai},{server.gemini.replace('tiny', 'other')}"
    for main, command in (
        (ekipl.main, ["ekipl.py"]),
        (collect.main, ["experts.collect", "collect"]),
    ):
        flags = flags_of(settings, ekipl.Config if main is ekipl.main else collect.CollectSettings)
        monkeypatch.setattr(sys, "argv", [*command, *flags, "--experts", names])
        try:
            main()
        except SystemExit as stop:
            assert stop.code == 2
        said = "".join(capfd.readouterr()) + caplog.text
        assert "[key]" in said and KEY not in said, said
        caplog.clear()
    travelled = str(server.headers)
    assert KEY in travelled and VENDORS_KEY not in travelled
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 5 and not [file for file in files if KEY.encode() in file.read_bytes()]


def test_a_missing_key_is_told_in_one_line_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setattr(policy.Policy, "load", None)
    monkeypatch.setattr(
        sys, "argv", ["ekipl.py", "--experts", "openai:gpt-4o", "--runs", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as stop:
        ekipl.main()
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err.strip()
        == "ekipl.py: error: openai experts need a key in the environment: export OPENAI_API_KEY"
    )


def test_a_failure_in_one_process_does_not_hang_the_other(serve, tmp_path):
    # Two processes; the server answers every second request and never the others.
    calls = iter(range(1000))
    server = serve(lambda body: ("good", "hang")[next(calls) % 2])
    settings = {
        **SMALL,
        "states": 16,
        "runs": tmp_path,
        "cache": tmp_path / "c.sqlite",
        "experts": server.openai,
        "expert_deadline": 2,
    }
    in_two_processes(ekipl.run, [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()])
    records = storage.read(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 4 and sum(record["api/states_without"] for record in records) > 0


# ------------------------------------------------------------------ collecting


def test_collect_buys_once_in_training_order_and_training_then_asks_nothing(serve, tell, tmp_path):
    server = serve()
    settings = {**SMALL, "runs": tmp_path, "cache": tmp_path / "cache.sqlite"}
    flags = flags_of(settings, collect.CollectSettings)
    code, out, err = tell("collect", *flags, "--experts", server.openai, "--limit", 5)
    assert (
        (code, len(server.bodies)) == (0, 5)
        and "bought 10 answers with 5 requests" in out
        and "5/5" in err
    )
    questions, order = sets.training_states(config(tmp_path, server.openai))
    cache = Cache(tmp_path / "cache.sqlite", read_only=True)
    expert = ApiExpert(server.openai, cache, config(tmp_path, server.openai))
    found = [len(cache.get(request_id(expert.content(questions[i])), 2)) for i in range(12)]
    assert found == [2] * 5 + [0] * 7  # what a run with --limit 5 asks
    assert [state.id for state in collect.states_to_ask(config(tmp_path, server.openai))] == [
        questions[i].id for i in order
    ]
    assert tell("collect", *flags, "--experts", server.openai)[0] == 0 and len(server.bodies) == 12
    trained(config(tmp_path, server.openai))
    assert len(server.bodies) == 12
    code, out, _ = tell("stats", tmp_path / "cache.sqlite")
    assert code == 0 and "24 answers of 12 states in 12 calls, answered by tiny-2026-01-01" in out
    code, out, _ = tell("export", tmp_path / "cache.sqlite")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (
        len(lines) == 24
        and lines[0]["text"] == good(1)[0]
        and lines[0]["expert"] == server.openai
        and lines[0]["messages"]
    )
    assert tell("verify", tmp_path / "cache.sqlite")[0] == 0


def test_a_dry_run_asks_nothing_needs_no_key_and_counts_what_is_missing(
    serve, tell, tmp_path, monkeypatch
):
    server = serve()
    flags = ["--states", 64, "--cache", tmp_path / "cache.sqlite", "--experts", server.openai]
    tell("collect", *flags, "--limit", 4)
    monkeypatch.delenv("OPENAI_API_KEY")
    code, out, err = tell("collect", *flags, "--dry-run", "--price", "1,100")
    assert code == 0 and len(server.bodies) == 4, err
    assert "64 states, 4 of them in the cache: 60 requests for 480 answers" in out
    # 20 tokens out for 8 answers, as the calls in the cache had.
    assert (
        "0.001 million out (2 an answer, as in the cache)" in out
        and "dollars" in out
        and "hours" in out
    )
    code, out, err = tell("collect", *flags[:2], "--experts", "openai:gpt-4o", "--dry-run")
    assert code == 0 and f"prices of {apis.PRICES_OF}" in out, err


def test_a_budget_is_never_overspent_and_the_rest_can_follow(serve, tell, tmp_path):
    server = serve()
    flags = [
        "collect",
        "--states",
        64,
        "--cache",
        tmp_path / "cache.sqlite",
        "--experts",
        server.openai,
        "--limit",
        12,
        "--expert-tokens",
        10,
    ]
    # A call costs 100 in and 20 out; at worst 8 answers of 10 tokens for a prompt of some 270: 0.35
    # USD at 1000 a million.
    code, out, _ = tell(*flags, "--price", "1000,1000", "--budget", 1.0)
    assert code == 0 and "stopped at the budget" in out and 0 < len(server.bodies) < 12
    assert 1.0 - 0.36 < 0.12 * len(server.bodies) <= 1.0
    assert tell(*flags)[0] == 0 and len(server.bodies) == 12
    code, _, err = tell(*flags[:-2], "--budget", 1.0)
    assert code == 2 and "--budget needs a price" in err


@pytest.mark.parametrize(
    "behaviour, says",
    [
        (error(401, "wrong key"), "wrong key"),
        (error(500, "down", **{"x-should-retry": "false"}), "again and again"),
    ],
)
def test_collect_stops_in_one_line_if_the_api_will_not_answer(
    serve, tell, tmp_path, monkeypatch, behaviour, says
):
    monkeypatch.setattr(api_expert, "PAUSE", 0.1)
    server = serve(behaviour)
    code, _, err = tell(
        "collect", "--states", 64, "--cache", tmp_path / "cache.sqlite", "--experts", server.openai
    )
    last = err.strip().splitlines()[-1]
    assert (
        code == 2
        and last.startswith("experts.collect: error:")
        and says in last
        and "Traceback" not in err
    )
    assert len(server.bodies) < 40
