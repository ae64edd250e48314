"""States and where they come from (paper, Sections 3.1 and 4.1): s = (v, t), images and a question.

Every data set gives its questions as `State`s, by its name, its length and `[i]`; nothing downstream knows which one it was:

    blocks.BlocksSet     the blocks world, the embedded default (--data blocks)
    ReasonRFTSet         Reason-RFT-CoT, the paper's data (--data reason-rft downloads it, --data DIR takes an unpacked copy)

The prompt is one user turn, images first, then the question and what to do with it; the policy and the experts get the same words,
since experts that are told more than the policy teach it what it cannot see.

Reason-RFT-CoT is JSON files of records, and zip archives of images. Every record is checked once, before anything is trained: one that
could not be used (an image is missing or broken, an answer has no form that the rewards know, ...) is left out and listed with its
reason. Images are opened when they are used (pictures.py). The order is the same always; any first
part of a set is a fair sample of the whole.

    python data.py --data reason-rft --task counting        # downloads, unpacks and checks: worth doing before GPUs wait for it

Departure from Reason-RFT: the prompts are in our words, but for mode "bare", which is its
ANS-SFT's.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from data.download import at_home, prepare
from data.lengths import Room
from data.reading import FILES
from data.reason_rft import ReasonRFTSet
from data.state import State
from training.console import UserError

# What else --data may name: a function of (set name, settings, mode) that makes the set. A world
# adds itself when it is imported (blocks/__init__.py).
WORLDS: dict[str, Callable] = {}


class Part:
    """States `start` to `stop` of a set, in its order."""

    def __init__(self, whole, start: int, stop: int):
        self.whole, self.name, self.places = whole, whole.name, range(start, stop)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> State:
        return self.whole[self.places[index]]


def load_set(
    name: str, config, mode: str = "reason", thoughts: bool = False, room: Room | None = None
):
    """The whole set of that name from where a run's settings say: `data`, `data_cache`; of the
    blocks world `states` and `seed`, and all of it, since its questions are never long. UserError
    if there is no such set."""
    if name not in FILES:
        raise UserError(f"no set {name!r}; there are {', '.join(FILES)}")
    if config.data in WORLDS:
        return WORLDS[config.data](name, config, mode)
    cache = at_home(config.data_cache)
    return ReasonRFTSet(name, prepare(config.data, [name], cache), mode, thoughts, cache, room)


def training_states(
    config, mode: str = "reason", thoughts: bool = False, room: Room | None = None
) -> tuple[Part, list[int]]:
    """The questions of a run, and the order in which it asks them over all epochs: its first `batch_size` are the first step's.

    Of the task's training set the first `skip` are left to somebody else; of the rest the first `fraction` are asked, `limit` at most
    (0: no limit). So runs with a smaller share see part of what the others see. UserError if this is less than one batch.
    """
    whole = load_set(f"{config.task}-train", config, mode, thoughts, room)
    count = round(config.fraction * max(0, len(whole) - config.skip))
    count = min(count, config.limit or count)
    if count * config.epochs < config.batch_size:
        raise UserError(
            f"{count} questions x {config.epochs} epochs are less than one batch of {config.batch_size}"
        )
    order = [
        i
        for epoch in range(config.epochs)
        for i in random.Random(f"{config.seed} order {epoch}").sample(range(count), count)
    ]
    return Part(whole, config.skip, config.skip + count), order


def test_sets(config, mode: str = "reason", room: Room | None = None) -> dict[str, Part]:
    """The first `eval_states` questions of each test set of the task."""
    names = [
        name for name in FILES if name.startswith(f"{config.task}-") and not name.endswith("-train")
    ]
    sets = {name: load_set(name, config, mode, room=room) for name in names}
    return {
        name: Part(whole, 0, min(len(whole), config.eval_states)) for name, whole in sets.items()
    }


def reports(sets: list[Part]) -> tuple[list[str], list[dict]]:
    """What of the records could not be used: a line for each set of real data, and all that was left out."""
    real = [part.whole for part in sets if isinstance(part.whole, ReasonRFTSet)]
    return [whole.report() for whole in real], [
        record for whole in real for record in whole.left_out
    ]
