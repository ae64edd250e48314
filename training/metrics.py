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
    advantages = []
    for i, g in enumerate(groups):
        parts = (g["sources"], g["format"], g["accuracy"], g["tokens"], g["truncated"])
        candidates += zip(*parts, strict=True)
        rewards = [f + a for f, a in zip(g["format"], g["accuracy"], strict=True)]
        stds.append(torch.tensor(rewards).std(correction=min(1, len(rewards) - 1)))
        kept += [g["sources"][k] for k in g["kept"]]
        kept_rewards += [rewards[k] for k in g["kept"]]
        states += [i] * len(g["kept"])
        advantages += g["advantages"]
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
        "negative": mean(a < 0 for a in advantages),  # kept actions that become less likely
    }
    for name in dict.fromkeys(row[0] for row in candidates if row[0] != POLICY):
        result[f"accuracy/{name}"] = mean(row[2] for row in candidates if row[0] == name)
        result[f"share/{name}"] = mean(source == name for source in kept)
    return result | diagnostics(*columns(groups), kept, states)


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


def diagnostics(
    objective, kl, clip_fraction, weights, sources: list[str], states: list | None = None
) -> dict[str, float]:
    """What A.3 and A.4 ask to watch, over all kept actions of a step and per source.

    objective, kl, clip_fraction: (n,), as in ekipl_loss's stats, without absent actions. weights:
    (n,), or None where densities are unknown. sources: n names. states: n numbers, which state each
    action answers; None: all the same.
    Returns finite floats: "clip_fraction", "kl"; with weights also "ess" (in actions of a state)
    and "ess_share" (of a state's kept actions), means over states, since only actions of one
    state share q (A.3); "weight_var", "weight_q95", "tv", "bias_bound", over all n. "ess/NAME" and
    so on are of one source's actions, without the last two, since these are no sample of q.
    ValueError on non-finite values, on lengths that differ and on n = 0.
    """
    columns = {"clip_fraction": clip_fraction, "kl": kl, "objective": objective}
    for name, values in columns.items():
        columns[name] = grpo.finite(name, values).detach().double()  # (n,)
    if weights is not None:
        columns["weights"] = grpo.finite("weights", weights).detach().double()  # (n,)
    n = len(sources)
    if not n or any(values.shape != (n,) for values in columns.values()):
        raise ValueError(f"{n} sources for { ({name: len(v) for name, v in columns.items()}) }")
    states = [0] * n if states is None else states
    if len(states) != n:
        raise ValueError(f"{n} sources for {len(states)} states")

    report = {}
    for source in [None, *dict.fromkeys(sources)]:
        suffix = "" if source is None else f"/{source}"
        rows = [i for i, name in enumerate(sources) if source in (None, name)]
        for name in ("clip_fraction", "kl"):
            report[name + suffix] = columns[name][rows].mean().item()
        if weights is not None:
            figures = _of_weights(columns["weights"][rows], [states[row] for row in rows])
            report |= {name + suffix: value for name, value in figures.items()}
    if weights is not None:
        largest = columns["objective"].abs().max().item()
        report["tv"] = grpo.total_variation(columns["weights"]).item()
        report["bias_bound"] = grpo.bias_bound(largest, report["tv"])  # Eq 10
    return report


def _of_weights(weights: torch.Tensor, states: list) -> dict[str, float]:
    """ESS and spread of weights, (n,), each of which belongs to a state. See `diagnostics`."""
    places_of = {}  # by state
    for place, state in enumerate(states):
        places_of.setdefault(state, []).append(place)
    ess, shares = [], []
    for places in places_of.values():
        ess.append(grpo.effective_sample_size(weights[places]).item())
        shares.append(ess[-1] / len(places))
    return {
        "ess": sum(ess) / len(ess),
        "ess_share": sum(shares) / len(shares),
        # Of one state alone: 1 / ess_share = 1 + variance / mean^2.
        "weight_var": weights.var(correction=0).item(),
        "weight_q95": weights.quantile(0.95).item(),
    }
