"""What a step tells: the figures of metrics.jsonl, and the groups of samples.jsonl for people to read.

Each process makes a `summary` of its groups, small enough to be gathered from all; `step_metrics` makes one line of them.
README.md says which figures to look at, and what a healthy run shows.
"""

import torch

import grpo


def step_metrics(groups: list[dict]) -> dict[str, float]:
    """One step's figures from the summaries of all its groups."""
    flat = [
        (source, *values)
        for g in groups
        for source, *values in zip(
            g["sources"], g["format"], g["accuracy"], g["tokens"], g["truncated"], strict=True
        )
    ]

    def mean(values) -> float:
        values = [float(value) for value in values]
        return sum(values) / len(values)

    own = [values for source, *values in flat if source == POLICY]
    kept = [g["sources"][i] for g in groups for i in g["kept"]]
    result = {
        "reward": mean(f + a for f, a, _, _ in own),  # of the policy's own actions
        "accuracy": mean(a for _, a, _, _ in own),
        "format": mean(f for f, _, _, _ in own),
        "tokens": mean(t for _, _, t, _ in own),
        "truncated": mean(t for *_, t in own),
        "reward_std": mean(
            torch.tensor([f + a for f, a in zip(g["format"], g["accuracy"], strict=True)]).std(
                correction=min(1, len(g["format"]) - 1)
            )
            for g in groups
        ),
        "kept_reward": mean(g["format"][i] + g["accuracy"][i] for g in groups for i in g["kept"]),
        "expert_share": mean(source != POLICY for source in kept),  # Fig. 4
        "dead_groups": mean(not any(g["advantages"]) for g in groups),
        # Dead ones, and those that only say "more of all that was kept": no kept action is preferred to another.
        "equal_advantages": mean(len(set(g["advantages"])) == 1 for g in groups),
    }
    for name in dict.fromkeys(source for source, *_ in flat if source != POLICY):
        result[f"accuracy/{name}"] = mean(a for source, _, a, *_ in flat if source == name)
        result[f"share/{name}"] = mean(source == name for source in kept)
    columns = [sum((g[name] for g in groups), []) for name in ("objective", "kl", "clip_fraction")]
    known = all(g["weights"] is not None for g in groups)
    weights = sum((g["weights"] for g in groups), []) if known else None
    states = [i for i, g in enumerate(groups) for _ in g["kept"]]
    return result | grpo.diagnostics(*columns, weights, kept, states)


POLICY = "policy"  # the name of the policy as a source of actions
