"""`python -m blocks.make_tiny` in a few steps: what it writes loads, and follows from the seed."""

import csv
import random
import runpy
import sys

import pytest

from blocks.dataset import BlocksSet
from blocks.make_tiny.lessons import NAMES, cell_labels, lesson, sum_or_product
from blocks.scenes import GRID, column_row
from policy import Policy


def test_a_short_run_writes_a_model_that_loads(tmp_path, monkeypatch):
    flags = f"--out {tmp_path / 'tiny'} --steps 1 1 1 --lessons 64 --batch 4"
    monkeypatch.setattr(sys, "argv", ["blocks.make_tiny", *flags.split()])
    runpy.run_module("blocks.make_tiny", run_name="__main__")
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
        assert len(worked) in (0, 1, 2)  # none out of distribution, no list of a count


def test_arithmetic_on_a_count_and_scenes_from_the_side_are_left_to_rl():
    for i in range(200):
        pairs = lesson(i, seed=1, glances=1, right=0.5).pairs
        asked = [request for request, _ in pairs if not request[0].isdigit()]  # "3 times 2 ?"
        assert not any(" times " in request for request in asked)
        assert not any("remove" in request and " add " in request for request in asked)


@pytest.mark.parametrize("worked", [0.0, 0.07])
def test_the_share_of_worked_thoughts_under_rls_prompt_is_the_one_asked_for(worked):
    thoughts = []
    for i in range(400):
        pairs = lesson(i, seed=1, glances=2, right=0.5, worked=worked).pairs
        told = [text for request, text in pairs if request.endswith("think , then answer .")]
        thoughts += [" glance " not in text and text.startswith("<think>") for text in told]
    assert sum(thoughts) / len(thoughts) == pytest.approx(0.85 * worked, abs=0.03)


def test_sums_and_products_are_right():
    rng = random.Random(0)
    for _ in range(100):
        request, response = sum_or_product(rng)
        a, word, b, _ = request.split()
        value = int(a) * int(b) if word == "times" else int(a) + int(b)
        assert response == f"{a} {word} {b} is {value}"


@pytest.mark.parametrize("name", ["counting-train", "transformation-train"])
def test_labels_name_each_object_in_its_cell(name):
    problem = BlocksSet(name, 1)[0].problem
    scenes = [problem.objects] if name == "counting-train" else [problem.before, problem.after]
    for labels, objects in zip(cell_labels(problem), scenes, strict=True):
        assert (labels[:, 0] == 1).sum() == len(objects)
        for thing in objects:
            column, row = column_row(thing.cell)
            kinds = zip(NAMES, labels[row * GRID + column], strict=True)
            words = [names[k] for names, k in kinds if k >= 0]
            assert words == ["object", thing.size, thing.color, thing.shape]
