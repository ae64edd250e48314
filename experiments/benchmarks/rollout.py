"""Throughput of the samplers: tokens per second of vLLM and of transformers' `generate`, on the same prompts, device and seed.

    python -m experiments.benchmarks.rollout --out benchmarks/rollout-cpu.json

Every measurement begins with a call that is not counted (the engine's first one prepares much), then takes the median of `--repeats`; the samplers
take turns, so that both see the same load of the machine. With vLLM a call is what training pays in a step: the weight sync, then the actions. Both samplers draw from the same distribution; their
actions differ, so the figure is tokens per second, not seconds.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
from blocks.dataset import BlocksSet
from policy import Policy
from rollouts.choice import make_sampler
from sampling import Sampler


def tokens_per_second(sampler: Sampler, prompts, n: int, seed: int) -> float:
    start = time.perf_counter()
    sampler.sync_weights()
    groups = sampler.sample(prompts, n, seed)
    return sum(len(action.tokens) for group in groups for action in group) / (
        time.perf_counter() - start
    )


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description="Rollout throughput, vLLM against transformers.")
    parser.add_argument(
        "--model",
        default=str(ROOT / "blocks" / "tiny"),
        help="a directory in Hugging Face layout or a hub id",
    )
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[16, 64], help="numbers of prompts in a call"
    )
    parser.add_argument("--num-samples", type=int, default=8, help="N, actions for each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = Policy.load(args.model).to(device)
    questions = BlocksSet("counting-train", max(args.prompts))
    prompts = policy.encode([questions[i] for i in range(max(args.prompts))])
    result = {
        "machine": machine(),
        "model": Path(args.model).name,
        "num_samples": args.num_samples,
        "max_new_tokens": args.max_new_tokens,
        "rows": [],
    }
    samplers = {
        name: make_sampler(name, policy, args.model, args.max_new_tokens, bf16=True)
        for name in ("transformers", "vllm")
    }
    for count in args.prompts:
        rates = {name: [] for name in samplers}
        for seed in range(args.repeats + 1):
            for name, sampler in samplers.items():
                rates[name].append(
                    tokens_per_second(sampler, prompts[:count], args.num_samples, seed)
                )
        rates = {name: values[1:] for name, values in rates.items()}
        row = {"prompts": count} | {
            name: round(statistics.median(values)) for name, values in rates.items()
        }
        row |= {
            "ratio": round(row["vllm"] / row["transformers"], 2),
            "all": {name: [round(value) for value in values] for name, values in rates.items()},
        }
        result["rows"].append(row)
        print(
            f"{count} prompts x {args.num_samples}: vLLM {row['vllm']} tokens/s, transformers {row['transformers']}, ratio {row['ratio']}",
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
