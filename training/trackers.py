"""Trackers: the figures of a run in TensorBoard or Weights & Biases, beside metrics.jsonl.

    pip install tensorboard    # --tracker tensorboard; tensorboard --logdir runs
    pip install wandb          # --tracker wandb; WANDB_MODE=offline needs no account

Every number of a step's record goes there; with an evaluation, and after the last step, those
groups of that step that samples.jsonl has, as a table, with the pictures of their questions; at the
end the run's own pictures. W&B shows the steps that a resumed run makes again twice.
Neither package is imported unless it is asked for. A tracker that fails after the start is left
out: metrics.jsonl has everything, and a run of days does not end with somebody's server.
"""

import dataclasses
import json
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from training import console
from training.console import UserError

COLUMNS = ("question", "answer", "source", "text", "reward", "kept", "advantage")
LARGEST = 512  # pixels of a picture's longer side
FINISH = 60.0  # seconds that the end of a run waits for wandb's server


def rows_of(groups: list[dict]) -> list[list]:
    """A row of COLUMNS for each action. groups: records of samples.jsonl."""
    rows = []
    for group in groups:
        for action in group["actions"]:
            told = [action[name] for name in COLUMNS[2:]]
            rows.append([group["question"], group["answer"], *told])
    return rows


class TensorBoard:
    def __init__(self, path: Path, settings: dict, done: int):
        from torch.utils.tensorboard import SummaryWriter

        # Records of steps after the checkpoint that is resumed are made again.
        self.writer = SummaryWriter(
            str(path / "tensorboard"), purge_step=done + 1 if done else None
        )
        self.writer.add_text("settings", f"```json\n{json.dumps(settings, indent=1)}\n```", done)

    def figures(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def groups(self, groups: list[dict], pictures: list[Image.Image], step: int) -> None:
        # As code: a model's text is not markup.
        lines = [json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in rows_of(groups)]
        self.writer.add_text("groups", "\n".join(f"    {line}" for line in lines), step)
        for i, picture in enumerate(pictures):
            self.picture(f"questions/{i}", picture, step)

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class Wandb:
    def __init__(self, path: Path, settings: dict, done: int):
        import wandb

        self.wandb = wandb
        file = path / "wandb-id"  # another run of this name is another run
        if not file.exists():
            file.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project="vision-ekipl",
            name=path.name,
            id=file.read_text(),
            resume="allow",
            dir=str(path),
            config=settings,
            settings=wandb.Settings(console="off", silent=True, finish_timeout=FINISH),
        )
        # Its own counter takes no step twice, which a resumed run makes again.
        self.run.define_metric("*", step_metric="step")

    def figures(self, figures: dict[str, float], step: int) -> None:
        self.run.log(figures | {"step": step})

    def groups(self, groups: list[dict], pictures: list[Image.Image], step: int) -> None:
        table = self.wandb.Table(columns=list(COLUMNS), data=rows_of(groups))
        images = [self.wandb.Image(picture) for picture in pictures]
        self.run.log({"groups": table, "questions": images, "step": step})

    def picture(self, name: str, picture: Image.Image, step: int) -> None:
        self.run.log({name: self.wandb.Image(picture), "step": step})

    def close(self) -> None:
        self.run.finish()


class Tracker:
    """What a run is reported to; nothing for "none", and after a failure nothing more.

    UserError if the package is not installed, or cannot start: no key, no server.
    """

    def __init__(self, config, path: Path, done: int):
        self.kind, self.step = config.tracker, done
        self.path, self.target = path, None
        if self.kind == "none":
            return
        start = {"tensorboard": TensorBoard, "wandb": Wandb}[self.kind]
        try:
            self.target = start(path, dataclasses.asdict(config), done)
        except ImportError:
            raise UserError(f"--tracker {self.kind}: pip install {self.kind}") from None
        except Exception as error:  # of many kinds: its server, its key, its files
            raise UserError(f"--tracker {self.kind} does not start: {error}") from None

    def write(self, record: dict, groups: list[dict], pictures: Callable) -> None:
        """A step's record, its groups, and pictures(), those of their questions."""
        self.step = record["step"]
        figures = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        self._try(lambda: self.target.figures(figures, self.step))
        if groups:
            self._try(lambda: self.target.groups(groups, list(map(small, pictures())), self.step))

    def close(self) -> None:
        for file in (self.path / "curves.png", self.path / "time.png"):
            if file.exists():
                self._try(lambda: self.target.picture(file.stem, image_of(file), self.step))
        self._try(lambda: self.target.close())

    def _try(self, tell: Callable) -> None:
        if self.target is None:
            return
        try:
            tell()
        except Exception as error:
            console.say(f"the run goes on without --tracker {self.kind}: {error}")
            self.target = None


def image_of(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB")


def small(picture: Image.Image) -> Image.Image:
    """A copy with at most LARGEST pixels a side."""
    copy = picture.convert("RGB")
    copy.thumbnail((LARGEST, LARGEST))
    return copy
