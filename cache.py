"""The cache of API answers: one SQLite file that many processes fill together, so that no answer is paid for twice.

    requests   what was asked: expert, prompt, hashes of the images, sampling parameters; its id is the hash of all of these
    calls      each time an API was asked: the model that answered, tokens in and out, seconds, when
    answers    the index-th answer to a request: text, finish reason, log-prob if given, and the call that brought it
    claims     which requests somebody is asking at this moment

The key of an answer is (request, index): no seed, step or process is part of it, so that a second run, another order and another
number of processes find the same answers. An answer is on the disk (WAL, synchronous=FULL) before anybody uses it. Who asks
an API claims the request first and renews the claim while it waits; a claim that nobody renews (its process was killed) ends
after LEASE seconds. WAL needs its users on one machine: a network file system will not do. No key and no header is ever in here.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runs import UserError

SCHEMA = 1  # the version of what follows, as the file's user_version
TABLES = """
CREATE TABLE requests (id TEXT PRIMARY KEY, content TEXT NOT NULL);
CREATE TABLE calls (
    id INTEGER PRIMARY KEY, request TEXT NOT NULL REFERENCES requests, model TEXT NOT NULL, input_tokens INTEGER, output_tokens INTEGER,
    seconds REAL NOT NULL, at REAL NOT NULL
);
CREATE TABLE answers (
    request TEXT NOT NULL REFERENCES requests, "index" INTEGER NOT NULL, text TEXT, finish TEXT NOT NULL, logp REAL,
    call INTEGER NOT NULL REFERENCES calls, PRIMARY KEY (request, "index")
);
CREATE TABLE claims (request TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL);
"""
LEASE = 20.0  # seconds that a claim holds unless renewed
BUSY = 60.0  # seconds to wait for another process's writing


@dataclass(frozen=True)
class Answer:
    """One answer of an API. text: as it came, None where the API gave none (blocked). finish: the API's own reason, in lower case.
    logp: log-density of the text in nats, None if untold."""

    text: str | None
    finish: str
    logp: float | None = None


@dataclass(frozen=True)
class Reply:
    """What one call of an API brought. model: the one that says it answered. input_tokens, output_tokens: None if untold."""

    answers: list[Answer]
    model: str
    input_tokens: int | None
    output_tokens: int | None
    seconds: float


def request_id(content: dict) -> str:
    """The hash of what is asked, in its canonical form."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def canonical(content: dict) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=False)


class Cache:
    """The cache file at `path`, made if it is missing, unless read_only. UserError if it is none, cannot be written or has another schema."""

    def __init__(self, path: str | Path, read_only: bool = False):
        self.path, self.lock = Path(path), threading.Lock()
        self.held: set[str] = set()  # owners of the claims to renew
        if read_only and not self.path.is_file():
            raise UserError(f"there is no cache of answers at {path}")
        with self.problems():
            # Whole transactions are said below; threads share the connection under the lock.
            self.db = sqlite3.connect(
                self.path, timeout=BUSY, isolation_level=None, check_same_thread=False
            )
            self.db.execute("PRAGMA synchronous = FULL")
            version = self.db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and self._foreign():
                raise UserError(f"{path} is a database of something else, not a cache of answers")
            if version == 0 and not read_only:
                self._write_ahead()
                with self.transaction():
                    if (
                        version := self.db.execute("PRAGMA user_version").fetchone()[0]
                    ) == 0:  # nobody else was quicker
                        for statement in TABLES.strip().split(";\n"):
                            self.db.execute(statement)
                        self.db.execute(f"PRAGMA user_version = {SCHEMA}")
                        version = SCHEMA
        if version != SCHEMA:
            raise UserError(
                f"{path} has schema {version}, this program knows {SCHEMA}: choose another --cache"
            )
        if not read_only:
            threading.Thread(target=self._renew, daemon=True).start()

    def _write_ahead(self) -> None:
        """WAL: readers do not wait for the writer."""
        deadline = time.monotonic() + BUSY
        while True:
            try:
                self.db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:  # here SQLite itself does not wait for another process that makes the same file
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _foreign(self) -> bool:
        """Whether there are tables although there is no version: ours come in one transaction with it."""
        count, version = self.db.execute(
            "SELECT count(*), (SELECT user_version FROM pragma_user_version) FROM sqlite_master"
        ).fetchone()
        return count > 0 and version == 0

    @contextmanager
    def problems(self):
        """A file that SQLite cannot use is the user's to mend."""
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(f"cannot use the cache of answers {self.path}: {error}") from None

    @contextmanager
    def transaction(self):
        """All or nothing, one writer at a time over all processes."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise

    def get(self, request: str, n: int) -> list[Answer]:
        """The answers 0 .. n - 1 to a request, as far as there are any; answers are stored in order, without gaps."""
        with self.lock, self.problems():
            rows = self.db.execute(
                'SELECT text, finish, logp FROM answers WHERE request = ? AND "index" < ? ORDER BY "index"',
                (request, n),
            )
            return [Answer(*row) for row in rows]

    def put(self, content: dict, reply: Reply) -> None:
        """Adds a call and its answers behind those that the request has already."""
        request = request_id(content)
        with self.lock, self.problems(), self.transaction():
            self.db.execute(
                "INSERT OR IGNORE INTO requests VALUES (?, ?)", (request, canonical(content))
            )
            usage = reply.input_tokens, reply.output_tokens, reply.seconds, time.time()
            call = self.db.execute(
                "INSERT INTO calls VALUES (NULL, ?, ?, ?, ?, ?, ?)", (request, reply.model, *usage)
            ).lastrowid
            (count,) = self.db.execute(
                "SELECT count(*) FROM answers WHERE request = ?", (request,)
            ).fetchone()
            rows = [
                (request, count + i, answer.text, answer.finish, answer.logp, call)
                for i, answer in enumerate(reply.answers)
            ]
            self.db.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", rows)

    # ------------------------------------------------------------------------------------------ claims

    @contextmanager
    def claimed(self, request: str, patience: float):
        """While inside, nobody else asks this request. Waits for whoever does, TimeoutError after `patience` seconds."""
        owner, deadline = uuid.uuid4().hex, time.monotonic() + patience
        while not self._claim(request, owner):
            if time.monotonic() > deadline:
                raise TimeoutError("another process is asking the same")
            time.sleep(0.1)
        self.held.add(owner)
        try:
            yield
        finally:
            self.held.discard(owner)
            with self.lock, self.problems():
                self.db.execute(
                    "DELETE FROM claims WHERE request = ? AND owner = ?", (request, owner)
                )

    def _claim(self, request: str, owner: str) -> bool:
        now = time.time()
        with self.lock, self.problems(), self.transaction():
            self.db.execute("DELETE FROM claims WHERE request = ? AND until < ?", (request, now))
            return (
                self.db.execute(
                    "INSERT OR IGNORE INTO claims VALUES (?, ?, ?)", (request, owner, now + LEASE)
                ).rowcount
                == 1
            )

    def _renew(self) -> None:
        while True:
            time.sleep(LEASE / 5)
            if owners := list(self.held):
                with self.lock:
                    try:
                        self.db.executemany(
                            "UPDATE claims SET until = ? WHERE owner = ?",
                            [(time.time() + LEASE, owner) for owner in owners],
                        )
                    except (
                        sqlite3.Error
                    ):  # a full disk, say: whoever stores an answer next will tell
                        pass

    # ------------------------------------------------------------------------------------------ to look at it

    def calls(self) -> list[dict]:
        """Every call: expert, model, input_tokens, output_tokens, seconds, at."""
        with self.lock, self.problems():
            rows = self.db.execute(
                "SELECT content, model, input_tokens, output_tokens, seconds, at FROM calls JOIN requests ON requests.id = request"
            ).fetchall()
        names = ("model", "input_tokens", "output_tokens", "seconds", "at")
        return [
            {"expert": json.loads(content)["expert"], **dict(zip(names, row, strict=True))}
            for content, *row in rows
        ]

    def entries(self) -> list[dict]:
        """Every answer with its whole key and the model that gave it, by request and index."""
        query = (
            'SELECT requests.id, content, "index", text, finish, logp, model, at FROM answers JOIN requests ON requests.id = answers.request '
            'JOIN calls ON calls.id = call ORDER BY calls.id, "index"'
        )
        with self.lock, self.problems():
            rows = self.db.execute(query).fetchall()
        names = ("index", "text", "finish", "logp", "model", "at")
        return [
            {"request": request, **json.loads(content), **dict(zip(names, row, strict=True))}
            for request, content, *row in rows
        ]

    def faults(self) -> list[str]:
        """What is wrong with the file, nothing if nothing is."""
        with self.lock, self.problems():
            found = [text for (text,) in self.db.execute("PRAGMA integrity_check") if text != "ok"]
            found += [
                f"table {row[0]}, row {row[1]}: points at a missing row of {row[2]}"
                for row in self.db.execute("PRAGMA foreign_key_check")
            ]
            for request, content in self.db.execute("SELECT id, content FROM requests"):
                if hashlib.sha256(content.encode()).hexdigest() != request:
                    found.append(f"request {request[:12]}: its content has another hash")
            gaps = 'SELECT request FROM answers GROUP BY request HAVING max("index") >= count(*) OR min("index") < 0'
            found += [
                f"request {request[:12]}: its answers have gaps"
                for (request,) in self.db.execute(gaps)
            ]
        return found
