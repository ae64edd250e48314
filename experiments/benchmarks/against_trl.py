"""A training step and a rollout of ours, of TRL's GRPOTrainer and of plain PyTorch, on the same model, pictures, prompts and actions.

    python -m experiments.benchmarks.against_trl --model tiny --out benchmarks/tiny-cpu.json
    python -m experiments.benchmarks.against_trl --model mid --out benchmarks/mid-cpu.json
    python -m experiments.benchmarks.against_trl --model 2b --out benchmarks/2b-gpu.json        # one GPU of 80 GB
    python -m experiments.benchmarks.against_trl --model mid --profile                          # where the seconds of a training step go

The sides take turns, step by step, each after a step that is not counted; a ratio is of two steps of the same round. With 2b they do not
fit the GPU together: there each turn is a new process, which makes its uncounted step itself. README.md beside this file says what is timed.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy
import torch

from experiments.benchmarks import workload
from experiments.benchmarks.sides import SIDES, Worker
from experiments.benchmarks.workload import WORKLOADS, Workload

PHASES = ("rollout", "train", "step")


def take_turns(
    work: Workload,
    path: Path,
    sides: list[str],
    runs: int,
    threads: int,
    together: bool,
    profile: bool = False,
) -> dict[str, list[dict]]:
    """The records of each side, a side's first ("warm-up") among them. together: all processes live at once, else one at a time."""
    last = ["memory"] + ["profile"] * profile
    records = {side: [] for side in sides}
    if together:
        steps = ["warm-up", *["time"] * runs, *last]
        workers = {side: Worker(side, work, path, steps, threads) for side in sides}
        for number, step in enumerate(steps):
            for side in sides:
                records[side].append(workers[side].step())
                report(side, number, records[side][-1])
        for worker in workers.values():
            worker.close()
    else:
        for number in range(runs):
            steps = ["warm-up", "time", *(last if number == runs - 1 else [])]
            for side in sides:
                worker = Worker(side, work, path, steps, threads)
                for _ in steps:
                    records[side].append(worker.step())
                    report(side, number, records[side][-1])
                worker.close()
    return records


def report(side: str, number: int, record: dict) -> None:
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in record["seconds"].items())
    print(
        f"  {number} {side:5} {record['kind']:7} {seconds}, gradient {record['grad_norm']:.6f}",
        file=sys.stderr,
        flush=True,
    )


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def agreement(records: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """Do all sides compute the same? The largest difference from ours: of a token's log-prob in the first step, in nats; of the
    gradient's norm in any step, as a share."""
    result = {}
    for side in [side for side in records if side != "ours"]:
        ours, theirs = records["ours"], records[side]
        norms = [
            abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"] for a, b in zip(ours, theirs)
        ]
        result[side] = {
            "logp": float(numpy.abs(ours[0]["logp"] - theirs[0]["logp"]).max()),
            "grad_norm": max(norms),
        }
    return result


def summary(
    work: Workload, path: Path, records: dict[str, list[dict]], prompt: int, device: str
) -> dict:
    """What the tables show: seconds, ratios against ours, memory, rates. prompt: tokens of one, on average."""
    model, tokens = workload.empty_model(path), work.states * work.group_size * work.action_tokens
    rate = workload.matrix_rate(device)
    once, repeated = (
        workload.step_cost(work, model.config, prompt, times) for times in (False, True)
    )
    timed = {
        side: [record["seconds"] for record in made if record["kind"] == "time"]
        for side, made in records.items()
    }
    result = {
        "workload": dataclasses.asdict(work), "prompt_tokens": prompt, "parameters": sum(p.numel() for p in model.parameters()),
        "matrix_tflops": rate / 1e12, "agreement": agreement(records) if "ours" in records else {}, "sides": {}, "ratios": {},
    }  # fmt: skip
    for side, seconds in timed.items():
        train = statistics.median(step["train"] for step in seconds)
        cost = once if side == "ours" else repeated
        peaks = [record["bytes"] for record in records[side] if record["kind"] == "memory"][-1]
        result["sides"][side] = {phase: spread([step[phase] for step in seconds]) for phase in PHASES} | {
            "peak_gb": {phase: peaks[phase] / 1e9 for phase in ("rollout", "train")},
            "action_tokens_per_second": {"rollout": tokens / statistics.median(step["rollout"] for step in seconds), "train": tokens / train},
            "train_tokens": cost.tokens, "mfu": once.flops / train / rate, "own_mfu": cost.flops / train / rate,
        }  # fmt: skip
        if side != "ours" and "ours" in timed:
            result["ratios"][side] = {
                phase: spread([b[phase] / a[phase] for a, b in zip(timed["ours"], seconds)])
                for phase in PHASES
            }
    return result


def three(values: dict[str, float]) -> str:
    """A `spread` as the tables show it."""
    return " / ".join(f"{value:.2f}" for value in values.values())


def table(result: dict) -> str:
    """Markdown, as in README.md."""
    lines = [
        "| | rollout, s | train, s | step, s | train: peak, GB | rollout: peak, GB | train: action tokens/s | MFU | own MFU |"
    ]
    lines += ["|---" * 9 + "|"]
    for side, row in result["sides"].items():
        peak, rate = row["peak_gb"], row["action_tokens_per_second"]["train"]
        cells = [
            *(three(row[phase]) for phase in PHASES),
            f"{peak['train']:.2f}",
            f"{peak['rollout']:.2f}",
            f"{rate:,.0f}",
        ]
        lines.append(f"| {side} | {' | '.join(cells)} | {row['mfu']:.2f} | {row['own_mfu']:.2f} |")
    if result["ratios"]:
        lines += [
            "",
            "| times ours | rollout | train | step | largest difference of a log-prob, nats | of the gradient's norm |",
        ]
        lines += ["|---" * 6 + "|"]
    for side, row in result["ratios"].items():
        same = result["agreement"][side]
        lines.append(
            f"| {side} | {' | '.join(three(row[phase]) for phase in PHASES)} | {same['logp']:.1e} | {same['grad_norm']:.1e} |"
        )
    return "\n".join(lines)


def profile_table(records: dict[str, list[dict]], rows: int = 12) -> str:
    lines = []
    for side, made in records.items():
        operators = made[-1]["operators"]
        total = sum(operators.values())
        lines += ["", f"{side}, train: {total:.2f} s in operators"]
        for name, seconds in sorted(operators.items(), key=lambda item: -item[1])[:rows]:
            lines.append(f"  {seconds:8.3f} s  {seconds / total:5.1%}  {name}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A training step and a rollout: ours, TRL's, plain PyTorch."
    )
    parser.add_argument("--model", choices=WORKLOADS, default="tiny")
    parser.add_argument("--sides", default="ours,trl,plain", help="some of them, comma-separated")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--states", type=int, help="B, instead of the model's own")
    parser.add_argument("--micro-batch", type=int, help="states in a forward pass")
    parser.add_argument("--group-size", type=int, help="G = N")
    parser.add_argument("--action-tokens", type=int, help="T")
    parser.add_argument(
        "--train-only", action="store_true", help="no rollout: the training step alone"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="one more step of each side: the seconds of its operators",
    )
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    changes = {
        name: getattr(args, name)
        for name in ("states", "micro_batch", "group_size", "action_tokens")
    }
    work = dataclasses.replace(
        WORKLOADS[args.model],
        **{name: value for name, value in changes.items() if value},
        rollout=not args.train_only,
    )
    sides, device = args.sides.split(","), "cuda" if torch.cuda.is_available() else "cpu"
    if unknown := set(sides) - set(SIDES):
        parser.error(f"no side {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    if work.states % work.micro_batch or args.runs < 1:
        parser.error("--states must be a multiple of --micro-batch, and --runs at least 1")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        workload.save_model(work, path)
        processor = workload.AutoProcessor.from_pretrained(path)
        prompts = [
            prompt_tokens(state, processor) for state in workload.make_states(work, processor)
        ]
        records = take_turns(
            work,
            path,
            sides,
            args.runs,
            args.threads,
            together=work.model != "2b",
            profile=args.profile,
        )
        result = workload.machine() | summary(
            work, path, records, round(statistics.mean(prompts)), device
        )
    if "trl" in sides:
        result["trl"] = version("trl")
    print(
        f"{result['machine']}, {result['date']}, torch {result['torch']}, transformers {result['transformers']}, trl {result.get('trl')}"
    )
    print(
        f"{work.model}: {result['parameters'] / 1e6:.1f} M parameters, {work.states} states of {result['prompt_tokens']} prompt tokens,"
    )
    print(
        f"{work.image_tokens} of them image, {work.group_size} actions of {work.action_tokens} tokens"
    )
    print(f"matrix products: {result['matrix_tflops']:.2f} TFLOP/s\n")
    print(table(result))
    if args.profile:
        print(profile_table(records))
    workload.write(args.out, result)
    worst = max((row["logp"] for row in result["agreement"].values()), default=0.0)
    bound = 1e-4 if device == "cpu" else 0.1  # bfloat16
    if worst > bound:
        sys.exit(
            f"the sides do not compute the same: log-probs differ by {worst:.1e}, more than {bound}"
        )


def prompt_tokens(state, processor) -> int:
    text = processor.apply_chat_template(
        state.messages(), tokenize=False, add_generation_prompt=True
    )
    return processor(text=[text], images=list(state.images), return_tensors="pt")[
        "input_ids"
    ].shape[1]


if __name__ == "__main__":
    main()
