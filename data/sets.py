"""Sets of states by name, and the questions of a run.

A set has a name, a length and `[i]`; nothing else depends on which one it is:

    blocks.BlocksSet                the blocks world, the embedded default: --data blocks
    data.reason_rft.ReasonRFTSet    Reason-RFT-CoT, the paper's data: --data reason-rft or a copy

The order of a set is fixed, and any first part of it is a fair sample of the whole.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from data.download import at_home, prepare
from data.lengths import Room
from data.reading import FILES
from data.reason_rft import ReasonRFTSet
from data.state import SET_NAMES, SETS, State
from training.console import UserError

# Other values of --data: a function of (set name, settings, mode) that makes the set. A world
# registers itself when it is imported (blocks/__init__.py).
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
    name: str,
    config,
    mode: str = "reason",
    thoughts: bool = False,
    room: Room | None = None,
):
    """The set of that name, from the `data` of a run's settings; UserError if there is none.

    thoughts, room: see ReasonRFTSet. The questions of the blocks world have thoughts and are short.
    """
    if name not in SET_NAMES:
        raise UserError(f"no set {name!r}; there are {', '.join(SET_NAMES)}")
    if config.data in WORLDS:
        return WORLDS[config.data](name, config, mode)
    if name not in FILES:
        raise UserError(f"Reason-RFT-CoT has no set {name!r}: it is for --data blocks")
    cache = at_home(config.data_cache)
    return ReasonRFTSet(name, prepare(config.data, [name], cache), mode, thoughts, cache, room)


def training_states(
    config,
    mode: str = "reason",
    thoughts: bool = False,
    room: Room | None = None,
) -> tuple[Part, list[int]]:
    """The questions of a run, and their order over all epochs: the first `batch_size` are step 1's.

    The first `skip` questions of the task's training set are left out (SFT has used them). Of the
    rest the run takes the first `fraction`, at most `limit` (0: no limit), so that a smaller share
    is part of every larger one. UserError if this is less than one batch.
    """
    whole = load_set(f"{config.task}-train", config, mode, thoughts, room)
    count = round(config.fraction * max(0, len(whole) - config.skip))
    count = min(count, config.limit or count)
    if count * config.epochs < config.batch_size:
        raise UserError(
            f"{count} questions x {config.epochs} epochs are less than one batch of "
            f"{config.batch_size}"
        )
    order = []
    for epoch in range(config.epochs):
        order += random.Random(f"{config.seed} order {epoch}").sample(range(count), count)
    return Part(whole, config.skip, config.skip + count), order


def test_sets(config, mode: str = "reason", room: Room | None = None) -> dict[str, Part]:
    """The first `eval_states` questions of each test set of the task."""
    parts = {}
    for name in SETS[config.task]:
        whole = load_set(name, config, mode, room=room)
        parts[name] = Part(whole, 0, min(len(whole), config.eval_states))
    return parts


def reports(sets: list[Part]) -> tuple[list[str], list[dict]]:
    """Of sets of real data, a line each on what can be used, and the records that cannot."""
    lines, left_out = [], []
    for part in sets:
        if isinstance(part.whole, ReasonRFTSet):
            lines.append(part.whole.report())
            left_out += part.whole.left_out
    return lines, left_out
