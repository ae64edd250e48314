"""Plausible mistakes: the answers of somebody who misperceived one thing of a scene."""

from functools import lru_cache

from rewards import judge_answer


@lru_cache(maxsize=1024)  # both experts ask for them
def mistakes(problem) -> tuple:
    """The misperceptions of a problem that lead to a wrong answer, each once.

    problem: one of the tasks. Wrong by the reward's judgement, which forgives 5 % of an area.
    """
    right, wrong = problem.answer(), []
    for seen in problem.misperceived():
        if judge_answer(seen.answer(), right, problem.kind) < 1:
            wrong.append(seen)
    return tuple(dict.fromkeys(wrong))


def readings(problem, share: float) -> list[tuple[object, float]]:
    """A problem as somebody sees it whose expected score (Table 1's) is `share`: each way to see
    it, and its probability.

    A transformation's changes are noticed one by one, as its score is partial credit. Other
    problems are seen as they are, or with any one mistake.
    """
    if hasattr(problem, "noticed"):
        return problem.noticed(share)
    wrong = mistakes(problem)
    return [(problem, share), *((seen, (1 - share) / len(wrong)) for seen in wrong)]
