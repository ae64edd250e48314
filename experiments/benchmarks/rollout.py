"""Throughput of the samplers: tokens per second of vLLM and of transformers' `generate`.

    python -m experiments.benchmarks.rollout --out rollout-cpu.json

Both have the same prompts, device and seed. Every measurement begins with a call that is not
counted (the engine's first one prepares much), then takes the median of `--repeats`; the samplers
take turns, so that both meet the same load of the machine. With vLLM a call is what training pays
in a step: the weight sync, then the actions. Both samplers draw from the same distribution; their
actions differ, so the figure is tokens per second, not seconds.
"""

import statistics
import time
from pathlib import Path

import torch

from blocks.dataset import BlocksSet
from experiments.benchmarks import measuring
from policy import Policy
from rollouts.choice import make_sampler
from sampling import Sampler
from training import console
from training.console import Parser, UserError
from training.settings import place_of


def tokens_per_second(sampler: Sampler, prompts, n: int, seed: int) -> float:
    start, tokens = time.perf_counter(), 0
    sampler.sync_weights()
    for group in sampler.sample(prompts, n, seed):
        tokens += sum(len(action.tokens) for action in group)
    return tokens / (time.perf_counter() - start)


def measure(samplers: dict[str, Sampler], prompts, n: int, repeats: int) -> dict:
    """Median rates of the samplers, their ratio, and the rate of every call."""
    rates = {name: [] for name in samplers}
    for seed in range(repeats + 1):
        for name, sampler in samplers.items():
            rates[name].append(tokens_per_second(sampler, prompts, n, seed))
    row, calls = {"prompts": len(prompts)}, {}
    for name, (_, *counted) in rates.items():
        row[name] = round(statistics.median(counted))
        calls[name] = [round(rate) for rate in counted]
    return row | {"ratio": round(row["vllm"] / row["transformers"], 2), "all": calls}


def run(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m experiments.benchmarks.rollout",
        description="Rollout throughput, vLLM against transformers.",
    )
    add = parser.add_argument
    add("--model", default="tiny", help="a directory in Hugging Face layout or a hub id")
    add("--prompts", type=int, nargs="+", default=[16, 64], help="prompts in a call, each in turn")
    add("--num-samples", type=int, default=8, help="N, actions for each prompt")
    add("--max-new-tokens", type=int, default=80)
    add("--repeats", type=int, default=5)
    add("--out", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    if min(*args.prompts, args.num_samples, args.max_new_tokens, args.repeats) < 1:
        raise UserError("all numbers must be at least 1")
    place, most = place_of(args.model), max(args.prompts)
    policy = Policy.load(place).to("cuda" if torch.cuda.is_available() else "cpu")
    questions = BlocksSet("counting-train", most)
    prompts = policy.encode([questions[i] for i in range(most)])
    samplers = {}
    for name in ("transformers", "vllm"):
        samplers[name] = make_sampler(name, policy, place, args.max_new_tokens, bf16=True)
    rows = []
    for count in args.prompts:
        row = measure(samplers, prompts[:count], args.num_samples, args.repeats)
        rows.append(row)
        rates = f"vLLM {row['vllm']} tokens/s, transformers {row['transformers']}"
        print(f"{count} prompts x {args.num_samples}: {rates}, ratio {row['ratio']}", flush=True)
    result = measuring.machine() | {"model": Path(place).name, "num_samples": args.num_samples}
    result |= {"max_new_tokens": args.max_new_tokens, "rows": rows}
    measuring.write(args.out, result)


def main() -> None:
    console.command("experiments.benchmarks.rollout", run, "nothing was written")


if __name__ == "__main__":
    main()
