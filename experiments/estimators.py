"""Appendix A's estimators against the truth, in a case so small that all groups are counted.

    python -m experiments.estimators    # seconds; writes experiments/results/estimators.png, .json

One state and four actions, right (reward 2) or wrong (1); a policy, and one or two experts at a
`shift` from 0 (the policy itself) to 1. As in training, N actions are drawn from each source, their
union are the candidates, and the best G = N are kept. All ordered draws are enumerated with their
probabilities, so expectation, bias and variance are exact. Estimators, weights, ESS and bound are
the functions of grpo.py that training uses, and sampling.select_top_g makes the selection.

The estimated value is E_{pi_old}[f] with f(a) = r(a) - 1.5: the policy's expected reward, centred,
since advantages have both signs too. f depends on the reward alone, so ties make no difference to
A; they do to B and C, by their weights. The stages:

candidates              before selection: all n = (m + 1) N actions, weights pi_old / q
policy_first, random    after selection, by either way of breaking ties: the n = G kept actions,
                        weights pi_old / q_S

Eq 10 bounds the bias of A; the paper has no bound for B and C. Beside mean, bias and variance of
each estimator, a row of the results has

tv, bound                         Eq 10 with the TV of the distribution of the counted actions
tv_estimated, bound_estimated     Eq 10 with the TV that training estimates from the weights
bound_uncentred, largest_bias     Eq 10 with f = r; and the largest bias that any q could have
target_B, target_C                what B and C estimate after selection by A.5, mean over groups:
                                  E_{pi_old}[f 1_S] and E_{pi_old}[f | S]
"""

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import grpo
from experiments import estimators_figure
from sampling import select_top_g
from training import console, storage
from training.console import Parser

OUT = Path(__file__).resolve().parent / "results" / "estimators.png"
ACTIONS = ("glance, right", "check, right", "glance, wrong", "check, wrong")
REWARDS = torch.tensor([2, 2, 1, 1], dtype=torch.float64)
F = REWARDS - 1.5
POLICY = torch.tensor([0.25, 0.05, 0.6, 0.1], dtype=torch.float64)
# The first expert checks, the second one glances.
EXPERTS = torch.tensor([[0, 0.7, 0, 0.3], [0.6, 0, 0.4, 0]], dtype=torch.float64)

STAGES = ("candidates", "policy_first", "random")
CASES = [  # experts, N, shift
    *((1, 4, shift) for shift in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
    *((1, n, 1.0) for n in (1, 2, 3)),
    *((2, n, 1.0) for n in (1, 2)),
]


def sources(experts: int, shift: float) -> Tensor:
    """pi_old and the experts as distributions over the K actions, (m + 1, K)."""
    return torch.cat([POLICY[None], (1 - shift) * POLICY + shift * EXPERTS[:experts]])


def sequences(length: int) -> Tensor:
    """Every sequence of so many actions, (K^length, length)."""
    return torch.cartesian_prod(*[torch.arange(len(ACTIONS))] * length)


def probabilities(densities: Tensor, n: int, shuffled: bool) -> Tensor:
    """The probability of each of sequences(M), (K^M,), when each source draws n actions: one source
    after the other or, `shuffled`, in random order.

    densities: (m + 1, K). Breaking ties at random is a shuffle before a stable sort, so it needs
    other probabilities, not another sort.
    """

    @cache
    def of_the_rest(left: tuple[int, ...]) -> Tensor:
        """left: how many draws of each source are still to come."""
        if not any(left):
            return torch.ones(1, dtype=torch.float64)
        waiting = [j for j in range(len(left)) if left[j]]
        next_draw = {waiting[0]: 1.0}  # the probability that a source is next
        if shuffled:
            next_draw = {j: left[j] / sum(left) for j in waiting}
        total = 0
        for j, share in next_draw.items():
            rest = of_the_rest((*left[:j], left[j] - 1, *left[j + 1 :]))
            total = total + share * torch.outer(densities[j], rest).flatten()
        return total

    return of_the_rest((n,) * len(densities))


@cache
def kept_positions(rewards: tuple[float, ...], g: int) -> list[int]:
    return select_top_g(rewards, g, ties="policy_first")


def study(experts: int, n: int, shift: float) -> list[dict]:
    """The exact figures of one case, a row for each of STAGES. n: N and G."""
    densities = sources(experts, shift)  # (m + 1, K)
    policy, m = densities[0], len(densities)
    mixture = torch.full((m,), 1 / m, dtype=torch.float64)
    log_q = grpo.mixture_logp(densities.T.log(), mixture)  # (K,)
    truth = (policy * F).sum().item()

    candidates = sequences(n * m)  # (D, M)
    rewards = REWARDS[candidates]  # (D, M)
    positions = [kept_positions(tuple(row), n) for row in rewards.tolist()]
    kept = candidates.gather(-1, torch.tensor(positions))  # (D, G)
    q_of_s = grpo.selection_probability(rewards, n)[:, None]  # (D, 1)
    log_q_s = grpo.selected_proposal_logp(log_q[kept], q_of_s)  # (D, G)
    in_s = REWARDS >= REWARDS[kept].amin(-1, keepdim=True)  # (D, K): S of each group
    f_in_s, policy_in_s = (in_s * policy * F).sum(-1), (in_s * policy).sum(-1)  # (D,) each

    rows, tv_q = [], 0.5 * (log_q.exp() - policy).abs().sum().item()
    for stage in STAGES:
        probability = probabilities(densities, n, shuffled=stage == "random")  # (D,)
        actions, log_proposal = kept, log_q_s  # (D, n) each
        targets = {
            "target_B": expectation(probability, f_in_s),
            "target_C": expectation(probability, f_in_s / policy_in_s),
        }
        if stage == "candidates":
            actions, log_proposal = candidates, log_q[candidates]
            targets = {"target_B": truth, "target_C": truth}
        row = {"experts": experts, "N": n, "shift": shift, "tv_q": tv_q, "stage": stage}
        row |= {"n": actions.shape[-1], "truth": truth, **targets}
        row |= figures(policy, actions, log_proposal, probability, truth)
        rows.append({key: rounded(value) for key, value in row.items()})
    return rows


def expectation(probability: Tensor, values: Tensor) -> float:
    """Of a value for each draw; both (D,)."""
    return (probability * values).sum().item()


def figures(
    policy: Tensor, actions: Tensor, log_proposal: Tensor, probability: Tensor, truth: float
) -> dict[str, float]:
    """Mean, bias and variance of the estimators, TV, bounds and ESS of one stage.

    policy: (K,). actions, log_proposal: (D, n). probability: (D,).
    """
    weights = grpo.importance_weights(policy.log()[actions], log_proposal)  # (D, n)
    values = F[actions]  # (D, n)
    estimates = {  # (D,) each
        "A": values.mean(-1),
        "B": grpo.is_estimate(values, weights),
        "C": grpo.snis_estimate(values, weights),
    }
    row = {}
    for name, estimate in estimates.items():
        mean = expectation(probability, estimate)
        row |= {f"mean_{name}": mean, f"bias_{name}": mean - truth}
        row[f"variance_{name}"] = expectation(probability, (estimate - mean) ** 2)
    shares = [(actions == a).double().mean(-1) for a in range(len(ACTIONS))]  # K of (D,)
    counted = torch.tensor([expectation(probability, share) for share in shares])  # (K,)
    tv = 0.5 * (counted - policy).abs().sum().item()
    estimated = expectation(probability, grpo.total_variation(weights))
    f_max, ess = F.abs().max().item(), grpo.effective_sample_size(weights)  # ESS: (D,)
    return row | {
        "tv": tv,
        "bound": grpo.bias_bound(f_max, tv),
        "tv_estimated": estimated,
        "bound_estimated": grpo.bias_bound(f_max, estimated),
        "bound_uncentred": grpo.bias_bound(REWARDS.max().item(), tv),
        "largest_bias": max(F.max().item() - truth, truth - F.min().item()),
        "ess_share": expectation(probability, ess) / actions.shape[-1],
    }


def rounded(value):
    return round(value, 6) + 0.0 if isinstance(value, float) else value  # + 0.0: no -0.0


COLUMNS = (
    *("truth", "mean_A", "mean_B", "mean_C", "target_B", "target_C"),
    *("bias_A", "bound", "bound_estimated", "ess_share"),
)


def table(rows: list[dict]) -> str:
    """Expectations beside their targets, and the bound beside the bias of A, for some cases."""
    widths = {name: max(7, len(name) + 2) for name in COLUMNS}
    head = "".join(f"{name:>{width}}" for name, width in widths.items())
    lines = ["experts  N  TV(q, pi_old)  stage       " + head]
    for row in rows:
        if row["shift"] in (0.0, 0.6, 1.0) and (row["experts"], row["N"]) in ((1, 4), (2, 2)):
            start = f"{row['experts']:7}  {row['N']}  {row['tv_q']:13.3f}  {row['stage']:12}"
            lines.append(start + "".join(f"{row[name]:{widths[name]}.3f}" for name in COLUMNS))
    return "\n".join(lines)


def run(argv: list[str]) -> str:
    parser = Parser(prog="python -m experiments.estimators", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        help="the picture; its numbers go beside it (default experiments/results/estimators.png)",
    )
    out = parser.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    numbers, rows = out.with_suffix(".json"), []
    for case in CASES:
        rows += study(*case)
    with storage.writing(numbers):
        numbers.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    estimators_figure.draw(rows, out)
    return f"{table(rows)}\n{out}, {numbers}"


def main() -> None:
    console.command("experiments.estimators", run)


if __name__ == "__main__":
    main()
