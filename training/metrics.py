"""The figures of a step in metrics.jsonl, from the summaries of all its groups.

README.md in this folder says which figures to look at, and what a healthy run shows.
"""

import torch

import grpo

POLICY = "policy"  # the name of the policy as a source of actions


def mean(values) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values)


def step_metrics(groups: list[dict]) -> dict[str, float]:
    """One step's figures. groups: the `summary` of each of its groups, from all processes."""
    candidates, kept, kept_rewards, stds, states = [], [], [], [], []
    for i, g in enumerate(groups):
        parts = (g["sources"], g["format"], g["accuracy"], g["tokens"], g["truncated"])
        candidates += zip(*parts, strict=True)
        rewards = [f + a for f, a in zip(g["format"], g["accuracy"], strict=True)]
        stds.append(torch.tensor(rewards).std(correction=min(1, len(rewards) - 1)))
        kept += [g["sources"][k] for k in g["kept"]]
        kept_rewards += [rewards[k] for k in g["kept"]]
        states += [i] * len(g["kept"])
    own = [row for row in candidates if row[0] == POLICY]
    result = {
        "reward": mean(f + a for _, f, a, _, _ in own),  # of the policy's own actions
        "accuracy": mean(a for _, _, a, _, _ in own),
        "format": mean(f for _, f, _, _, _ in own),
        "tokens": mean(tokens for *_, tokens, _ in own),
        "truncated": mean(truncated for *_, truncated in own),
        "reward_std": mean(stds),
        "kept_reward": mean(kept_rewards),
        "expert_share": mean(source != POLICY for source in kept),  # Fig. 4
        "dead_groups": mean(not any(g["advantages"]) for g in groups),
        # Also groups whose kept actions all have the same advantage: none is preferred.
        "equal_advantages": mean(len(set(g["advantages"])) == 1 for g in groups),
    }
    for name in dict.fromkeys(row[0] for row in candidates if row[0] != POLICY):
        result[f"accuracy/{name}"] = mean(row[2] for row in candidates if row[0] == name)
        result[f"share/{name}"] = mean(source == name for source in kept)
    return result | grpo.diagnostics(*columns(groups), kept, states)


def columns(groups: list[dict]) -> list[list[float] | None]:
    """objective, kl, clip_fraction and weights of all kept actions; None if a weight is unknown."""
    found = []
    for name in ("objective", "kl", "clip_fraction", "weights"):
        column = []
        for group in groups:
            if column is not None:
                column = None if group[name] is None else column + group[name]
        found.append(column)
    return found
