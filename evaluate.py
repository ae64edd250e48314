"""Evaluation: greedy accuracy on test sets (Table 1's number), and Pass@k (Fig. 5).

    python evaluate.py tiny --sets counting-id counting-ood          # a model's directory or hub id
    python evaluate.py runs/NAME/model --sets transformation-id --samples 8

Accuracy is what Table 1 reports: the mean accuracy reward, and for function sequences Reason-RFT's test score, which gives partial
credit (rewards.py). "exact" is the share of answers that are wholly right. One greedy answer a question, so that no luck is in it.
"""

import argparse
import math
import sys

import torch
from tqdm import tqdm

from blocks import SETS, BlocksSet
from policy import Policy
from rewards import accuracy_reward, format_reward, function_score
from runs import UserError
from sampling import ROLLOUTS, Action, Sampler, make_sampler

EVAL_SEED = 0  # of Pass@k's samples


def score(states, actions: list[Action]) -> dict[str, float]:
    """Means over the states, one action each: accuracy (Table 1), exact (wholly right), format, tokens, truncated."""
    rewards = [accuracy_reward(action.text, state.answer, state.kind) for state, action in zip(states, actions, strict=True)]
    columns = {
        "accuracy": [
            function_score(action.text, state.answer) if state.kind == "function" else reward
            for state, action, reward in zip(states, actions, rewards, strict=True)
        ],
        "exact": [float(reward == 1.0) for reward in rewards],
        "format": [format_reward(action.text) for action in actions],
        "tokens": [len(action.tokens) for action in actions],
        "truncated": [float(action.truncated) for action in actions],
    }
    return {name: sum(values) / len(values) for name, values in columns.items()}


def answer_greedily(sampler: Sampler, states, batch: int = 128) -> list[Action]:
    """One greedy action for each state."""
    actions = []
    for start in range(0, len(states), batch):
        actions += sampler.greedy(sampler.policy.encode(states[start : start + batch]))
    return actions


def pass_at_k(n: int, c: int, k: int) -> float:
    """Fig. 5: the chance that k answers hold a right one, 1 - C(n - c, k) / C(n, k), unbiased from c right ones of n.

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy accuracy, and Pass@k, of a model on sets of the blocks world.")
    parser.add_argument("model", help="a directory in Hugging Face layout, such as runs/NAME/model, or a hub id")
    parser.add_argument("--sets", nargs="+", default=[name for names in SETS.values() for name in names], metavar="SET")
    parser.add_argument("--states", type=int, default=300, help="questions of each set (default 300)")
    parser.add_argument("--samples", type=int, default=0, help="also sample this many answers a question, for Pass@k")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rollout", choices=ROLLOUTS, default="auto", help="what generates: auto is vLLM where it can run")
    args = parser.parse_args()
    if args.states < 1 or args.max_new_tokens < 1 or args.samples < 0:
        parser.error("--states and --max-new-tokens must be at least 1, --samples at least 0")
    try:
        report(args)
    except (ValueError, UserError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def report(args: argparse.Namespace) -> None:
    """Prints a line for each set."""
    sets = {name: BlocksSet(name, args.states) for name in args.sets}
    policy = Policy.load(args.model).to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
    sampler = make_sampler(args.rollout, policy, args.model, args.max_new_tokens)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= args.samples]
    print("set                       accuracy  exact  format  tokens" + "".join(f"  pass@{k}" for k in ks))
    for name, questions in sets.items():
        states = [questions[i] for i in tqdm(range(len(questions)), desc=name, leave=False)]
        result = score(states, answer_greedily(sampler, states))
        line = f"{name:25s} {100 * result['accuracy']:8.1f} {100 * result['exact']:6.1f} {100 * result['format']:7.1f} {result['tokens']:7.1f}"
        if ks:
            groups = sampler.sample(policy.encode(states), args.samples, EVAL_SEED)
            right = [sum(accuracy_reward(a.text, s.answer, s.kind) == 1.0 for a in g) for s, g in zip(states, groups, strict=True)]
            line += "".join(f"  {100 * sum(pass_at_k(args.samples, c, k) for c in right) / len(right):6.1f}" for k in ks)
        print(line, flush=True)


if __name__ == "__main__":
    main()
