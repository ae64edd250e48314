"""The room that checkpoints take on the disk."""

import shutil
from pathlib import Path

import torch

from training.console import UserError
from training.settings import Settings

GB = 10**9
WEIGHT = 4  # bytes of a parameter in a checkpoint: float32, whatever it is on a GPU
MOMENTS = 8  # bytes of a trained parameter there, beside its own


def check_disk(config: Settings, policy: torch.nn.Module, resume: Path | None) -> None:
    """UserError if the disk has no room for what the run will save.

    config: with the real number of states. The newest checkpoint is complete before the one before
    it is removed.
    """
    needed = 0
    for parameter in policy.parameters():
        needed += parameter.numel() * (WEIGHT + MOMENTS * parameter.requires_grad)
    # With LoRA all but the last checkpoint hold an adapter alone.
    if not resume and 0 < config.save_every < config.steps and not config.lora_rank:
        needed *= 2
    place = resume or Path(config.runs)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"the disk of {place} has {free / GB:.1f} GB free, and checkpoints take "
            f"{needed / GB:.1f} ({WEIGHT} bytes a parameter, {WEIGHT + MOMENTS} if it is trained; "
            "without --lora-rank twice while one is saved): make room, or choose another --runs"
        )
