"""The room that checkpoints take on the disk."""

import shutil
from pathlib import Path

import torch

from training.console import UserError
from training.settings import Settings

GB = 10**9
WEIGHTS, MOMENTS = 4, 8  # bytes of a parameter in a checkpoint; moments of what is trained only


def check_disk(config: Settings, policy: torch.nn.Module, resume: Path | None) -> None:
    """UserError if the disk has no room for what the run will save.

    config: with the real number of states. The newest checkpoint is complete before the one before
    it is removed.
    """
    needed = 0
    for parameter in policy.parameters():
        needed += parameter.numel() * (WEIGHTS + MOMENTS * parameter.requires_grad)
    if not resume and 0 < config.save_every < config.steps:
        needed *= 2
    place = resume or Path(config.runs)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"the disk of {place} has {free / GB:.1f} GB free, and checkpoints take "
            f"{needed / GB:.1f} (12 bytes a parameter, twice while one is saved): make room, or "
            "choose another --runs"
        )
