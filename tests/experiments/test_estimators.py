"""estimators.py: expectations are exact, Eq 10 holds where it must, results are committed."""

import json
import random
from pathlib import Path

import pytest
import torch

from experiments import estimators, estimators_figure
from sampling import select_top_g

ROOT = Path(__file__).resolve().parents[2]
ROWS = json.loads((ROOT / "experiments" / "results" / "estimators.json").read_text())
AFTER = ("policy_first", "random")


def row(experts: int, n: int, shift: float, stage: str) -> dict:
    (found,) = (
        r
        for r in ROWS
        if (r["experts"], r["N"], r["shift"], r["stage"]) == (experts, n, shift, stage)
    )
    return found


def test_the_committed_numbers_are_what_it_computes():
    computed = [row for case in estimators.CASES for row in estimators.study(*case)]
    assert [list(r) for r in computed] == [list(r) for r in ROWS]
    for now, then in zip(computed, ROWS, strict=True):
        assert now == pytest.approx(then, abs=2e-6)


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_probabilities_are_those_of_a_sequence_of_draws(shuffled):
    densities = estimators.sources(2, 0.7)
    p = estimators.probabilities(densities, 2, shuffled)
    assert p.shape == (4**6,) and p.sum().item() == pytest.approx(1)
    first = torch.zeros(4, dtype=torch.float64).index_add(0, estimators.sequences(6)[:, 0], p)
    torch.testing.assert_close(first, densities.mean(0) if shuffled else densities[0])


@pytest.mark.parametrize("stage", estimators.STAGES)
def test_the_expectations_are_those_of_many_sampled_groups(stage):
    """Within 4 standard errors, by other code, with select_top_g's own random ties."""
    n, rng, densities = 2, random.Random(0), estimators.sources(2, 1.0).tolist()
    q, f, r = (
        [sum(p) / 3 for p in zip(*densities, strict=True)],
        estimators.F.tolist(),
        estimators.REWARDS.tolist(),
    )
    drawn = {"A": [], "B": [], "C": []}
    for _ in range(8000):
        group = [a for density in densities for a in rng.choices(range(4), density, k=n)]
        kept, q_of_s = group, 1.0
        if stage in AFTER:
            kept = [group[i] for i in select_top_g([r[a] for a in group], n, stage, "top", rng)]
            q_of_s = sum(r[a] >= min(r[k] for k in kept) for a in group) / len(group)
        w = [densities[0][a] / q[a] * q_of_s for a in kept]
        weighted = sum(wi * f[a] for wi, a in zip(w, kept, strict=True))
        for name, value in (
            ("A", sum(f[a] for a in kept) / len(kept)),
            ("B", weighted / len(kept)),
            ("C", weighted / sum(w)),
        ):
            drawn[name].append(value)
    exact = row(2, n, 1.0, stage)
    for name, values in drawn.items():
        values = torch.tensor(values, dtype=torch.float64)
        error = (exact[f"variance_{name}"] / len(values)) ** 0.5
        assert abs(values.mean().item() - exact[f"mean_{name}"]) < 4 * error, name
        assert values.var().item() == pytest.approx(exact[f"variance_{name}"], rel=0.1), name


def test_before_selection_b_is_exact_and_the_bias_of_c_vanishes_with_n():
    before = [r for r in ROWS if r["stage"] == "candidates"]
    assert all(r["bias_B"] == 0 for r in before)
    for experts, sizes in ((1, (1, 2, 3, 4)), (2, (1, 2))):
        biases = [abs(row(experts, n, 1.0, "candidates")["bias_C"]) for n in sizes]
        assert biases == sorted(biases, reverse=True) and biases[-1] < 0.5 * biases[0]
    assert {r["bias_A"] for r in before if (r["experts"], r["shift"]) == (1, 1.0)} == {
        0.2
    }  # whatever n


def test_before_selection_the_estimated_bound_is_eq_10():
    for r in ROWS:
        if r["stage"] == "candidates":
            assert r["tv_estimated"] == r["tv"] == r["tv_q"] and r["bound_estimated"] == r["bound"]


def test_eq_10_bounds_the_bias_of_a_with_the_tv_of_what_is_counted():
    assert all(abs(r["bias_A"]) <= r["bound"] + 1e-6 for r in ROWS)


def test_after_selection_nobody_estimates_the_policys_expectation_and_the_estimated_bound_is_none():
    for r in ROWS:
        if r["stage"] in AFTER:
            assert min(abs(r[f"bias_{name}"]) for name in "ABC") > 0.2, r
            assert r["bound_estimated"] < abs(r["bias_A"]), r


def test_an_expert_that_is_the_policy_shows_what_selection_alone_does():
    for stage in AFTER:
        alone = row(1, 4, 0.0, stage)
        assert (
            alone["ess_share"] == 1 and alone["mean_C"] == alone["mean_A"]
        )  # the weights are all equal
        assert (
            alone["target_B"] > alone["truth"] + 0.05
            and alone["mean_B"] > alone["target_B"]
            and alone["mean_C"] > alone["target_C"]
        )


def test_it_draws_and_prints_them(tmp_path):
    estimators_figure.draw(ROWS, tmp_path / "estimators.png")
    assert (tmp_path / "estimators.png").stat().st_size > 10_000
    assert len(estimators.table(ROWS).splitlines()) == 1 + 3 * len(estimators.STAGES) + len(
        estimators.STAGES
    )


def test_readme_says_what_the_numbers_say():
    text = " ".join(
        (ROOT / "experiments" / "README.md")
        .read_text()
        .split("## The estimators against the truth")[1]
        .split("## Speed")[0]
        .split()
    )
    before, small, far = (
        row(1, 4, 1.0, "candidates"),
        row(1, 1, 1.0, "candidates"),
        row(1, 4, 1.0, "policy_first"),
    )
    alone = row(1, 4, 0.0, "policy_first")
    assert f"C's falls from {small['bias_C']:.3f} (n = 2) to {before['bias_C']:.4f} (n = 8)" in text
    assert f"at most {before['bias_A']:.2f} where Eq 10 allows {before['bound']:.2f}" in text
    assert f"TV = {before['largest_bias'] * before['tv'] / before['bound_uncentred']:.3f}" in text
    assert f"off by {alone['bias_A']:.2f} and B by {alone['bias_B']:.2f}" in text
    assert f"{alone['mean_B']:.2f} for {alone['target_B']:.2f}" in text
    bounds = f"{alone['bound_estimated']:.2f} to {far['bound_estimated']:.2f}"
    biases = f"{alone['bias_A']:.2f} to {far['bias_A']:.2f}"
    assert f"{bounds} where the bias is {biases}" in text
