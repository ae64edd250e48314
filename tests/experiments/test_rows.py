"""The list of methods: who sees which questions, and which rows a sweep takes."""

import shlex
import sys

import pytest

import ekipl
import sft
from experiments import rows, sweep
from training.console import UserError


def config(*flags: str) -> ekipl.Config:
    return ekipl.parse(list(flags))[0]


def test_all_methods_learn_from_the_same_questions_once():
    made = {row.name: row for row in rows.methods(config("--states", "640"), 192)}
    for row in made.values():
        if not row.program or not row.listed:
            continue
        parsed = (sft if row.program == "sft.py" else ekipl).parse(list(row.flags))[0]
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
    assert parsed["Vision-EKIPL"] == config()
    assert parsed["Vision-EKIPL-reversed"].experts == "quick,careful"
    assert parsed["Vision-EKIPL-any"].tie_rule == "any_expert"
    assert (made["base"].request, made["base-check"].request) == ("", "check .")


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
    assert sum("check ." in words for words in said) == 1 and len(said) == 6
    with pytest.raises(UserError, match="no row RFT2; there are careful, quick, base"):
        rows.chosen(rows.methods(config(), 1280), "RFT2")
