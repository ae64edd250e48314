"""States and where they come from (paper, Sections 3.1 and 4.1): s = (v, t), images and a question.

Every data set gives its questions as `State`s, by its name, its length and `[i]`; nothing downstream knows which one it was:

    blocks.BlocksSet     the blocks world, the embedded default (--data blocks)
    ReasonRFTSet         Reason-RFT-CoT, the paper's data (--data reason-rft downloads it, --data DIR takes an unpacked copy)

The prompt is one user turn, images first, then the question and what to do with it; the policy and the experts get the same words,
since experts that are told more than the policy teach it what it cannot see.

Reason-RFT-CoT is JSON files of records, and zip archives of images. Every record is checked once, before anything is trained: one that
could not be used (an image is missing or broken, an answer has no form that the rewards know, ...) is left out and listed with its
reason. Images are opened when they are used (pictures.py). The order is the same always; any first
part of a set is a fair sample of the whole.

    python data.py --data reason-rft --task counting        # downloads, unpacks and checks: worth doing before GPUs wait for it

Departure from Reason-RFT: the prompts are in our words, but for mode "bare", which is its
ANS-SFT's.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from filelock import FileLock
from PIL import Image
from tqdm import tqdm

import runs
from lengths import Room
from pictures import ImageFiles, look_into, open_image  # noqa: F401
from rewards import extract_answer, judge_answer
from runs import UserError

CACHE = "~/.cache/vision-ekipl"  # of what is downloaded and of what was checked
TASKS = ("counting", "structure", "transformation")
# What a prompt asks for: a thought and an answer; the answer alone; or nothing, the question being
# all of it (Reason-RFT's ANS-SFT).
MODES = ("reason", "answer", "bare")
FORMS = {"discrete": "a number", "math": "a number", "function": "a sequence of functions"}


# ---------------------------------------------------------------------------------------------- a state


@dataclass(frozen=True)
class State:
    """One question about one or more images.

    id: unique within its set. images: RGB pictures, in the order in which the question speaks of them; some sets open them only when
    they are used. question: the text t. answer: the truth, as text. kind: how the answer is judged ("discrete", "math" or "function",
    see rewards.py). thought: a correct chain of thought, "" where the data set has none. mode: one of `MODES`. rules: what the
    prompt tells before the question, "" where the question says it all. form: what the prompt
    calls the answer, "" goes by kind; it must not depend on the answer where one question's is a
    letter and another's a number.
    """

    id: str
    images: Sequence[Image.Image]
    question: str
    answer: str
    kind: str
    thought: str = ""
    mode: str = "reason"
    rules: str = ""
    form: str = ""

    @property
    def request(self) -> str:
        """What follows the question in the prompt: how to answer."""
        form = self.form or FORMS[self.kind]
        if self.mode == "answer":
            return f"Give only the final answer, {form}, between <answer> and </answer>."
        return f"Reason step by step between <think> and </think>, then give the final answer, {form}, between <answer> and </answer>."

    def messages(self) -> list[dict]:
        """The prompt as chat messages, as a processor's `apply_chat_template` takes them (images by order)."""
        content = [{"type": "image"} for _ in range(len(self.images))]
        text = self.question
        if self.mode != "bare":
            text = f"{self.rules}\n\n{text}" if self.rules else text
            text = f"{text} {self.request}"
        content.append({"type": "text", "text": text})
        return [{"role": "user", "content": content}]

    def reading(self, response: str) -> str:
        """The response as the scorers read it: who was asked in mode "bare" says the answer
        without tags."""
        untagged = self.mode == "bare" and "<answer>" not in response
        return f"<answer>{response}</answer>" if untagged else response


# ---------------------------------------------------------------------------------------------- Reason-RFT-CoT


REPOSITORY = "tanhuajie2001/Reason-RFT-CoT-Dataset"  # on the Hugging Face hub
FILES = {  # the set of each file; the names are the blocks world's
    "counting-train": "train_jsons/A3-Visual-Counting-train-35k-cot.json",
    "counting-id": "test_jsons/Visual-Counting-id-test-1k.json",  # Clevr-Math
    "counting-ood": "test_jsons/Visual-Counting-ood-test-1k.json",  # Super-Clevr
    "structure-train": "train_jsons/A2-Structure-Perception-train-4k5-cot.json",
    "structure-id": "test_jsons/Structure-Perception-id-test-820.json",  # GeoMath
    "structure-ood": "test_jsons/Structure-Perception-ood-test-800.json",  # Geometry3k
    "transformation-train": "train_jsons/A1-Spatial-Transformation-train-60k-cot.json",
    "transformation-id": "test_jsons/Spatial-Transformation-id-test-1k.json",  # TRANCE, then TRANCE-L and -R
    "transformation-left": "test_jsons/Spatial-Transformation-ood-left-test-1k.json",
    "transformation-right": "test_jsons/Spatial-Transformation-ood-right-test-1k.json",
}
FUNCTIONS = {  # TRANCE's, and the values of each
    "change_size": "small medium large".split(),
    "change_color": "yellow gray cyan blue brown green red purple".split(),
    "change_material": "glass metal rubber".split(),
    "change_shape": "cube sphere cylinder".split(),
    "change_position": "front behind left right front_left front_right behind_left behind_right".split(),
}
RULES = (
    "The first picture shows a scene before, the second the same scene after some of its objects were changed; it may be seen from another "
    "side. The question lists the objects of the first scene, each as ('object_id', 'shape', 'size', 'color', 'material'). "
    "Find a sequence of 1 to 4 functions that turns the first scene into the second. Each is written func(object_id, value), with the "
    "id of an object from that list, and one of these functions and values:\n"
    + "\n".join(
        f"- {name}(object_id, value): {', '.join(values)}" for name, values in FUNCTIONS.items()
    )
    + "\nDirections are those of the first picture; front is towards the viewer. "
    "Write the functions one after another, separated by commas, such as change_color(2, red), change_position(0, front_left)."
)
# Geometry's answers are letters and quantities. Which of the two the question wants is for the
# policy to see: the prompt could tell it by the truth alone.
GEOMETRY = "a letter, a number or an expression"
MAX_QUESTION = 100_000  # characters; more are no question
NUMBER = r"[+-]?(\d{1,3}(,\d{3})+(\.\d*)?|\d+(\.\d*)?|\.\d+)"
LETTER = r"\(?[A-Ha-h]\)?\.?"
EXPRESSION = r"(?s).*(\d|\\pi|π).*"  # that its value can be judged is asked of rewards.py
CALL = r"(\w+)\s*\(\s*['\"]?(\w+)['\"]?\s*,\s*['\"]?(\w+)['\"]?\s*\)"
TAG = r"</?(?:think|answer)>"


class Unusable(Exception):
    """Why a record is left out."""


@dataclass(frozen=True)
class Record:
    """What a state is made of, images as paths."""

    id: str
    images: tuple[Path, ...]
    question: str
    answer: str
    kind: str
    thought: str


class ReasonRFTSet:
    """A set of Reason-RFT-CoT: `ReasonRFTSet("counting-train", directory)[17]`.

    name: one of `FILES`. directory: where `prepare` has put it. mode: of the prompts, one of `MODES`. thoughts: leave out what has no
    chain of thought. cache: where it is kept which images were found whole, so that they are
    looked into once. room: leave out what does not fit in there, None: nothing.
    left_out: [{"set", "record", "id", "reason"}], what was not usable. UserError if the file is missing or nothing is usable.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        mode: str = "reason",
        thoughts: bool = False,
        cache: Path | None = None,
        room: Room | None = None,
    ):
        if name not in FILES:
            raise ValueError(f"no set '{name}' in Reason-RFT-CoT; there are {', '.join(FILES)}")
        self.name, self.mode, self.left_out = name, mode, []
        self.task, split = name.split("-")
        path = directory / FILES[name]
        records = read_records(path)
        images = "train_images" if split == "train" else "test_images"
        roots = [directory / "images" / images, directory / "images", directory / images, directory]
        found: list[Record | Unusable] = []
        for i, record in enumerate(records):
            try:
                found.append(read_record(record, f"{name}-{i}", self.task, roots, thoughts))
            except Unusable as reason:
                found.append(reason)
        self._leave_out_by_images(found, directory, cache, room)
        for i, record in enumerate(found):
            if isinstance(record, Unusable):
                given = records[i].get("id") if isinstance(records[i], dict) else None
                left_out = {"set": name, "record": i, "id": short_id(given), "reason": str(record)}
                self.left_out.append(left_out)
        # The files are sorted by where their records are from; shuffled, any first part is a sample of them all.
        order = random.Random(name).sample(range(len(found)), len(found))
        self.records = [found[i] for i in order if isinstance(found[i], Record)]
        if not self.records:
            why = self.left_out[0]["reason"] if self.left_out else "it is empty"
            raise UserError(f"no record of {path} can be used: {why}")

    def _leave_out_by_images(self, found: list, directory: Path, cache: Path | None, room) -> None:
        """Puts the reason in the place of a record with a broken image, or one that takes more
        room than there is."""
        place = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:12]
        file = cache / f"{self.name}-{place}.json" if cache else None
        paths = [image for record in found if isinstance(record, Record) for image in record.images]
        broken, sizes = check_images(paths, self.name, file)
        for i, record in enumerate(found):
            if not isinstance(record, Record):
                continue
            if bad := [image for image in record.images if image in broken]:
                found[i] = Unusable(f"broken image: {bad[0].name}: {broken[bad[0]]}")
            elif room is not None:
                long = room.problem(self._state(record), [sizes[image] for image in record.images])
                found[i] = Unusable(long) if long else record

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> State:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} states, there is no state {index}")
        return self._state(self.records[index])

    def _state(self, record: "Record") -> State:
        return State(
            record.id, ImageFiles(record.images), record.question, record.answer, record.kind, record.thought, self.mode,
            rules=RULES if self.task == "transformation" else "", form=GEOMETRY if self.task == "structure" else "",
        )  # fmt: skip

    def report(self) -> str:
        """In one line, what was left out and why."""
        total = len(self) + len(self.left_out)
        reasons = Counter(record["reason"].split(":")[0] for record in self.left_out)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        return f"{self.name}: {len(self)} of {total} records" + (
            f"; left out: {why}" if why else ""
        )


# ---------------------------------------------------------------------------------------------- its records


def read_records(path: Path) -> list:
    """The JSON file's list, in UTF-8 or UTF-16, with a byte order mark or without. UserError if it
    has none."""
    try:
        # A whole number of thousands of digits is left as text: Python would refuse it, and with
        # it the file.
        records = json.loads(path.read_bytes(), parse_int=lambda x: int(x) if len(x) < 99 else x)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not isinstance(records, list):
        raise UserError(f"{path} is no list of records")
    return records


def read_record(record, id: str, task: str, roots: list[Path], thoughts: bool) -> Record:
    """A record of the JSON file as a `Record`; raises `Unusable`. roots: folders that its paths
    may be relative to, the last one holds all."""
    if not isinstance(record, dict):
        raise Unusable("no record")
    question = record.get("problem")
    question = question[0] if isinstance(question, list) and len(question) == 1 else question
    question = as_text(question) if isinstance(question, str) else ""
    if not question:
        raise Unusable("no question")
    if len(question) > MAX_QUESTION:
        raise Unusable(f"question too long: {len(question)} characters")
    if re.search(r"<\|\w+\|>", question):  # an image token would break the forward pass
        raise Unusable("special token in the question")
    answer = answer_of(record, task)
    kind = kind_of(answer, task)
    names = names_of(record.get("image"))
    if not names:
        raise Unusable("no image")
    if len(names) != (2 if task == "transformation" else 1):
        raise Unusable(f"{len(names)} images")
    images = tuple(find_image(name, roots) for name in names)
    thought = thought_of(record.get("cot"))
    thought = spelled(thought) if task == "transformation" else thought
    if thoughts and not thought:
        raise Unusable("no usable thought")
    return Record(id, images, question, answer, kind, thought)


def as_text(value) -> str:
    """A text, a number, or a list of them one after the other; "" for anything else. Half a
    surrogate pair, which JSON can hold and no tokenizer takes, becomes U+FFFD."""
    if isinstance(value, list):
        parts = ["" if isinstance(part, list) else as_text(part) for part in value]
        return ", ".join(parts) if all(parts) else ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        return ""
    return value.strip().encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def answer_of(record: dict, task: str) -> str:
    """The truth under either of its names, bare or in <answer> tags; raises `Unusable` if there is
    none."""
    for name in ("answer", "solution"):
        answer = as_text(record.get(name))
        if re.search(TAG, answer):
            answer = extract_answer(answer) or ""
        if answer:
            return distinct(spelled(answer)) if task == "transformation" else answer
    raise Unusable("no answer")


def spelled(text: str) -> str:
    """Directions as `FUNCTIONS` and so the prompt spell them: TRANCE's own files have
    front-left."""
    return re.sub(r"(?i)\b(front|behind)[- ](left|right)\b", r"\1_\2", text)


def distinct(answer: str) -> str:
    """A sequence of functions with each call once: both sides are judged as sets, so a repetition
    in the truth could only cost."""
    calls = re.findall(CALL, answer)
    kept = dict.fromkeys(tuple(map(str.lower, call)) for call in calls)
    if len(kept) == len(calls) or not all_calls(calls, answer):
        return answer
    return ", ".join(f"{name}({thing}, {value})" for name, thing, value in kept)


def all_calls(calls: list, answer: str) -> bool:
    """Whether everything in the answer that looks like a call is one of these."""
    return len(calls) == len(re.findall(r"\w\s*\(", answer))


def kind_of(answer: str, task: str) -> str:
    """How rewards.py judges this answer; raises `Unusable` if it has no form that is known, or does not count as right itself."""
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
    if kind is None or re.search(TAG, answer) or judge_answer(answer, answer, kind) < 1:
        raise Unusable(f"unknown form of answer: {answer[:80]!r}")
    return kind


def thought_of(cot) -> str:
    """The chain of thought without its tags; "" where there is none or it holds other tags."""
    if not isinstance(cot, str):
        return ""
    cot = re.sub(
        r"<answer>(?:(?!</?answer>|</?think>).)*</answer>\s*$", "", as_text(cot), flags=re.DOTALL
    ).strip()
    cot = (
        cot.removeprefix("<think>").removesuffix("</think>").strip()
        if cot.startswith("<think>") and cot.endswith("</think>")
        else cot
    )
    return "" if re.search(TAG, cot) else cot


def short_id(given):
    """A record's own id as a line of JSON can hold it: NaN cannot be written, and a list or a
    novel is no id."""
    if given is None or isinstance(given, int) or (isinstance(given, str) and len(given) <= 200):
        return given
    return repr(given)[:200]


# ---------------------------------------------------------------------------------------------- its images


def names_of(value) -> list[str]:
    """The paths in a record: a text, {"path": text}, or a list of these; [] if anything else is
    among them."""
    values = value if isinstance(value, list) else [value]
    names = [one.get("path") if isinstance(one, dict) else one for one in values]
    return names if all(isinstance(name, str) and name for name in names) else []


def find_image(name: str, roots: list[Path]) -> Path:
    """The file of that name, relative to one of the roots or absolute; raises `Unusable` if there
    is none in them.

    What a name or a link leads to outside of all roots is not opened. A root itself may be a link,
    which its owner has made.
    """
    shown = repr(name if len(name) <= 80 else f"{name[:80]}...")
    path = name.replace("\\", "/")  # Windows
    for root in roots:
        place = os.path.join(root, path)
        if os.path.isfile(place):  # not so for what is no path at all, such as an image in base64
            if any(real_path(place).startswith(f"{real_folder(str(r))}{os.sep}") for r in roots):
                return Path(place)
            raise Unusable(f"image outside the data set: {shown}")
    foreign = path.startswith("/") and not path.startswith(f"{roots[-1].absolute()}/")
    if foreign or ".." in PurePosixPath(path).parts:
        raise Unusable(f"image outside the data set: {shown}")
    raise Unusable(f"missing image: {shown}")


def real_path(place: str) -> str:
    """Where a file is once links are followed."""
    folder, file = os.path.split(place)
    return os.path.realpath(place) if os.path.islink(place) else f"{real_folder(folder)}/{file}"


@lru_cache(maxsize=4096)  # many files lie in few folders
def real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def check_images(
    paths: list[Path], name: str, file: Path | None
) -> tuple[dict[Path, str], dict[Path, list[int]]]:
    """Which of these images cannot be used, and why; and width and height of the others. What was
    found once is kept in `file` and counts until an image changes."""
    paths = list(dict.fromkeys(paths))
    stamps = [[stat.st_size, stat.st_mtime_ns] for stat in (path.stat() for path in paths)]
    with (
        locked(file) if file else nullcontext()
    ):  # one process looks, the others read what it found
        seen = images_seen(file) if file else {}
        new = [i for i, path in enumerate(paths) if seen.get(str(path), [None])[0] != stamps[i]]
        with ThreadPoolExecutor() as threads:  # PIL decodes beside Python
            found = threads.map(look_into, [paths[i] for i in new])
            bar = tqdm(
                found, total=len(new), desc=f"{name}: checking images", disable=len(new) < 1000
            )
            for i, (problem, size) in zip(new, bar, strict=True):
                seen[str(paths[i])] = [stamps[i], problem, size]
        if file and new:
            with runs.writing(file):
                runs.write_aside(file, json.dumps(seen))
    broken = {path: problem for path in paths if (problem := seen[str(path)][1])}
    return broken, {path: seen[str(path)][2] for path in paths}


def images_seen(file: Path) -> dict[str, list]:
    """What is known of images by their paths: [stamp, problem, size]. Whatever else a file holds
    is as good as none."""
    try:
        seen = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(seen, dict):
        return {}
    return {path: entry for path, entry in seen.items() if is_entry(entry)}


def is_entry(entry) -> bool:
    match entry:
        case [[int(), int()], str(), None]:
            return bool(entry[1])
        case [[int(), int()], None, [int(width), int(height)]]:
            return width > 0 and height > 0
    return False


# ---------------------------------------------------------------------------------------------- to the disk


@contextmanager
def locked(file: Path):
    """One process at a time, of all that use this file. UserError where none can be written."""
    with runs.writing(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{file}.lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def at_home(path: str) -> Path:
    """The path, with ~ as the home directory. UserError where this user has none, as in some
    containers."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"there is no home directory for {path} here: name another place, with --data-cache or --data, or set HOME"
        ) from None


def prepare(source: str, names: list[str], cache: Path) -> Path:
    """The directory that has the files of these sets, unpacked: downloaded into the cache if `source` is "reason-rft", else `source`.

    Killed at any moment, it goes on at the next call. UserError if something is missing.
    """
    ours = source == "reason-rft"
    directory = cache / "Reason-RFT-CoT-Dataset" if ours else at_home(source)
    if not ours and not directory.is_dir():
        raise UserError(
            f"no data at {directory}: --data is a directory with train_jsons and test_jsons, or reason-rft, or blocks"
        )
    with locked(cache / "prepare"):
        for split in dict.fromkeys(
            "train" if name.endswith("-train") else "test" for name in names
        ):
            files = [FILES[name] for name in names if FILES[name].startswith(split)]
            images, archive = (
                directory / "images" / f"{split}_images",
                directory / f"{split}_images.zip",
            )
            if ours:
                download([*files, *([] if images.is_dir() else [archive.name])], directory)
            if missing := [file for file in files if not (directory / file).is_file()]:
                raise UserError(f"{directory} has no {missing[0]}")
            if not images.is_dir() and archive.is_file():
                unpack(archive, images)
    return directory


def download(files: list[str], directory: Path) -> None:
    """Files of the data set from the hub, with a progress bar; one that was begun earlier is gone on with.

    By the library's `http_get`, since its `hf_hub_download` throws away what it has of a file when the process ends.
    """
    from huggingface_hub import (  # slow to import, and rarely needed
        get_hf_file_metadata,
        hf_hub_url,
    )
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    for file in files:
        if (directory / file).is_file():
            continue
        try:
            url = hf_hub_url(REPOSITORY, file, repo_type="dataset")
            metadata = get_hf_file_metadata(url)
            version = hashlib.sha256(f"{metadata.etag} {metadata.size}".encode()).hexdigest()[:12]
            part = directory / f"{file}.{version}.part"  # of another version nothing is of use
            part.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab") as content:
                http_get(
                    url, content, resume_size=part.stat().st_size, headers=build_hf_headers(), expected_size=metadata.size,
                    displayed_filename=file, tqdm_class=tqdm,
                )  # fmt: skip
            os.replace(part, directory / file)
        except (
            Exception
        ) as error:  # the library's errors, those of its HTTP client, those of the disk
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot download {file} of {REPOSITORY} ({reason}): try again, it goes on; or get it by hand and name its place with --data"
            ) from None


MAX_EXPANSION = (
    20  # images hardly shrink in a zip; what grows more than this is no archive of images
)
MAX_FILES = 1_000_000


def unpack(archive: Path, target: Path) -> None:
    """The files of a zip archive, as the folder `target`, which is there in the end as a whole or not at all.

    Names may begin with "images/" and the target's own name, or not. Nothing is written outside of the target. UserError if
    a name leads out of the archive, if it grows too large, or if it is broken.
    """
    aside = target.with_name(target.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)  # of an earlier try
    try:
        with zipfile.ZipFile(archive) as file, runs.writing(aside):
            entries = [
                entry
                for entry in file.infolist()
                if not entry.filename.endswith(("/", "\\"))
                and not entry.filename.startswith("__MACOSX/")
            ]
            names = [inside(entry.filename, target.name, archive) for entry in entries]
            size, packed = sum(entry.file_size for entry in entries), archive.stat().st_size
            if size > MAX_EXPANSION * packed or len(entries) > MAX_FILES:
                raise UserError(
                    f"{archive} claims to hold {len(entries):,} files of {size / 1e9:.1f} GB in {packed / 1e9:.3f} GB: that is no archive of images"
                )
            aside.mkdir(parents=True)
            if (free := shutil.disk_usage(aside).free) < size:
                raise UserError(
                    f"{archive} needs {size / 1e9:.1f} GB in {target.parent}, where {free / 1e9:.1f} GB are free"
                )
            for entry, name in zip(
                tqdm(entries, desc=f"unpacking {archive.name}", disable=len(entries) < 1000),
                names,
                strict=True,
            ):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                with (
                    file.open(entry) as source,
                    open(aside / name, "wb") as copy,
                ):  # never more than file_size bytes
                    shutil.copyfileobj(source, copy)
            os.rename(aside, target)
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        EOFError,
        NotImplementedError,
        RuntimeError,
        zlib.error,
    ) as error:
        raise UserError(f"{archive} is broken ({error}): get it again") from None


def inside(name: str, folder: str, archive: Path) -> PurePosixPath:
    """A member's place in the folder, its parts between slashes or, from Windows, backslashes;
    UserError if it leads out of it."""
    path = PurePosixPath(name.replace("\\", "/"))
    parts = list(path.parts)
    if "\0" in name or ":" in name or path.is_absolute() or ".." in parts or not parts:
        raise UserError(f"{archive} holds {name!r}, which leads out of it: not unpacked")
    if parts[:2] == ["images", folder]:
        parts = parts[2:]
    elif parts[:1] == [folder]:
        parts = parts[1:]
    if not parts:
        raise UserError(f"{archive} holds a file {name!r} where a folder should be: not unpacked")
    return PurePosixPath(*parts)


# ---------------------------------------------------------------------------------------------- the sets of a run


class Part:
    """States `start` to `stop` of a set, in its order."""

    def __init__(self, whole, start: int, stop: int):
        self.whole, self.name, self.places = whole, whole.name, range(start, stop)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> State:
        return self.whole[self.places[index]]


def load_set(
    name: str, config, mode: str = "reason", thoughts: bool = False, room: Room | None = None
):
    """The whole set of that name from where a run's settings say: `data`, `data_cache`; of the
    blocks world `states` and `seed`, and all of it, since its questions are never long. UserError
    if there is no such set."""
    if name not in FILES:
        raise UserError(f"no set {name!r}; there are {', '.join(FILES)}")
    if config.data == "blocks":
        from blocks import BlocksSet  # which takes `State` from here

        train = name.endswith("-train")
        return (
            BlocksSet(name, config.states, config.seed, mode)
            if train
            else BlocksSet(name, config.eval_states, 0, mode)
        )
    cache = at_home(config.data_cache)
    return ReasonRFTSet(name, prepare(config.data, [name], cache), mode, thoughts, cache, room)


def training_states(
    config, mode: str = "reason", thoughts: bool = False, room: Room | None = None
) -> tuple[Part, list[int]]:
    """The questions of a run, and the order in which it asks them over all epochs: its first `batch_size` are the first step's.

    Of the task's training set the first `skip` are left to somebody else; of the rest the first `fraction` are asked, `limit` at most
    (0: no limit). So runs with a smaller share see part of what the others see. UserError if this is less than one batch.
    """
    whole = load_set(f"{config.task}-train", config, mode, thoughts, room)
    count = round(config.fraction * max(0, len(whole) - config.skip))
    count = min(count, config.limit or count)
    if count * config.epochs < config.batch_size:
        raise UserError(
            f"{count} questions x {config.epochs} epochs are less than one batch of {config.batch_size}"
        )
    order = [
        i
        for epoch in range(config.epochs)
        for i in random.Random(f"{config.seed} order {epoch}").sample(range(count), count)
    ]
    return Part(whole, config.skip, config.skip + count), order


def test_sets(config, mode: str = "reason", room: Room | None = None) -> dict[str, Part]:
    """The first `eval_states` questions of each test set of the task."""
    names = [
        name for name in FILES if name.startswith(f"{config.task}-") and not name.endswith("-train")
    ]
    sets = {name: load_set(name, config, mode, room=room) for name in names}
    return {
        name: Part(whole, 0, min(len(whole), config.eval_states)) for name, whole in sets.items()
    }


def reports(sets: list[Part]) -> tuple[list[str], list[dict]]:
    """What of the records could not be used: a line for each set of real data, and all that was left out."""
    real = [part.whole for part in sets if isinstance(part.whole, ReasonRFTSet)]
    return [whole.report() for whole in real], [
        record for whole in real for record in whole.left_out
    ]


def run(argv: list[str]) -> None:
    parser = runs.Parser(
        prog="data.py",
        description="Downloads, unpacks and checks Reason-RFT-CoT, and tells what cannot be used.",
    )
    parser.add_argument(
        "--data", default="reason-rft", help="reason-rft (downloads) or the directory of a copy"
    )
    parser.add_argument(
        "--data-cache", default=CACHE, help=f"where to download to (default: {CACHE})"
    )
    parser.add_argument("--task", choices=TASKS, help="one of the tasks (default: all)")
    args = parser.parse_args(argv)
    cache = at_home(args.data_cache)
    for name in [name for name in FILES if name.startswith(args.task or "")]:
        questions = ReasonRFTSet(name, prepare(args.data, [name], cache), cache=cache)
        print(questions.report())
        for record in questions.left_out:
            print(f"  {FILES[name]}, record {record['record']}: {record['reason']}")


def main() -> None:
    runs.command("data.py", run)


if __name__ == "__main__":
    main()
