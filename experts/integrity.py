"""How a change of what was bought is noticed: each call is signed with a digest of all it brought.

Digests have a table of their own rather than a column, so that older programs and older files go on
working. Calls from before there were digests have none.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import defaultdict

DIGESTS = """
CREATE TABLE IF NOT EXISTS digests (call INTEGER PRIMARY KEY REFERENCES calls, digest TEXT NOT NULL)
"""
CALL = "request, model, input_tokens, output_tokens, seconds, at"  # what a digest is of
ANSWER = 'request, "index", text, finish, logp'


def request_hash(content: object) -> str:
    """The id of a request with this content."""
    data = content if isinstance(content, bytes) else str(content).encode()
    return hashlib.sha256(data).hexdigest()


def digest(call: tuple, answers: list[tuple]) -> str:
    """The hash of a row of calls (without id) and its rows of answers (without call)."""
    rows = json.dumps([call, *answers], default=repr)
    return hashlib.sha256(rows.encode()).hexdigest()


def sign(db: sqlite3.Connection, request: str, call: int) -> None:
    """Adds the digest of what a call has written."""
    row = db.execute(f"SELECT {CALL} FROM calls WHERE id = ?", (call,)).fetchone()
    query = f'SELECT {ANSWER} FROM answers WHERE request = ? AND call = ? ORDER BY "index"'
    answers = db.execute(query, (request, call)).fetchall()
    db.execute("INSERT INTO digests VALUES (?, ?)", (call, digest(row, answers)))


def has_digests(db: sqlite3.Connection) -> bool:
    query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'digests'"
    return db.execute(query).fetchone()[0] == 1


def undigested(db: sqlite3.Connection) -> int:
    """How many answers have no digest, so that `faults` cannot notice a change of them."""
    signed = "SELECT call FROM digests" if has_digests(db) else "SELECT NULL WHERE 0"
    query = f"SELECT count(*) FROM answers WHERE call NOT IN ({signed})"
    return db.execute(query).fetchone()[0]


def faults(db: sqlite3.Connection) -> list[str]:
    """Everything that is wrong with the file, one line each."""
    checked = [" ".join(text.split()) for (text,) in db.execute("PRAGMA integrity_check")]
    found = [text for text in checked if text != "ok"]
    for table, row, missing, *_ in db.execute("PRAGMA foreign_key_check"):
        found.append(f"table {table}, row {row}: points at a missing row of {missing}")
    for request, content in db.execute("SELECT id, content FROM requests"):
        if request_hash(content) != request:
            found.append(f"request {str(request)[:12]}: its content has another hash")
    gaps = "SELECT request FROM answers GROUP BY request"
    gaps += ' HAVING max("index") >= count(*) OR min("index") < 0'
    for (request,) in db.execute(gaps):
        found.append(f"request {str(request)[:12]}: its answers have gaps")
    return found + (changed(db) if has_digests(db) else [])


def changed(db: sqlite3.Connection) -> list[str]:
    """The calls that are no longer, with their answers, what was written."""
    rows = db.execute(f'SELECT call, {ANSWER} FROM answers ORDER BY call, "index", request')
    answers = defaultdict(list)
    for call, *row in rows:
        answers[call].append(tuple(row))
    query = f"SELECT id, digest, {CALL} FROM calls JOIN digests ON digests.call = calls.id"
    found = []
    for call, signed, *row in db.execute(query):
        if digest(tuple(row), answers[call]) != signed:
            request = str(row[0])[:12]
            found.append(
                f"request {request}: what call {call} brought was changed, moved or removed"
            )
    return found
