"""A run's directory: what a run leaves behind, and how it goes on after an interruption.

    runs/NAME/config.json          every setting of the run
              metrics.jsonl        one line a step
              samples.jsonl        a few whole groups a step: question, every action, its source, reward, advantage, kept or not
              left_out.jsonl       the records of Reason-RFT-CoT that could not be used, and why (data.py)
              curves.png, time.png drawn from metrics.jsonl (curves.py)
              checkpoint-000060/   the model in Hugging Face layout and trainer.pt: the optimizer's state,
                                   the step, the number of processes and of threads
              model                a link to the newest complete checkpoint, or where the file system
                                   has no links a copy of its model
              lock                 held by the process that writes here

A checkpoint is written aside, synced to the disk and renamed, so that whatever moment the run is killed at, the last complete one
is whole. All randomness follows from the seed and the step, so weights, optimizer and step are the whole state.

What every program's command line and end have in common stands here too: `Parser`, `command`.
"""

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

# ---------------------------------------------------------------------------------------------- the directory


@contextmanager
def writing(path: Path):
    """A full or read-only disk is the user's to mend: UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(
            error
        ):  # torch.save on a full disk
            raise UserError(f"cannot write {path}: is the disk full?") from error
        raise


HELD: dict[
    Path, FileLock
] = {}  # by directory: this process's locks, which the system releases when it dies


def hold(directory: Path, instead: str) -> None:
    """Keeps every other process out of a directory until this one lets go of it or ends; it may come back to its own.

    UserError if another process has it. instead: what the user can do then.
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
    """One process at a time, of all that use this file. UserError where none can be written."""
    with writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{file}.lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def let_go(directory: Path) -> None:
    """Of a directory that this process may hold."""
    if lock := HELD.pop(directory.resolve(), None):
        lock.release()


def write_aside(path: Path, text: str) -> None:
    """Replaces a file as a whole: whoever reads it sees the old or the new text."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def append(path: Path, records: list[dict]) -> None:
    """Adds lines of JSON, whole lines only, NaN not allowed."""
    with writing(path), open(path, "a") as file:
        file.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def lines(path: Path) -> Iterator[tuple[bytes, dict | None]]:
    """Each line of a JSONL file with its record, None where it holds none: something has damaged it.

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
    """The records of a JSONL file. Damaged lines and a last one that an interruption cut short are left out."""
    records = []
    for number, (_, record) in enumerate(lines(path), 1):
        if record is None:
            say_once(f"{path}: line {number} is damaged and left out")
        else:
            records.append(record)
    return records


def mend(path: Path, wanted: Callable[[dict], bool]) -> list[dict]:
    """Leaves the records that are wanted in a JSONL file, in whole lines to append to, and returns them.

    Damaged lines are moved to PATH.damaged, and that is told: those that hold no record, or one of
    which `wanted` raises KeyError or TypeError.
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
    """A value of JSON with the name of a number in the place of one that JSON does not know: NaN, Infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------- checkpoints


def sync(path: Path) -> None:
    """Onto the disk, a file's content or a directory's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems sync no directories
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
