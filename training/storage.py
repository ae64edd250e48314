"""Files that survive an interruption: locks, whole replacements, JSONL that can be repaired."""

import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from training.console import UserError, say, say_once

# By directory: this process's locks, which the system releases when the process dies.
HELD: dict[Path, FileLock] = {}


@contextmanager
def writing(path: Path):
    """UserError if the disk is full or read-only, which only the user can repair."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {why}") from error
    except RuntimeError as error:  # torch.save's on a full disk
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            raise UserError(f"cannot write {path}: is the disk full?") from error
        raise


def hold(directory: Path, instead: str) -> None:
    """Keeps other processes out of a directory until this one lets go of it or ends.

    UserError if another process holds it. instead: what the user can do then.
    """
    place = directory.resolve()
    if place in HELD:
        return
    lock = FileLock(place / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process writes into {directory}: {instead}") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise UserError(f"cannot write {place / 'lock'}: {error.strerror}") from None
        say(f"{directory}: this file system has no locks; let no other process write there")
        return
    HELD[place] = lock


@contextmanager
def locked(file: Path):
    """One process at a time works on this file. UserError where none can be written."""
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{file}.lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def let_go(directory: Path) -> None:
    """Ends `hold`, if this process holds the directory."""
    if lock := HELD.pop(directory.resolve(), None):
        lock.release()


def write_aside(path: Path, text: str) -> None:
    """Replaces a file as a whole: a reader sees the old or the new text, never a part."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def append(path: Path, records: list[dict]) -> None:
    """Adds lines of JSON. ValueError for NaN."""
    with writing(path), open(path, "a") as file:
        file.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def lines(path: Path) -> Iterator[tuple[bytes, dict | None]]:
    """Each line of a JSONL file with its record, None if the line is damaged.

    A last line that an interruption cut short is left out.
    """
    *whole, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for line in whole:
        if line.strip():
            yield line, parsed(line)
    if record := parsed(rest):
        yield rest, record


def parsed(line: bytes) -> dict | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read(path: Path) -> list[dict]:
    """The records of a JSONL file, without damaged lines and a last one that was cut short."""
    records = []
    for number, (_, record) in enumerate(lines(path), 1):
        if record is None:
            say_once(f"{path}: line {number} is damaged and left out")
        else:
            records.append(record)
    return records


def mend(path: Path, wanted: Callable[[dict], bool]) -> list[dict]:
    """Keeps the wanted records of a JSONL file, in whole lines, and returns them.

    Damaged lines, without a record or one of which `wanted` raises KeyError or TypeError, are moved
    to PATH.damaged, with a message.
    """
    if not path.exists():
        return []
    kept, records, damaged = [], [], []
    for line, record in lines(path):
        try:
            if wanted(record):
                kept.append(line)
                records.append(record)
        except (KeyError, TypeError):  # no record at all, too
            damaged.append(line)
    with writing(path):
        if damaged:
            aside = path.with_name(path.name + ".damaged")
            with open(aside, "ab") as file:
                file.write(b"".join(line + b"\n" for line in damaged))
                os.fsync(file.fileno())
            say(f"{path}: damaged lines were moved to {aside.name} ({len(damaged)})")
        write_aside(path, b"".join(line + b"\n" for line in kept).decode())
    return records


def forget_after(path: Path, step: int) -> None:
    """Drops the records of steps after `step`, which a resumed run will do again."""
    mend(path, lambda record: record["step"] <= step)


def finite(value):
    """A value for JSON: numbers that JSON does not have (NaN, infinity) become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def sync(path: Path) -> None:
    """Writes a file's content or a directory's names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems sync no directories
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
