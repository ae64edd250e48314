"""TODO data.answers"""

import re

from data.expressions import compared

KINDS = ("discrete", "math", "function")


def extract_answer(text: str) -> str | None:
    """The answer of a response, stripped, or None where it is missing, blank or not the only one.

    There is one <answer> and one </answer> in the text, the text ends with the latter (white space aside), and a
    thought that was opened is closed before. What precedes, or whether there is a thought, is the format's business.
    """
    text = text.rstrip()
    if (
        text.count("<answer>") != 1
        or text.count("</answer>") != 1
        or not text.endswith("</answer>")
    ):
        return None
    before, _, answer = text.removesuffix("</answer>").partition("<answer>")
    in_thought = before.rfind("<think>") > before.rfind("</think>")
    if in_thought or "<think>" in answer or "</think>" in answer:
        return None
    return answer.strip() or None


Call = tuple[str, str, str]  # function, object, value
# Each starts at the start of a word and has no two neighbouring runs of one class: linear time.
CALL = re.compile(r"(?<!\w)(\w+) ?\( ?(\w+) ?, ?(\w+) ?\)")
LEGACY_CALL = re.compile(r"(?<!\w)(\w+)\((\w+),\s*'?(\w+)'?\)")


def calls(text: str, legacy: bool = False) -> list[Call]:
    """The calls in a text, in order, repeats included; strict: whatever the case, the quotes and the white space."""
    if legacy:
        return LEGACY_CALL.findall(text)
    return CALL.findall(re.sub(r"[\s'\"`]+", " ", text.lower()))


def judgeable(answer: str, kind: str) -> bool:
    """Whether a truth counts as right itself: a value that is known, or calls without a repetition."""
    if kind == "function":
        found = calls(answer)
        return bool(found) and len(set(found)) == len(found)
    return compared(answer, answer, kind) is not None
