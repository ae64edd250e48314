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

import argparse
import errno
import getpass
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from tqdm import tqdm


class UserError(Exception):
    """A mistake of the user's or of their machine: told in one line, without traceback, with exit code 2."""


# ---------------------------------------------------------------------------------------------- programs


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are told as all others are: UserError, without the usage text."""

    def error(self, message):
        raise UserError(f"{message} (--help explains every flag)")


def command(program: str, run: Callable, stopped: str = "the same command goes on") -> None:
    """Runs `run(argv)` and prints what it returns, if anything, in the first process.

    A mistake is told in one line, with exit code 2; so is what the system refuses of a file. stopped: what to say after Ctrl-C.
    """
    rank = int(os.environ.get("RANK", 0))
    logging.lastResort = Told()  # what a library has to say, where nothing else is set
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name may hold any byte
    try:
        find_home()
        try:
            said = run(sys.argv[1:])
        finally:
            close_bars()
        if said and rank == 0:
            print(said)
        sys.stdout.flush()
    except UserError as error:
        fail(program, str(error), rank)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:  # no file
            raise
        fail(program, f"{error.filename}: {error.strerror}", rank)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"\nstopped; {stopped}", file=sys.stderr)
        sys.exit(130)


def fail(program: str, message: str, rank: int) -> None:
    """Ends the process with exit code 2 and one line, whatever the message holds."""
    if rank > 0:
        # The first process tells, and torchrun ends the others; who is alone with the mistake tells it.
        time.sleep(10)
    line = " ".join(message.splitlines())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if len(line) > 1000:
        line = f"{line[:700]} ... {line[-250:]}"
    print(f"{program}: error: {line}", file=sys.stderr, flush=True)
    sys.exit(2)


def say(line: str) -> None:
    """A line for the user, above the progress bars."""
    tqdm.write(line, file=sys.stderr)


@cache
def say_once(line: str) -> None:
    say(line)


class Told(logging.Handler):
    """Warnings of a library as lines of ours: none is written into a progress bar."""

    def __init__(self):
        super().__init__(logging.WARNING)

    def emit(self, record):
        say(self.format(record))


def close_bars() -> None:
    """Ends the lines of all progress bars, which an exception leaves open: what is said next has a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def find_home() -> None:
    """Libraries keep caches in the user's home, named after the user. A container may know neither."""
    name = f"uid-{os.getuid()}"
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = name
    if os.path.expanduser("~") != "~":
        return
    home = os.path.join(tempfile.gettempdir(), f"vision-ekipl-{name}")
    os.makedirs(home, mode=0o700, exist_ok=True)
    if os.stat(home).st_uid != os.getuid():  # somebody else made it
        home = tempfile.mkdtemp()
    os.environ["HOME"] = home


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


def let_go(directory: Path) -> None:
    """Of a directory that this process may hold."""
    if lock := HELD.pop(directory.resolve(), None):
        lock.release()


def must_be_new(path: Path) -> None:
    """UserError if there is something at the place of a new run."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # too long a name, a place that nobody may look into
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot make the run directory {path}: {why}") from None
    raise UserError(f"{path} exists: continue it with --resume {path}, or choose another --name")


def create(root: str, name: str, config: dict) -> Path:
    """Makes the directory of a new run and writes its settings. UserError if it exists or cannot be written."""
    path = Path(root) / name
    must_be_new(path)
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make the run directory {path}: {error.strerror}") from None
    with writing(path):
        write_aside(path / "config.json", json.dumps(config, indent=2) + "\n")
    return path


def read_config(path: Path) -> dict:
    """The settings of an earlier run. UserError if there is none here."""
    if not os.path.isdir(path):
        raise UserError(f"no run to resume at {path}")
    try:
        return dict(json.loads((path / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{path} is no run of this program: its config.json is missing or not readable"
        ) from None


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


def save_checkpoint(
    path: Path, step: int, policy, weights: dict, optimizer: dict, processes: int = 1
) -> None:
    """Writes checkpoint-STEP, makes it `model`, and removes the older ones. UserError if it cannot be written.

    weights, optimizer: whole tensors, by name and as a state dict; so another number of processes, or none of them, can read it.
    """
    with writing(path):
        _save_checkpoint(
            path, policy, weights, {"step": step, "processes": processes, "optimizer": optimizer}
        )


def _save_checkpoint(path: Path, policy, weights: dict, trainer: dict) -> None:
    step = trainer["step"]
    final = path / f"checkpoint-{step:06d}"
    aside = path / f"{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    import torch  # seconds, which data.py, blocks.py and the cache of answers do without

    trainer["threads"] = torch.get_num_threads()
    policy.save(aside, weights)
    torch.save(trainer, aside / "trainer.pt")
    for file in [
        *path.glob("*.jsonl"),
        *aside.iterdir(),
        aside,
    ]:  # before the name says that it is complete
        sync(file)
    os.rename(aside, final)
    publish(path)
    for old in checkpoints(path)[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def publish(path: Path) -> None:
    """Makes `model` the newest checkpoint: a link, or where the file system has none a copy of its model.

    Whoever is killed here leaves a run that can be resumed, and the resumed run does it again.
    """
    if not (found := checkpoints(path)):
        return
    newest, new, old = found[-1], path / "model.tmp", path / "model.old"
    remove(new)
    remove(old)
    try:
        new.symlink_to(newest.name)
    except (OSError, NotImplementedError):
        shutil.copytree(newest, new, ignore=shutil.ignore_patterns("trainer.pt"))
        for file in [*new.iterdir(), new]:
            sync(file)
    model = path / "model"
    if os.path.lexists(model) and (is_directory(new) or is_directory(model)):
        os.rename(model, old)  # only links and files can be replaced in one step
    os.replace(new, model)
    sync(path)
    remove(old)


def is_directory(path: Path) -> bool:
    """Whether it is one itself, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def remove(path: Path) -> None:
    """A file, a link or a whole directory, if it is there."""
    if is_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def checkpoints(path: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        found
        for found in path.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", found.name) and found.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(path: Path) -> Path:
    """The newest complete checkpoint. UserError if there is none."""
    found = checkpoints(path)
    if not found and (path / "model" / "trainer.pt").is_file():
        return path / "model"  # a copy of the run, with what the link pointed to in its place
    if not found:
        raise UserError(
            f"{path} was stopped before its first checkpoint: start again with another --name"
        )
    return found[-1]
