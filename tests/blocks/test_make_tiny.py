"""`python -m blocks.make_tiny` in a few steps: what it writes loads, and follows from the seed."""

import csv
import subprocess
import sys

import pytest
from conftest import ROOT

from blocks.dataset import BlocksSet
from blocks.make_tiny.lessons import NAMES, cell_labels, lesson
from blocks.scenes import GRID, seen_at
from policy import Policy


def test_a_short_run_writes_a_model_that_loads(tmp_path):
    flags = "--steps 1 1 1 --lessons 64 --batch 4"
    command = [sys.executable, "-m", "blocks.make_tiny", "--out", tmp_path / "tiny", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "tiny" / "losses.csv", newline="") as file:
        assert [row["phase"] for row in csv.DictReader(file)] == ["name", "see", "glance"]
    Policy.load(tmp_path / "tiny").encode([BlocksSet("transformation-train", 1)[0]])


def test_a_lesson_follows_from_its_seed():
    for i in range(40):
        one = lesson(i, seed=1, glances=2, right=0.5)
        assert one.pairs == lesson(i, seed=1, glances=2, right=0.5).pairs
        asked = [request for request, _ in one.pairs]
        assert sum(request.endswith("think , then answer .") for request in asked) == 2
        worked = [request for request in asked if request.endswith(("check .", "list ."))]
        assert len(worked) in (0, 2)


@pytest.mark.parametrize("name", ["counting-train", "transformation-left"])
def test_labels_name_each_object_in_the_cell_where_it_is_seen(name):
    problem = BlocksSet(name, 1)[0].problem
    if name == "counting-train":
        scenes = [(problem.objects, "center")]
    else:
        scenes = [(problem.before, "center"), (problem.after, problem.view)]
    for labels, (objects, view) in zip(cell_labels(problem), scenes, strict=True):
        assert (labels[:, 0] == 1).sum() == len(objects)
        for thing in objects:
            column, row = seen_at(thing.cell, view)
            kinds = zip(NAMES, labels[row * GRID + column], strict=True)
            words = [names[k] for names, k in kinds if k >= 0]
            assert words == ["object", thing.size, thing.color, thing.shape]
