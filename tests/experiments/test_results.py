"""The committed results: the READMEs agree with the scores of every question, and with the runs."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from blocks.dataset import BlocksSet
from experiments import paired
from training import storage

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
COUNTING = RESULTS / "counting"
CELLS = [f"counting-{split}/{part}" for split in ("id", "ood") for part in ("one-step", "two-step")]
SCORES = paired.by_method(json.loads((COUNTING / "scores.json").read_text()))
MORE = {"careful", "quick", "Vision-EKIPL-any"}  # only in the tables of the results
SHOWN = {  # rows of the README at the root
    "the commonest answer": None,
    "base, RL's prompt": "base",
    'base, "check ."': "base-check",
    "GRPO": "GRPO",
    "RFT on both experts": "RFT",
    "RFT on `careful`": "RFT-careful",
    "SFT-then-GRPO": "SFT-then-GRPO",
    "RFT-then-GRPO": "RFT-then-GRPO",
    "**Vision-EKIPL**": "Vision-EKIPL",
    "Vision-EKIPL, `quick` named first": "Vision-EKIPL-reversed",
    "Vision-EKIPL, `--expert-steps 30`": "Vision-EKIPL-early",
    "the same, and `--ties any_expert`": "Vision-EKIPL-any-early",
}


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def history(method: str, seed: int) -> list[dict]:
    return storage.read(COUNTING / f"{method}-seed{seed}.jsonl")


@cache
def answers(name: str, size: int) -> list[tuple[str, str]]:
    """(part, answer) of each question."""
    return [(state.part, state.answer) for state in BlocksSet(name, size)]


def commonest(cell: str, size: int = 2000) -> float:
    """The share of the commonest answer of a cell's questions."""
    name, _, part = cell.partition("/")
    found = [answer for its, answer in answers(name, size) if its == part]
    return max(map(found.count, set(found))) / len(found)


def test_every_cell_has_a_thousand_questions_and_every_method_three_seeds():
    assert list(SCORES) == CELLS
    for methods in SCORES.values():
        assert set(SHOWN.values()) - {None} | MORE == set(methods)
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


@pytest.mark.parametrize("task", ["counting", "structure", "transformation"])
def test_the_tables_of_the_results_are_made_of_the_scores_and_told(task, tmp_path):
    scores = (RESULTS / task / "scores.json").read_text()
    (tmp_path / "scores.json").write_text(scores)
    paired.run(["--out", str(tmp_path)])
    for name in ("table.md", "differences.md") if task == "counting" else ("table.md",):
        made = (tmp_path / name).read_text()
        assert (RESULTS / task / name).read_text() == made
        assert made in (RESULTS / "README.md").read_text()


def test_the_commonest_answers_of_structure_are_told():
    parts = ("aside", "turned", "larger", "unseen", "letters")
    shares = [f"`{p}` {100 * commonest(f'structure-ood/{p}', 500):.1f}" for p in parts]
    told = " ".join((RESULTS / "README.md").read_text().split())
    assert ", ".join(shares) in told, shares


def test_all_methods_saw_as_many_questions():
    for seed in range(3):
        for method in set(SHOWN.values()) - {None, "base", "base-check"} | {"Vision-EKIPL-any"}:
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
