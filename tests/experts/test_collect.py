"""Collecting: never dearer than the budget, patient with an API's bad minute, and everything bought
is in one file; and answers of any length."""

import json
import random
import shutil
import signal
import sqlite3
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import collecting, in_two_processes
from fake_api import KEY, chat, content, error
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from experts import api_expert, collect, collection, integrity
from experts.cache import Cache
from policy import Policy

ROOT = Path(__file__).resolve().parents[2]
AT_ONCE = {"x-should-retry": "false"}
PRICE = 0.001  # USD a token, see `flags`


@pytest.fixture(autouse=True)
def planted_key(monkeypatch):
    for variable in ("OPENAI_API_KEY", "GEMINI_API_KEY", "EXPERT_API_KEY"):
        monkeypatch.setenv(variable, KEY)


def flags(tmp_path, name: str, states: int, *more) -> list:
    return [
        "collect",
        "--states",
        64,
        "--limit",
        states,
        "--cache",
        tmp_path / "c.sqlite",
        "--experts",
        name,
        "--num-samples",
        4,
        "--expert-tokens",
        10,
        "--price",
        "1000,1000",
        *more,
    ]


# ------------------------------------------------------------------ the budget


def told(vendor: str, texts: list, tokens: tuple | None, **more) -> dict:
    """A reply of either vendor that tells these tokens in and out, or none."""
    usage = tokens or (0, 0)
    if vendor == "openai":
        reply = chat(texts, usage=usage, **more)
        return reply if tokens else {**reply, "usage": None}
    reply = content(texts, usage=(*usage, sum(usage)))
    if not tokens:
        del reply["usageMetadata"]
    return reply


def number(body: dict) -> int:
    return body["n"] if "messages" in body else body["generationConfig"]["candidateCount"]


def empty(vendor: str, body: dict, tokens: tuple | None) -> dict:
    reply = told(vendor, ["x"] * number(body), tokens)
    return {**reply, "choices" if vendor == "openai" else "candidates": []}


PROMPT = 250  # tokens that the server bills for a prompt, fewer than are taken for it
MOST = lambda body: (PROMPT, 10 * number(body))  # noqa: E731
BILLS = {
    # what the server does, and what it bills: (vendor, body) -> reply, tokens
    "tells all": lambda v, b: (told(v, ["x"] * number(b), (100, 20)), (100, 20)),
    "tells nothing": lambda v, b: (told(v, ["x"] * number(b), None), MOST(b)),
    "tells zeros": lambda v, b: (told(v, ["x"] * number(b), (0, 0)), MOST(b)),
    "one answer a request": lambda v, b: (told(v, ["x"], None), MOST(b)),
    "no answer, told": lambda v, b: (empty(v, b, MOST(b)), MOST(b)),
    "no answer, untold": lambda v, b: (empty(v, b, None), MOST(b)),
    "never answers": lambda v, b: ("hang", MOST(b)),
    "cut in the middle": lambda v, b: ((200, {}, "cut"), MOST(b)),
    "no JSON": lambda v, b: ((200, {}, "<html>"), MOST(b)),
    "an error that is billed": lambda v, b: (
        (500, {}, {**error(500, "x")[2], **told(v, [], MOST(b))}),
        MOST(b),
    ),
    "dearer than anyone thinks": lambda v, b: (told(v, ["x"] * number(b), (600, 90)), (600, 90)),
}


@pytest.mark.parametrize("vendor", ["openai", "gemini"])
@pytest.mark.parametrize("kind", BILLS)
def test_what_the_server_bills_is_never_more_than_the_budget(
    serve, tell, tmp_path, monkeypatch, vendor, kind
):
    monkeypatch.setattr(api_expert, "PAUSE", 0.01)
    bills, lock = [], threading.Lock()

    def behave(body):
        reply, tokens = BILLS[kind](vendor, body)
        with lock:
            bills.append(PRICE * sum(tokens))
        return reply

    name = getattr(serve(behave), vendor)
    more = ["--expert-deadline", 0.3] if kind == "never answers" else []
    budget = 2.5
    code, out, err = tell(*flags(tmp_path, name, 30, "--budget", budget, *more))
    assert budget / 4 < sum(bills) <= budget + 1e-9, (len(bills), out, err)
    assert "stopped at the budget" in out or "again and again" in err
    assert code in (0, 2) and "Traceback" not in err


def test_errors_that_nobody_bills_take_nothing_from_the_budget(serve, tell, tmp_path):
    calls = iter(range(1000))
    server = serve(
        lambda body: error(500, "busy", **AT_ONCE) if next(calls) % 2 else "good"
    )  # 0.12 an answer, and 0.31 at most
    code, out, err = tell(*flags(tmp_path, server.openai, 8, "--budget", 2.0))
    # four states at once, two more at their second and last try
    assert "bought 24 answers with 6 requests, $0.7200;" in out, (out, err)
    assert code == 2 and "2 states stayed without answers" in err


def test_what_no_server_told_is_said(serve, tell, tmp_path):
    server = serve(lambda body: told("openai", ["x"] * number(body), None))
    code, out, _ = tell(*flags(tmp_path, server.openai, 2))
    assert code == 0 and "of it assumed" in out


# ------------------------------------------------------------------ a bad minute


@pytest.mark.parametrize("good_before", [0, 3])
def test_a_bad_minute_is_waited_out_and_its_states_are_asked_again(
    serve, tell, tmp_path, monkeypatch, good_before
):
    monkeypatch.setattr(api_expert, "PAUSE", 0.5)
    calls, bad = iter(range(1000)), range(good_before, good_before + 7)
    server = serve(lambda body: error(503, "busy", **AT_ONCE) if next(calls) in bad else "good")
    code, out, err = tell(*flags(tmp_path, server.openai, 12, "--expert-requests", 2))
    assert code == 0 and "bought 48 answers with 12 requests" in out, err
    assert "12/12" in err


def test_an_api_that_stays_down_is_given_up_with_one_line_and_nothing_is_lost(
    serve, tell, tmp_path, monkeypatch
):
    monkeypatch.setattr(api_expert, "PAUSE", 0.2)
    calls = iter(range(1000))
    server = serve(lambda body: "good" if next(calls) < 2 else error(503, "busy", **AT_ONCE))
    started = time.monotonic()
    code, _, err = tell(*flags(tmp_path, server.openai, 20, "--expert-requests", 2))
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("experts.collect: error:") and "again and again: " in last
    assert "what arrived is in" in last and "Traceback" not in err
    assert time.monotonic() - started > collection.WAITS * 0.2
    with sqlite3.connect(tmp_path / "c.sqlite") as database:
        assert database.execute("SELECT count(*) FROM answers").fetchone() == (8,)


def test_a_key_withdrawn_and_a_server_that_is_not_there_are_not_waited_for(serve, tell, tmp_path):
    calls = iter(range(1000))
    server = serve(lambda body: "good" if next(calls) < 2 else error(401, "withdrawn"))
    started = time.monotonic()
    code, _, err = tell(*flags(tmp_path, server.openai, 20))
    assert code == 2 and "withdrawn" in err.strip().splitlines()[-1]
    code, _, err = tell(*flags(tmp_path, "openai:m@http://127.0.0.1:9/v1", 20))
    assert code == 2 and "refused" in err.strip().splitlines()[-1]
    assert time.monotonic() - started < api_expert.PAUSE


# ------------------------------------------------------------------ the one file


def bought(path: Path) -> int:
    """How many answers a copy of the file alone has."""
    copy = path.with_name("copy.sqlite")
    shutil.copy(path, copy)
    with sqlite3.connect(copy) as database:
        return database.execute("SELECT count(*) FROM answers").fetchone()[0]


def test_all_answers_are_in_the_one_file_after_collect_and_after_an_error(serve, tell, tmp_path):
    server = serve()
    assert tell(*flags(tmp_path, server.openai, 3))[0] == 0
    assert bought(tmp_path / "c.sqlite") == 12
    assert not list(tmp_path.glob("c.sqlite-*"))
    server.script = [error(401, "withdrawn")]
    assert tell(*flags(tmp_path, server.openai, 20))[0] == 2
    assert bought(tmp_path / "c.sqlite") == 12 and not list(tmp_path.glob("c.sqlite-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_paid_answer_is_lost_by_a_signal_and_none_is_paid_twice(serve, tell, tmp_path, number):
    calls = iter(range(1000))
    server = serve(lambda body: "good" if next(calls) < 5 else "hang")
    process = collecting(*flags(tmp_path, server.openai, 20))
    deadline = time.monotonic() + 120
    while len(server.bodies) < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert server.answered == 5 and bought(tmp_path / "c.sqlite") == 20, err
    if number != signal.SIGKILL:
        assert not list(tmp_path.glob("c.sqlite-*"))
        assert "stopped; what had arrived is in the cache" in err and "Traceback" not in err
    assert Cache(tmp_path / "c.sqlite", read_only=True).faults() == []
    server.script = ["good"]
    code, _, err = tell(*flags(tmp_path, server.openai, 20))
    assert code == 0 and server.answered == 20, err  # each paid for once


def collect_as(arguments: list) -> None:
    """In one of two processes: `python -m experts.collect ...`."""
    sys.argv = ["experts.collect", *map(str, arguments)]
    collect.main()


def test_two_collects_at_once_buy_each_answer_once(serve, tmp_path):
    server = serve(lambda body: 0.1)
    in_two_processes(collect_as, flags(tmp_path, server.openai, 12))
    assert len(server.bodies) == 12 and bought(tmp_path / "c.sqlite") == 48
    cache = Cache(tmp_path / "c.sqlite", read_only=True)
    assert cache.faults() == [] and cache.undigested() == 0


def test_a_full_disk_ends_it_with_one_line(serve, tell, tmp_path, monkeypatch):
    def full(*arguments):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(integrity, "sign", full)
    code, _, err = tell(*flags(tmp_path, serve().openai, 4))
    assert code == 2 and "disk is full" in err.strip().splitlines()[-1] and "Traceback" not in err


def test_verify_tells_what_it_cannot_check(serve, tell, tmp_path):
    assert tell(*flags(tmp_path, serve().openai, 2))[0] == 0
    path = tmp_path / "c.sqlite"
    assert tell("verify", path)[1] == f"{path}: 8 answers, no fault\n"
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE digests")  # as an older program made it
    code, out, _ = tell("verify", path)
    assert code == 0 and "8 answers, no fault; in 8 of them" in out
    assert tell(*flags(tmp_path, serve().openai, 2, "--dry-run"))[0] == 0


def test_a_damaged_cache_is_told_in_one_line(serve, tell, tmp_path):
    assert tell(*flags(tmp_path, serve().openai, 6))[0] == 0
    whole = (tmp_path / "c.sqlite").read_bytes()
    damages = [whole[:n] for n in (1, 50, 100, 4096, 5000, len(whole) // 2, len(whole) - 100)]
    for place in range(100, len(whole), len(whole) // 25):
        damages.append(whole[:place] + bytes(64) + whole[place + 64 :])
        damages.append(whole[:place] + b"\xff{x" * 20 + whole[place + 60 :])
    for number, damage in enumerate(damages):
        path = tmp_path / f"damaged{number}.sqlite"
        path.write_bytes(damage)
        for command in ("verify", "stats", "export"):
            code, out, err = tell(command, path)
            assert code in (0, 2) and len(err.splitlines()) == (code == 2), (number, command, err)
            for line in out.splitlines() if command == "export" else ():
                json.loads(line)


# ------------------------------------------------------------------ long answers


def byte_level_bpe():
    """A tokenizer that splits as Qwen2's does, with merges learnt from a few lines."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    lines = [
        "the red cube is left of the blue sphere",
        "aaaa aa aaaaaaaa",
        "é 数 数数 😀 -----  \n\n",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(lines * 20, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


WORDS = "the red cube, left of 12 blue spheres.\n<think> a </think>"
WORDS += " é e\u0301 数数 😀 \t  - --- 'll "
WORDS = WORDS.split(" ")
LONG = {
    "words": lambda draw: " ".join(draw.choices(WORDS, k=3000)),
    "one word": lambda draw: "".join(draw.choices("abcdeé", k=9000)),
    "one letter": lambda draw: "a" * 9001,
    "spaces": lambda draw: " " * 9001,
    "lines": lambda draw: "\n" * 4000 + " " * 4000 + "x",
    "digits": lambda draw: "".join(draw.choices("0123456789", k=9000)),
    "signs": lambda draw: "-" * 9001,
    "faces": lambda draw: "😀" * 5000,
    "accents": lambda draw: "e\u0301" * 5000,
    "a stack of accents": lambda draw: "e" + "\u0301\u0327" * 4500,
    "special tokens": lambda draw: "<|im_end|>" * 900 + "the red cube " * 400,
    "short": lambda draw: "the red cube",
    "nothing": lambda draw: "",
}


@pytest.mark.parametrize("kind", LONG)
def test_a_long_answer_is_cut_before_it_is_tokenised_and_keeps_its_tokens(kind):
    tokenizer, draw, read = byte_level_bpe(), random.Random(0), []

    def reads(text, **settings):
        read.append(len(text))
        return tokenizer(text, **settings)

    policy = SimpleNamespace(
        tokenizer=reads, eos_id=tokenizer.eos_token_id, suppressed_ids=torch.tensor([], dtype=int)
    )
    text = LONG[kind](draw)
    whole = tokenizer(text, add_special_tokens=False).input_ids
    whole = [token for token in whole if token != tokenizer.eos_token_id]
    for count in (1, 2, 7, 31):
        tokens, truncated = Policy.tokens_of(policy, text, count)
        assert truncated == (len(whole) >= count)
        assert tokens == (whole[:count] if truncated else [*whole, policy.eos_id])
    read.clear()
    Policy.tokens_of(policy, text * 200, 7)
    assert sum(read) < max(3 * len(text), 6000)
