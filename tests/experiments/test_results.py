"""The committed results: the READMEs of experiments/ agree with the files and the programs."""

import csv
from pathlib import Path

import pytest

from training import storage

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("ekipl", "grpo")
HISTORIES = {
    m: [
        storage.read(ROOT / "experiments" / "results" / f"{m}-seed{seed}.jsonl")
        for seed in range(3)
    ]
    for m in METHODS
}


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def accuracy(method: str, test: str, step: int) -> list[float]:
    """In percent, by seed."""
    return [100 * history[step][f"eval/{test}"] for history in HISTORIES[method]]


def table() -> list[str]:
    """The table of the default run, from the metrics."""
    rows = ["| greedy accuracy, % | seed 0 | seed 1 | seed 2 | mean |", "|---|---|---|---|---|"]
    for test in ("counting-id", "counting-ood"):
        for name, method, step in (
            ("base", "ekipl", 0),
            ("GRPO", "grpo", -1),
            ("Vision-EKIPL", "ekipl", -1),
        ):
            values = accuracy(method, test, step)
            rows.append(
                f"| {name}, {test} | "
                + " | ".join(f"{v:.1f}" for v in [*values, mean(values)])
                + " |"
            )
    first, last = (
        [100 * mean(r["expert_share"] for r in h[part]) for h in HISTORIES["ekipl"]]
        for part in (slice(1, 11), slice(-10, None))
    )
    for name, values in (("first", first), ("last", last)):
        rows.append(
            f"| expert share, {name} 10 steps | "
            + " | ".join(f"{v:.1f}" for v in [*values, mean(values)])
            + " |"
        )
    return rows


def test_both_methods_saw_as_many_states():
    assert {history[-1]["states"] for histories in HISTORIES.values() for history in histories} == {
        3840
    }


def test_vision_ekipl_learns_and_passes_grpo():
    base, grpo, ekipl = (
        mean(accuracy(m, "counting-id", step))
        for m, step in (("ekipl", 0), ("grpo", -1), ("ekipl", -1))
    )
    assert ekipl >= base + 20 and ekipl >= grpo + 8


@pytest.mark.parametrize("seed", range(3))
def test_the_experts_share_falls(seed):
    share = [record["expert_share"] for record in HISTORIES["ekipl"][seed][1:]]
    assert mean(share[:10]) - mean(share[-10:]) >= 0.25


CLAIMS = (ROOT / "experiments" / "results" / "README.md").read_text()


def test_the_default_run_is_told_as_it_was_measured():
    for row in table():
        assert row in CLAIMS, row


def test_table_1_of_the_results_is_the_one_that_was_made():
    for line in (
        (ROOT / "experiments" / "results" / "table1.md").read_text().split("\n\n")[0].splitlines()
    ):
        assert line in CLAIMS, line


@pytest.mark.parametrize("name", ["ablation", "stages"])
def test_the_other_tables_of_the_results_are_those_that_were_made(name):
    for line in (
        (ROOT / "experiments" / "results" / name / f"{name}.md")
        .read_text()
        .split("\n\n")[0]
        .splitlines()
    ):
        assert line in CLAIMS, line


def test_data_efficiency_is_told_as_it_was_measured():
    for line in (
        (ROOT / "experiments" / "results" / "transformation" / "figure3.txt")
        .read_text()
        .strip()
        .splitlines()
    ):
        assert line in CLAIMS, line


def test_pass_at_k_is_told_as_it_was_measured():
    found = {}
    for row in csv.DictReader(
        (ROOT / "experiments" / "results" / "transformation" / "figure5.csv").open()
    ):
        found.setdefault((row["set"], row["method"]), {})[int(row["k"])] = 100 * float(
            row["pass_at_k"]
        )
    for (test, method), values in found.items():
        if method in ("Zero-shot", "Reason-RFT-Zero", "Vision-EKIPL", "Reason-RFT", "CoT-SFT"):
            assert (
                f"| {test} | {method} | "
                + " | ".join(f"{values[k]:.1f}" for k in (1, 4, 16, 64))
                + " |"
                in CLAIMS
            ), (test, method)


@pytest.mark.parametrize("seed", range(3))
def test_the_experts_share_is_told_as_it_was_measured(seed):
    share = [
        record["expert_share"]
        for record in storage.read(
            ROOT / "experiments" / "results" / "transformation" / f"Vision-EKIPL-seed{seed}.jsonl"
        )[1:]
    ]
    assert f"{100 * mean(share[:10]):.1f} to {100 * mean(share[-10:]):.1f} (seed {seed})" in CLAIMS
