"""TODO data.reason_rft"""

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
