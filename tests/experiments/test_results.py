"""The committed results: the READMEs agree with the scores of every question, and with the runs."""

import json
import re
from pathlib import Path

import pytest

from experiments import paired
from training import storage

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
COUNTING = RESULTS / "counting"
CELLS = [f"counting-{split}/{part}" for split in ("id", "ood") for part in ("one-step", "two-step")]
SCORES = paired.by_method(json.loads((COUNTING / "scores.json").read_text()))
SHOWN = {  # rows of the README at the root
    "the commonest answer": None,
    "`careful`": "careful",
    "`quick`": "quick",
    "base, RL's prompt": "base",
    'base, "check ."': "base-check",
    "GRPO": "GRPO",
    "RFT on both experts": "RFT",
    "RFT on `careful`": "RFT-careful",
    "SFT-then-GRPO": "SFT-then-GRPO",
    "RFT-then-GRPO": "RFT-then-GRPO",
    "**Vision-EKIPL**": "Vision-EKIPL",
    "Vision-EKIPL, `quick` named first": "Vision-EKIPL-reversed",
    "Vision-EKIPL, `--ties any_expert`": "Vision-EKIPL-any",
    "Vision-EKIPL, `--expert-steps 30`": "Vision-EKIPL-early",
    "Vision-EKIPL, both flags": "Vision-EKIPL-any-early",
}


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def history(method: str, seed: int) -> list[dict]:
    return storage.read(COUNTING / f"{method}-seed{seed}.jsonl")


def commonest(cell: str) -> float:
    """The share of the commonest answer of a cell's questions."""
    from blocks.dataset import BlocksSet

    name, _, part = cell.partition("/")
    answers = [state.answer for state in BlocksSet(name, 2000) if state.part == part]
    return max(map(answers.count, set(answers))) / len(answers)


def test_every_cell_has_a_thousand_questions_and_every_method_three_seeds():
    assert list(SCORES) == CELLS
    for methods in SCORES.values():
        assert set(SHOWN.values()) - {None} == set(methods)
        for method, scores in methods.items():
            trained = method not in ("careful", "quick", "base", "base-check")
            assert scores.shape[0] == (3 if trained else 1) and scores.shape[1] > 950


def test_the_table_of_the_first_page_is_made_of_the_scores():
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(
        r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.M
    )
    assert [name for name, *_ in rows] == list(SHOWN)
    for name, *values in rows:
        method = SHOWN[name]
        found = [SCORES[cell][method].mean() if method else commonest(cell) for cell in CELLS]
        assert values == [f"{100 * value:.1f}" for value in found], name


@pytest.mark.parametrize("name", ["table.md", "differences.md"])
def test_the_tables_of_the_results_are_made_of_the_scores_and_told(name, tmp_path):
    (tmp_path / "scores.json").write_text((COUNTING / "scores.json").read_text())
    paired.run(["--out", str(tmp_path)])
    made = (tmp_path / name).read_text()
    assert (COUNTING / name).read_text() == made
    assert made in (RESULTS / "README.md").read_text()


def test_all_methods_saw_as_many_questions():
    for seed in range(3):
        for method in set(SHOWN.values()) - {None, "careful", "quick", "base", "base-check"}:
            states = history(method, seed)[-1]["states"]
            if method in ("SFT-then-GRPO", "RFT-then-GRPO"):
                first = "Stage-1" if method.startswith("SFT") else "RFT-first"
                states += history(first, seed)[-1]["states"]
            assert states == 3200, method


def test_what_the_shares_are_said_to_be_is_what_was_measured():
    head = "| kept actions, % | steps | policy | `careful` | `quick` | tokens of the policy |"
    rows = [head, "|---|---|---|---|---|---|"]
    for method in ("Vision-EKIPL", "Vision-EKIPL-any", "Vision-EKIPL-reversed"):
        for label, part in (("1 to 10", slice(1, 11)), ("41 to 50", slice(-10, None))):
            cells = []
            for key in ("expert_share", "share/careful", "share/quick", "tokens"):
                value = mean(mean(r[key] for r in history(method, s)[part]) for s in range(3))
                share = 1 - value if key == "expert_share" else value
                cells.append(f"{value:.1f}" if key == "tokens" else f"{100 * share:.1f}")
            rows.append(f"| {method} | {label} | " + " | ".join(cells) + " |")
    table = "\n".join(rows)
    assert table in (RESULTS / "README.md").read_text(), table
