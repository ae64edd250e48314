"""What a run has used: questions, samples of the policy, answers of experts, actions, seconds.

    lr              peak learning rate
    states          questions that it has learnt from, each counted once
    policy_samples  actions sampled from the policy, kept or not
    expert_calls    actions asked of experts, kept or not
    trained         actions in the loss, once for each pass
    seconds         of all steps, without evaluations and without start

A run that starts from another run's model has used what that one has, too (lr: its own).
"""

from __future__ import annotations

from pathlib import Path

from experts.roster import expert_specs
from training import rundir, storage

COLUMNS = {
    "lr": "lr",
    "states": "questions",
    "policy_samples": "policy's samples",
    "expert_calls": "experts' answers",
    "trained": "trained actions",
    "seconds": "seconds",
}
Budget = dict[str, float]


def budget_of(run: Path) -> Budget:
    """Of a finished run of ekipl.py or sft.py. UserError if its files cannot be read."""
    config = rundir.read_config(run)
    steps = [record for record in storage.read(run / "metrics.jsonl") if "loss" in record]
    used = of_sft(config, steps) if "method" in config else of_rl(config, steps)
    used["lr"] = config["lr"]
    used["seconds"] = sum(map(seconds, steps))
    first = Path(config["model"]).parent
    if (first / "metrics.jsonl").exists():
        for name, value in budget_of(first).items():
            used[name] += value if name != "lr" else 0
    return {name: round(used[name], 6) for name in COLUMNS}


def told(budgets: list[Budget]) -> list[str]:
    """Cells of a table: means over a method's seeds, and the least seconds, since other programs
    may have run beside some; "-" where nothing was trained.
    """
    if not budgets:
        return ["-"] * len(COLUMNS)
    cells = []
    for name in COLUMNS:
        values = [budget[name] for budget in budgets]
        value = min(values) if name == "seconds" else sum(values) / len(values)
        cells.append(f"{value:g}" if name == "lr" else f"{value:,.0f}")
    return cells


def seconds(record: dict) -> float:
    """Of one step."""
    phases = [key for key in record if key.startswith("seconds/")]
    return sum(record[key] for key in phases if key != "seconds/evaluation")


def of_rl(config: dict, steps: list[dict]) -> Budget:
    count = len(expert_specs(config["experts"], offline=True))
    asked = config["expert_steps"] or len(steps) if count else 0
    used = {"states": len(steps) * config["batch_size"] // config["epochs"]}
    used |= {"policy_samples": 0, "expert_calls": 0, "trained": 0}
    for step in range(len(steps)):
        joining = count if step < asked else 0
        drawn = config["batch_size"] * config["num_samples"]
        used["policy_samples"] += drawn
        used["expert_calls"] += drawn * joining
        kept = min(config["group_size"], config["num_samples"] * (1 + joining))
        used["trained"] += config["batch_size"] * kept * config["updates_per_batch"]
    return used


def of_sft(config: dict, steps: list[dict]) -> Budget:
    passes = len(steps) * config["batch_size"]
    states = passes // config["epochs"]
    used = {"states": states, "policy_samples": 0, "expert_calls": 0, "trained": passes}
    if config["method"] in ("rft", "distil"):
        count = len(expert_specs(config["experts"], offline=True))
        used["expert_calls"] = states * config["num_samples"] * count
        used["trained"] = sum(record["trained"] for record in steps)
    return used
