"""report.py, figures.py: table and figures follow from the numbers by their formulas."""

import dataclasses
import json

import numpy as np
import pytest

from data.predictions import Prediction
from experiments import conditions, figures, report
from training import storage
from training.console import UserError


def history(points: dict[int, float], share: float) -> list[dict]:
    """Accuracy on counting-id by states seen, with an expert share that is constant."""
    first = {"step": 0, "states": 0, "eval/counting-id": points[0]}
    return [
        first,
        *(
            {
                "step": i,
                "states": x,
                "eval/counting-id": y,
                "expert_share": share,
                "share/careful": share,
            }
            for i, (x, y) in enumerate(points.items())
            if x
        ),
    ]


def test_a_tasks_avg_is_the_mean_of_its_sets_and_needs_all_of_them():
    whole = {
        "transformation-id": 0.6,
        "transformation-left": 0.3,
        "transformation-right": 0.0,
        "counting-id": 0.5,
    }
    assert report.by_method({"A": whole})["A"] == {
        **{name: [value] for name, value in whole.items()},
        "transformation AVG": [pytest.approx(0.3)],
    }


def test_seeds_are_one_method_with_mean_and_standard_deviation(tmp_path):
    text = report.table(
        {
            "A-seed0": {"counting-id": 0.4},
            "A-seed1": {"counting-id": 0.6},
            "B": {"counting-id": 0.1, "counting-ood": 0.3},
        },
        tmp_path / "t",
    )
    assert "| method | counting-id | counting-ood | counting AVG |" in text
    assert "| A | 50.0 ± 14.1 | - | - |" in text and "| B | 10.0 | 30.0 | 20.0 |" in text
    assert (tmp_path / "t.csv").read_text().splitlines()[1] == "A,counting-id,0.50000,0.14142,2"


@pytest.mark.parametrize(
    "curve, target, share",
    [
        ([(0, 0.2), (10, 0.4), (20, 0.8)], 0.6, 1.0),  # nothing is said of between
        ([(0, 0.2), (10, 0.4), (20, 0.8)], 0.4, 0.5),
        ([(0, 0.5), (10, 0.4), (20, 0.8)], 0.5, 0.0),  # it starts there
        ([(0, 0.2), (10, 0.9), (20, 0.1)], 0.55, 0.5),  # the first time counts
        ([(0, 0.2), (10, 0.4), (20, 0.5)], 0.6, None),
    ],
)
def test_the_share_of_the_data_that_reaches_a_target(curve, target, share):
    assert figures.share_to_reach(curve, target) == (
        None if share is None else pytest.approx(share)
    )


def test_a_mean_curve_has_the_points_that_all_seeds_have():
    assert figures.mean_curve([[(0, 0.0), (10, 0.4), (15, 0.9)], [(0, 0.2), (10, 0.8)]]) == [
        (0, pytest.approx(0.1)),
        (10, pytest.approx(0.6)),
    ]


def test_figure_3_tells_when_the_mean_of_the_seeds_reaches_the_end_of_the_method_without_experts(
    tmp_path,
):
    histories = {
        "ekipl-seed0": history({0: 0.2, 40: 0.6, 80: 0.9}, 0.5),
        "ekipl-seed1": history({0: 0.2, 40: 0.8, 80: 0.7}, 0.5),
        # No method of RL: nothing is compared with it.
        "sft": [{"states": x, "eval/counting-id": 0.3} for x in (0, 80)],
        "grpo-seed0": history({0: 0.2, 40: 0.4, 80: 0.4}, 0.0),
        "grpo-seed1": history({0: 0.2, 40: 0.5, 80: 0.5}, 0.0),
    }
    said = figures.data_efficiency(histories, tmp_path / "3.png")
    reached = "counting-id: ekipl reaches the end of grpo (45.0 %)"
    assert said == f"{reached} after 50 % of its states (evaluated every 50 %)"
    late = {"ekipl": history({0: 0.2, 80: 0.3}, 0.5), "grpo": history({0: 0.2, 80: 0.4}, 0.0)}
    assert "never (evaluated" in figures.data_efficiency(late, tmp_path / "3.png")


def test_figure_4_stacks_the_sources_to_one(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        figures.plt.Axes,
        "stackplot",
        lambda self, x, *ys, **options: drawn.append((list(x), ys, options["labels"])),
        raising=False,
    )
    figures.sources(
        {
            "ekipl": history({0: 0.2, 40: 0.3, 80: 0.4}, 0.25),
            "grpo": history({0: 0.2, 40: 0.3}, 0.0),
        },
        tmp_path / "4.png",
    )
    ((x, ys, labels),) = drawn  # none for the method without experts
    assert (
        x == [1, 2]
        and labels == ["policy", "careful"]
        and [list(y) for y in ys] == [[0.75, 0.75], [0.25, 0.25]]
    )


def test_figure_5_is_the_mean_over_questions_for_every_k_that_all_have(tmp_path, monkeypatch):
    drawn = []
    plot = figures.plt.Axes.plot
    monkeypatch.setattr(
        figures.plt.Axes,
        "plot",
        lambda self, x, y, *rest, **options: (
            drawn.append((list(x), list(y))) or plot(self, x, y, *rest, **options)
        ),
    )
    monkeypatch.setattr(figures, "pass_at_k", lambda n, c, k: c * k / n)
    figures.pass_at({"counting-id": {"A": (4, [1, 0])}}, tmp_path / "5.png")
    assert drawn == [([1, 2, 4], [pytest.approx(v) for v in (0.125, 0.25, 0.5)])]
    assert (tmp_path / "5.csv").read_text().splitlines()[1:] == [
        "A,counting-id,1,0.1250,1",
        "A,counting-id,2,0.2500,1",
        "A,counting-id,4,0.5000,1",
    ]


def test_figure_5_is_made_again_from_the_saved_counts_and_the_others_from_files(tmp_path):
    answers = ["<answer> 3 </answer>", "<answer> 4 </answer>", "3"]
    records = []
    for i, samples in enumerate([answers, [*answers[:1] * 2, *answers]]):  # two of the same set
        record = Prediction(f"a-{i}", "3", "discrete", samples[0], 5, False, samples)
        records.append(dataclasses.asdict(record))
    run, out = tmp_path / "A-seed0", tmp_path / "out"
    (run / "predictions").mkdir(parents=True)
    storage.append(run / "predictions" / "counting-id.jsonl", records)
    report.figures_command([str(run), "--out", str(out)])
    saved = json.loads((out / "samples.json").read_text())
    assert saved == {"counting-id": {"A-seed0": [3, [1, 3]]}}  # as many samples of each
    made = (out / "figure5.csv").read_text()
    (out / "figure5.csv").unlink()
    file = tmp_path / "B-seed0.jsonl"
    storage.append(file, history({0: 0.2, 80: 0.3}, 0.5))
    report.figures_command([str(file), "--out", str(out)])
    assert (out / "figure5.csv").read_text() == made
    assert (out / "figure4.png").exists() and (out / "updates.png").exists()


def test_a_condition_is_drawn_with_the_interval_of_its_scores(tmp_path, monkeypatch):
    for name, rights in (("one", "1100"), ("two", "1111")):
        (tmp_path / name).mkdir()
        scores = {"counting-id": {"A-seed0": rights, "A-seed1": "1100"}}
        (tmp_path / name / "scores.json").write_text(json.dumps(scores))
    drawn, errorbar = [], conditions.panels(1)[1][0].__class__.errorbar

    def record(self, x, y, half, **options):
        drawn.append((y, half))
        return errorbar(self, x, y, half, **options)

    monkeypatch.setattr(figures.plt.Axes, "errorbar", record)
    given = [f"{name}={tmp_path / name}" for name in ("one", "two")]
    conditions.run([*given, "--methods", "A", "--out", str(tmp_path / "c.png")])
    ((values, halves),) = drawn
    value, half = conditions.interval(np.array([[1.0, 1, 1, 1], [1, 1, 0, 0]]))
    assert values == [50.0, 100 * value] and halves[1] == pytest.approx(100 * half)
    for wrong, says in ((["x"], "LABEL=DIR"), ([f"a={tmp_path}"], "no scores.json")):
        with pytest.raises(UserError, match=says):
            conditions.run([*wrong, "--methods", "A", "--out", "c.png"])
    with pytest.raises(UserError, match="no scores of B; there are A"):
        conditions.run([*given, "--methods", "B", "--out", "c.png"])
