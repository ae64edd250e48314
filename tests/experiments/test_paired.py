"""Paired differences: a bootstrap over questions, the same for both methods, and over seeds."""

import dataclasses
import json
import math

import numpy as np
import pytest

from data.predictions import Prediction
from experiments import paired
from training import storage
from training.console import UserError


def drawn(seeds: int, questions: int, p: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random((seeds, questions)) < p).astype(float)


def test_a_single_run_has_the_interval_of_its_questions():
    scores = drawn(1, 1000, 0.3, 0)
    value, low, high = paired.interval(scores)
    p = scores.mean()
    half = 1.96 * math.sqrt(p * (1 - p) / 1000)
    assert value == pytest.approx(p)
    assert (low, high) == pytest.approx((p - half, p + half), abs=0.1 * half)


def test_a_difference_is_taken_on_the_same_questions():
    one = drawn(1, 1000, 0.5, 0)
    other = one.copy()
    other[0, :20] = 1 - other[0, :20]  # they disagree about 20 questions only
    assert paired.interval(one, one) == (0.0, 0.0, 0.0)
    value, low, high = paired.interval(one, other)
    apart = (one - other)[0]
    assert value == pytest.approx(apart.mean())
    half = 1.96 * apart.std() / math.sqrt(1000)  # as of independent samples it would be 0.044
    assert high - low == pytest.approx(2 * half, rel=0.15)


def test_seeds_that_disagree_widen_the_interval():
    apart = np.concatenate([drawn(1, 1000, p, i) for i, p in enumerate((0.3, 0.5, 0.7))])
    _, low, high = paired.interval(apart)
    # A mean of three seeds drawn anew has the deviation of the seeds by the root of 3.
    assert high - low == pytest.approx(2 * 1.96 * 0.163 / math.sqrt(3), rel=0.2)


def predictions(path, right: dict[str, list[bool]], kind: str = "discrete") -> None:
    """A run's predictions of counting-id: by part, whether each answer is right."""
    records = []
    for part, answers in right.items():
        for i, good in enumerate(answers):
            text = f"<think> t </think> <answer> {3 if good else 4} </answer>"
            answer = Prediction(f"{part}-{i}", "3", kind, text, 5, False, part=part)
            records.append(dataclasses.asdict(answer))
    (path / "predictions").mkdir(parents=True)
    storage.append(path / "predictions" / "counting-id.jsonl", records)


def test_runs_become_scores_by_part_and_method_and_tables(tmp_path, capsys):
    for seed, right in enumerate(([True, True, False], [True, False, False])):
        predictions(tmp_path / f"A-seed{seed}", {"one-step": right, "two-step": [True]})
        predictions(tmp_path / f"B-seed{seed}", {"one-step": [True] * 3, "two-step": [False]})
    runs = [str(tmp_path / name) for name in ("A-seed0", "A-seed1", "B-seed0", "B-seed1")]
    paired.run([*runs, "--out", str(tmp_path / "out"), "--of", "B"])
    saved = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert saved["counting-id/one-step"]["A-seed1"] == "100"
    assert saved["counting-id/two-step"]["B-seed0"] == "0"
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| method | seeds | counting-id/one-step | counting-id/two-step |" in table
    assert "| A | 2 | 50.0 (" in table and "| B | 2 | 100.0 (100.0 to 100.0) | 0.0 (" in table
    assert "| A | 2 | -50.0 (" in (tmp_path / "out" / "differences.md").read_text()
    said = capsys.readouterr().out
    paired.run(["--out", str(tmp_path / "out"), "--of", "B"])  # from the scores alone
    assert capsys.readouterr().out == said


def test_runs_that_answered_other_questions_are_refused(tmp_path):
    predictions(tmp_path / "A", {"one-step": [True, True]})
    predictions(tmp_path / "B", {"one-step": [True]})
    with pytest.raises(UserError, match="other questions of counting-id/one-step"):
        paired.run([str(tmp_path / "A"), str(tmp_path / "B"), "--out", str(tmp_path / "out")])
