"""A training step and a rollout of ours, of TRL's GRPOTrainer and of plain PyTorch.

    python -m experiments.benchmarks.against_trl --model tiny --out tiny-cpu.json
    python -m experiments.benchmarks.against_trl --model mid --out mid-cpu.json
    python -m experiments.benchmarks.against_trl --model 2b --out 2b-gpu.json  # a GPU of 80 GB
    python -m experiments.benchmarks.against_trl --model mid --profile    # seconds by operator

All have the same model, pictures, prompts and actions. The sides take turns, step by step, each
after a step that is not counted; a ratio is of two steps of the same round. With 2b they do not fit
the GPU together: there each turn is a new process, which makes its uncounted step itself. README.md
beside this file says what is timed.
"""

import dataclasses
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy
import torch

from experiments.benchmarks import measuring, workload
from experiments.benchmarks.law import step_cost
from experiments.benchmarks.measuring import spread, three
from experiments.benchmarks.sides import SIDES, Worker
from experiments.benchmarks.workload import WORKLOADS, Workload
from training import console
from training.console import Parser, UserError

PHASES = ("rollout", "train", "step")
Records = dict[str, list[dict]]  # of each side, one a step, the first ("warm-up") among them


def take_turns(
    work: Workload,
    path: Path,
    sides: list[str],
    runs: int,
    threads: int,
    together: bool,
    profile: bool = False,
) -> Records:
    """together: all processes live at once, else each turn is a process of its own."""
    last = ["memory", "profile"] if profile else ["memory"]
    rounds, groups = [["warm-up", *["time"] * runs, *last]], [sides]
    if not together:
        rounds = [["warm-up", "time"]] * (runs - 1) + [["warm-up", "time", *last]]
        groups = [[side] for side in sides]
    records: Records = {side: [] for side in sides}
    for steps in rounds:
        for group in groups:
            workers = {side: Worker(side, work, path, steps, threads) for side in group}
            for _ in steps:
                for side, worker in workers.items():
                    records[side].append(worker.step())
                    report(side, records[side])
            for worker in workers.values():
                worker.close()
    return records


def report(side: str, records: list[dict]) -> None:
    """A line on stderr about the last step of a side."""
    record, number = records[-1], len(records) - 1
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in record["seconds"].items())
    line = f"  {number} {side:5} {record['kind']:7} {seconds}, gradient {record['grad_norm']:.6f}"
    print(line, file=sys.stderr, flush=True)


def agreement(records: Records) -> dict[str, dict[str, float]]:
    """Whether all sides compute the same: the largest differences from ours.

    logp: of a token's log-prob in the first step, in nats. grad_norm: of the gradient's norm in any
    step, as a share.
    """
    result = {}
    for side in [side for side in records if side != "ours"]:
        norms = []
        for a, b in zip(records["ours"], records[side]):
            norms.append(abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"])
        difference = records["ours"][0]["logp"] - records[side][0]["logp"]
        result[side] = {"logp": float(numpy.abs(difference).max()), "grad_norm": max(norms)}
    return result


def summary(work: Workload, path: Path, records: Records, prompt: int, device: str) -> dict:
    """What the tables show: seconds, ratios against ours, memory, rates.

    prompt: tokens of a prompt, on average.
    """
    model, rate = workload.empty_model(path), measuring.matrix_rate(device)
    once, repeated = (step_cost(work, model.config, prompt, times) for times in (False, True))
    result = {
        "workload": dataclasses.asdict(work),
        "prompt_tokens": prompt,
        "parameters": sum(p.numel() for p in model.parameters()),
        "matrix_tflops": rate / 1e12,
        "agreement": agreement(records) if "ours" in records else {},
        "sides": {},
        "ratios": {},
    }
    timed = {}
    for side, steps in records.items():
        timed[side] = [record["seconds"] for record in steps if record["kind"] == "time"]
    tokens = work.states * work.group_size * work.action_tokens
    for side, seconds in timed.items():
        row = {}
        for phase in PHASES:
            row[phase] = spread([step[phase] for step in seconds])
        rollout, train = row["rollout"]["median"], row["train"]["median"]
        peaks = [record["bytes"] for record in records[side] if record["kind"] == "memory"][-1]
        cost = once if side == "ours" else repeated
        result["sides"][side] = row | {
            "peak_gb": {phase: peaks[phase] / 1e9 for phase in ("rollout", "train")},
            "action_tokens_per_second": {"rollout": tokens / rollout, "train": tokens / train},
            "train_tokens": cost.tokens,
            "mfu": once.flops / train / rate,
            "own_mfu": cost.flops / train / rate,
        }
        if side != "ours" and "ours" in timed:
            result["ratios"][side] = ratios(timed["ours"], seconds)
    return result


def ratios(ours: list[dict], theirs: list[dict]) -> dict[str, dict[str, float]]:
    """How many times our seconds another side takes, by phase, from pairs of steps."""
    found = {}
    for phase in PHASES:
        found[phase] = spread([b[phase] / a[phase] for a, b in zip(ours, theirs)])
    return found


def table(result: dict) -> str:
    """Markdown, as in README.md."""
    names = [*(f"{phase}, s" for phase in PHASES), "train: peak, GB", "rollout: peak, GB"]
    names += ["train: action tokens/s", "MFU", "own MFU"]
    lines = ["| | " + " | ".join(names) + " |", "|---" * 9 + "|"]
    for side, row in result["sides"].items():
        peak, rate = row["peak_gb"], row["action_tokens_per_second"]["train"]
        cells = [three(row[phase]) for phase in PHASES]
        cells += [f"{peak['train']:.2f}", f"{peak['rollout']:.2f}", f"{rate:,.0f}"]
        lines.append(f"| {side} | {' | '.join(cells)} | {row['mfu']:.2f} | {row['own_mfu']:.2f} |")
    if result["ratios"]:
        names = [*PHASES, "largest difference of a log-prob, nats", "of the gradient's norm"]
        lines += ["", "| times ours | " + " | ".join(names) + " |", "|---" * 6 + "|"]
    for side, row in result["ratios"].items():
        same = result["agreement"][side]
        cells = [three(row[phase]) for phase in PHASES]
        cells += [f"{same['logp']:.1e}", f"{same['grad_norm']:.1e}"]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def profile_table(records: Records, rows: int = 12) -> str:
    lines = []
    for side, steps in records.items():
        operators = steps[-1]["operators"]
        total = sum(operators.values())
        lines += ["", f"{side}, train: {total:.2f} s in operators"]
        for name, seconds in sorted(operators.items(), key=lambda item: -item[1])[:rows]:
            lines.append(f"  {seconds:8.3f} s  {seconds / total:5.1%}  {name}")
    return "\n".join(lines)


def heading(result: dict) -> str:
    """On what, and what was measured."""
    work, versions = result["workload"], ("torch", "transformers", "trl")
    where = [result["machine"], result["date"], *(f"{n} {result.get(n)}" for n in versions)]
    size = f"{work['model']}: {result['parameters'] / 1e6:.1f} M parameters"
    prompt = f"{result['prompt_tokens']} prompt tokens, {work['image_tokens']} of them image"
    actions = f"{work['group_size']} actions of {work['action_tokens']} tokens"
    lines = [", ".join(where), f"{size}, {work['states']} states of {prompt}, {actions}"]
    return "\n".join([*lines, f"matrix products: {result['matrix_tflops']:.2f} TFLOP/s"])


def arguments(argv: list[str]):
    """The flags, and the workload that they ask for."""
    parser = Parser(
        prog="python -m experiments.benchmarks.against_trl", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", choices=WORKLOADS, default="tiny")
    add("--sides", default="ours,trl,plain", help="some of them, comma-separated")
    add("--runs", type=int, default=5)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--states", type=int, help="B, instead of the model's own")
    add("--micro-batch", type=int, help="states in a forward pass")
    add("--group-size", type=int, help="G = N")
    add("--action-tokens", type=int, help="T")
    add("--train-only", action="store_true", help="no rollout: the training step alone")
    add("--profile", action="store_true", help="another step of each side: seconds by operator")
    add("--out", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    args.sides = args.sides.split(",")
    if unknown := set(args.sides) - set(SIDES):
        raise UserError(f"no side {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    names = ("states", "micro_batch", "group_size", "action_tokens")
    work = workload.changed(WORKLOADS[args.model], args, *names)
    work = dataclasses.replace(work, rollout=not args.train_only)
    if work.states % work.micro_batch or args.runs < 1:
        raise UserError("--states must be a multiple of --micro-batch, and --runs at least 1")
    return args, work


def run(argv: list[str]) -> None:
    args, work = arguments(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        workload.save_model(work, path)
        processor = workload.AutoProcessor.from_pretrained(path)
        states = workload.make_states(work, processor)
        prompt = statistics.mean(workload.prompt_tokens(state, processor) for state in states)
        together = work.model != "2b"
        records = take_turns(
            work, path, args.sides, args.runs, args.threads, together, args.profile
        )
        result = measuring.machine() | summary(work, path, records, round(prompt), device)
    if "trl" in args.sides:
        result["trl"] = version("trl")
    print(heading(result), table(result), sep="\n\n")
    if args.profile:
        print(profile_table(records))
    measuring.write(args.out, result)
    worst = max((row["logp"] for row in result["agreement"].values()), default=0.0)
    bound = 1e-4 if device == "cpu" else 0.1  # bfloat16
    if worst > bound:
        differ = f"log-probs differ by {worst:.1e}, more than {bound}"
        sys.exit(f"the sides do not compute the same: {differ}")


def main() -> None:
    console.command("experiments.benchmarks.against_trl", run, "nothing was written")


if __name__ == "__main__":
    main()
