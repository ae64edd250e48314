"""Rewards: how good one action is, R = R_format + R_accuracy (paper, Eq 7), each in [0, 1], by rules alone.

The paper takes both from Reason-RFT, its reference [52], which judges three kinds of answers:
  discrete   a count, or the letter of a choice: right or wrong;
  math       a quantity: full reward below 5 % of relative error, falling smoothly to none at 20 %;
  function   a sequence of calls like change_color(0, blue): the share of calls that are right.

Evaluation is another matter (`accuracy_score`): there a quantity is right or wrong, as in Table 1, and a sequence has
partial credit.

Departures. The strict scorer, the default, closes the gaps through which a policy could earn reward without the
answer: a second or an empty <answer>, one inside the thought, text after it, "nan", a leading number, a repeated
call. It also accepts what is right but written differently (expressions.py): "3.0" for "3", white space around the tags, a
truth of 0. `legacy=True` gives the numbers of Reason-RFT's own code, as it is since May 2025, so that tables can be
compared. Its training rewards: equal text ("discrete" and "math"), or equal calls, in the first <answer>; only that a
response without <answer> is compared as text alone, where theirs also asks math-verify. Its test score: equal text or
math-verify's verdict, and partial credit; ties of its greedy pairing, which follow Python's random string hashes, are
settled by the order of the calls.

Texts come from models, so they are hostile: nothing here evaluates them, raises on them, returns anything that is not
finite, or needs more than linear time (what is not linear sees a bounded length). The one exception is math-verify,
which only the legacy test score asks, within a time limit: see `_verified`.
"""

import functools
import logging
import math
import re
import threading

from data.answers import KINDS, Call, calls, extract_answer
from data.expressions import compared

# Relative errors of "math" between which the reward falls from 1 to 0.
FULL_BELOW, NONE_ABOVE = 0.05, 0.20
# Of equal values, relative (a decimal is rounded); absolute where the truth is 0.
TOLERANCE = 1e-6
MAX_PARTIAL = 64  # calls of a side that partial credit pairs (TRANCE has at most 4)
MATH_VERIFY = "math-verify[antlr4_13_2]==0.9.0"  # what the legacy test score needs


# ------------------------------------------------------------------------------------------------ the rewards


def reward(text: str, answer: str, kind: str, legacy: bool = False) -> float:
    """Eq 7: the reward of the response `text` to a question whose true answer is `answer`, in [0, 2].

    Raises ValueError for a kind that is not in KINDS (a mistake in the program), and for no text.
    """
    return format_reward(text, legacy) + accuracy_reward(text, answer, kind, legacy)


def format_reward(text: str, legacy: bool = False) -> float:
    """R_format: 1.0 if the response is a thought and then an answer, else 0.0.

    Strict: the whole text, white space around it aside, is one <think>...</think>, white space, one
    <answer>...</answer>; neither is blank and no further tag of the four occurs anywhere.
    Legacy: `<think>.*?</think>\\s*<answer>.*?</answer>` matches the whole text, the dot matching newlines.
    """
    if legacy:
        # The same test without the regex, whose backtracking takes quadratic time on "</think><answer>" repeated.
        ends = text.startswith("<think>") and text.endswith("</answer>")
        return float(ends and re.search(r"</think>\s*<answer>", text) is not None)
    text = text.strip()
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    if not (once and text.startswith("<think>") and text.endswith("</answer>")):
        return 0.0
    thought, _, rest = text[len("<think>") : -len("</answer>")].partition("</think>")
    between, _, answer = rest.partition("<answer>")
    return float(bool(thought.strip() and answer.strip() and not between.strip()))


def accuracy_reward(text: str, answer: str, kind: str, legacy: bool = False) -> float:
    """R_accuracy: how right the answer in the response `text` is, in [0, 1].

    Strict: what `extract_answer` finds, judged by `judge_answer`; 0.0 if it finds none. The format is not asked for
    again here: an answer without a thought still earns its accuracy, as in Reason-RFT.
    Legacy: the first <answer>, or the whole text without one, must equal the truth letter by letter ("discrete" and
    "math"), or is searched for calls ("function").
    Raises ValueError for a kind that is not in KINDS.
    """
    _check(kind)
    if not legacy:
        predicted = extract_answer(text)
        return 0.0 if predicted is None else judge_answer(predicted, answer, kind)
    if kind == "function":
        return _full_matches(calls(_legacy_answer(text), legacy=True), calls(answer, legacy=True))
    return float(_legacy_answer(text) == _legacy_answer(answer))


def judge_answer(predicted: str, answer: str, kind: str) -> float:
    """How right a bare answer is, in [0, 1]: the strict rules. Use it for models that answer without tags (ANS-SFT).

    discrete: numbers by value ("3.0", "03" and "1,000" are numbers; "3 cubes", "4 - 1" and "nan" are not), choices
        by their letter ("b", "(B)", "B.", "B) 12 m", but no second letter on its own), other texts when they are equal.
    math: values by relative error, see `_band`; what has no value is judged as in discrete. See expressions.py.
    function: matches / max(|predicted|, |answer|) over the sets of calls, times distinct / all predicted calls, so
        that neither more calls nor repeated ones pay.
    Raises ValueError for a kind that is not in KINDS.
    """
    _check(kind)
    if kind == "function":
        return _full_matches(calls(predicted), calls(answer))
    values = compared(predicted, answer, kind)
    if values is None:
        return 0.0
    return _band(*values) if kind == "math" else float(values[0] == values[1])


# ------------------------------------------------------------------------------------------- scores of evaluation


def accuracy_score(text: str, answer: str, kind: str, legacy: bool = False) -> float:
    """Table 1's accuracy of the response `text`: right or wrong, 1 or 0; partial credit in [0, 1] for "function".

    Strict: quantities are right when equal, but for TOLERANCE; the rest is as in `accuracy_reward`.
    Legacy: Reason-RFT's test score. The first <answer>, or the whole text without one, equals the truth, or
    math-verify says so; UserError where it is not installed.
    Raises ValueError for a kind that is not in KINDS.
    """
    _check(kind)
    if kind == "function":
        return function_score(text, answer, legacy)
    if legacy:
        found = _legacy_answer(text)
        return float(found == answer.strip() or _verified(found, answer))
    predicted = extract_answer(text)
    values = compared(predicted, answer, kind) if predicted is not None else None
    return float(values is not None and _equal(*values))


def wholly_right(text: str, answer: str, kind: str, legacy: bool = False) -> bool:
    """What "exact" and Pass@k count: an accuracy of 1; of a sequence also, unless legacy, that no call is repeated."""
    if kind == "function" and not legacy:
        return accuracy_reward(text, answer, kind) == 1.0
    return accuracy_score(text, answer, kind, legacy) == 1.0


def function_score(text: str, answer: str, legacy: bool = False) -> float:
    """Reason-RFT's test score of a sequence of calls, in [0, 1]: partial credit, for evaluation, not for training.

    Calls of prediction and truth are paired, each at most once: 1 for equal calls, 0.5 if function and object or
    function and value agree, 0.25 for the function alone. The sum is divided by max(|predicted|, |answer|).
    Strict: the pairing is the best one. Legacy: four greedy passes, in this order, over the first <answer> that opens
    and closes on one line, or the whole text without one.
    """
    found = _legacy_answer(text, one_line=True) if legacy else extract_answer(text) or ""
    predicted, truth = (list(dict.fromkeys(calls(part, legacy))) for part in (found, answer))
    if not predicted or not truth:
        return 0.0
    size = max(len(predicted), len(truth))
    # Pairing equal calls first loses nothing: the two pairs that it may break up are worth 0.5 each at most.
    full, predicted, truth = _pair(predicted, truth, lambda call: call)
    if legacy:
        same_object, predicted, truth = _pair(predicted, truth, lambda call: call[:2])
        same_value, predicted, truth = _pair(predicted, truth, lambda call: (call[0], call[2]))
        same_name, _, _ = _pair(predicted, truth, lambda call: call[0])
        return (full + 0.5 * (same_object + same_value) + 0.25 * same_name) / size
    # The rest: a pair of one name is worth 0.25, and 0.25 more if object or value agree. Any pairing of the second
    # sort can be completed to one with as many pairs as the names allow, so both numbers are at their best at once.
    same_name, _, _ = _pair(predicted, truth, lambda call: call[0])
    return (
        full + 0.25 * same_name + 0.25 * _most_pairs(predicted[:MAX_PARTIAL], truth[:MAX_PARTIAL])
    ) / size


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of answer {kind!r}: it is one of {', '.join(KINDS)}")


def _band(value: float, truth: float) -> float:
    """Reason-RFT's reward of a quantity: half a cosine wave between the relative errors 0.05 and 0.20."""
    if truth == 0.0:  # it has no relative error
        return float(_equal(value, truth))
    error = abs(value - truth) / abs(truth)  # may be inf, never NaN
    fall = min(max((error - FULL_BELOW) / (NONE_ABOVE - FULL_BELOW), 0.0), 1.0)
    return 0.5 * (math.cos(math.pi * fall) + 1.0)


def _equal(value: float, truth: float) -> bool:
    return abs(value - truth) <= TOLERANCE * (abs(truth) or 1.0)


def _full_matches(predicted: list[Call], truth: list[Call]) -> float:
    """Reason-RFT's training reward of a sequence: the share of equal calls, times the share of calls not repeated."""
    distinct, wanted = set(predicted), set(truth)
    if not distinct or not wanted:
        return 0.0
    return len(distinct & wanted) / max(len(distinct), len(wanted)) * len(distinct) / len(predicted)


def _pair(predicted: list[Call], truth: list[Call], key) -> tuple[int, list[Call], list[Call]]:
    """Pairs each predicted call with the first free true call of the same key: the number of pairs, what is left."""
    free: dict = {}
    for call in reversed(truth):
        free.setdefault(key(call), []).append(call)
    left = [call for call in predicted if not (free.get(key(call)) and free[key(call)].pop())]
    unpaired = {call for calls in free.values() for call in calls}
    return len(predicted) - len(left), left, [call for call in truth if call in unpaired]


def _most_pairs(predicted: list[Call], truth: list[Call]) -> int:
    """The largest number of pairs of one function whose object or value agree (matching by augmenting paths)."""
    partner: dict[Call, Call] = {}  # of a predicted call

    def place(call: Call, tried: set[Call]) -> bool:
        for other in predicted:
            if (
                other not in tried
                and other[0] == call[0]
                and (other[1] == call[1] or other[2] == call[2])
            ):
                tried.add(other)
                if other not in partner or place(
                    partner[other], tried
                ):  # its partner moves elsewhere if it can
                    partner[other] = call
                    return True
        return False

    return sum(place(call, set()) for call in truth)


# ----------------------------------------------------------------------------------------------- Reason-RFT's own


def _legacy_answer(text: str, one_line: bool = False) -> str:
    """What Reason-RFT's `<answer>(.*?)</answer>` finds first, or without it all the text. one_line: its dot stops at a newline."""
    for part in text.split("\n") if one_line else (text,):
        start = part.find("<answer>")
        end = part.find("</answer>", start + len("<answer>"))
        if start >= 0 and end >= 0:
            return part[start + len("<answer>") : end].strip()
    return text.strip()


def need_math_verify() -> None:
    """UserError, with what to install, if math-verify is not there."""
    try:
        import math_verify  # noqa: F401
    except ImportError:
        from training.console import UserError  # not needed to reward

        raise UserError(
            f"legacy scores ask math-verify, which is not installed: pip install '{MATH_VERIFY}'"
        ) from None


@functools.lru_cache(maxsize=10_000)  # accuracy and "exact" ask the same
def _verified(predicted: str, answer: str) -> bool:
    """math-verify's verdict, called as Reason-RFT does. Lenient: it finds an answer in a longer text, and "2" in 2\\sqrt{3}.

    It hands digits and operators to sympy's parser, which evaluates them; its own time-outs, 5 s each, end what takes
    too long. They are signals, so this runs in the main thread only: RuntimeError elsewhere.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math-verify needs the main thread: its time-outs are signals")
    need_math_verify()
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it would print the text
    try:
        return bool(verify(parse(predicted), parse(answer)))
    except (Exception, TimeoutException):  # theirs: whatever it raises is a wrong answer
        return False
