"""The cache of API answers: one SQLite file for many processes. No answer is paid for twice.

The key of an answer is (request, index). No seed, step or process is part of it, so a second run,
another order and another number of processes find the same answers. An answer is on the disk (WAL,
synchronous=FULL) before anybody uses it.

Whoever asks an API claims the request first and renews the claim while it waits. A claim that is
not renewed (its process was killed) ends after LEASE seconds. One that ends later than any claim
can (the clock was set back) is void.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from experts import integrity
from experts.cache_file import CacheFile
from training.console import UserError

LEASE = 20.0  # seconds that a claim holds unless renewed
SLACK = 1.0  # seconds that the clock may be set back without ending a claim


@dataclass(frozen=True)
class Answer:
    """One answer of an API.

    text: as it came, None where the API gave none (blocked). finish: the API's own reason, in lower
    case. logp: log-density of the text in nats, None if unknown.
    """

    text: str | None
    finish: str
    logp: float | None = None


@dataclass(frozen=True)
class Reply:
    """What one call of an API brought.

    model: the one that says it answered. input_tokens, output_tokens: None if unknown. beside: what
    else may be billed, and is kept nowhere: the number of attempts of unknown cost (this reply is
    one if its tokens are unknown), and tokens in and out of replies that were no use.
    """

    answers: list[Answer]
    model: str
    input_tokens: int | None
    output_tokens: int | None
    seconds: float
    beside: tuple[int, int, int] = (0, 0, 0)


def request_id(content: dict) -> str:
    """The hash of what is asked, in its canonical form."""
    return integrity.request_hash(canonical(content))


def canonical(content: dict) -> str:
    return storable(json.dumps(content, sort_keys=True, ensure_ascii=False))


def storable(text: str) -> str:
    """Without halves of surrogate pairs, which UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Cache(CacheFile):
    """The answers in a cache file: `get` and `put` them, claim a request, list them."""

    def __init__(self, path: str | Path, read_only: bool = False):
        super().__init__(path, read_only)
        self.held: set[str] = set()  # owners of the claims to renew
        if not read_only:
            threading.Thread(target=self._renew, daemon=True).start()

    def get(self, request: str, n: int) -> list[Answer]:
        """The first n answers to a request, or fewer. Their indices have no gaps."""
        query = "SELECT text, finish, logp FROM answers"
        query += ' WHERE request = ? AND "index" < ? ORDER BY "index"'
        with self.lock, self.problems():
            return [Answer(*row) for row in self.db.execute(query, (request, n))]

    def put(self, content: dict, reply: Reply) -> None:
        """Adds a call and its answers behind those that the request has already."""
        request, db = request_id(content), self.db
        with self.lock, self.problems():
            with self.transaction():
                row = request, canonical(content)
                db.execute("INSERT OR IGNORE INTO requests VALUES (?, ?)", row)
                usage = reply.input_tokens, reply.output_tokens, reply.seconds, time.time()
                row = request, storable(reply.model), *usage
                call = db.execute(
                    "INSERT INTO calls VALUES (NULL, ?, ?, ?, ?, ?, ?)", row
                ).lastrowid
                query = "SELECT count(*) FROM answers WHERE request = ?"
                (count,) = db.execute(query, (request,)).fetchone()
                for index, answer in enumerate(reply.answers, count):
                    text = None if answer.text is None else storable(answer.text)
                    row = request, index, text, storable(answer.finish), answer.logp, call
                    db.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)
                integrity.sign(db, request, call)
            # Into the file itself, unless another process reads: a copy of it then has everything.
            with suppress(sqlite3.Error):
                db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    # ------------------------------------------------------------------ claims

    @contextmanager
    def claimed(self, request: str, patience: float):
        """While inside, no other process or thread asks this request. Waits while one does:
        TimeoutError after `patience` seconds."""
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
            query = "DELETE FROM claims WHERE request = ? AND owner = ?"
            with self.lock, self.problems():
                self.db.execute(query, (request, owner))

    def _claim(self, request: str, owner: str) -> bool:
        now = time.time()
        void = "DELETE FROM claims WHERE request = ? AND NOT until BETWEEN ? AND ?"
        with self.lock, self.problems(), self.transaction():
            self.db.execute(void, (request, now, now + LEASE + SLACK))
            row = request, owner, now + LEASE
            return (
                self.db.execute("INSERT OR IGNORE INTO claims VALUES (?, ?, ?)", row).rowcount == 1
            )

    def _renew(self) -> None:
        while not self.ended.wait(LEASE / 5):
            with self.lock, suppress(sqlite3.Error):  # the next answer to be stored will raise it
                until = time.time() + LEASE
                rows = [(until, owner) for owner in list(self.held)]
                self.db.executemany("UPDATE claims SET until = ? WHERE owner = ?", rows)

    # ------------------------------------------------------------------ to look at it

    def calls(self) -> list[dict]:
        """Every call: expert, model, input_tokens, output_tokens, seconds, at."""
        names = ("model", "input_tokens", "output_tokens", "seconds", "at")
        query = (
            f"SELECT content, {', '.join(names)} FROM calls JOIN requests ON requests.id = request"
        )
        with self.lock, self.problems():
            rows = self.db.execute(query).fetchall()
        calls = []
        for content, *row in rows:
            expert = self._content(content)["expert"]
            calls.append({"expert": expert, **dict(zip(names, row, strict=True))})
        return calls

    def entries(self) -> list[dict]:
        """Every answer with its whole key and the model that gave it, by request and index."""
        names = ("index", "text", "finish", "logp", "model", "at")
        query = 'SELECT requests.id, content, "index", text, finish, logp, model, at FROM answers'
        query += " JOIN requests ON requests.id = answers.request JOIN calls ON calls.id = call"
        with self.lock, self.problems():
            rows = self.db.execute(f'{query} ORDER BY calls.id, "index"').fetchall()
        entries = []
        for request, content, *row in rows:
            answer = dict(zip(names, row, strict=True))
            entries.append({"request": request, **self._content(content), **answer})
        return entries

    def _content(self, text: str) -> dict:
        """A request's content. UserError if it is damaged."""
        try:
            content = json.loads(text)
            if isinstance(content["expert"], str):
                return content
        except (ValueError, TypeError, KeyError):
            pass
        command = f"python -m experts.collect verify {self.path}"
        raise UserError(f"{self.path}: a request is damaged: {command} shows which")

    def undigested(self) -> int:
        """How many answers are too old for `faults` to notice a change of them."""
        with self.lock, self.problems():
            return integrity.undigested(self.db)

    def faults(self) -> list[str]:
        """Everything that is wrong with the file, one line each."""
        with self.lock, self.problems():
            return integrity.faults(self.db)
