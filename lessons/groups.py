"""The page of a run: its groups step beside step, and its curves, as one file for a browser.

    python -m lessons.groups runs/NAME                             # runs/NAME/groups.html
    python -m lessons.groups runs/NAME --steps 1,25,50 --out page.html

It is made of samples.jsonl, metrics.jsonl and config.json, and of the run's data for the pictures.
The page needs nothing else: it can be sent, or put on a server.

Texts in it come from models and data sets, so they may be hostile. They reach the page as JSON, in
which no `<` is left to end the script element, and groups.html.template puts them there as text
alone. The page's Content-Security-Policy allows no script but its own and no request at all.
"""

import base64
import hashlib
import io
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

from matplotlib.colors import to_hex
from PIL import Image

import blocks  # noqa: F401  (adds itself to WORLDS)
from data.download import at_home, directory_of
from data.pictures import ImageFiles
from data.reading import FILES, Unusable, read_record, read_records
from data.reason_rft import image_roots
from data.sets import WORLDS
from training import console, curves, rundir, storage
from training.console import Parser, UserError
from training.metrics import POLICY
from training.settings import Settings

TEMPLATE = Path(__file__).with_name("groups.html.template")
MOST_STEPS = 12  # of a page, unless --steps asks for more
SIDE = 160  # pictures are at most so many pixels wide and high
SETTINGS = ("task", "data", "model", "experts", "num_samples", "group_size", "estimator", "seed")


# ---------------------------------------------------------------------------------------- groups


def read_groups(file: Path) -> dict[int, list[dict]]:
    """The groups of samples.jsonl by step, as `sampling.Group.transcript` wrote them.

    UserError if there are none, or for a record that is no such group.
    """
    if not file.is_file():
        raise UserError(f"no {file}: only a run of ekipl.py writes it, with --log-groups above 0")
    steps: dict[int, list[dict]] = {}
    for number, group in enumerate(storage.read(file), 1):
        if not is_group(group):
            raise UserError(f"{file}: record {number} is no group that this version writes")
        steps.setdefault(group["step"], []).append(group)
    if not steps:
        raise UserError(f"{file} holds no group")
    return dict(sorted(steps.items()))


def is_group(record: dict) -> bool:
    match record:
        case {
            "step": int(),
            "state": str(),
            "question": str(),
            "answer": str(),
            "actions": [_, *_] as actions,
        }:
            return all(is_action(action) for action in actions)
    return False


def is_action(record) -> bool:
    match record:
        case {
            "source": str(),
            "text": str(),
            "format": float(),
            "accuracy": float(),
            "reward": float(),
            "kept": bool(kept),
            "advantage": advantage,
        }:
            known = isinstance(advantage, float) if kept else advantage is None
            return known and storage.finite(record) == record
    return False


def chosen_steps(steps: list[int], wanted: str) -> list[int]:
    """The steps that `wanted` lists ("1,25,50"); if it is empty, at most MOST_STEPS, evenly.

    UserError for what is no step of the run.
    """
    if not wanted:
        count = min(len(steps), MOST_STEPS)
        return [steps[i * (len(steps) - 1) // max(1, count - 1)] for i in range(count)]
    chosen = set()
    for word in wanted.split(","):
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*", word):
            raise UserError(f"--steps takes numbers with commas between them, not {wanted!r}")
        if int(word) not in steps:
            raise UserError(f"no groups of step {int(word)}: they are of {steps[0]} to {steps[-1]}")
        chosen.add(int(word))
    return sorted(chosen)


# -------------------------------------------------------------------------------------- pictures


class Questions:
    """The questions of a run by the ids of their states, each with its images.

    They are read one by one: nothing is downloaded, unpacked or checked as a whole.
    """

    def __init__(self, config: SimpleNamespace):
        self.config = config
        self.records: dict[str, list] = {}  # of Reason-RFT-CoT's files, by set

    def find(self, id: str):
        """(question, images). Raises UserError, Unusable, LookupError, ValueError or OSError."""
        name, _, index = id.rpartition("-")
        if self.config.data in WORLDS:
            name = name.rpartition("-")[0]  # the seed
            state = WORLDS[self.config.data](name, self.config, "reason")[int(index)]
            return state.question, state.images
        directory = directory_of(self.config.data, at_home(self.config.data_cache))
        if name not in self.records:
            self.records[name] = read_records(directory / FILES[name])
        task, roots = name.split("-")[0], image_roots(name, directory)
        record = read_record(self.records[name][int(index)], id, task, roots, thoughts=False)
        return record.question, ImageFiles(record.images)


def pictures(group: dict, questions: Questions) -> list[str] | str:
    """The pictures of a group's state as data: URIs, or why there are none."""
    try:
        question, images = questions.find(group["state"])
        if question != group["question"]:  # the data, or the seed, is not the run's
            return "not found: the data has another question of this name"
        return [data_uri(image) for image in images]
    except (UserError, Unusable) as error:
        return f"not found: {error}"
    except (LookupError, ValueError, TypeError, OSError):
        return f"not found: the data has no {group['state']}"


def data_uri(picture: Image.Image) -> str:
    """At most SIDE pixels: a small picture enlarged by a whole factor (PNG), or shrunk (JPEG)."""
    file, factor = io.BytesIO(), SIDE // max(picture.size)
    if factor:
        size = (picture.width * factor, picture.height * factor)
        picture.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
        return as_uri(file.getvalue(), "png")
    picture = picture.copy()
    picture.thumbnail((SIDE, SIDE))
    picture.save(file, "JPEG", quality=85)
    return as_uri(file.getvalue(), "jpeg")


def as_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def curves_uri(run: Path) -> str:
    """The run's curves as they are now; "" if it has no metrics."""
    history = curves.metrics(run / "metrics.jsonl")
    if not history:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "curves.png"
        curves.draw({run.resolve().name: history}, picture)
        return as_uri(picture.read_bytes(), "png")


# ------------------------------------------------------------------------------------------ page


def page_data(run: Path, wanted: str) -> dict:
    """All that the page shows."""
    steps = read_groups(run / "samples.jsonl")
    config = SimpleNamespace(**(vars(Settings()) | rundir.read_config(run)))
    sources: set[str] = set()  # over all steps, in an order that --experts does not change
    for groups in steps.values():
        for group in groups:
            sources.update(action["source"] for action in group["actions"])
    colors = curves.colors_of(sorted(sources, key=lambda name: (name != POLICY, name)))
    questions, shown = Questions(config), []
    for step in chosen_steps(list(steps), wanted):
        groups = [group | {"pictures": pictures(group, questions)} for group in steps[step]]
        shown.append({"step": step, "groups": groups})
    return {
        "name": run.resolve().name,
        "settings": [[key, str(getattr(config, key, ""))] for key in SETTINGS],
        "of": len(steps),
        "sources": [[name, to_hex(color)] for name, color in colors.items()],
        "steps": shown,
        "curves": curves_uri(run),
    }


def page(data: dict) -> str:
    """The whole page, with its data as JSON and the hash by which its policy knows its script."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return template.replace("{{HASH}}", digest).replace("{{DATA}}", text)


def run(argv: list[str]) -> str:
    parser = Parser(
        prog="python -m lessons.groups", description="Makes a page of a run's groups, to read."
    )
    parser.add_argument("run", type=Path, help="a run's directory")
    parser.add_argument("--out", type=Path, help="the page (default: groups.html in the run)")
    parser.add_argument(
        "--steps",
        default="",
        help=f"of these steps, such as 1,25,50 (default: at most {MOST_STEPS}, evenly spread)",
    )
    args = parser.parse_args(argv)
    out = args.out or args.run / "groups.html"
    text = page(page_data(args.run, args.steps))
    with storage.writing(out):
        storage.write_aside(out, text)
    return f"{out} ({len(text) // 1000} kB): open it in a browser"


def main() -> None:
    console.command("lessons.groups", run)


if __name__ == "__main__":
    main()
