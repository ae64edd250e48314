"""The blocks world, the embedded default (`--data blocks`); see README.md.

Read in this order:
    scenes.py, figures.py    what there is to see: objects in cells, figures on a unit grid
    drawing.py               their pictures
    counting.py, structure.py, transformation.py    a task each: questions, answers, thoughts
    mistakes.py, scripted.py the scripted experts: how they err, and how often
    dataset.py               sets of questions by name
    sheet.py                 a picture of examples
    make_tiny/, tiny/        the tiny Qwen2-VL, and how it was made
"""

from blocks.dataset import BlocksSet
from data import sets


def _set(name: str, config, mode: str) -> BlocksSet:
    """`states` training questions of the run's seed, or the first `eval_states` test questions."""
    if name.endswith("-train"):
        return BlocksSet(name, config.states, config.seed, mode)
    return BlocksSet(name, config.eval_states, 0, mode)


sets.WORLDS["blocks"] = _set
