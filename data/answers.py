"""The answer in a response: extracted from its tags, and a sequence of calls read from it.

Bare numbers, quantities, choices and texts are read by expressions.py. Reason-RFT's own, laxer
reading is in legacy.py.
"""

import re

from data.expressions import compared

KINDS = ("discrete", "math", "function")
Call = tuple[str, str, str]  # function, object, value
# Each part starts at the start of a word, and no two neighbouring runs share a class: linear time.
CALL = re.compile(r"(?<!\w)(\w+) ?\( ?(\w+) ?, ?(\w+) ?\)")
DIAGONAL = re.compile(r"(?i)\b(front|behind)[- ](left|right)\b")


def extract_answer(text: str) -> str | None:
    """The answer of a response, stripped; None if it is missing, blank or not the only one.

    The text has one <answer> and one </answer>, ends with the latter (white space aside), and
    closes a thought that it opened before the answer. The rest is the format reward's business.
    """
    text = text.rstrip()
    once = text.count("<answer>") == text.count("</answer>") == 1
    if not once or not text.endswith("</answer>"):
        return None
    before, _, answer = text.removesuffix("</answer>").partition("<answer>")
    in_thought = before.rfind("<think>") > before.rfind("</think>")
    if in_thought or "<think>" in answer or "</think>" in answer:
        return None
    return answer.strip() or None


def underscored(text: str) -> str:
    """front-left and "front left" as front_left, the spelling of the prompt and of the truths."""
    return DIAGONAL.sub(r"\1_\2", text)


def calls(text: str) -> list[Call]:
    """The calls in a text, in order, with repeats. Case, quotes and white space do not matter."""
    return CALL.findall(underscored(re.sub(r"[\s'\"`]+", " ", text.lower())))


def judgeable(answer: str, kind: str) -> bool:
    """Whether a truth counts as right itself: its value is known, or it repeats no call."""
    if kind == "function":
        found = calls(answer)
        return bool(found) and len(set(found)) == len(found)
    return compared(answer, answer, kind) is not None
