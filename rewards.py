"""Rewards by rules alone: R = R_format + R_accuracy (Eq 7), each in [0, 1].

The paper takes both from Reason-RFT, its reference [52], which judges three kinds of answers:
  discrete   a count, or the letter of a choice: right or wrong;
  math       a quantity: 1 below 5 % of relative error, falling smoothly to 0 at 20 %;
  function   a sequence of calls such as change_color(0, blue): the share of calls that are right.

Evaluation scores differently (`accuracy_score`): as in Table 1, a quantity is right or wrong, and
a sequence has partial credit.

Departures. The strict rules, the default, give no accuracy for a second or empty <answer>, one
inside the thought, text after it, "nan" or a leading number, and repeated calls cost. They accept
other ways of writing the right answer: "3.0" for "3", white space around the tags, a truth of 0
(data/expressions.py). `legacy=True` gives the numbers of Reason-RFT's own code as it is since May
2025 (data/legacy.py).

Texts come from models, so they may be hostile: no rule evaluates them, raises on them, returns a
number that is not finite, or takes more than linear time (what does sees a bounded length). The
one exception is math-verify, which only the legacy test score asks, within a time limit.
"""

import itertools
import math
from collections import Counter

from data.answers import KINDS, Call, calls, extract_answer
from data.expressions import compared
from data.legacy import first_answer, legacy_calls, legacy_format, legacy_function_score, verified

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Relative errors of "math" between which the reward falls from 1 to 0.
FULL_BELOW, NONE_ABOVE = 0.05, 0.20
TOLERANCE = 1e-6  # of equal values, relative (decimals are rounded); absolute if the truth is 0
MAX_PARTIAL = 64  # calls of each side that partial credit pairs (TRANCE has at most 4)


# ------------------------------------------------------------------------------------- the rewards


def reward(text: str, answer: str, kind: str, legacy: bool = False) -> float:
    """Eq 7: the reward in [0, 2] of the response `text`, given the true `answer`.

    Training calls the two parts itself, to report them (`sampling.give_rewards`). ValueError for a
    kind that is not in KINDS; no text raises.
    """
    return format_reward(text, legacy) + accuracy_reward(text, answer, kind, legacy)


def format_reward(text: str, legacy: bool = False) -> float:
    """R_format: 1.0 if the response is a thought and then an answer, else 0.0.

    The whole text, white space around it aside, is one <think>...</think>, white space and one
    <answer>...</answer>; neither is blank, and none of the four tags occurs again.
    """
    if legacy:
        return float(legacy_format(text))
    text = text.strip()
    once = all(text.count(tag) == 1 for tag in TAGS)
    if not (once and text.startswith("<think>") and text.endswith("</answer>")):
        return 0.0
    thought, _, rest = text[len("<think>") : -len("</answer>")].partition("</think>")
    between, _, answer = rest.partition("<answer>")
    return float(bool(thought.strip() and answer.strip() and not between.strip()))


def accuracy_reward(text: str, answer: str, kind: str, legacy: bool = False) -> float:
    """R_accuracy: how right the answer in the response `text` is, in [0, 1].

    Strict: `judge_answer` of what `extract_answer` finds, else 0.0. An answer without a thought
    still earns its accuracy, as in Reason-RFT. Legacy: the first <answer>, or the whole text
    without one, equals the truth letter by letter, or is searched for calls ("function").
    ValueError for a kind that is not in KINDS.
    """
    _check(kind)
    if not legacy:
        predicted = extract_answer(text)
        return 0.0 if predicted is None else judge_answer(predicted, answer, kind)
    if kind == "function":
        return _full_matches(legacy_calls(first_answer(text)), legacy_calls(answer))
    return float(first_answer(text) == first_answer(answer))


def judge_answer(predicted: str, answer: str, kind: str) -> float:
    """How right a bare answer is by the strict rules, in [0, 1].

    discrete: numbers by value ("3.0", "03" and "1,000" are numbers; "3 cubes", "4 - 1" and "nan"
        are not), choices by their letter ("b", "(B)", "B.", "B) 12 m", but no second letter on its
        own), other texts if they are equal.
    math: by relative error, see `_band`; an answer without a value is judged as in discrete.
    function: matches / max(|predicted|, |answer|) over the sets of calls, times the share of
        predicted calls that are distinct, so that neither more nor repeated calls pay.
    ValueError for a kind that is not in KINDS.
    """
    _check(kind)
    if kind == "function":
        return _full_matches(calls(predicted), calls(answer))
    values = compared(predicted, answer, kind)
    if values is None:
        return 0.0
    return _band(*values) if kind == "math" else float(values[0] == values[1])


# ---------------------------------------------------------------------------- scores of evaluation


def accuracy_score(text: str, answer: str, kind: str, legacy: bool = False) -> float:
    """Table 1's accuracy of the response `text`: 1 or 0; in [0, 1] for "function".

    Strict: quantities are right if equal within TOLERANCE; the rest is as in `accuracy_reward`.
    Legacy: Reason-RFT's test score. The first <answer>, or the whole text without one, equals the
    truth or math-verify accepts it; UserError if that is not installed.
    ValueError for a kind that is not in KINDS.
    """
    _check(kind)
    if kind == "function":
        return function_score(text, answer, legacy)
    if legacy:
        found = first_answer(text)
        return float(found == answer.strip() or verified(found, answer))
    predicted = extract_answer(text)
    values = compared(predicted, answer, kind) if predicted is not None else None
    return float(values is not None and _equal(*values))


def wholly_right(text: str, answer: str, kind: str, legacy: bool = False) -> bool:
    """What "exact" and Pass@k count: an accuracy of 1, and, unless legacy, no repeated call."""
    if kind == "function" and not legacy:
        return accuracy_reward(text, answer, kind) == 1.0
    return accuracy_score(text, answer, kind, legacy) == 1.0


def function_score(text: str, answer: str, legacy: bool = False) -> float:
    """Reason-RFT's test score of a sequence of calls, in [0, 1]: partial credit, not for training.

    Each call is paired at most once: equal calls count 1, the same function with the same object
    or value 0.5, the same function 0.25. The sum is divided by max(|predicted|, |answer|).
    Strict: by the best pairing. Legacy: by greedy passes.
    """
    if legacy:
        return legacy_function_score(text, answer)
    predicted = dict.fromkeys(calls(extract_answer(text) or ""))  # each once, in order
    truth = dict.fromkeys(calls(answer))
    if not predicted or not truth:
        return 0.0
    # Pairing equal calls first loses nothing: it breaks up at most two pairs worth 0.5 each.
    equal = predicted.keys() & truth.keys()
    left = [call for call in predicted if call not in equal]
    missing = [call for call in truth if call not in equal]
    # Of the rest, a pair of one function is worth 0.25, and 0.25 more if object or value agree. Any
    # pairing of the latter sort extends to one with as many pairs as the functions allow, so both
    # numbers are at their best at once.
    pairs = Counter(call[0] for call in left) & Counter(call[0] for call in missing)
    close = _most_close_pairs(left[:MAX_PARTIAL], missing[:MAX_PARTIAL])
    credit = len(equal) + 0.25 * pairs.total() + 0.25 * close
    return credit / max(len(predicted), len(truth))


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of answer {kind!r}: it is one of {', '.join(KINDS)}")


def _band(value: float, truth: float) -> float:
    """Reason-RFT's reward of a quantity: half a cosine wave between errors of 0.05 and 0.20."""
    if truth == 0.0:  # it has no relative error
        return float(_equal(value, truth))
    error = abs(value - truth) / abs(truth)  # may be inf, never NaN
    fall = min(max((error - FULL_BELOW) / (NONE_ABOVE - FULL_BELOW), 0.0), 1.0)
    return 0.5 * (math.cos(math.pi * fall) + 1.0)


def _equal(value: float, truth: float) -> bool:
    return abs(value - truth) <= TOLERANCE * (abs(truth) or 1.0)


def _full_matches(predicted: list[Call], truth: list[Call]) -> float:
    """Reason-RFT's training reward of a sequence: share of equal calls x share of distinct ones."""
    distinct, wanted = set(predicted), set(truth)
    if not distinct or not wanted:
        return 0.0
    share = len(distinct & wanted) / max(len(distinct), len(wanted))
    return share * len(distinct) / len(predicted)


def _most_close_pairs(predicted: list[Call], truth: list[Call]) -> int:
    """The largest number of pairs of one function whose object or value agree."""
    # Half a second to import, for evaluation alone.
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    close = np.zeros((len(predicted), len(truth)))
    for i, j in itertools.product(range(len(predicted)), range(len(truth))):
        one, other = predicted[i], truth[j]
        close[i, j] = one[0] == other[0] and (one[1] == other[1] or one[2] == other[2])
    return int(close[linear_sum_assignment(close, maximize=True)].sum())
