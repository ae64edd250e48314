"""Plausible mistakes: what somebody answers who misperceived one thing of a scene."""

from functools import lru_cache

from blocks.counting import Counting
from blocks.structure import Structure
from blocks.transformation import Transformation
from rewards import judge_answer


@lru_cache(maxsize=1024)  # each expert asks for them
def mistakes(problem: Counting | Structure | Transformation) -> tuple:
    """The problem as somebody sees it who gets it wrong, in every plausible way, each once."""
    right = problem.answer()
    # By the reward's own judgement, which forgives 5 % of a length or an area.
    wrong = [
        seen
        for seen in problem.misperceived()
        if judge_answer(seen.answer(), right, problem.kind) < 1
    ]
    return tuple(dict.fromkeys(wrong))
