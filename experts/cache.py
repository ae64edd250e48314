"""The cache of API answers: one SQLite file that many processes fill together, so that no answer is paid for twice.

    requests   what was asked: expert, prompt, hashes of the images, sampling parameters; its id is the hash of all of these
    calls      each time an API was asked: the model that answered, tokens in and out, seconds, when
    answers    the index-th answer to a request: text, finish reason, log-prob if given, and the call that brought it
    digests    of all that a call brought, as it was written; calls of earlier versions have none
    claims     which requests somebody is asking at this moment

The key of an answer is (request, index): no seed, step or process is part of it, so that a second run, another order and another
number of processes find the same answers. An answer is on the disk (WAL, synchronous=FULL) before anybody uses it. Who asks
an API claims the request first and renews the claim while it waits; a claim that nobody renews (its process was killed) ends
after LEASE seconds, and one that ends later than any claim can (the clock was set back) is void.

While it is open there are two files beside it, -wal and -shm. What was written moves from -wal into the file after each call of an
API, and wholly when the last process closes it. WAL needs its users on one machine: a network file system will not do. No key and
no header is ever in here.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from training.console import UserError

LOG = logging.getLogger("experts")
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
# Beside them rather than a column: programs and files from before it go on working.
DIGESTS = "CREATE TABLE IF NOT EXISTS digests (call INTEGER PRIMARY KEY REFERENCES calls, digest TEXT NOT NULL)"
CALL = "request, model, input_tokens, output_tokens, seconds, at"  # what a digest is of
ANSWER = 'request, "index", text, finish, logp'
LEASE = 20.0  # seconds that a claim holds unless renewed
SLACK = 1.0  # seconds that the clock may be set back without ending a claim
BUSY = 60.0  # seconds to wait for another process's writing
LOCAL = "its file system cannot lock or share files as SQLite needs, as many over a network: keep it on a local disk"
ADVICE = {
    sqlite3.SQLITE_BUSY: f"; if no other program holds it, {LOCAL}",
    sqlite3.SQLITE_PROTOCOL: f"; {LOCAL}",
    sqlite3.SQLITE_IOERR: f"; the disk is broken, or {LOCAL}",
    sqlite3.SQLITE_CANTOPEN: "; its directory must exist and be writable, for the files -wal and -shm beside it",
    sqlite3.SQLITE_READONLY: "; file and directory must be writable (--offline only reads)",
    sqlite3.SQLITE_FULL: "; what was bought before is safe: make room and go on",
    sqlite3.SQLITE_CORRUPT: "; the file is damaged: sqlite3 FILE .recover saves what can be read",
}


@dataclass(frozen=True)
class Answer:
    """One answer of an API. text: as it came, None where the API gave none (blocked). finish: the API's own reason, in lower case.
    logp: log-density of the text in nats, None if untold."""

    text: str | None
    finish: str
    logp: float | None = None


@dataclass(frozen=True)
class Reply:
    """What one call of an API brought. model: the one that says it answered. input_tokens, output_tokens: None if untold.
    beside: what else may be billed (kept nowhere): attempts whose cost nobody tells, this reply too if its tokens are untold; and
    tokens in and out of replies that were no use."""

    answers: list[Answer]
    model: str
    input_tokens: int | None
    output_tokens: int | None
    seconds: float
    beside: tuple[int, int, int] = (0, 0, 0)


def request_id(content: dict) -> str:
    """The hash of what is asked, in its canonical form."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def canonical(content: dict) -> str:
    return storable(json.dumps(content, sort_keys=True, ensure_ascii=False))


def storable(text: str) -> str:
    """Without halves of surrogate pairs, which UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def digest(call: tuple, answers: list[tuple]) -> str:
    """The hash of a row of calls (without id) and its rows of answers (without call)."""
    rows = json.dumps([call, *answers], default=repr)
    return hashlib.sha256(rows.encode()).hexdigest()


def primary(error: sqlite3.Error) -> int | None:
    """SQLite's kind of an error; its extended codes are the kind's with higher bits."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def writable(file: Path) -> bool:
    try:
        with file.open("r+b"):
            return True
    except OSError:
        return False


class Cache:
    """The cache file at `path`, made if it is missing, unless read_only. UserError if it is none, cannot be written or has another schema.

    read_only: nothing is written, and the place may forbid it. Closed when the process ends, if not before.
    """

    def __init__(self, path: str | Path, read_only: bool = False):
        self.path, self.lock = Path(path), threading.Lock()
        self.read_only, self.process, self.ended = read_only, os.getpid(), threading.Event()
        self.held: set[str] = set()  # owners of the claims to renew
        try:
            self.file = self.path.resolve()  # SQLite's files lie beside the target of a link
            if self.file.exists() and not self.file.is_file():
                raise UserError(f"cannot use the cache of answers {path}: it is not a file")
            if read_only and not self.file.exists():
                raise UserError(f"there is no cache of answers at {path}")
        except (OSError, RuntimeError) as error:  # a link to itself is a RuntimeError
            why = getattr(error, "strerror", None) or error
            raise UserError(f"cannot use the cache of answers {path}: {why}") from None
        with self.problems():
            self.db = self._opened()
            try:
                self._check()
            except BaseException:
                self.db.close()
                raise
        atexit.register(self.close)
        if not read_only:
            threading.Thread(target=self._renew, daemon=True).start()

    def _opened(self) -> sqlite3.Connection:
        if not self.read_only:
            return self._connect("mode=rwc")
        wal = Path(f"{self.file}-wal")
        if not wal.exists() and not writable(self.file):
            return self._connect("immutable=1")  # else SQLite would leave files beside it
        db = self._connect("mode=rw")
        try:
            db.execute("SELECT count(*) FROM sqlite_master")
            return db
        except sqlite3.OperationalError as error:
            db.close()
            if primary(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                raise
            if wal.exists() and wal.stat().st_size:
                raise UserError(
                    f"cannot read the cache of answers {self.path}: its newest answers are in {wal.name}, which SQLite "
                    "reads where it can write only: copy both files to such a place"
                ) from None
            return self._connect("immutable=1")

    def _connect(self, how: str) -> sqlite3.Connection:
        # Whole transactions are said below; threads share the connection under the lock.
        return sqlite3.connect(
            f"{self.file.as_uri()}?{how}", uri=True, timeout=BUSY, isolation_level=None,
            check_same_thread=False,
        )  # fmt: skip

    def _check(self) -> None:
        """Makes the tables of a new file. UserError if they are not what this program knows."""
        self.db.execute("PRAGMA synchronous = FULL")
        version = self._version()
        if version == 0 and self._foreign():
            raise UserError(f"{self.path} is a database of something else, not a cache of answers")
        if version == 0 and self.read_only:
            raise UserError(f"{self.path} is an empty file: there are no answers in it")
        if version == 0:
            self._write_ahead()
        if version not in (0, SCHEMA):
            raise UserError(
                f"{self.path} has schema {version}, this program knows {SCHEMA}: choose another --cache"
            )
        if not self.read_only:
            if not writable(self.file):  # SQLite would tell at the first answer
                why = f"it is read-only{ADVICE[sqlite3.SQLITE_READONLY]}"
                raise UserError(f"cannot use the cache of answers {self.path}: {why}")
            with self.transaction():
                if self._version() == 0:  # nobody else was quicker
                    for statement in TABLES.strip().split(";\n"):
                        self.db.execute(statement)
                    self.db.execute(f"PRAGMA user_version = {SCHEMA}")
                self.db.execute(DIGESTS)

    def _version(self) -> int:
        return self.db.execute("PRAGMA user_version").fetchone()[0]

    def _write_ahead(self) -> None:
        """WAL: readers do not wait for the writer."""
        deadline = time.monotonic() + BUSY
        while True:
            try:
                (mode,) = self.db.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:  # here SQLite itself does not wait for another process that makes the same file
                if primary(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        if mode != "wal":
            raise UserError(f"cannot use the cache of answers {self.path}: {LOCAL}")

    def _foreign(self) -> bool:
        """Whether there are tables although there is no version: ours come in one transaction with it."""
        count, version = self.db.execute(
            "SELECT count(*), (SELECT user_version FROM pragma_user_version) FROM sqlite_master"
        ).fetchone()
        return count > 0 and version == 0

    def close(self) -> None:
        """Brings all answers into the one file, if no other process has it open (else the last one does), and closes it."""
        atexit.unregister(self.close)
        if self.ended.is_set() or self.process != os.getpid():  # a fork leaves it to its parent
            return
        self.ended.set()
        if not self.lock.acquire(timeout=10):
            return  # a thread waits for the disk; what it has written is safe in -wal
        try:
            self.db.execute("PRAGMA busy_timeout = 1000")
            if not self.read_only:
                self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.ProgrammingError:
            pass  # somebody closed the connection
        except sqlite3.OperationalError as error:  # a full disk, say
            LOG.warning("answers are left in %s-wal, keep it: %s", self.path, error)
        finally:
            with suppress(sqlite3.Error):
                self.db.close()
            self.lock.release()

    @contextmanager
    def problems(self):
        """A file that SQLite cannot use is the user's to mend."""
        try:
            yield
        except sqlite3.Error as error:
            why = f"{error}{ADVICE.get(primary(error), '')}"
            raise UserError(f"cannot use the cache of answers {self.path}: {why}") from None

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
        with self.lock, self.problems():
            with self.transaction():
                self.db.execute(
                    "INSERT OR IGNORE INTO requests VALUES (?, ?)", (request, canonical(content))
                )
                usage = reply.input_tokens, reply.output_tokens, reply.seconds, time.time()
                call = self.db.execute(
                    "INSERT INTO calls VALUES (NULL, ?, ?, ?, ?, ?, ?)",
                    (request, storable(reply.model), *usage),
                ).lastrowid
                (count,) = self.db.execute(
                    "SELECT count(*) FROM answers WHERE request = ?", (request,)
                ).fetchone()
                for index, answer in enumerate(reply.answers, count):
                    text = None if answer.text is None else storable(answer.text)
                    row = request, index, text, storable(answer.finish), answer.logp, call
                    self.db.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)
                self._sign(request, call)
            # Into the file itself, as far as nobody reads it: whoever copies it has what there is.
            with suppress(sqlite3.Error):
                self.db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _sign(self, request: str, call: int) -> None:
        """Adds the digest of what a call has written."""
        row = self.db.execute(f"SELECT {CALL} FROM calls WHERE id = ?", (call,)).fetchone()
        answers = self.db.execute(
            f'SELECT {ANSWER} FROM answers WHERE request = ? AND call = ? ORDER BY "index"',
            (request, call),
        ).fetchall()
        self.db.execute("INSERT INTO digests VALUES (?, ?)", (call, digest(row, answers)))

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
            self.db.execute(
                "DELETE FROM claims WHERE request = ? AND NOT until BETWEEN ? AND ?",
                (request, now, now + LEASE + SLACK),
            )
            return (
                self.db.execute(
                    "INSERT OR IGNORE INTO claims VALUES (?, ?, ?)", (request, owner, now + LEASE)
                ).rowcount
                == 1
            )

    def _renew(self) -> None:
        while not self.ended.wait(LEASE / 5):
            with self.lock, suppress(sqlite3.Error):  # whoever stores an answer next will tell
                self.db.executemany(
                    "UPDATE claims SET until = ? WHERE owner = ?",
                    [(time.time() + LEASE, owner) for owner in list(self.held)],
                )

    # ------------------------------------------------------------------------------------------ to look at it

    def calls(self) -> list[dict]:
        """Every call: expert, model, input_tokens, output_tokens, seconds, at."""
        with self.lock, self.problems():
            rows = self.db.execute(
                f"SELECT content, {CALL} FROM calls JOIN requests ON requests.id = request"
            ).fetchall()
        names = ("model", "input_tokens", "output_tokens", "seconds", "at")
        return [
            {"expert": self._content(content)["expert"], **dict(zip(names, row, strict=True))}
            for content, _, *row in rows
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
            {"request": request, **self._content(content), **dict(zip(names, row, strict=True))}
            for request, content, *row in rows
        ]

    def _content(self, text: str) -> dict:
        """A request's content. UserError if it is damaged."""
        try:
            content = json.loads(text)
            if isinstance(content["expert"], str):
                return content
        except (ValueError, TypeError, KeyError):
            pass
        raise UserError(f"{self.path}: a request is damaged: python experts.py verify tells which")

    def undigested(self) -> int:
        """Answers in which `faults` cannot notice a change, as they were bought before there were digests."""
        with self.lock, self.problems():
            signed = "SELECT call FROM digests" if self._has_digests() else "SELECT NULL WHERE 0"
            query = f"SELECT count(*) FROM answers WHERE call NOT IN ({signed})"
            return self.db.execute(query).fetchone()[0]

    def _has_digests(self) -> bool:
        names = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'digests'"
        return self.db.execute(names).fetchone()[0] == 1

    def faults(self) -> list[str]:
        """What is wrong with the file, nothing if nothing is."""
        with self.lock, self.problems():
            checked = [
                " ".join(text.split()) for (text,) in self.db.execute("PRAGMA integrity_check")
            ]
            found = [text for text in checked if text != "ok"]
            found += [
                f"table {row[0]}, row {row[1]}: points at a missing row of {row[2]}"
                for row in self.db.execute("PRAGMA foreign_key_check")
            ]
            for request, content in self.db.execute("SELECT id, content FROM requests"):
                if request_hash(content) != request:
                    found.append(f"request {str(request)[:12]}: its content has another hash")
            gaps = 'SELECT request FROM answers GROUP BY request HAVING max("index") >= count(*) OR min("index") < 0'
            found += [
                f"request {str(request)[:12]}: its answers have gaps"
                for (request,) in self.db.execute(gaps)
            ]
            if self._has_digests():
                found += self._changed()
        return found

    def _changed(self) -> list[str]:
        """The calls that are not, with their answers, what was written."""
        rows = self.db.execute(
            f'SELECT call, {ANSWER} FROM answers ORDER BY call, "index", request'
        )
        answers = {
            call: [row[1:] for row in group] for call, group in groupby(rows, lambda row: row[0])
        }
        query = f"SELECT id, digest, {CALL} FROM calls JOIN digests ON digests.call = calls.id"
        return [
            f"request {str(row[0])[:12]}: what call {call} brought was changed, moved or removed"
            for call, told, *row in self.db.execute(query)
            if digest(tuple(row), answers.get(call, [])) != told
        ]


def request_hash(content: object) -> str:
    """The id that a request's stored content should have."""
    data = content if isinstance(content, bytes) else str(content).encode()
    return hashlib.sha256(data).hexdigest()
