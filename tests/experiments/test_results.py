"""The committed results: READMEs and tables are made of the scores and metrics beside them."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import ekipl
from blocks.dataset import BlocksSet
from experiments import figures, guess, paired, results_page, rows, summary, sweep
from experts.roster import make_experts
from rewards import accuracy_score
from training import curves, storage
from training.console import UserError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
PAGE = (RESULTS / "page.md").read_text()
COUNTING = RESULTS / "counting"
SCORES = results_page.scores("counting")
TASKS = [path.parent.name for path in sorted(RESULTS.glob("*/scores.json"))]
CELLS = list(results_page.CELLS)
UNTRAINED = ("careful", "quick", "base", "base-check")
SHOWN = {  # rows of the README at the root
    "a guess from the question alone": None,
    "base, RL's prompt": "base",
    'base, "check ."': "base-check",
    "CoT-SFT, on true thoughts": "CoT-SFT",
    "CoT-SFT, three passes": "CoT-SFT-3-epochs",
    "RFT on both experts": "RFT",
    "RFT on both, three passes": "RFT-3-epochs",
    "RFT on `careful`, three passes": "RFT-careful-3-epochs",
    "GRPO": "GRPO",
    "SFT-then-GRPO": "SFT-then-GRPO",
    "**Vision-EKIPL**": "Vision-EKIPL",
    "Vision-EKIPL, four updates a batch": "Vision-EKIPL-4-updates",
    "Vision-EKIPL, `--loss-mean token`": "Vision-EKIPL-token",
    "the same, `quick` named first": "Vision-EKIPL-reversed-token",
}

FIRST = {"Stage-1": 1280, "RFT-first": 1920}  # questions of a first stage
TIMES = {"-3-epochs": 3, "-all": 3, "-2-updates": 2, "-4-updates": 4}  # 8 actions a question


def test_every_cell_has_a_thousand_questions_and_every_method_three_seeds():
    assert list(SCORES) == list(results_page.CELLS.values())
    for methods in SCORES.values():
        for method, scores in methods.items():
            assert scores.shape[0] == (1 if method in UNTRAINED else 3), method
            assert scores.shape[1] > 950


def test_the_table_of_the_first_page_is_made_of_the_scores():
    readme = (ROOT / "README.md").read_text()
    found = re.findall(
        r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.M
    )
    assert [name for name, *_ in found] == list(SHOWN)
    for name, *values in found:
        method = SHOWN[name]
        made = results_page.mean if method else lambda _, cell: results_page.guess(cell)
        assert values == [made(method, cell) for cell in CELLS], name


def test_the_page_is_made_of_the_scores_and_metrics():
    assert (RESULTS / "README.md").read_text() == results_page.render(PAGE)


def test_no_number_of_the_page_is_typed_by_hand():
    """Numbers with decimals, and percentages, are places; settings and versions are whole."""
    text = re.sub(r"\{\{.+?\}\}|^```.*?^```|`[^`\n]+`|\]\([^)]+\)", "", PAGE, flags=re.M | re.S)
    text = (
        text.replace("torch 2.13", "")
        .replace("Gemini-1.5-Pro", "")
        .replace("transformers 5.19", "")
        .replace("1.3 M", "")
    )
    assert re.findall(r"\d+\.\d+", text) == []


def test_places_are_means_and_differences_in_their_order(monkeypatch):
    right = {"A": np.array([[1.0, 1, 0, 1]]), "B": np.array([[0.0, 1, 0, 0]])}
    monkeypatch.setattr(results_page, "scores", lambda _: {"counting-id/one-step": right})
    assert results_page.render("{{mean A id1}} {{mean B id1}}").endswith("75.0 25.0")
    assert "+50.0 ±" in results_page.render("{{difference A B id1}}")
    assert "-50.0 ±" in results_page.render("{{difference B A id1}}")


def test_what_is_beyond_the_guess_are_the_questions_where_it_is_wrong(monkeypatch):
    right = {"A": np.array([[1.0, 1, 0, 1]]), "B": np.array([[1.0, 0, 0, 0]])}
    monkeypatch.setattr(results_page, "scores", lambda _: {"counting-id/one-step": right})
    found = [np.array([True, False, False, True]), np.array([False, False, True, True])]
    monkeypatch.setattr(results_page, "guessed", lambda cell, size, rank=0: found[rank])
    assert results_page.render("{{beyond A id1}} {{beyond B id1}}").endswith("50.0 0.0")
    assert results_page.render("{{second_guess id1}}").endswith("\n50.0")


def test_the_second_guess_is_the_next_commonest_answer(monkeypatch):
    asked = [(f"counting-id-0-{i}", "one-step", "how many ?", a) for i, a in enumerate("3245")]
    monkeypatch.setattr(results_page, "asked", lambda name, size: asked)
    given = Counter({"2": 3, "4": 2, "5": 1})
    monkeypatch.setattr(results_page.blind, "answers_to", lambda task, question: given)
    guessed = results_page.guessed.__wrapped__
    assert guessed("counting-id/one-step", 4).tolist() == [False, True, False, False]
    assert guessed("counting-id/one-step", 4, 1).tolist() == [False, False, True, False]
    assert not guessed("counting-id/one-step", 4, 3).any()  # there is no fourth


def test_what_a_second_stage_adds_is_paired_by_seed(monkeypatch):
    first = np.array([[0.1] * 4, [0.5] * 4])
    scores = {"counting-id/one-step": {"first": first, "second": first + 0.2}}
    monkeypatch.setattr(results_page, "scores", lambda _: scores)
    assert results_page.render("{{gained second first id1}}").endswith("+20.0 ± 0.0")
    assert not results_page.render("{{difference second first id1}}").endswith("± 0.0")


def test_a_whole_set_is_its_parts_and_twins_stay_in_theirs(monkeypatch):
    one, other = np.array([[1.0, 1.0]]), np.array([[0.0, 0.0, 1.0]])
    scores = {"set/a": {"A": one, "B": 0 * one}, "set/b": {"A": other, "B": 0 * other}}
    monkeypatch.setattr(results_page, "scores", lambda _: scores)
    monkeypatch.setattr(paired, "saved_kin", lambda _: {"set/a": np.array([0, 0])})
    (left, right), groups = results_page.whole("", "set", "A", "B")
    assert left.tolist() == [[1, 1, 0, 0, 1]] and not right.any()
    assert groups.tolist() == [0, 0, 1, 2, 3]
    assert "+60.0 ±" in results_page.render("{{difference A B set}}")


@pytest.mark.parametrize("cell", results_page.CELLS.values())
def test_guesses_are_in_the_order_of_the_scores(cell):
    """An expert's answer follows from the question, so it can be scored again."""
    name, _, part = cell.partition("/")
    (expert,) = make_experts("careful")
    first = sorted(range(2000), key=lambda i: f"{name}-0-{i}")[:200]
    states = [state for i in first if (state := BlocksSet(name, 2000)[i]).part == part]
    texts = [first.text for (first,) in expert.sample(states, 1, 0)]
    right = [accuracy_score(t, s.answer, s.kind) for t, s in zip(texts, states, strict=True)]
    count = len(states)
    assert count > 80 and right == SCORES[cell]["careful"][0, :count].tolist()
    guesses = [guess.guess("counting", state.question) == state.answer for state in states]
    assert results_page.guessed(cell, 2000)[:count].tolist() == guesses


def test_questions_are_worth_the_effective_number_of_their_groups(monkeypatch, tmp_path):
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "kin.json").write_text('{"set": [0, 0, 0, 0, 1, 2, 3, 4]}')
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    assert results_page.render("{{worth set A}}").endswith("\n3")  # 8^2 / (4^2 + 4)


def test_questions_that_are_nearly_the_same_are_those_of_the_world():
    cells: dict[str, list[str]] = {}
    for name in ("structure-id", "structure-ood"):
        for state in BlocksSet(name, 1000):
            cells.setdefault(f"{name}/{state.part}".rstrip("/"), []).append(state.id)
    found = {cell: paired.kin(sorted(ids)) for cell, ids in cells.items()}
    made = {cell: groups.tolist() for cell, groups in found.items() if groups is not None}
    assert json.loads((RESULTS / "structure" / "kin.json").read_text()) == made


def test_one_answer_to_all_is_chosen_on_training_questions_and_has_partial_credit(monkeypatch):
    red, blue = "change_color(0, red)", "change_color(0, blue)"
    sets = {
        "transformation-train": [red, red, blue],
        "transformation-id": [blue, f"{red} change_size(1, large)"],
    }
    monkeypatch.setattr(results_page, "answers", lambda name, size: sets[name])
    results_page.best_answer.cache_clear()
    try:
        made = float(results_page.render("{{one_answer transformation-id}}").split("\n")[1])
    finally:
        results_page.best_answer.cache_clear()
    assert made == 100 * (0.5 + 0.5) / 2  # the same object; one of two calls


def test_pass_places_are_chances_of_k_samples_and_their_difference(monkeypatch, tmp_path):
    samples = {"counting-id": {"A-seed0": [4, [4, 2]], "A-seed1": [4, [4, 0]], "B": [4, [1, 0]]}}
    (tmp_path / "counting").mkdir()
    (tmp_path / "counting" / "samples.json").write_text(json.dumps(samples))
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    results_page.chances.cache_clear()
    try:
        # Of the question with two right ones of four, two samples miss both in one case of six.
        made = results_page.render("{{pass_at 2 A counting-id}} {{pass_at 2 B counting-id}}")
        assert made.endswith(f"{100 * (1 + 5 / 6 + 1 + 0) / 4:.1f} 25.0")
        assert "+45.8 ±" in results_page.render("{{pass_difference 2 A B counting-id}}")
        assert "-45.8 ±" in results_page.render("{{pass_difference 2 B A counting-id}}")
    finally:
        results_page.chances.cache_clear()


def test_hours_are_those_of_every_run(monkeypatch, tmp_path):
    for name, seconds in (("a", [3600, 1800]), ("b", [5400])):
        (tmp_path / name).mkdir()
        used = {str(i): {"seconds": value} for i, value in enumerate(seconds)}
        (tmp_path / name / "budgets.json").write_text(json.dumps(used))
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    assert results_page.render("{{hours}} {{hours a}}").endswith("\n3.0 1.5")


def test_figure_5_is_made_of_the_samples(tmp_path):
    samples = json.loads((COUNTING / "samples.json").read_text())
    for runs in samples.values():
        for n, right in runs.values():
            assert n == 64 and len(right) == 200
    figures.pass_at(samples, tmp_path / "figure5.png")
    made = (tmp_path / "figure5.csv").read_text()
    assert (COUNTING / "figure5.csv").read_text() == made


@pytest.mark.parametrize("place", [
    "{{mean RFT nowhere}}", "{{mean Nobody id1}}", "{{avg}}", "{{mean RFT}}",
    "{{include nothing.md}}", "{{rate X}}",
])  # fmt: skip
def test_a_place_that_cannot_be_filled_is_told(place):
    with pytest.raises(UserError, match=re.escape(place)):
        results_page.render(place)


def test_the_commands_of_the_page_make_every_row_of_its_tables(monkeypatch):
    monkeypatch.setattr(ekipl, "check", lambda *_, **__: None)  # the bases are not there
    text = re.sub(
        r"(?s)for base in 1 7; do(.+?)done", lambda loop: each(loop, "base", "1", "7"), PAGE
    )
    text = re.sub(
        r"(?s)for a in 0.05 0.3; do(.+?)done", lambda loop: each(loop, "a", "0.05", "0.3"), text
    )
    made: dict[str, set[str]] = {}
    for line in re.findall(r"python -m experiments\.sweep ((?:methods|ablation) .+)", text):
        args, _ = sweep.arguments(shlex.split(line))
        chosen = rows.chosen(rows.LISTS[args.list](args.config, args.stage1), args.rows)
        folder = args.out.name if args.out.name != "results" else args.out.parent.name
        folder = folder.replace("0.05", "5").replace("0.3", "30")
        made[folder] = {row.name for row in chosen if row.listed}
    assert sorted(made) == TASKS
    for task in TASKS:
        assert made[task] == set(paired.methods_of(results_page.scores(task))), task


def each(loop: re.Match, name: str, *values: str) -> str:
    """What a shell's loop runs."""
    return "".join(loop[1].replace(f"${name}", value) for value in values)


@pytest.mark.parametrize("task", TASKS)
def test_tables_are_made_of_scores_and_budgets(task, tmp_path):
    for name in ("scores.json", "budgets.json", "kin.json"):
        if (RESULTS / task / name).exists():
            (tmp_path / name).write_text((RESULTS / task / name).read_text())
    paired.run(["--out", str(tmp_path)])
    for name in ("table.md", "differences.md"):
        assert (RESULTS / task / name).read_text() == (tmp_path / name).read_text()


def test_methods_have_used_what_is_said_of_them():
    used = json.loads((COUNTING / "budgets.json").read_text())
    trained = {run for cell in json.loads((COUNTING / "scores.json").read_text()).values()
               for run in cell if "-seed" in run}  # fmt: skip
    assert set(used) == trained
    for run, budget in used.items():
        assert budget["states"] == FIRST.get(curves.method_of(run), 3200), run
        times = max([n for name, n in TIMES.items() if name in run], default=1)
        assert budget["trained"] <= times * 8 * 3200, run
        history = storage.read(COUNTING / f"{run}.jsonl")
        assert all("loss" in record for record in history[1:])


def test_every_method_has_the_rate_that_is_best_for_it():
    used = json.loads((COUNTING / "budgets.json").read_text())
    found = json.loads((COUNTING / "rates.json").read_text())
    assert {tuple(accuracy) for accuracy in found.values()} == {rows.RATES}
    for method, accuracy in found.items():
        seeds = [run for run in used if curves.method_of(run) == method]
        for run in seeds:
            assert f"{used[run]['lr']:g}" == f"{float(max(accuracy, key=accuracy.get)):g}", run


def test_figure_3_says_what_the_metrics_say(tmp_path):
    names = ("GRPO", "Vision-EKIPL", "Vision-EKIPL-all", "RFT", "RFT-careful")
    histories = {}
    for name in names:
        for file in sorted(COUNTING.glob(f"{name}-seed*.jsonl")):
            histories[file.stem] = curves.metrics(file)
    said = figures.data_efficiency(histories, tmp_path / "3.png")
    assert (COUNTING / "figure3.txt").read_text() == said + "\n"


@pytest.mark.parametrize("task", [path.parent.name for path in RESULTS.glob("*/diagnostics.md")])
def test_diagnostics_are_means_of_the_metrics(task):
    histories = {}
    for file in sorted((RESULTS / task).glob("*-seed*.jsonl")):
        histories[file.stem] = curves.metrics(file)
    made = summary.diagnostics(histories).splitlines()
    for line in (RESULTS / task / "diagnostics.md").read_text().splitlines():
        assert line in made
