"""The list of methods: who sees which questions, and which rows a sweep takes."""

import dataclasses
import json
import shlex
import sys

import pytest

import ekipl
import sft
from data.predictions import Prediction
from experiments import rows, summary, sweep
from experiments.tasks import Task
from training import storage
from training.console import UserError


def config(*flags: str) -> ekipl.Config:
    return ekipl.parse(list(flags))[0]


def test_all_methods_learn_from_the_same_questions_once():
    made = {row.name: row for row in rows.methods(config("--states", "640"), 192)}
    stages = {row.after for row in made.values()} - {""}
    assert stages == {"Stage-1", "RFT-first"}
    for row in made.values():
        if not row.program or row.name in stages:
            continue
        parsed = (sft if row.program == "sft.py" else ekipl).parse(list(row.flags))[0]
        assert parsed.epochs == (3 if "3-epochs" in row.name else 1)
        seen = range(parsed.skip, parsed.limit or 640)
        if row.after:
            first = sft.parse(list(made[row.after].flags))[0]
            assert (first.skip, first.limit) == (0, seen.start)
        else:
            assert seen.start == 0
        assert seen.stop == 640
    early = ekipl.parse(list(made["Vision-EKIPL-early"].flags))[0].expert_steps
    assert early == 6  # of ten steps, as for RFT before GRPO
    assert sft.parse(list(made["RFT-first"].flags))[0].limit == early * 64


def test_each_row_does_what_its_name_says():
    made = {row.name: row for row in rows.methods(config(), 1280)}
    parsed = {}
    for name, row in made.items():
        if row.program:
            program = sft if row.program == "sft.py" else ekipl
            parsed[name] = program.parse(list(row.flags))[0]
    assert parsed["GRPO"].experts == parsed["GRPO-best"].experts == "none"
    assert parsed["GRPO-best"].num_samples == 3 * parsed["GRPO"].num_samples
    assert (parsed["RFT"].method, parsed["RFT"].experts) == ("rft", "careful,quick")
    assert (parsed["RFT-careful"].method, parsed["RFT-careful"].experts) == ("rft", "careful")
    assert parsed["distillation"].method == "distil"
    assert parsed["RFT-action"] == dataclasses.replace(parsed["RFT"], loss_mean="action")
    assert parsed["RFT"].loss_mean == "token" and not made["RFT-action"].rate  # each at its own
    alone = dataclasses.replace(parsed["RFT-careful"], loss_mean="action")
    assert parsed["RFT-careful-action"] == alone
    assert made["RFT-careful-action"].rate == "RFT-action"
    assert parsed["CoT-SFT-3-epochs"] == dataclasses.replace(parsed["CoT-SFT"], epochs=3)
    assert parsed["Vision-EKIPL"] == config()
    assert parsed["Vision-EKIPL-reversed"].experts == "quick,careful"
    assert parsed["Vision-EKIPL-any"].tie_rule == "any_expert"
    assert parsed["Vision-EKIPL-all"].group_size == 24  # of 24 candidates
    for name in ("GRPO-2-updates", "Vision-EKIPL-2-updates", "Vision-EKIPL-4-updates"):
        assert parsed[name].updates_per_batch == int(name[-9]), name
    for expert in ("careful", "quick"):
        alone = parsed[f"Vision-EKIPL-{expert}-4-updates"]
        assert (alone.experts, alone.updates_per_batch) == (expert, 4)
    assert (made["base"].request, made["base-check"].request) == ("", "check .")


def test_the_methods_next_door_change_what_their_papers_change():
    made = {row.name: row for row in rows.methods(config(), 1280)}
    constant = dict(loss_mean="constant", advantage_std=False)
    changes = {
        "Dr-GRPO": dict(constant, experts="none"),
        "LUFFY": dict(constant, expert_loss="luffy", beta=0.0),
        "RL-PLUS": dict(constant, expert_loss="rl-plus", beta=0.0),
        "Vision-EKIPL-unsolved": dict(experts_when="unsolved"),
        "Vision-EKIPL-constant": dict(constant, beta=0.0),
    }
    held_to(made, changes)
    own = {name for name in changes if not made[name].rate}
    # Each at its best: LUFFY and RL-PLUS differ from "constant" in the experts' loss alone.
    assert own == {"LUFFY", "RL-PLUS", "Vision-EKIPL-constant"}


def test_the_mean_over_all_tokens_is_the_only_change_of_its_rows():
    made = {row.name: row for row in rows.methods(config(), 1280)}
    name, token = "Vision-EKIPL-token", dict(loss_mean="token")
    changes = {
        name: token,
        "Vision-EKIPL-any-token": dict(token, ties="any_expert"),
        "Vision-EKIPL-reversed-token": dict(token, experts="quick,careful"),
        f"{name}-4-updates": dict(token, updates_per_batch=4),
        "GRPO-token": dict(token, experts="none"),
        "SFT-then-GRPO-token": dict(token, experts="none", skip=1280),
    }
    held_to(made, changes)
    assert made["SFT-then-GRPO-token"].after == "Stage-1"
    rates = {each: made[each].rate for each in changes}
    own = (name, "GRPO-token", "SFT-then-GRPO-token")
    assert rates == {each: "" if each in own else name for each in changes}


def held_to(made: dict[str, rows.Row], changes: dict[str, dict]) -> None:
    """The settings of these rows are the default's but for these."""
    for name, changed in changes.items():
        parsed = ekipl.parse(list(made[name].flags))[0]
        assert parsed == dataclasses.replace(config(), **changed), name
        ekipl.check(parsed, 1, False)


@pytest.mark.parametrize("flags, says", [
    (("--experts", "none"), "needs --experts"), (("--epochs", "2"), "no --epochs"),
    (("--limit", "640"), "no --epochs"), (("--preset", "counting-2b"), "for the blocks world"),
])  # fmt: skip
def test_settings_that_would_make_budgets_differ_are_refused(flags, says):
    with pytest.raises(UserError, match=says):
        rows.methods(config(*flags), 64)


def test_chosen_rows_come_with_those_that_they_start_from(monkeypatch, capsys):
    arguments = "methods --seeds 0 --dry-run --rows SFT-then-GRPO,RFT,base-check".split()
    monkeypatch.setattr(sys, "argv", ["experiments.sweep", *arguments])
    sweep.main()
    said = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    names = [words[words.index("--name") + 1] for words in said if "--name" in words]
    assert names == ["RFT-seed0", "Stage-1-seed0", "SFT-then-GRPO-seed0"]
    assert sum("check ." in words for words in said) == 1 and len(said) == 7
    with pytest.raises(UserError, match="no row RFT2; there are careful, quick, base"):
        rows.chosen(rows.methods(config(), 1280), "RFT2")


def test_every_method_is_searched_and_takes_what_is_best_for_it(tmp_path):
    made = rows.methods(config(), 1280)
    searched = rows.rates(config(), 1280)
    own = [row.name for row in made if row.program and row.listed and not row.rate]
    names = [row.name for row in searched if row.listed]
    assert names == [f"{name}-lr{rate}" for name in own for rate in rows.RATES]
    assert len(rows.chosen(searched, "GRPO,RFT-then-GRPO")) == 11  # and RFT-first
    file = tmp_path / "rates.json"
    found = {"RFT": {"0.001": 0.4, "0.002": 0.5}, "Vision-EKIPL": {"0.001": 0.4, "0.0005": 0.3}}
    file.write_text(json.dumps(found))
    flags = {row.name: row.flags for row in rows.with_best_rates(made, file)}
    for name in ("RFT", "RFT-3-epochs", "RFT-first"):
        assert flags[name][-2:] == ("--lr", "0.002")
    for name in ("Vision-EKIPL", "Vision-EKIPL-any", "Vision-EKIPL-reversed", "Vision-EKIPL-all"):
        assert flags[name][-2:] == ("--lr", "0.001")
    for name in ("GRPO", "base", "RFT-careful", "Vision-EKIPL-early"):  # not in the file
        assert "--lr" not in flags[name]
    again = rows.with_best_rates(searched, file)  # those that have a rate keep it
    assert [row.flags for row in again if row.listed] == [r.flags for r in searched if r.listed]
    for text in ("", "[]", '{"RFT": 3}'):
        file.write_text(text)
        with pytest.raises(UserError, match="is not what the list of rates writes"):
            rows.with_best_rates(made, file)


def test_the_ablation_changes_one_thing_at_the_rate_of_vision_ekipl():
    for row in rows.ablation(config(), 1280):
        parsed, changed = ekipl.parse(list(row.flags))[0], []
        for name, value in vars(config()).items():
            if getattr(parsed, name) != value:
                changed.append(name)
        assert row.rate == "Vision-EKIPL"
        assert len(changed) == (0 if row.name == "Vision-EKIPL" else 2 if row.name == "N-2" else 1)


def test_experts_of_another_accuracy_are_the_same_rows():
    made = {row.name: row for row in rows.methods(config("--experts", "careful:0.3,quick:0.05"), 1)}
    assert made["RFT-careful"].flags[-1] == "careful:0.3" and made["quick"].model == "quick:0.05"


def test_rates_are_chosen_on_validation_questions(monkeypatch, capsys):
    arguments = "rates --seeds 3 --dry-run --rows GRPO".split()
    monkeypatch.setattr(sys, "argv", ["experiments.sweep", *arguments])
    sweep.main()
    said = capsys.readouterr().out.splitlines()
    evaluations = [line for line in said if "evaluate.py" in line]
    assert len(evaluations) == 5
    assert all("--sets counting-val --states" in line for line in evaluations)


def test_the_rates_table_has_every_rate_in_order_and_the_best_in_bold(tmp_path):
    finished = []
    for rate, right in (("0.001", 3), ("0.0005", 1), ("0.002", 2)):
        name = f"GRPO-lr{rate}-seed3"
        texts = ["<answer> 3 </answer>"] * right + ["<answer> 4 </answer>"] * (4 - right)
        answers = [Prediction(f"a-{i}", "3", "discrete", t, 5, False) for i, t in enumerate(texts)]
        (tmp_path / name / "predictions").mkdir(parents=True)
        file = tmp_path / name / "predictions" / "counting-val.jsonl"
        storage.append(file, [dataclasses.asdict(answer) for answer in answers])
        finished.append(Task(name, tmp_path / name, []))
    summary.rates(finished, tmp_path)
    assert json.loads((tmp_path / "rates.json").read_text()) == {
        "GRPO": {"0.0005": 0.25, "0.001": 0.75, "0.002": 0.5}
    }
    assert "| GRPO | 25.0 | **75.0** | 50.0 |" in (tmp_path / "rates.md").read_text()
