"""The file of the cache: its tables, how it is opened, checked and closed, and what can go wrong.

    requests   what was asked: expert, prompt, hashes of the images, sampling parameters; its id is
               the hash of all of these
    calls      each time an API was asked: the model that answered, tokens in and out, seconds, when
    answers    the index-th answer to a request: text, finish reason, log-prob if given, and the
               call that brought it
    digests    the signature of each call (integrity.py)
    claims     which requests are being asked at this moment

While it is open there are two files beside it, -wal and -shm. What was written moves from -wal into
the file after each call of an API, and all of it when the last process closes the file. WAL needs
its users on one machine: a network file system will not do. No key and no header is ever in here.
"""

from __future__ import annotations

import atexit
import logging
import os
import sqlite3
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from experts.integrity import DIGESTS
from training.console import UserError

LOG = logging.getLogger("experts")
SCHEMA = 1  # the version of what follows, as the file's user_version
TABLES = """
CREATE TABLE requests (id TEXT PRIMARY KEY, content TEXT NOT NULL);
CREATE TABLE calls (
    id INTEGER PRIMARY KEY, request TEXT NOT NULL REFERENCES requests, model TEXT NOT NULL,
    input_tokens INTEGER, output_tokens INTEGER, seconds REAL NOT NULL, at REAL NOT NULL
);
CREATE TABLE answers (
    request TEXT NOT NULL REFERENCES requests, "index" INTEGER NOT NULL,
    text TEXT, finish TEXT NOT NULL, logp REAL,
    call INTEGER NOT NULL REFERENCES calls, PRIMARY KEY (request, "index")
);
CREATE TABLE claims (request TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL);
"""
BUSY = 60.0  # seconds to wait for another process's writing
LOCAL = (
    "its file system cannot lock or share files as SQLite needs, as many over a network: "
    "keep it on a local disk"
)
ADVICE = {
    sqlite3.SQLITE_BUSY: f"; if no other program holds it, {LOCAL}",
    sqlite3.SQLITE_PROTOCOL: f"; {LOCAL}",
    sqlite3.SQLITE_IOERR: f"; the disk is broken, or {LOCAL}",
    sqlite3.SQLITE_CANTOPEN: "; its directory must exist and be writable, for -wal and -shm",
    sqlite3.SQLITE_READONLY: "; file and directory must be writable (--offline only reads)",
    sqlite3.SQLITE_FULL: "; what was bought before is safe: make room and go on",
    sqlite3.SQLITE_CORRUPT: "; the file is damaged: sqlite3 FILE .recover saves what can be read",
}


class CacheFile:
    """An SQLite file with the tables above. It is made if it is missing, unless read_only.

    UserError if it is no such file, cannot be written or has another schema. read_only: nothing is
    written, and the place may forbid it. Threads share the connection `db` under `lock`. Closed
    when the process ends, if not before.
    """

    def __init__(self, path: str | Path, read_only: bool = False):
        self.path, self.lock = Path(path), threading.Lock()
        self.read_only, self.process, self.ended = read_only, os.getpid(), threading.Event()
        try:
            self.file = self.path.resolve()  # SQLite's files lie beside the target of a link
            if self.file.exists() and not self.file.is_file():
                raise self._unusable("it is not a file")
            if read_only and not self.file.exists():
                raise UserError(f"there is no cache of answers at {path}")
        except (OSError, RuntimeError) as error:  # a link to itself is a RuntimeError
            raise self._unusable(getattr(error, "strerror", None) or error) from None
        with self.problems():
            self.db = self._opened()
            try:
                self._check()
            except BaseException:
                self.db.close()
                raise
        atexit.register(self.close)

    def _unusable(self, why: object) -> UserError:
        return UserError(f"cannot use the cache of answers {self.path}: {why}")

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
                    f"cannot read the cache of answers {self.path}: its newest answers are in "
                    f"{wal.name}, which SQLite reads where it can write only: copy both files to "
                    "such a place"
                ) from None
            return self._connect("immutable=1")

    def _connect(self, how: str) -> sqlite3.Connection:
        # isolation_level: transactions are begun and ended below.
        uri = f"{self.file.as_uri()}?{how}"
        return sqlite3.connect(
            uri, uri=True, timeout=BUSY, isolation_level=None, check_same_thread=False
        )

    def _check(self) -> None:
        """Makes the tables of a new file. UserError if a file has others."""
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
                f"{self.path} has schema {version}, this program knows {SCHEMA}: "
                "choose another --cache"
            )
        if not self.read_only:
            if not writable(self.file):  # SQLite would only say so at the first answer
                raise self._unusable(f"it is read-only{ADVICE[sqlite3.SQLITE_READONLY]}")
            with self.transaction():
                if self._version() == 0:  # no other process was quicker
                    for statement in TABLES.strip().split(";\n"):
                        self.db.execute(statement)
                    self.db.execute(f"PRAGMA user_version = {SCHEMA}")
                self.db.execute(DIGESTS)

    def _version(self) -> int:
        return self.db.execute("PRAGMA user_version").fetchone()[0]

    def _foreign(self) -> bool:
        """Whether there are tables without a version. Ours come in one transaction with it."""
        query = "SELECT count(*), (SELECT user_version FROM pragma_user_version) FROM sqlite_master"
        count, version = self.db.execute(query).fetchone()
        return count > 0 and version == 0

    def _write_ahead(self) -> None:
        """Turns on WAL, so that readers do not wait for the writer."""
        deadline = time.monotonic() + BUSY
        while True:
            try:
                (mode,) = self.db.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:
                # SQLite itself does not wait here for another process that makes the same file.
                if primary(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        if mode != "wal":
            raise self._unusable(LOCAL)

    def close(self) -> None:
        """Brings all answers into the one file and closes it. If another process has it open, the
        last one brings them."""
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
            pass  # the connection is closed already
        except sqlite3.OperationalError as error:  # such as a full disk
            LOG.warning(f"answers are left in {self.path}-wal, keep it: {error}")
        finally:
            with suppress(sqlite3.Error):
                self.db.close()
            self.lock.release()

    @contextmanager
    def problems(self):
        """Turns errors of SQLite into UserError, with advice."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._unusable(f"{error}{ADVICE.get(primary(error), '')}") from None

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


def primary(error: sqlite3.Error) -> int | None:
    """The kind of an error of SQLite; its extended codes are the kind's with higher bits."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def writable(file: Path) -> bool:
    try:
        with file.open("r+b"):
            return True
    except OSError:
        return False
