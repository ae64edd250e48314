"""A miniature Reason-RFT-CoT in the real layout, with records that cannot be used."""

import io
import json
import random
import zipfile
from pathlib import Path

from PIL import Image

from data import reading

BROKEN = {  # what of a counting-train set cannot be used, by the first words of the reason
    "no record": "just a text",
    "no question": dict(problem="  "),
    "special token in the question": dict(problem="what is <|image_pad|> ?"),
    "no answer": dict(answer=None),
    "unknown form of answer": dict(answer="many"),
    "no image": dict(image=[]),
    "2 images": dict(image=["counting/0.png", "counting/1.png"]),
    "missing image": dict(image="counting/nowhere.png"),
    "image outside the data set": dict(image="../../secret.png"),
    "broken image": dict(image="counting/broken.png"),
}


def png(seed: int, size=(40, 32)) -> bytes:
    rng = random.Random(seed)
    picture = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    picture.paste(tuple(rng.randrange(256) for _ in range(3)), (seed % 20, 4, seed % 20 + 12, 20))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def record(task: str, i: int, train: bool) -> dict:
    """A good one. Answers, names of fields and forms of thoughts vary as in the real files."""
    image = f"{task}/{i}.png"
    answer = {
        "counting": str(i % 10),
        "structure": ["A", "12.5", "2\\sqrt{3}", "C"][i % 4],
        "transformation": [
            "change_size(0, small)",
            "change_color(1, 'red'), change_position(0, 'front_left')",
        ][i % 2],
    }[task]
    if task == "transformation":
        image = [f"{task}/{i}.png", f"{task}/{i + 1}.png"]
    made = {
        "id": i,
        "image": image,
        "problem": f"how many red objects are there ? {i}",
        "solution" if i % 3 else "answer": answer,
    }
    if train:
        thought = "count every red object"
        made["cot"] = [
            thought,
            f"<think>\n{thought}\n</think>",
            f"<think>{thought}</think>\n<answer>{answer}</answer>",
        ][i % 3]
    return made


def make(
    directory: Path,
    size: int = 12,
    zipped: bool = True,
    prefix: str = "train_images/",
    broken: bool = True,
) -> Path:
    """The data set at `directory`: `size` good records a file; in counting-train also `BROKEN`."""
    images = {"train": {}, "test": {}}
    for name, file in reading.FILES.items():
        task, split = name.split("-")
        split = "train" if split == "train" else "test"
        records = [record(task, i, split == "train") for i in range(size)]
        if name == "counting-train" and broken:
            for i, change in enumerate(BROKEN.values()):
                records.insert(
                    3 * i,
                    {**record(task, 3, True), **change} if isinstance(change, dict) else change,
                )
        images[split] |= {f"{task}/{i}.png": png(i) for i in range(size + 1)}
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_text(json.dumps(records))
    images["train"]["counting/broken.png"] = png(1)[:60]
    for split, files in images.items():
        if zipped:
            with zipfile.ZipFile(directory / f"{split}_images.zip", "w") as archive:
                for name, content in files.items():
                    archive.writestr(prefix.replace("train", split) + name, content)
        for name, content in files.items() if not zipped else ():
            (directory / "images" / f"{split}_images" / name).parent.mkdir(
                parents=True, exist_ok=True
            )
            (directory / "images" / f"{split}_images" / name).write_bytes(content)
    return directory
