"""What a run has used, counted by hand."""

import json

import ekipl
import sft
from experiments.budgets import budget_of, told
from training import storage


def run(path, config, steps: list[dict]):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(vars(config)))
    records = [
        {"step": i + 1, "states": 2 * (i + 1), "loss": 0.0, **r} for i, r in enumerate(steps)
    ]
    storage.append(path / "metrics.jsonl", [{"step": 0, "states": 0, "eval/a": 0.5}, *records])
    return path


def rl(*flags: str) -> ekipl.Config:
    return ekipl.parse(["--batch-size", "2", "--states", "8", "--num-samples", "3", *flags])[0]


def test_experts_that_leave_are_not_counted_after(tmp_path):
    config = rl("--expert-steps", "1", "--group-size", "5")
    time = {"seconds/rollout": 2.0, "seconds/evaluation": 9.0}
    used = budget_of(run(tmp_path / "a", config, [time] * 4))
    assert used == {
        "lr": 5e-4,
        "states": 8,
        "policy_samples": 4 * 2 * 3,
        "expert_calls": 1 * 2 * 3 * 2,
        "trained": 2 * 5 + 3 * 2 * 3,  # of 9 candidates 5, then all 3
        "seconds": 8.0,
    }


def test_a_second_stage_has_used_what_the_first_has(tmp_path):
    first = sft.parse(["--method", "rft", "--batch-size", "2", "--states", "4", "--epochs", "3"])[0]
    run(tmp_path / "first", first, [{"trained": 7}] * 6)
    model = str(tmp_path / "first" / "model")
    config = rl("--experts", "none", "--lr", "1e-3", "--model", model)
    used = budget_of(run(tmp_path / "second", config, [{}] * 2))
    assert (used["lr"], used["states"]) == (1e-3, 4 + 4)  # each question of three passes once
    assert used["expert_calls"] == 4 * 8 * 2 and used["policy_samples"] == 2 * 2 * 3
    assert used["trained"] == 6 * 7 + 2 * 2 * 3


def test_records_are_learnt_once_each_and_no_expert_is_asked(tmp_path):
    config = sft.parse(["--batch-size", "2", "--states", "4"])[0]
    used = budget_of(run(tmp_path / "a", config, [{}] * 2))
    assert (used["states"], used["trained"], used["expert_calls"]) == (4, 4, 0)


def test_a_table_has_the_mean_of_the_seeds_and_the_least_seconds():
    names = ("lr", "states", "policy_samples", "expert_calls", "trained", "seconds")
    budgets = [dict.fromkeys(names, value) for value in (1000.0, 3000.0)]
    assert told(budgets) == ["2000", "2,000", "2,000", "2,000", "2,000", "1,000"]
    assert told([]) == ["-"] * 6
