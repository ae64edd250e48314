"""The records of a run's steps: metrics.jsonl, samples.jsonl, the progress bar, a tracker."""

import shutil
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from training import curves, storage
from training.console import UserError
from training.distributed import World
from training.trackers import Tracker

SHOWN = {  # figures in the bar
    "reward": "reward",
    "accuracy": "accuracy",
    "experts": "expert_share",
    "dead": "dead_groups",
    "kl": "kl",
}


def pictures_of(groups: list) -> list[Image.Image]:
    pictures = []
    for group in groups:
        pictures += group.state.images
    return pictures


class StepLog:
    """Writes a run's records, in the first process. done: steps of earlier processes.

    UserError if the tracker of `config` cannot start.
    """

    def __init__(self, config, path: Path, done: int, world: World):
        self.path, self.first, self.steps = path, world.rank == 0, config.steps
        self.complete = done == config.steps
        self.tracker = None
        world.first(lambda: self.start_tracker(config, done))
        self.bar = tqdm(
            total=config.steps,
            initial=done,
            desc=path.name,
            disable=not self.first,
            dynamic_ncols=True,
        )

    def start_tracker(self, config, done: int) -> None:
        try:
            self.tracker = Tracker(config, self.path, done)
        except UserError:
            if done == 0:  # else the run's name would be taken, by a run that cannot be resumed
                storage.let_go(self.path)
                shutil.rmtree(self.path)
            raise

    def write(self, record: dict, groups: list = ()) -> None:
        """One step's record, and the groups (sampling.Group) that are kept for people to read."""
        if not self.first:
            return
        storage.append(self.path / "metrics.jsonl", [record])
        transcripts = [group.transcript(record["step"]) for group in groups]
        if groups:
            storage.append(self.path / "samples.jsonl", transcripts)
        tested = {key: value for key, value in record.items() if key.startswith("eval/")}
        if tested:
            accuracy = [f"{key[5:]} {100 * value:.1f}" for key, value in tested.items()]
            self.bar.write(f"step {record['step']}: greedy accuracy {'  '.join(accuracy)}")
        shown = groups if tested or record["step"] == self.steps else ()
        pictures = partial(pictures_of, shown)
        self.tracker.write(record, transcripts if shown else [], pictures)
        if "reward" in record:
            figures = {name: f"{record[key]:.2f}" for name, key in SHOWN.items()}
            self.bar.set_postfix(figures, refresh=False)
        elif "loss" in record:
            self.bar.set_postfix({"loss": f"{record['loss']:.3f}"}, refresh=False)
        self.bar.update(int("loss" in record))

    def close(self) -> None:
        """Ends the run. Draws its pictures if no step was left to do it."""
        self.bar.close()
        if self.first and self.complete:  # it was stopped after its last checkpoint
            curves.draw_run(self.path / "metrics.jsonl", self.path.name)
        if self.first:
            self.tracker.close()
        storage.let_go(self.path)
