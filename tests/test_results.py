"""The committed results: what README says of the six default runs is what their metrics say."""

from pathlib import Path

import pytest

import runs

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("ekipl", "grpo")
HISTORIES = {m: [runs.read(ROOT / "results" / f"{m}-seed{seed}.jsonl") for seed in range(3)] for m in METHODS}


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def accuracy(method: str, test: str, step: int) -> list[float]:
    """In percent, by seed."""
    return [100 * history[step][f"eval/{test}"] for history in HISTORIES[method]]


def table() -> list[str]:
    """README's table, from the metrics."""
    rows = ["| greedy accuracy, % | seed 0 | seed 1 | seed 2 | mean |", "|---|---|---|---|---|"]
    for test in ("counting-id", "counting-ood"):
        for name, method, step in (("base", "ekipl", 0), ("GRPO", "grpo", -1), ("Vision-EKIPL", "ekipl", -1)):
            values = accuracy(method, test, step)
            rows.append(f"| {name}, {test} | " + " | ".join(f"{v:.1f}" for v in [*values, mean(values)]) + " |")
    first, last = ([100 * mean(r["expert_share"] for r in h[part]) for h in HISTORIES["ekipl"]] for part in (slice(1, 11), slice(-10, None)))
    for name, values in (("first", first), ("last", last)):
        rows.append(f"| expert share, {name} 10 steps | " + " | ".join(f"{v:.1f}" for v in [*values, mean(values)]) + " |")
    return rows


def test_both_methods_saw_as_many_states():
    assert {history[-1]["states"] for histories in HISTORIES.values() for history in histories} == {3840}


def test_vision_ekipl_learns_and_passes_grpo():
    base, grpo, ekipl = (mean(accuracy(m, "counting-id", step)) for m, step in (("ekipl", 0), ("grpo", -1), ("ekipl", -1)))
    assert ekipl >= base + 20 and ekipl >= grpo + 8


@pytest.mark.parametrize("seed", range(3))
def test_the_experts_share_falls(seed):
    share = [record["expert_share"] for record in HISTORIES["ekipl"][seed][1:]]
    assert mean(share[:10]) - mean(share[-10:]) >= 0.25


def test_readme_says_what_the_metrics_say():
    readme = (ROOT / "README.md").read_text()
    for row in table():
        assert row in readme, row
