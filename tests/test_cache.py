"""The cache of API answers: whole after any end, one buyer for each request, and no file but its own."""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import in_two_processes
from fake_api import Server
from PIL import Image

import cache as cache_module
import collect
from cache import Answer, Cache, Reply, request_id
from data import State
from distributed import World
from experts import make_experts
from runs import UserError

ROOT = Path(__file__).resolve().parent.parent


def content(number: int) -> dict:
    return {
        "expert": "openai:m@http://h/v1",
        "messages": [f"question {number}"],
        "images": [],
        "temperature": 1.0,
        "max_tokens": 9,
    }


def reply(*texts: str) -> Reply:
    return Reply([Answer(text, "stop", -1.0) for text in texts], "m-1", 10, 20, 0.5)


def test_answers_keep_their_order_and_later_calls_add_to_them(tmp_path):
    cache = Cache(tmp_path / "c.sqlite")
    cache.put(content(0), reply("a", "b"))
    cache.put(content(1), reply("z"))
    cache.put(content(0), Reply([Answer(None, "safety")], "m-2", None, None, 1.0))
    expected = [Answer("a", "stop", -1.0), Answer("b", "stop", -1.0), Answer(None, "safety")]
    assert (
        cache.get(request_id(content(0)), 5) == expected
        and cache.get(request_id(content(0)), 2) == expected[:2]
    )
    assert cache.get(request_id(content(2)), 5) == []
    assert [entry["model"] for entry in cache.entries()] == ["m-1", "m-1", "m-1", "m-2"]
    assert Cache(tmp_path / "c.sqlite", read_only=True).get(request_id(content(0)), 5) == expected


def test_it_writes_ahead_and_onto_the_disk(tmp_path):
    cache = Cache(tmp_path / "c.sqlite")
    assert cache.db.execute("PRAGMA journal_mode").fetchone() == ("wal",) and cache.db.execute(
        "PRAGMA synchronous"
    ).fetchone() == (2,)  # FULL


def test_a_claim_keeps_others_out_until_it_ends(tmp_path):
    one, other = Cache(tmp_path / "c.sqlite"), Cache(tmp_path / "c.sqlite")
    with one.claimed("r", 5):
        with pytest.raises(TimeoutError), other.claimed("r", 0.3):
            pass
        with (
            pytest.raises(TimeoutError),
            one.claimed("r", 0.3),
        ):  # nor the same process, which may have given up waiting
            pass
        with other.claimed("another", 0.3):
            pass
    with other.claimed("r", 0.3):
        pass


def test_a_claim_is_renewed_while_its_owner_lives_and_ends_soon_after(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "LEASE", 1.0)
    one, other = Cache(tmp_path / "c.sqlite"), Cache(tmp_path / "c.sqlite")
    with one.claimed("r", 5):
        with pytest.raises(TimeoutError), other.claimed("r", 2.5):
            pass
        one.held.clear()  # as after kill -9: nobody renews
        started = time.monotonic()
        with other.claimed("r", 5):
            assert time.monotonic() - started < 4.0


@pytest.mark.parametrize("damage, says", [
    ("UPDATE requests SET content = replace(content, 'question', 'other')", "another hash"),
    ('DELETE FROM answers WHERE "index" = 0', "gaps"),
    ("DELETE FROM calls", "missing row of calls"),
])  # fmt: skip
def test_verify_finds_what_is_wrong(tmp_path, monkeypatch, capsys, damage, says):
    cache = Cache(tmp_path / "c.sqlite")
    cache.put(content(0), reply("a", "b"))
    assert cache.faults() == []
    with sqlite3.connect(tmp_path / "c.sqlite") as database:
        database.execute(damage)
    assert any(says in fault for fault in cache.faults())
    monkeypatch.setattr(sys, "argv", ["experts.py", "verify", str(tmp_path / "c.sqlite")])
    with pytest.raises(SystemExit) as stop:
        collect.main()
    assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("make, says", [
    (lambda path: path.write_bytes(b"this is no database at all" * 100), "not a database"),
    (lambda path: sqlite3.connect(path).execute("CREATE TABLE t (x)"), "something else"),
    (lambda path: sqlite3.connect(path).execute("PRAGMA user_version = 99"), "schema 99"),
    (lambda path: path.mkdir(), "cannot use the cache"),
])  # fmt: skip
def test_another_file_is_left_alone_and_told_in_one_line(tmp_path, make, says):
    path = tmp_path / "c.sqlite"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(UserError, match=says) as told:
        Cache(path)
    assert "\n" not in str(told.value) and (before is None or path.read_bytes() == before)


def test_an_answer_that_cannot_be_kept_stops_the_run(tmp_path):
    cache = Cache(tmp_path / "c.sqlite")
    cache.db.execute("PRAGMA max_page_count = 1")  # a full disk
    with pytest.raises(UserError, match="cannot use the cache.*full"):
        cache.put(content(0), reply("a" * 100_000))
    cache.db.execute("PRAGMA max_page_count = 100000")
    cache.put(content(0), reply("a"))  # nothing half done is left behind
    assert cache.faults() == [] and len(cache.entries()) == 1


def test_threads_share_it(tmp_path):
    cache = Cache(tmp_path / "c.sqlite")
    threads = [
        threading.Thread(target=lambda n=n: [cache.put(content(n), reply("a")) for _ in range(20)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache.entries()) == 160 and cache.faults() == []


# ---------------------------------------------------------------------------------------------- two processes


def buy(path: str, name: str, rounds: int) -> list:
    """In one of two processes, which begin each round at the same moment, the first one making the file: what it has got."""
    settings = SimpleNamespace(
        cache=path,
        offline=False,
        expert_tokens=64,
        expert_requests=4,
        expert_deadline=60,
        expert_failures=5,
        price="",
    )
    world, expert, got = World.join("cpu"), None, []
    for round in range(rounds):
        states = [
            State(
                f"{round}-{i}",
                (Image.new("RGB", (8, 8), (round, i, 0)),),
                "how many ?",
                "1",
                "discrete",
            )
            for i in range(12)
        ]
        world.agree(None)
        expert = expert or make_experts(name, settings)[0]
        got.append(expert.sample(states, 3))
    return got


def test_a_file_that_another_process_is_just_making_is_waited_for(tmp_path):
    other = sqlite3.connect(tmp_path / "c.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")  # as somebody has it who is about to make the tables
    threading.Timer(0.5, lambda: other.execute("ROLLBACK")).start()
    assert Cache(tmp_path / "c.sqlite").faults() == []


def test_two_processes_that_fill_one_cache_at_once_pay_for_each_entry_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")  # no key leaves this machine
    server = Server([lambda body: 0.02])
    rounds, path = 10, tmp_path / "c.sqlite"
    left, right = in_two_processes(buy, str(path), server.openai, rounds)
    server.close()
    assert left == right and all(
        len(texts) == 3 for samples in left for texts in samples
    )  # both have the same answers
    assert len(server.bodies) == 12 * rounds
    cache = Cache(path, read_only=True)
    assert (
        len(cache.calls()) == 12 * rounds
        and len(cache.entries()) == 36 * rounds
        and cache.faults() == []
    )


def test_a_process_killed_while_it_writes_leaves_a_whole_file(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); from cache import *\ncache = Cache(sys.argv[2])\n"
    code += (
        "n, two = 0, Reply([Answer('a' * 5000, 'stop'), Answer('b', 'stop')], 'm-1', 10, 20, 0.5)\n"
    )
    code += "while True:\n    cache.put({'expert': 'm', 'messages': [n]}, two); n += 1; print(n, flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), str(tmp_path / "c.sqlite")],
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(50):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    last = int(([str(last), *process.stdout.read().split()])[-1])
    process.wait()
    cache = Cache(tmp_path / "c.sqlite")
    assert (
        cache.faults() == []
        and len(cache.calls()) in (last, last + 1)
        and len(cache.entries()) == 2 * len(cache.calls())
    )
