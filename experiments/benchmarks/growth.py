"""How the seconds and the memory of a training step grow: with G, image tokens, length, vocabulary.

    python -m experiments.benchmarks.growth --out growth-cpu.json    # draws growth-cpu.png as well

One quantity grows, the others stay at the base (BASE). Ours and plain PyTorch, each point in a
fresh process. The dashed lines are the law, as `law.step_cost` counts, with the machine's constants
fitted to all points of a side:

    seconds = a + floating-point operations / rate             memory = factor * bytes
"""

import dataclasses
import statistics
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy
import torch

from experiments.benchmarks import measuring, workload
from experiments.benchmarks.law import step_cost
from experiments.benchmarks.sides import SIDES, Worker
from experiments.benchmarks.workload import Workload
from training import console, curves
from training.console import Parser, UserError

# One state in a forward pass, G = 4, 196 image tokens, T = 64.
BASE = Workload("mid", 1, 1, 4, 196, 64, 8192, rollout=False)
AXES = {
    "group_size": ([1, 2, 4, 8, 16], "G, actions of a state"),
    "image_tokens": ([64, 196, 400, 784], "image tokens of a state"),
    "action_tokens": ([32, 64, 128, 256], "T, tokens of an action"),
    "vocabulary": ([2048, 8192, 32768, 151936], "words in the vocabulary"),
}


def measure(work: Workload, sides: list[str], runs: int, threads: int) -> list[dict]:
    """A point of each side: median seconds and peak bytes of the training step, and its counts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        workload.save_model(work, path)
        config = workload.empty_model(path).config
        processor = workload.AutoProcessor.from_pretrained(path)
        (state, *_) = workload.make_states(work, processor)
        prompt = workload.prompt_tokens(state, processor)
        points = []
        for side in sides:
            steps = ["warm-up", *["time"] * runs, "memory"]
            worker = Worker(side, work, path, steps, threads)
            records = [worker.step() for _ in steps]
            worker.close()
            cost = step_cost(work, config, prompt, repeated=side != "ours")
            point = {
                "side": side,
                "seconds": statistics.median(r["seconds"]["train"] for r in records[1:-1]),
                "bytes": records[-1]["bytes"]["train"],
                "flops": cost.flops,
                "law_bytes": cost.bytes,
                "tokens": cost.tokens,
            }
            points.append(point)
    return points


def fit(points: list[dict]) -> dict[str, float]:
    """The constants of one side's law, by least squares of the relative error."""
    seconds = numpy.array([point["seconds"] for point in points])
    flops = numpy.array([point["flops"] for point in points])
    columns, ones = numpy.stack([1 / seconds, flops / seconds], 1), numpy.ones(len(points))
    constant, per_flop = numpy.linalg.lstsq(columns, ones, rcond=None)[0]
    if constant < 0 or len(points) < 3:  # no fixed part that can be told apart
        constant, per_flop = 0.0, float(numpy.exp(numpy.log(seconds / flops).mean()))
    factors = [numpy.log(point["bytes"] / point["law_bytes"]) for point in points]
    factor = numpy.exp(numpy.mean(factors))
    return {"constant": float(constant), "rate": float(1 / per_flop), "factor": float(factor)}


def law(point: dict, fitted: dict[str, float]) -> dict[str, float]:
    """Seconds and bytes by the law."""
    seconds = fitted["constant"] + point["flops"] / fitted["rate"]
    return {"seconds": seconds, "bytes": fitted["factor"] * point["law_bytes"]}


def draw(result: dict, out: Path) -> None:
    """A column for each quantity: seconds above, memory below."""
    count = len(result["axes"])
    figure, panels = plt.subplots(
        2, count, figsize=(4 * count, 7), layout="constrained", squeeze=False
    )
    panels[0, 0].set_ylabel("seconds of a training step")
    panels[1, 0].set_ylabel("peak memory of it, GB")
    for column, (name, points) in zip(panels.T, result["axes"].items()):
        for panel, (key, unit) in zip(column, (("seconds", 1.0), ("bytes", 1e9))):
            draw_panel(panel, points, result["law"], key, unit)
            panel.set(xlabel=AXES[name][1], ylim=(0, None))
            if name == "vocabulary":
                panel.set_xscale("log")
    panels[0, 0].legend()
    curves.save(figure, out, dpi=110)


def draw_panel(panel, points: list[dict], fitted: dict[str, dict], key: str, unit: float) -> None:
    """Measured and by the law, for each side."""
    for side, color in zip(fitted, ("C0", "C1")):
        own = [point for point in points if point["side"] == side]
        x = [point["value"] for point in own]
        measured = [point[key] / unit for point in own]
        expected = [law(point, fitted[side])[key] / unit for point in own]
        panel.plot(x, measured, "o-", color=color, label=f"{side}, measured")
        panel.plot(x, expected, "--", color=color, label=f"{side}, law")


def arguments(argv: list[str]):
    parser = Parser(
        prog="python -m experiments.benchmarks.growth", description=__doc__.split("\n\n")[0]
    )
    add = parser.add_argument
    add("--model", choices=workload.WORKLOADS, default=BASE.model)
    add("--sides", default="ours,plain", help="one or two, comma-separated")
    add("--runs", type=int, default=3, help="counted steps of a point, after one that is not")
    add("--threads", type=int, default=torch.get_num_threads())
    for name, (values, text) in AXES.items():
        flag, text = f"--{name.replace('_', '-')}", f"{text}; none: not measured"
        add(flag, type=int, nargs="*", default=values, metavar="N", help=text)
    add("--out", type=Path, required=True, help="the figures, as JSON; the picture, PNG, beside")
    args = parser.parse_args(argv)
    args.sides = args.sides.split(",")
    if not set(args.sides) <= set(SIDES):
        raise UserError(f"--sides wants one or two of {', '.join(SIDES)}, comma-separated")
    if args.runs < 1:
        raise UserError(f"--runs must be at least 1, not {args.runs}")
    return args


def run(argv: list[str]) -> None:
    args = arguments(argv)
    base = dataclasses.replace(BASE, model=args.model)
    measured, axes = {}, {}
    for name in AXES:
        for value in getattr(args, name):
            work = dataclasses.replace(base, **{name: value})
            if work not in measured:
                measured[work] = measure(work, args.sides, args.runs, args.threads)
            points, found = [{"value": value, **point} for point in measured[work]], []
            for point in points:
                gigabytes = f"{point['bytes'] / 1e9:.2f} GB"
                found.append(f"{point['side']} {point['seconds']:.2f} s, {gigabytes}")
            axes.setdefault(name, []).extend(points)
            print(f"{name} {value}: " + "; ".join(found), flush=True)
    fitted = {}
    for i, side in enumerate(args.sides):
        fitted[side] = fit([points[i] for points in measured.values()])
    result = {"base": dataclasses.asdict(base), "runs": args.runs, "law": fitted, "axes": axes}
    compare(result)
    measuring.write(args.out, measuring.machine() | result)
    draw(result, args.out.with_suffix(".png"))


def compare(result: dict) -> None:
    """Prints how far the points are from the law."""
    for side, constants in result["law"].items():
        rate, factor = constants["rate"] / 1e9, constants["factor"]
        seconds = f"seconds = {constants['constant']:.2f} + FLOPs / {rate:.0f} G"
        print(f"{side}: {seconds}; memory = {factor:.2f} * bytes")
        for name, points in result["axes"].items():
            own = [point for point in points if point["side"] == side]
            for key in ("seconds", "bytes"):
                shares = [point[key] / law(point, constants)[key] for point in own]
                print(f"  {name}: {key} {min(shares):.2f} to {max(shares):.2f} of the law")


def main() -> None:
    console.command("experiments.benchmarks.growth", run, "nothing was written")


if __name__ == "__main__":
    main()
