"""The cache of API answers: whole after any end, one buyer for each request, and no file but its
own."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import in_two_processes
from fake_api import Server
from PIL import Image

from data.state import State
from experts import cache, collect
from experts.cache import Answer, Cache, Reply, request_id
from experts.roster import make_experts
from training.console import UserError
from training.distributed import World

ROOT = Path(__file__).resolve().parents[2]


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
    monkeypatch.setattr(cache, "LEASE", 1.0)
    one, other = Cache(tmp_path / "c.sqlite"), Cache(tmp_path / "c.sqlite")
    with one.claimed("r", 5):
        with pytest.raises(TimeoutError), other.claimed("r", 2.5):
            pass
        one.held.clear()  # as after kill -9: nobody renews
        started = time.monotonic()
        with other.claimed("r", 5):
            assert time.monotonic() - started < 4.0


@pytest.mark.parametrize(
    "damage, says",
    [
        ("UPDATE requests SET content = replace(content, 'question', 'other')", "another hash"),
        ('DELETE FROM answers WHERE "index" = 0', "gaps"),
        ("DELETE FROM calls", "missing row of calls"),
        ("UPDATE answers SET text = 'c' WHERE text = 'a'", "call 1 brought was changed"),
        ("UPDATE answers SET text = NULL WHERE text = 'z'", "call 2 brought was changed"),
        ("UPDATE answers SET logp = -1.0000001 WHERE text = 'b'", "call 1 brought was changed"),
        ("UPDATE answers SET finish = 'length' WHERE text = 'b'", "call 1 brought was changed"),
        (
            "UPDATE answers SET text = CASE text WHEN 'a' THEN 'b' ELSE 'a' END WHERE call = 1",
            "call 1 brought",
        ),
        (
            "UPDATE answers SET text = CASE text WHEN 'a' THEN 'z' WHEN 'z' THEN 'a' ELSE text END",
            "call 2 brought",
        ),
        (
            'UPDATE answers SET request = (SELECT request FROM calls WHERE id = 2), "index" = '
            "1 WHERE text = 'b'",
            "moved",
        ),
        ("UPDATE answers SET call = 2 WHERE text = 'b'", "moved"),
        ("DELETE FROM answers WHERE text = 'b'", "call 1 brought was changed, moved or removed"),
        ("UPDATE calls SET model = 'm-2'", "call 1 brought was changed"),
        ("UPDATE calls SET output_tokens = 2", "call 1 brought was changed"),
    ],
)
def test_verify_finds_what_is_wrong(tmp_path, monkeypatch, capsys, damage, says):
    cache = Cache(tmp_path / "c.sqlite")
    cache.put(content(0), reply("a", "b"))
    cache.put(content(1), reply("z"))
    assert cache.faults() == [] and cache.undigested() == 0
    with sqlite3.connect(tmp_path / "c.sqlite") as database:
        database.execute(damage)
    assert any(says in fault for fault in cache.faults())
    monkeypatch.setattr(sys, "argv", ["experts.collect", "verify", str(tmp_path / "c.sqlite")])
    with pytest.raises(SystemExit) as stop:
        collect.main()
    assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda path: path.write_bytes(b"this is no database at all" * 100), "not a database"),
        (lambda path: sqlite3.connect(path).execute("CREATE TABLE t (x)"), "something else"),
        (lambda path: sqlite3.connect(path).execute("PRAGMA user_version = 99"), "schema 99"),
        (
            lambda path: sqlite3.connect(path).execute("PRAGMA user_version = 2"),
            "schema 2, this program knows 1",
        ),
        (lambda path: path.mkdir(), "cannot use the cache.*not a file"),
        (lambda path: os.mkfifo(path), "not a file"),
        (lambda path: path.symlink_to(path), "cannot use the cache"),
        (lambda path: path.symlink_to(path.with_name("none") / "x"), "directory must exist"),
    ],
)
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


# ------------------------------------------------------------------ two processes


def buy(path: str, name: str, rounds: int) -> list:
    """In one of two processes, which begin each round at the same moment, the first one making the
    file: what it has got."""
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
        world.broadcast(None)
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
    code = "import sys; sys.path.insert(0, sys.argv[1])\n"
    code += "from experts.cache import Answer, Cache, Reply\ncache = Cache(sys.argv[2])\n"
    code += (
        "n, two = 0, Reply([Answer('a' * 5000, 'stop'), Answer('b', 'stop')], 'm-1', 10, 20, 0.5)\n"
    )
    code += "while True:\n    cache.put({'expert': 'm', 'messages': [n]}, two)\n"
    code += "    n += 1; print(n, flush=True)"
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


# ------------------------------------------------------------------ the file and its place


@pytest.fixture
def filled() -> Path:
    """A cache with two answers, in a place of its own that every user can reach."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = Path(directory) / "place" / "c.sqlite"
        path.parent.mkdir()
        cache = Cache(path)
        cache.put(content(0), reply("a", "b"))
        cache.close()
        yield path
        path.parent.chmod(0o755)


def test_closing_leaves_one_file_and_may_be_repeated(filled):
    assert os.listdir(filled.parent) == ["c.sqlite"]
    cache = Cache(filled)
    cache.close()
    cache.close()
    assert os.listdir(filled.parent) == ["c.sqlite"]
    with pytest.raises(UserError, match="closed"):
        cache.get("r", 1)


def test_while_it_is_open_the_file_alone_has_all_answers(filled, tmp_path):
    cache = Cache(filled)
    for n in range(5):
        cache.put(content(n), reply("a" * 3000, "b"))
    copy = shutil.copy(filled, tmp_path / "copy.sqlite")
    assert len(Cache(copy, read_only=True).entries()) == 12
    cache.close()


def test_the_last_one_to_close_it_brings_the_answers_into_the_one_file(filled):
    first, last = Cache(filled), Cache(filled)
    last.db.execute("BEGIN")
    last.db.execute("SELECT count(*) FROM answers").fetchone()  # reads while the first one closes
    first.put(content(1), reply("z"))
    first.close()
    assert Path(f"{filled}-wal").stat().st_size > 0
    last.db.execute("COMMIT")
    last.close()
    assert os.listdir(filled.parent) == ["c.sqlite"]
    assert len(Cache(filled, read_only=True).entries()) == 3


PROBE = (
    "import sys; sys.path.insert(0, sys.argv[1])\n"
    "from experts.cache import Cache\nfrom training.console import UserError\n"
    "try:\n    cache = Cache(sys.argv[2], read_only=sys.argv[3] == 'read')\n"
    "    print(len(cache.entries())); cache.close()\n"
    "except UserError as error: print(error)\n"
)


def as_a_user(path: Path, how: str) -> str:
    """What somebody says who may read all and write only what the modes allow."""
    command = [sys.executable, "-c", PROBE, str(ROOT), str(path), how]
    if os.getuid() == 0:
        rights = "-all,+dac_read_search"
        command = [
            "setpriv",
            "--reuid",
            "12345",
            "--clear-groups",
            "--inh-caps",
            rights,
            "--ambient-caps",
            "+dac_read_search",
            "--bounding-set",
            rights,
            "--",
            *command,
        ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.stderr
    return done.stdout.strip()


needs_rights = pytest.mark.skipif(
    os.getuid() == 0 and not shutil.which("setpriv"), reason="root writes everywhere"
)


@needs_rights
@pytest.mark.parametrize("place", [0o555, 0o777])
@pytest.mark.parametrize("file", [0o444, 0o666])
@pytest.mark.parametrize("wal", ["none", "empty", "left"])
def test_a_cache_in_a_read_only_place_opens(filled, place, file, wal):
    if wal == "empty":
        Path(f"{filled}-wal").touch()
    if wal == "left":  # as after kill -9
        other = sqlite3.connect(filled)
        other.execute("PRAGMA wal_autocheckpoint = 0")
        other.execute("INSERT INTO claims VALUES ('r', 'o', 0)")
        other.commit()
        log = Path(f"{filled}-wal").read_bytes()
        other.close()
        Path(f"{filled}-wal").write_bytes(log)
    for path in filled.parent.iterdir():
        path.chmod(file)
    filled.parent.chmod(place)
    before = sorted(os.listdir(filled.parent))
    said = as_a_user(filled, "read")
    if wal == "left" and place == 0o555:
        assert "newest answers are in c.sqlite-wal" in said and "copy both files" in said
    else:
        assert said == "2"
    if wal == "none":
        assert sorted(os.listdir(filled.parent)) == before  # nothing is left there
    said = as_a_user(filled, "write")
    if file == 0o666 and place == 0o777:
        assert said == "2"
    else:
        assert said.startswith("cannot use the cache") and "writable" in said
    assert "\n" not in said


@needs_rights
@pytest.mark.parametrize(
    "name", ["a?b.sqlite", "a#b.sqlite", "a b%20.sqlite", "ä☃.sqlite", "a?immutable=1"]
)
def test_any_name_will_do(filled, name):
    path = filled.parent / name
    cache = Cache(path)
    cache.put(content(0), reply("a"))
    cache.close()
    assert sorted(os.listdir(filled.parent)) == sorted(["c.sqlite", name])
    path.chmod(0o444)
    filled.parent.chmod(0o555)
    assert as_a_user(path, "read") == "1"


def test_a_name_that_sqlite_takes_for_something_else_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (":memory:", "file:x?mode=memory"):
        cache = Cache(name)
        cache.put(content(0), reply("a"))
        cache.close()
        assert len(Cache(name, read_only=True).entries()) == 1


def test_a_link_is_followed_with_the_files_beside_it(filled, tmp_path):
    link = tmp_path / "link.sqlite"
    link.symlink_to(filled)
    cache = Cache(link)
    cache.put(content(1), reply("z"))
    assert Path(f"{filled}-wal").exists() and not Path(f"{link}-wal").exists()
    cache.close()
    assert len(Cache(filled, read_only=True).entries()) == 3


def test_an_empty_file_becomes_a_cache_and_is_none_to_read(tmp_path):
    (tmp_path / "c.sqlite").touch()
    with pytest.raises(UserError, match="empty file"):
        Cache(tmp_path / "c.sqlite", read_only=True)
    Cache(tmp_path / "c.sqlite").put(content(0), reply("a"))


def test_a_file_that_was_cut_is_told_in_one_line(filled):
    cache = Cache(filled)
    for n in range(20):
        cache.put(content(n), reply("a" * 3000))
    cache.close()
    os.truncate(filled, filled.stat().st_size // 2)
    with pytest.raises(UserError, match="malformed.*recover") as told:
        Cache(filled, read_only=True).entries()
    assert "\n" not in str(told.value)


def test_a_file_system_that_cannot_lock_or_share_is_told(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # it has no write-ahead log
        patch.setattr(
            Cache, "_connect", lambda cache, how: sqlite3.connect(":memory:", isolation_level=None)
        )
        with pytest.raises(UserError, match="local disk"):
            Cache(tmp_path / "c.sqlite")
    for code in (sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR_LOCK):

        def fails(cache, code=code):
            error = sqlite3.OperationalError("no lock")
            error.sqlite_errorcode = code
            raise error

        monkeypatch.setattr(Cache, "_check", fails)
        with pytest.raises(UserError, match="no lock.*local disk"):
            Cache(tmp_path / "c.sqlite")


def test_a_full_disk_when_it_is_closed_is_told_and_fails_nothing(filled, caplog):
    class Full:
        def execute(self, statement):
            raise sqlite3.OperationalError("database or disk is full")

        def close(self):
            """As a connection."""

    cache = Cache(filled)
    cache.db.close()
    cache.db = Full()
    cache.close()
    assert "c.sqlite-wal, keep it: database or disk is full" in caplog.text


# ------------------------------------------------------------------ older files, other clocks


def test_a_cache_from_before_digests_is_read_and_added_to(filled):
    with sqlite3.connect(filled) as database:
        database.execute("DROP TABLE digests")
    old = Cache(filled, read_only=True)
    assert old.faults() == [] and old.undigested() == 2 and len(old.entries()) == 2
    cache = Cache(filled)
    cache.put(content(0), reply("c"))
    assert cache.faults() == [] and cache.undigested() == 2 and old.undigested() == 2
    assert [answer.text for answer in cache.get(request_id(content(0)), 9)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "until, holds",
    [(-1, False), (5, True), (19, True), (60, False), (1e9, False), (float("inf"), False)],
)
def test_a_claim_holds_for_a_lease_and_no_longer_whatever_the_clock_was(tmp_path, until, holds):
    cache = Cache(tmp_path / "c.sqlite")
    cache.db.execute("INSERT INTO claims VALUES ('r', 'other', ?)", (time.time() + until,))
    assert cache._claim("r", "own") is not holds


def test_a_claim_outlives_a_clock_that_is_set_back(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "LEASE", 1.0)
    one, other = Cache(tmp_path / "c.sqlite"), Cache(tmp_path / "c.sqlite")
    with one.claimed("r", 5):
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() - 3600)
        time.sleep(0.5)  # renewed, by the new clock
        with pytest.raises(TimeoutError), other.claimed("r", 1.5):
            pass


def test_half_a_surrogate_pair_can_be_kept(tmp_path):
    cache = Cache(tmp_path / "c.sqlite")
    half = {**content(0), "messages": ["\ud83d ?"]}
    cache.put(half, Reply([Answer("a \ud83d", "stop")], "m\udc00", None, None, 1.0))
    assert cache.get(request_id(half), 1) == [Answer("a \ufffd", "stop")]
    assert cache.faults() == [] and cache.entries()[0]["model"] == "m\ufffd"
