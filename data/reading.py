"""Records of Reason-RFT-CoT's JSON files, read with care: each as a `Record`, or `Unusable`.

Truths may be bare or in <answer> tags, images a path, {"path": path} or a list; paths and links out
of the data set are not followed.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from data.answers import extract_answer, judgeable, underscored
from training.console import UserError

FILES = {  # of each set; the names are those of the blocks world
    "counting-train": "train_jsons/A3-Visual-Counting-train-35k-cot.json",
    "counting-id": "test_jsons/Visual-Counting-id-test-1k.json",  # Clevr-Math
    "counting-ood": "test_jsons/Visual-Counting-ood-test-1k.json",  # Super-Clevr
    "structure-train": "train_jsons/A2-Structure-Perception-train-4k5-cot.json",
    "structure-id": "test_jsons/Structure-Perception-id-test-820.json",  # GeoMath
    "structure-ood": "test_jsons/Structure-Perception-ood-test-800.json",  # Geometry3k
    "transformation-train": "train_jsons/A1-Spatial-Transformation-train-60k-cot.json",
    # TRANCE, TRANCE-L, TRANCE-R
    "transformation-id": "test_jsons/Spatial-Transformation-id-test-1k.json",
    "transformation-left": "test_jsons/Spatial-Transformation-ood-left-test-1k.json",
    "transformation-right": "test_jsons/Spatial-Transformation-ood-right-test-1k.json",
}
DIRECTIONS = "front behind left right front_left front_right behind_left behind_right"
FUNCTIONS = {  # TRANCE's functions, and the values of each
    "change_size": "small medium large".split(),
    "change_color": "yellow gray cyan blue brown green red purple".split(),
    "change_material": "glass metal rubber".split(),
    "change_shape": "cube sphere cylinder".split(),
    "change_position": DIRECTIONS.split(),
}
MAX_QUESTION = 100_000  # characters
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>")
NUMBER = r"[+-]?(\d{1,3}(,\d{3})+(\.\d*)?|\d+(\.\d*)?|\.\d+)"
LETTER = r"\(?[A-Ha-h]\)?\.?"
EXPRESSION = r"(?s).*(\d|\\pi|π).*"  # `judgeable` asks for its value
CALL = r"(\w+)\s*\(\s*['\"]?(\w+)['\"]?\s*,\s*['\"]?(\w+)['\"]?\s*\)"
TAG = r"</?(?:think|answer)>"
LAST_ANSWER = re.compile(rf"(?s)<answer>(?:(?!{TAG}).)*</answer>\s*$")


class Unusable(Exception):
    """Why a record is left out."""


@dataclass(frozen=True)
class Record:
    """The fields of a state, images as paths."""

    id: str
    images: tuple[Path, ...]
    question: str
    answer: str
    kind: str
    thought: str


def read_records(path: Path) -> list:
    """The list in a JSON file, in UTF-8 or UTF-16, with or without a byte order mark.

    UserError if there is none.
    """
    try:
        # An integer of thousands of digits stays text: Python would refuse it and so the file.
        records = json.loads(path.read_bytes(), parse_int=lambda x: int(x) if len(x) < 99 else x)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from None
    if not isinstance(records, list):
        raise UserError(f"{path} is no list of records")
    return records


def read_record(record, id: str, task: str, roots: list[Path], thoughts: bool) -> Record:
    """A record of a JSON file as a `Record`; raises `Unusable`.

    roots: folders that its paths may be relative to; the last one contains the others.
    thoughts: a record without a thought is not usable.
    """
    if not isinstance(record, dict):
        raise Unusable("no record")
    question = question_of(record)
    answer = answer_of(record, task)
    kind = kind_of(answer, task)
    names = names_of(record.get("image"))
    if not names:
        raise Unusable("no image")
    if len(names) != (2 if task == "transformation" else 1):
        raise Unusable(f"{len(names)} images")
    images = tuple(find_image(name, roots) for name in names)
    thought = thought_of(record.get("cot"))
    thought = underscored(thought) if task == "transformation" else thought
    if thoughts and not thought:
        raise Unusable("no usable thought")
    return Record(id, images, question, answer, kind, thought)


def question_of(record: dict) -> str:
    """The question, which may be a list of one; raises `Unusable` if there is none to ask."""
    question = record.get("problem")
    question = question[0] if isinstance(question, list) and len(question) == 1 else question
    question = as_text(question) if isinstance(question, str) else ""
    if not question:
        raise Unusable("no question")
    if len(question) > MAX_QUESTION:
        raise Unusable(f"question too long: {len(question)} characters")
    if SPECIAL_TOKEN.search(question):  # an image token would break the forward pass
        raise Unusable("special token in the question")
    return question


def as_text(value) -> str:
    """A text, a number, or a list of these joined by commas; "" for anything else.

    Half a surrogate pair, which JSON can hold and no tokenizer takes, becomes U+FFFD.
    """
    if isinstance(value, list):
        parts = ["" if isinstance(part, list) else as_text(part) for part in value]
        return ", ".join(parts) if all(parts) else ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        return ""
    return value.strip().encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def answer_of(record: dict, task: str) -> str:
    """The truth under either of its names, bare or in <answer> tags; raises `Unusable`."""
    for name in ("answer", "solution"):
        answer = as_text(record.get(name))
        if re.search(TAG, answer):
            answer = extract_answer(answer) or ""
        if answer:
            return distinct(underscored(answer)) if task == "transformation" else answer
    raise Unusable("no answer")


def distinct(answer: str) -> str:
    """A sequence of functions with each call once: a repetition in the truth could only cost."""
    calls = re.findall(CALL, answer)
    kept = dict.fromkeys(tuple(map(str.lower, call)) for call in calls)
    if len(kept) == len(calls) or not all_calls(calls, answer):
        return answer
    return ", ".join(f"{name}({thing}, {value})" for name, thing, value in kept)


def all_calls(calls: list, answer: str) -> bool:
    """Whether `calls` are all that looks like a call in the answer."""
    return len(calls) == len(re.findall(r"\w\s*\(", answer))


def kind_of(answer: str, task: str) -> str:
    """How rewards.py judges this answer; raises `Unusable` for an unknown form of answer."""
    form = unicodedata.normalize("NFKC", answer)  # a full-width digit is a digit
    kind = None
    if task == "counting":
        kind = "discrete" if re.fullmatch(NUMBER, form) else None
    elif re.fullmatch(LETTER, form) and task == "structure":
        kind = "discrete"
    elif task == "structure":
        kind = "math" if re.fullmatch(EXPRESSION, form) else None
    else:
        calls = re.findall(CALL, answer.lower())
        known = all(value in FUNCTIONS.get(name, ()) for name, _, value in calls)
        known = known and all_calls(calls, answer)
        kind = "function" if known and 1 <= len(calls) <= 4 else None
    if kind is None or re.search(TAG, answer) or not judgeable(answer, kind):
        raise Unusable(f"unknown form of answer: {answer[:80]!r}")
    return kind


def thought_of(cot) -> str:
    """The chain of thought without its tags; "" if there is none or it holds other tags."""
    if not isinstance(cot, str):
        return ""
    cot = LAST_ANSWER.sub("", as_text(cot)).strip()
    if cot.startswith("<think>") and cot.endswith("</think>"):
        cot = cot.removeprefix("<think>").removesuffix("</think>").strip()
    return "" if re.search(TAG, cot) else cot


def short_id(given):
    """A record's own id, or its `repr` where a line of JSON cannot hold it or it is too long."""
    if given is None or isinstance(given, int) or (isinstance(given, str) and len(given) <= 200):
        return given
    return repr(given)[:200]


def names_of(value) -> list[str]:
    """The paths in a record: a text, {"path": text}, or a list of these; [] for anything else."""
    values = value if isinstance(value, list) else [value]
    names = [one.get("path") if isinstance(one, dict) else one for one in values]
    return names if all(isinstance(name, str) and name for name in names) else []


def find_image(name: str, roots: list[Path]) -> Path:
    """The file of that name, relative to one of the roots or absolute; raises `Unusable`.

    A file outside of all roots is not opened, whether a name or a link leads there. A root itself
    may be a link, since its owner made it.
    """
    shown = repr(name if len(name) <= 80 else f"{name[:80]}...")
    path = name.replace("\\", "/")  # Windows
    for root in roots:
        place = os.path.join(root, path)
        if os.path.isfile(place):  # False for what is not a path, such as an image in base64
            if any(real_path(place).startswith(f"{real_folder(str(r))}{os.sep}") for r in roots):
                return Path(place)
            raise Unusable(f"image outside the data set: {shown}")
    foreign = path.startswith("/") and not path.startswith(f"{roots[-1].absolute()}/")
    if foreign or ".." in PurePosixPath(path).parts:
        raise Unusable(f"image outside the data set: {shown}")
    raise Unusable(f"missing image: {shown}")


def real_path(place: str) -> str:
    """The path of a file once links are followed."""
    folder, file = os.path.split(place)
    return os.path.realpath(place) if os.path.islink(place) else f"{real_folder(folder)}/{file}"


@lru_cache(maxsize=4096)  # many files lie in few folders
def real_folder(folder: str) -> str:
    return os.path.realpath(folder)
