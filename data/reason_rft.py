"""Reason-RFT-CoT, the paper's data (Section 4.1), as sets of states.

Every record is checked before training. One that cannot be used (a missing or broken image, an
answer of unknown form, a question too long for the model, ...) is left out and listed with its
reason.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

from data.image_check import check_images
from data.lengths import Room
from data.pictures import ImageFiles
from data.reading import FILES, FUNCTIONS, Record, Unusable, read_record, read_records, short_id
from data.state import State
from training.console import UserError

FUNCTION_LINES = "\n".join(
    f"- {name}(object_id, value): {', '.join(values)}" for name, values in FUNCTIONS.items()
)
RULES = f"""\
The first picture shows a scene before, the second the same scene after some of its objects were \
changed; it may be seen from another side. The question lists the objects of the first scene, \
each as ('object_id', 'shape', 'size', 'color', 'material'). \
Find a sequence of 1 to 4 functions that turns the first scene into the second. Each is written \
func(object_id, value), with the id of an object from that list, and one of these functions and \
values:
{FUNCTION_LINES}
Directions are those of the first picture; front is towards the viewer. \
Write the functions one after another, separated by commas, such as change_color(2, red), \
change_position(0, front_left)."""
# Geometry's answers are letters and quantities. The prompt must not say which of them the question
# wants: only the truth could tell.
GEOMETRY = "a letter, a number or an expression"


def image_roots(name: str, directory: Path) -> list[Path]:
    """The folders that a record of this set may name its images from."""
    images = "train_images" if name.endswith("-train") else "test_images"
    return [directory / "images" / images, directory / "images", directory / images, directory]


class ReasonRFTSet:
    """A set of Reason-RFT-CoT: `ReasonRFTSet("counting-train", directory)[17]`.

    name: one of `FILES`. directory: as `data.download.prepare` returns it. mode: of the prompts.
    thoughts: leave out records without a chain of thought. cache: directory for the results of
    image checks, so that each image is checked once. room: leave out what does not fit.
    left_out: [{"set", "record", "id", "reason"}] of the records that cannot be used.
    UserError if the file is missing or no record can be used.
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
        self.task = name.split("-")[0]
        path = directory / FILES[name]
        records = read_records(path)
        roots = image_roots(name, directory)
        found: list[Record | Unusable] = []
        for i, record in enumerate(records):
            try:
                found.append(read_record(record, f"{name}-{i}", self.task, roots, thoughts))
            except Unusable as reason:
                found.append(reason)
        self._check_images_and_lengths(found, directory, cache, room)
        for i, record in enumerate(found):
            if isinstance(record, Unusable):
                given = records[i].get("id") if isinstance(records[i], dict) else None
                left_out = {"set": name, "record": i, "id": short_id(given), "reason": str(record)}
                self.left_out.append(left_out)
        # The files are sorted by source; shuffled, any first part is a fair sample of the whole.
        order = random.Random(name).sample(range(len(found)), len(found))
        self.records = [found[i] for i in order if isinstance(found[i], Record)]
        if not self.records:
            why = self.left_out[0]["reason"] if self.left_out else "it is empty"
            raise UserError(f"no record of {path} can be used: {why}")

    def _check_images_and_lengths(
        self,
        found: list,
        directory: Path,
        cache: Path | None,
        room: Room | None,
    ) -> None:
        """Replaces records with a broken image or a prompt that is too long by the reason."""
        place = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:12]
        file = cache / f"{self.name}-{place}.json" if cache else None
        paths = []
        for record in found:
            paths += record.images if isinstance(record, Record) else ()
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

    def _state(self, record: Record) -> State:
        return State(
            id=record.id,
            images=ImageFiles(record.images),
            question=record.question,
            answer=record.answer,
            kind=record.kind,
            thought=record.thought,
            mode=self.mode,
            rules=RULES if self.task == "transformation" else "",
            form=GEOMETRY if self.task == "structure" else "",
        )

    def report(self) -> str:
        """One line: how many records can be used, and why others cannot."""
        reasons = Counter(record["reason"].split(":")[0] for record in self.left_out)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        line = f"{self.name}: {len(self)} of {len(self) + len(self.left_out)} records"
        return f"{line}; left out: {why}" if why else line
