"""A run's directory: what a run leaves behind, and how it goes on after an interruption.

    runs/NAME/config.json          every setting of the run
              metrics.jsonl        one line a step
              samples.jsonl        a few whole groups a step: question, every action, its source, reward, advantage, kept or not
              left_out.jsonl       the records of Reason-RFT-CoT that could not be used, and why (data.py)
              curves.png, time.png drawn from metrics.jsonl (curves.py)
              checkpoint-000060/   the model in Hugging Face layout and trainer.pt (the optimizer's state, the step, how many processes)
              model                a link to the newest complete checkpoint

A checkpoint is written aside, synced to the disk and renamed, so that whatever moment the run is killed at, the last complete one
is whole. All randomness follows from the seed and the step, so weights, optimizer and step are the whole state.
"""

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class UserError(Exception):
    """A mistake of the user's or of their machine: told in one line, without traceback, with exit code 2."""


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


def must_be_new(path: Path) -> None:
    """UserError if there is something at the place of a new run."""
    if path.exists():
        raise UserError(
            f"{path} exists: continue it with --resume {path}, or choose another --name"
        )


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
    if not path.is_dir():
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


def read(path: Path) -> list[dict]:
    """The records of a JSONL file; a last line that an interruption cut short is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def forget_after(path: Path, step: int) -> None:
    """Drops the records of steps after `step`, which a resumed run will do again."""
    if path.exists():
        kept = [record for record in read(path) if record["step"] <= step]
        with writing(path):
            write_aside(path, "".join(json.dumps(record) + "\n" for record in kept))


def sync(path: Path) -> None:
    """Onto the disk, a file's content or a directory's names."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save_checkpoint(
    path: Path, step: int, policy, weights: dict, optimizer: dict, processes: int = 1
) -> None:
    """Writes checkpoint-STEP, points `model` at it, and removes the older ones. UserError if it cannot be written.

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

    policy.save(aside, weights)
    torch.save(trainer, aside / "trainer.pt")
    for file in [
        *path.glob("*.jsonl"),
        *aside.iterdir(),
        aside,
    ]:  # before the name says that it is complete
        sync(file)
    os.rename(aside, final)
    link = path / "model.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, path / "model")
    sync(path)
    for old in checkpoints(path)[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(path: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        found for found in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", found.name)
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(path: Path) -> Path:
    """The newest complete checkpoint. UserError if there is none."""
    if not (found := checkpoints(path)):
        raise UserError(
            f"{path} was stopped before its first checkpoint: start again with another --name"
        )
    return found[-1]
