"""TODO training.rundir"""

import dataclasses
import json
import os
import sys
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from training import storage
from training.console import UserError
from training.distributed import World
from training.storage import write_aside, writing


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


BUSY = "wait until that run has ended, or stop it first"


def open_run(
    config, resume: Path | None, world: World, lines: list[str], left_out: list[dict]
) -> Path:
    """Makes the directory of a new run, which nobody else writes into meanwhile, and tells what of the sets cannot be used.

    lines, left_out: as data.sets.reports returns them.
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
    """Keeps other processes out of a run that is resumed. UserError if one is at it."""
    if resume:
        world.first(lambda: storage.hold(resume, BUSY))


def log(path: Path, records: list[dict], groups: list[dict], bar: tqdm, world: World) -> None:
    """Writes the step's records, in the first process, and moves the bar."""
    if world.rank > 0:
        return
    storage.append(path / "metrics.jsonl", records)
    if groups:
        storage.append(path / "samples.jsonl", groups)
    for record in records:
        if evaluated := {
            name.removeprefix("eval/"): f"{100 * value:.1f}"
            for name, value in record.items()
            if name.startswith("eval/")
        }:
            bar.write(
                f"step {record['step']}: greedy accuracy "
                + "  ".join(f"{name} {value}" for name, value in evaluated.items())
            )
        if "reward" in record:
            bar.set_postfix({
                "reward": f"{record['reward']:.2f}", "accuracy": f"{record['accuracy']:.2f}",
                "experts": f"{record['expert_share']:.2f}", "dead": f"{record['dead_groups']:.2f}", "kl": f"{record['kl']:.2f}",
            }, refresh=False)  # fmt: skip
        elif "loss" in record:
            bar.set_postfix({"loss": f"{record['loss']:.3f}"}, refresh=False)
        bar.update(int("loss" in record))
