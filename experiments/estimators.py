"""Appendix A's estimators against the truth, in a case so small that every group that can be drawn is counted.

    python -m experiments.estimators --out results/estimators.png    # seconds; the numbers go to results/estimators.json

One state and four actions, right (reward 2) or wrong (1); a policy, and one or two experts at a `shift` from 0 (the policy itself) to 1. As in
training, N actions are drawn from each source, their union are the candidates, and the best G = N are kept. All ordered draws are enumerated with
their probabilities, so expectation, bias and variance are exact; nothing is sampled. Estimators, weights, ESS and bound are the functions of grpo.py
that training uses, put together as in sampling.group_log_weights; what is kept is sampling.select_top_g's choice.

Estimated is E_{pi_old}[f], f(a) = r(a) - 1.5: the policy's expected reward, centred, since advantages have both signs too. f depends on the reward
alone, so A does not feel how ties are broken; B and C do, by their weights. The stages:

candidates              before selection: all n = (m + 1) N actions, weights pi_old / q
policy_first, random    after selection, by either way of breaking ties: the n = G kept actions, weights pi_old / q_S

Eq 10 bounds the bias of A; the paper has no bound for B and C. A row of the results has, beside mean, bias and variance of each estimator,

tv, bound                         Eq 10 with the TV of what the counted actions really are
tv_estimated, bound_estimated     Eq 10 with the TV that training estimates from the weights
bound_uncentred, largest_bias     Eq 10 with f = r; and the largest bias that any q at all could have
target_B, target_C                what B and C estimate after selection by A.5: E_{pi_old}[f 1_S] and E_{pi_old}[f | S], mean over the groups
"""

import json
from functools import cache
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import grpo
from sampling import select_top_g
from training import console, curves, storage
from training.console import Parser

matplotlib.use("Agg")

ACTIONS = ("glance, right", "check, right", "glance, wrong", "check, wrong")
REWARDS = torch.tensor([2, 2, 1, 1], dtype=torch.float64)
F = REWARDS - 1.5
POLICY = torch.tensor([0.25, 0.05, 0.6, 0.1], dtype=torch.float64)
EXPERTS = torch.tensor(
    [[0, 0.7, 0, 0.3], [0.6, 0, 0.4, 0]], dtype=torch.float64
)  # one that checks, one that glances

STAGES = ("candidates", "policy_first", "random")
CASES = [  # experts, N, shift
    *((1, 4, shift) for shift in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)), *((1, n, 1.0) for n in (1, 2, 3)), *((2, n, 1.0) for n in (1, 2)),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- enumeration


def sources(experts: int, shift: float) -> Tensor:
    """pi_old and the experts as distributions over the K actions, (m + 1, K)."""
    return torch.cat([POLICY[None], (1 - shift) * POLICY + shift * EXPERTS[:experts]])


def sequences(length: int) -> Tensor:
    """Every sequence of so many actions, (K^length, length)."""
    return torch.cartesian_prod(*[torch.arange(len(ACTIONS))] * length)


def probabilities(densities: Tensor, n: int, shuffled: bool) -> Tensor:
    """Of each of sequences(M), (K^M,): n draws from each source, one source after the other or, `shuffled`, in random order.

    densities: (m + 1, K). Breaking ties at random is a shuffle before a stable sort, so it needs other probabilities, not another sort.
    """

    @cache
    def of_the_rest(left: tuple[int, ...]) -> Tensor:
        """left: how many draws of each source are still to come."""
        if not any(left):
            return torch.ones(1, dtype=torch.float64)
        waiting = [j for j in range(len(left)) if left[j]]
        shares = (
            {j: left[j] / sum(left) for j in waiting} if shuffled else {waiting[0]: 1.0}
        )  # who is next
        rest = {j: of_the_rest((*left[:j], left[j] - 1, *left[j + 1 :])) for j in shares}
        return sum(shares[j] * torch.outer(densities[j], rest[j]).flatten() for j in shares)

    return of_the_rest((n,) * len(densities))


@cache
def kept_positions(rewards: tuple[float, ...], g: int) -> list[int]:
    return select_top_g(rewards, g, ties="policy_first")


def study(experts: int, n: int, shift: float) -> list[dict]:
    """The exact figures of one case, a row for each of STAGES. n: N and G."""
    densities = sources(experts, shift)  # (m + 1, K)
    policy, mixture = (
        densities[0],
        torch.full((len(densities),), 1 / len(densities), dtype=torch.float64),
    )
    log_q = grpo.mixture_logp(densities.T.log(), mixture)  # (K,)
    truth = (policy * F).sum().item()

    candidates = sequences(n * len(densities))  # (D, M)
    rewards = REWARDS[candidates]
    kept = candidates.gather(
        -1, torch.tensor([kept_positions(tuple(row), n) for row in rewards.tolist()])
    )  # (D, G)
    log_q_s = grpo.selected_proposal_logp(
        log_q[kept], grpo.selection_probability(rewards, n)[:, None]
    )  # (D, G)
    in_s = REWARDS >= REWARDS[kept].amin(-1, keepdim=True)  # (D, K): S of each group
    f_in_s, policy_in_s = (in_s * policy * F).sum(-1), (in_s * policy).sum(-1)  # (D,) each

    rows = []
    for stage in STAGES:
        actions, proposal = (
            (candidates, log_q[candidates]) if stage == "candidates" else (kept, log_q_s)
        )  # (D, n) each
        weights = grpo.importance_weights(policy.log()[actions], proposal)
        values = F[actions]
        probability = probabilities(densities, n, shuffled=stage == "random")  # (D,)

        def mean(of: Tensor, probability=probability) -> float:
            return (probability * of).sum().item()

        row = {
            "experts": experts,
            "N": n,
            "shift": shift,
            "tv_q": 0.5 * (log_q.exp() - policy).abs().sum().item(),
            "stage": stage,
        }
        row |= {"n": actions.shape[-1], "truth": truth, "target_B": truth, "target_C": truth}
        if stage != "candidates":
            row |= {"target_B": mean(f_in_s), "target_C": mean(f_in_s / policy_in_s)}
        for name, estimate in (
            ("A", values.mean(-1)),
            ("B", grpo.is_estimate(values, weights)),
            ("C", grpo.snis_estimate(values, weights)),
        ):
            expected = mean(estimate)
            row |= {
                f"mean_{name}": expected,
                f"bias_{name}": expected - truth,
                f"variance_{name}": mean((estimate - expected) ** 2),
            }
        counted = torch.tensor(
            [mean((actions == a).double().mean(-1)) for a in range(len(ACTIONS))]
        )  # (K,): what a counted action is
        for name, tv in (
            ("", 0.5 * (counted - policy).abs().sum().item()),
            ("_estimated", mean(grpo.total_variation(weights))),
        ):
            row |= {f"tv{name}": tv, f"bound{name}": grpo.bias_bound(F.abs().max().item(), tv)}
        row["bound_uncentred"] = grpo.bias_bound(REWARDS.max().item(), row["tv"])
        row["largest_bias"] = max(F.max().item() - truth, truth - F.min().item())
        row |= {"ess_share": mean(grpo.effective_sample_size(weights)) / actions.shape[-1]}
        rows.append(
            {
                key: round(value, 6) + 0.0 if isinstance(value, float) else value
                for key, value in row.items()
            }
        )  # + 0.0: no -0.0
    return rows


# ---------------------------------------------------------------------------------------------- results


def line(axis, rows: list[dict], x: str, y: str, style: str, **options) -> None:
    points = sorted((row[x], abs(row[y])) for row in rows)
    axis.plot(*zip(*points, strict=True), style, markersize=4, **options)


def draw(rows: list[dict], out: Path) -> None:
    """Six panels of the case with one expert: |bias| over n and over TV, before and after selection; variance; ESS."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    colors = {"A": "tab:red", "B": "tab:blue", "C": "tab:green"}
    names = {"A": "A, uncorrected", "B": "B, importance weights: 0", "C": "C, self-normalised"}
    by_stage = {
        stage: [row for row in rows if row["stage"] == stage and row["experts"] == 1]
        for stage in STAGES
    }
    over_n = {
        stage: [row for row in found if row["shift"] == 1.0] for stage, found in by_stage.items()
    }
    over_tv = {stage: [row for row in found if row["N"] == 4] for stage, found in by_stage.items()}

    for (before, after), x, data in ((axes[:, 0], "n", over_n), (axes[:, 1], "tv_q", over_tv)):
        line(
            before,
            data["candidates"],
            x,
            "bound",
            "-",
            color="lightgrey",
            linewidth=6,
            label="Eq 10",
        )
        for name in (
            "AC" if x == "n" else "ABC"
        ):  # 0 has no place on the logarithmic axis of the first panel
            line(
                before,
                data["candidates"],
                x,
                f"bias_{name}",
                "o-",
                color=colors[name],
                label=names[name],
            )
        line(
            after,
            data["policy_first"],
            x,
            "bound",
            "-",
            color="lightgrey",
            linewidth=6,
            label="Eq 10, TV of the kept",
        )
        line(
            after,
            data["policy_first"],
            x,
            "bound_estimated",
            ":",
            color="black",
            label="Eq 10, TV as training has it",
        )
        line(after, data["policy_first"], x, "bias_A", "o-", color=colors["A"], label="A, any ties")
        for name in "BC":
            line(
                after,
                data["policy_first"],
                x,
                f"bias_{name}",
                "o-",
                color=colors[name],
                label=f"{name}, policy first",
            )
            line(
                after,
                data["random"],
                x,
                f"bias_{name}",
                "o--",
                color=colors[name],
                label=f"{name}, ties random",
            )
        after.set_ylim(-0.02, 0.85)
        after.legend(fontsize=7, ncol=2, loc="upper left")
    line(
        axes[0, 1],
        over_tv["candidates"],
        "tv_q",
        "bound_uncentred",
        ":",
        color="grey",
        label="Eq 10 with f = r, the reward itself",
    )
    line(
        axes[0, 1],
        over_tv["candidates"],
        "tv_q",
        "largest_bias",
        "-.",
        color="grey",
        label="the largest bias that any q can have",
    )

    variance, ess = axes[:, 2]
    styles = {
        "candidates": ("o-", "8 candidates"),
        "policy_first": ("s:", "4 kept, policy first"),
        "random": ("^--", "4 kept, ties random"),
    }
    for stage, (style, label) in styles.items():
        for name in "ABC" if stage != "random" else "":
            line(
                variance,
                over_tv[stage],
                "tv_q",
                f"variance_{name}",
                style,
                color=colors[name],
                label=f"{name}, {label}",
            )
        line(
            ess,
            over_tv[stage],
            "tv_q",
            "ess_share",
            style,
            color="black" if stage == "candidates" else "tab:purple",
            label=label,
        )

    far, selected = "expert at its farthest", "selection of G = N"
    axes[0, 0].set(
        title=f"|bias| before selection ({far}; B: 0)",
        xlabel="candidates, n = 2N",
        xticks=[2, 4, 6, 8],
        yscale="log",
    )
    axes[1, 0].set(
        title=f"|bias| after {selected} ({far})", xlabel="kept actions, n = G", xticks=[1, 2, 3, 4]
    )
    axes[0, 1].set(title="|bias| before selection (N = 4)", ylim=(-0.02, 1.3))
    axes[1, 1].set(title=f"|bias| after {selected} (N = 4)")
    variance.set(title="variance (N = 4)", ylim=(0, 0.17))
    ess.set(title="expected ESS / n (N = 4)", ylim=(0, 1.05))
    for axis in axes.flat:
        axis.set_xlabel(axis.get_xlabel() or "TV(q, pi_old)")
        axis.grid(alpha=0.3)
    for axis, place in (
        (axes[0, 0], "center right"),
        (axes[0, 1], "upper right"),
        (variance, "upper left"),
        (ess, "lower left"),
    ):
        axis.legend(fontsize=7, loc=place)
    curves.save(figure, out)


def table(rows: list[dict]) -> str:
    """Expectations beside what they should be, and the bound beside the bias of A, for a few of the cases."""
    columns = (
        "truth",
        "mean_A",
        "mean_B",
        "mean_C",
        "target_B",
        "target_C",
        "bias_A",
        "bound",
        "bound_estimated",
        "ess_share",
    )
    lines = [
        "experts  N  TV(q, pi_old)  stage       "
        + "".join(f"{name:>{len(name) + 2}}" for name in columns)
    ]
    for row in rows:
        if row["shift"] in (0.0, 0.6, 1.0) and (row["experts"], row["N"]) in ((1, 4), (2, 2)):
            figures = "".join(
                f"{row[name]:{len(name) + 2}.3f}" if len(name) > 5 else f"{row[name]:7.3f}"
                for name in columns
            )
            lines.append(
                f"{row['experts']:7}  {row['N']}  {row['tv_q']:13.3f}  {row['stage']:12}" + figures
            )
    return "\n".join(lines)


def run(argv: list[str]) -> str:
    parser = Parser(prog="python -m experiments.estimators", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/estimators.png"),
        help="the picture; numbers lie beside it (default %(default)s)",
    )
    out = parser.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    numbers = out.with_suffix(".json")
    rows = [row for case in CASES for row in study(*case)]
    with storage.writing(numbers):
        numbers.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    draw(rows, out)
    return f"{table(rows)}\n{out}, {numbers}"


def main() -> None:
    console.command("experiments.estimators", run)


if __name__ == "__main__":
    main()
