"""A run's directory: what a run leaves behind.

runs/NAME/config.json          every setting of the run
          metrics.jsonl        one line a step
          samples.jsonl        some whole groups of each step: question and every action with its
                               source, reward, its parts and advantage, and whether it was kept
          left_out.jsonl       records of Reason-RFT-CoT that cannot be used, and why
          curves.png, time.png drawn from metrics.jsonl (curves.py)
          checkpoint-000060/   the model in Hugging Face layout and trainer.pt: the optimizer's
                               state, the step, the number of processes and of threads; with LoRA
                               adapter/, and the merged model only in the last one
          model                a link to the newest complete checkpoint, or a copy of its model
                               if the file system has no links
          lock                 held by the process that writes here
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from training import storage
from training.console import UserError
from training.storage import write_aside, writing

if TYPE_CHECKING:  # PyTorch: seconds, which programs that load no model do without
    from training.distributed import World


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
    """Makes a new run's directory and writes its settings. UserError if it exists or cannot."""
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


BUSY = "wait until that run has ended, or stop it first"


def open_run(
    config, resume: Path | None, world: World, lines: list[str], left_out: list[dict]
) -> Path:
    """The directory of this run. A new one is made, held, and says which records cannot be used.

    lines, left_out: as `data.sets.reports` returns them.
    """

    def make() -> Path:
        name = config.name or f"{config.preset}-{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]
        path = create(config.runs, name, dataclasses.asdict(config))
        storage.hold(path, BUSY)
        print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
        if left_out:
            storage.append(path / "left_out.jsonl", [storage.finite(record) for record in left_out])
        return path

    return resume or world.first(make)


def take(resume: Path | None, world: World) -> None:
    """Keeps other programs out of a run that is resumed. UserError if one is writing there."""
    if resume:
        world.first(lambda: storage.hold(resume, BUSY))
