"""Reason-RFT's own reading and scores (`legacy=True` in rewards.py), so that tables compare.

They are laxer than ours: the first <answer> counts, without one the whole text, and math-verify
may find the answer in a longer text. Departures: in training a response without <answer> is
compared as text alone, where theirs also asks math-verify; ties of the greedy pairing, which
follow Python's random string hashes, are settled by the order of the calls.
"""

import functools
import logging
import re
import threading
from collections.abc import Callable

from data.answers import Call
from training.console import UserError

MATH_VERIFY = "math-verify[antlr4_13_2]==0.9.0"  # what the test score needs
CALL = re.compile(r"(?<!\w)(\w+)\((\w+),\s*'?(\w+)'?\)")


def legacy_format(text: str) -> bool:
    """Whether `<think>.*?</think>\\s*<answer>.*?</answer>` matches the whole text.

    The dot matches newlines. Tested without that regex, whose backtracking takes quadratic time.
    """
    ends = text.startswith("<think>") and text.endswith("</answer>")
    return ends and re.search(r"</think>\s*<answer>", text) is not None


def first_answer(text: str, one_line: bool = False) -> str:
    """What `<answer>(.*?)</answer>` finds first, else the whole text.

    one_line: the dot does not match newlines.
    """
    for part in text.split("\n") if one_line else (text,):
        start = part.find("<answer>")
        end = part.find("</answer>", start + len("<answer>"))
        if start >= 0 and end >= 0:
            return part[start + len("<answer>") : end].strip()
    return text.strip()


def legacy_calls(text: str) -> list[Call]:
    return CALL.findall(text)


def legacy_function_score(text: str, answer: str) -> float:
    """Partial credit in [0, 1] by four greedy passes, over the first <answer> on one line."""
    predicted = list(dict.fromkeys(legacy_calls(first_answer(text, one_line=True))))
    truth = list(dict.fromkeys(legacy_calls(answer)))
    if not predicted or not truth:
        return 0.0
    size, score = max(len(predicted), len(truth)), 0.0
    for credit, key in (
        (1.0, lambda call: call),
        (0.5, lambda call: call[:2]),  # function and object
        (0.5, lambda call: (call[0], call[2])),  # function and value
        (0.25, lambda call: call[0]),  # function
    ):
        pairs, predicted, truth = _pair(predicted, truth, key)
        score += credit * pairs
    return score / size


def _pair(predicted: list, truth: list, key: Callable) -> tuple[int, list[Call], list[Call]]:
    """Pairs each predicted call with the first free true call of the same key.

    Returns the number of pairs, and the predicted and true calls that are left.
    """
    free: dict = {}
    for call in reversed(truth):
        free.setdefault(key(call), []).append(call)
    left = [call for call in predicted if not (free.get(key(call)) and free[key(call)].pop())]
    unpaired = set()
    for rest in free.values():
        unpaired.update(rest)
    return len(predicted) - len(left), left, [call for call in truth if call in unpaired]


def need_math_verify() -> None:
    """UserError that says what to install if math-verify is missing."""
    try:
        import math_verify  # noqa: F401
    except ImportError:
        raise UserError(
            f"legacy scores ask math-verify, which is not installed: pip install '{MATH_VERIFY}'"
        ) from None


@functools.lru_cache(maxsize=10_000)  # accuracy and "exact" ask the same
def verified(predicted: str, answer: str) -> bool:
    """math-verify's verdict, called as Reason-RFT does. It is lenient: "2" counts for 2\\sqrt{3}.

    It hands digits and operators to sympy's parser, which evaluates them; its own time-outs of 5 s
    end what takes too long. They are signals, so it runs in the main thread only: RuntimeError
    elsewhere.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math-verify needs the main thread: its time-outs are signals")
    need_math_verify()
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it would print the text
    try:
        return bool(verify(parse(predicted), parse(answer)))
    except (Exception, TimeoutException):  # whatever it raises is a wrong answer, as in theirs
        return False
