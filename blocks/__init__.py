"""The blocks world, the embedded default: `--data blocks`."""

from blocks.dataset import BlocksSet
from data import sets


def _set(name: str, config, mode: str) -> BlocksSet:
    """Of a training set `states` questions of the run's seed, of a test set the first `eval_states`."""
    if name.endswith("-train"):
        return BlocksSet(name, config.states, config.seed, mode)
    return BlocksSet(name, config.eval_states, 0, mode)


sets.WORLDS["blocks"] = _set
