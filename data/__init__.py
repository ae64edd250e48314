"""Questions, where they come from, and how their answers are read (README.md).

Read in this order:
    state.py        a question with its images and truth, and the prompt made of it
    sets.py         sets by name, the questions of a run
    reason_rft.py   Reason-RFT-CoT as states: reading.py (records), pictures.py and image_check.py
                    (images), lengths.py (prompts that are too long), download.py
    answers.py      the answer in a response: expressions.py (numbers, quantities, choices),
                    legacy.py (Reason-RFT's own reading)
    predictions.py  responses to test questions, saved by evaluate.py
"""

from data.pictures import open_image
from data.reading import FILES
from data.reason_rft import ReasonRFTSet
from data.sets import load_set, test_sets, training_states
from data.state import State

__all__ = ["FILES", "ReasonRFTSet", "State", "load_set", "open_image"]
__all__ += ["test_sets", "training_states"]
