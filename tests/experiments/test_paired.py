"""Paired differences: their intervals hold the truth, for other questions and other seeds."""

import dataclasses
import json
import math

import numpy as np
import pytest

from blocks.dataset import BlocksSet
from data.predictions import Prediction
from experiments import paired
from training import storage
from training.console import UserError


def drawn(seeds: int, questions: int, p: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random((seeds, questions)) < p).astype(float)


def test_a_single_run_has_the_interval_of_its_questions():
    scores = drawn(1, 1000, 0.3, 0)
    value, half = paired.interval(scores)
    p = scores.mean()
    assert value == pytest.approx(p)
    assert half == pytest.approx(1.96 * math.sqrt(p * (1 - p) / 1000), rel=5e-3)


def test_a_difference_is_taken_on_the_same_questions():
    one = drawn(1, 1000, 0.5, 0)
    other = one.copy()
    other[0, :20] = 1 - other[0, :20]  # they disagree about 20 questions only
    assert paired.interval(one, one) == (0.0, 0.0)
    value, half = paired.interval(one, other)
    apart = (one - other)[0]
    assert value == pytest.approx(apart.mean())
    # As of independent samples it would be 0.044.
    assert half == pytest.approx(1.96 * apart.std() / math.sqrt(1000), rel=5e-3)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_interval_holds_the_truth_in_95_of_100_cases(seeds):
    """Seeds differ by 5 points, questions in how hard they are; a method of three seeds against
    one that is fixed, or, of one seed, where seeds do not differ."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        hard = rng.normal(0, 0.2, 500)  # the same questions for both
        shift = rng.normal(0, 0.05 if seeds > 1 else 0.0, (seeds, 1))
        one = (rng.random((seeds, 500)) < np.clip(0.5 + shift + hard, 0, 1)).astype(float)
        other = (rng.random((1, 500)) < np.clip(0.45 + hard, 0, 1)).astype(float)
        value, half = paired.interval(one, other)
        held += abs(value - 0.05) < half
    assert 0.92 <= held / 300 <= 1.0


def test_questions_that_are_nearly_the_same_are_one_question():
    scores, other = drawn(1, 300, 0.4, 0), drawn(1, 300, 0.5, 1)
    thrice, groups = np.repeat(scores, 3, axis=1), np.repeat(np.arange(300), 3)
    assert paired.interval(thrice, None, groups) == pytest.approx(paired.interval(scores))
    pair = (np.repeat(other, 3, axis=1), groups)
    assert paired.interval(thrice, *pair) == pytest.approx(paired.interval(scores, other))
    assert paired.interval(thrice)[1] < paired.interval(thrice, None, groups)[1] / 1.7
    alone = np.random.default_rng(0).permutation(300)
    assert paired.interval(scores, None, alone) == pytest.approx(paired.interval(scores))


def test_the_kin_of_questions_is_that_of_the_blocks_world():
    ids = [f"structure-id-0-{i}" for i in range(60)]
    groups, kin = paired.kin(ids), [BlocksSet("structure-id", 60)[i].problem.kin for i in range(60)]
    for i in range(60):
        for j in range(60):
            assert (groups[i] == groups[j]) == (kin[i] == kin[j])
    assert 2 < groups.max() < 59
    assert paired.kin([f"counting-id-0-{i}" for i in range(60)]) is None
    assert paired.kin(["a record", "another"]) is None


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
    assert "| seconds | counting-id/one-step | counting-id/two-step |" in table
    untrained = "- | - | - | - | - | -"
    assert f"| A | 2 | {untrained} | 50.0 ± " in table
    assert f"| B | 2 | {untrained} | 100.0 ± 0.0 | 0.0 ± " in table
    assert "| A | -50.0 ± " in (tmp_path / "out" / "differences.md").read_text()
    said = capsys.readouterr().out
    paired.run(["--out", str(tmp_path / "out"), "--of", "B"])  # from the scores alone
    assert capsys.readouterr().out == said


def test_tables_count_questions_that_are_nearly_the_same_once(tmp_path, capsys):
    ids = sorted(f"structure-id-0-{i}" for i in range(60))
    kin = paired.kin(ids)
    right = drawn(1, 60, 0.5, 0)[0][kin]  # what is right is right of all that are nearly the same
    records = []
    for id, good in zip(ids, right, strict=True):
        text = f"<answer> {3 if good else 4} </answer>"
        records.append(dataclasses.asdict(Prediction(id, "3", "math", text, 5, False)))
    (tmp_path / "A").mkdir()
    storage.append(tmp_path / "A" / "structure-id.jsonl", records)
    out = tmp_path / "out"
    paired.run([str(tmp_path / "A"), "--out", str(out)])
    said = capsys.readouterr().out
    assert paired.told(*paired.interval(right[None], None, kin), "") in said
    assert paired.told(*paired.interval(right[None]), "") not in said
    paired.run(["--out", str(out)])  # from the scores alone
    assert capsys.readouterr().out == said
    predictions(tmp_path / "B", {"one-step": [True, False]})
    paired.run([str(tmp_path / "B"), "--out", str(out)])
    assert not (out / "kin.json").exists()


def test_runs_that_answered_other_questions_are_refused(tmp_path):
    predictions(tmp_path / "A", {"one-step": [True, True]})
    predictions(tmp_path / "B", {"one-step": [True]})
    with pytest.raises(UserError, match="other questions of counting-id/one-step"):
        paired.run([str(tmp_path / "A"), str(tmp_path / "B"), "--out", str(tmp_path / "out")])


def test_partial_credit_is_kept_as_numbers(tmp_path):
    answer = "change_color(0, red) change_size(1, small)"
    text = "<think> t </think> <answer> change_color(0, red) </answer>"
    record = dataclasses.asdict(Prediction("a", answer, "function", text, 5, False))
    for name in ("A", "Vision-EKIPL"):
        (tmp_path / name / "predictions").mkdir(parents=True)
        storage.append(tmp_path / name / "predictions" / "transformation-id.jsonl", [record] * 2)
    paired.run([str(tmp_path / "A"), str(tmp_path / "Vision-EKIPL"), "--out", str(tmp_path / "o")])
    saved = json.loads((tmp_path / "o" / "scores.json").read_text())
    assert saved["transformation-id"]["A"] == [0.5]  # each question once


def test_mistakes_are_one_line(tmp_path, capsys):
    predictions(tmp_path / "A", {"one-step": [True, False]})
    (tmp_path / "Stage-1-seed0").mkdir()  # trained, and never evaluated
    runs = [str(tmp_path / "A"), str(tmp_path / "Stage-1-seed0")]
    with pytest.raises(UserError, match="--of vision: there are A"):
        paired.run([*runs, "--out", str(tmp_path / "out"), "--of", "vision"])
    assert "Stage-1-seed0 has no predictions: left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="two runs have the name A"):
        paired.run([runs[0], runs[0], "--out", str(tmp_path / "out"), "--of", "A"])
    with pytest.raises(UserError, match="no .*scores.json: name the runs"):
        paired.run(["--out", str(tmp_path / "nowhere")])
    assert not (tmp_path / "nowhere").exists()
