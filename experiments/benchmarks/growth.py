"""How a training step's seconds and memory grow: with G, with image tokens, with the length of actions, with the vocabulary.

    python -m experiments.benchmarks.growth --out benchmarks/growth-cpu.json       # also draws benchmarks/growth-cpu.png

One quantity grows, the others stay at the base (BASE). Ours and plain PyTorch, each point in a fresh process. The dashed lines are the law, what
`workload.step_cost` counts, with the machine's constants fitted to all points of a side:

    seconds = a + floating-point operations / rate             memory = factor * bytes
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy
import torch

from experiments.benchmarks import workload
from experiments.benchmarks.against_trl import prompt_tokens
from experiments.benchmarks.sides import Worker
from experiments.benchmarks.workload import Workload

BASE = Workload(
    "mid",
    states=1,
    micro_batch=1,
    group_size=4,
    image_tokens=196,
    action_tokens=64,
    vocabulary=8192,
    rollout=False,
)
AXES = {
    "group_size": ([1, 2, 4, 8, 16], "G, actions of a state"),
    "image_tokens": ([64, 196, 400, 784], "image tokens of a state"),
    "action_tokens": ([32, 64, 128, 256], "T, tokens of an action"),
    "vocabulary": ([2048, 8192, 32768, 151936], "words in the vocabulary"),
}


def measure(work: Workload, sides: list[str], runs: int, threads: int) -> list[dict]:
    """One point of each side: median seconds and peak bytes of the training step, and the law's counts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        workload.save_model(work, path)
        config, processor = (
            workload.empty_model(path).config,
            workload.AutoProcessor.from_pretrained(path),
        )
        prompt = prompt_tokens(workload.make_states(work, processor)[0], processor)
        points = []
        for side in sides:
            steps = ["warm-up", *["time"] * runs, "memory"]
            worker = Worker(side, work, path, steps, threads)
            records = [worker.step() for _ in steps]
            worker.close()
            cost = workload.step_cost(work, config, prompt, repeated=side != "ours")
            seconds = statistics.median(record["seconds"]["train"] for record in records[1:-1])
            point = {"side": side, "seconds": seconds, "bytes": records[-1]["bytes"]["train"]}
            points.append(
                point | {"flops": cost.flops, "law_bytes": cost.bytes, "tokens": cost.tokens}
            )
    return points


def fit(points: list[dict]) -> dict[str, float]:
    """The constants of one side's law, by least squares of the relative error."""
    seconds, flops = (
        numpy.array([point[name] for point in points]) for name in ("seconds", "flops")
    )
    constant, per_flop = numpy.linalg.lstsq(
        numpy.stack([1 / seconds, flops / seconds], 1), numpy.ones(len(points)), rcond=None
    )[0]
    if constant < 0 or len(points) < 3:  # no fixed part that can be told apart
        constant, per_flop = 0.0, float(numpy.exp(numpy.log(seconds / flops).mean()))
    factor = numpy.exp(
        numpy.mean([numpy.log(point["bytes"] / point["law_bytes"]) for point in points])
    )
    return {"constant": float(constant), "rate": float(1 / per_flop), "factor": float(factor)}


def law(point: dict, fitted: dict[str, float]) -> tuple[float, float]:
    """(seconds, bytes) as the law has them."""
    return fitted["constant"] + point["flops"] / fitted["rate"], fitted["factor"] * point[
        "law_bytes"
    ]


def draw(result: dict, out: Path) -> None:
    figure, panels = plt.subplots(
        2,
        len(result["axes"]),
        figsize=(4 * len(result["axes"]), 7),
        layout="constrained",
        squeeze=False,
    )
    for column, (name, rows) in enumerate(result["axes"].items()):
        for side, color in zip(result["law"], ("C0", "C1")):
            points = [row for row in rows if row["side"] == side]
            x = [point["value"] for point in points]
            expected = [law(point, result["law"][side]) for point in points]
            for row, (key, unit) in enumerate((("seconds", 1.0), ("bytes", 1e9))):
                panels[row, column].plot(
                    x,
                    [point[key] / unit for point in points],
                    "o-",
                    color=color,
                    label=f"{side}, measured",
                )
                panels[row, column].plot(
                    x,
                    [values[row] / unit for values in expected],
                    "--",
                    color=color,
                    label=f"{side}, law",
                )
        for row, label in enumerate(("seconds of a training step", "peak memory of it, GB")):
            panels[row, column].set(
                xlabel=AXES[name][1], ylabel=label if column == 0 else "", ylim=(0, None)
            )
            if name == "vocabulary":
                panels[row, column].set_xscale("log")
    panels[0, 0].legend()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="How a training step grows.")
    parser.add_argument("--model", choices=workload.WORKLOADS, default=BASE.model)
    parser.add_argument("--sides", default="ours,plain", help="one or two, comma-separated")
    parser.add_argument(
        "--runs", type=int, default=3, help="counted steps of a point, after one that is not"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for name, (values, help) in AXES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            nargs="*",
            default=values,
            metavar="N",
            help=f"{help}; none: not measured",
        )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="where to write the figures, as JSON; the picture goes beside it, as PNG",
    )
    args = parser.parse_args()
    base, sides = dataclasses.replace(BASE, model=args.model), args.sides.split(",")
    measured, axes = {}, {}
    for name in AXES:
        for value in getattr(args, name):
            work = dataclasses.replace(base, **{name: value})
            if work not in measured:
                measured[work] = measure(work, sides, args.runs, args.threads)
            points = [{"value": value, **point} for point in measured[work]]
            axes.setdefault(name, []).extend(points)
            found = [
                f"{point['side']} {point['seconds']:.2f} s, {point['bytes'] / 1e9:.2f} GB"
                for point in points
            ]
            print(f"{name} {value}: " + "; ".join(found), flush=True)
    fitted = {
        side: fit(
            [point for points in measured.values() for point in points if point["side"] == side]
        )
        for side in sides
    }
    result = workload.machine() | {
        "base": dataclasses.asdict(base),
        "runs": args.runs,
        "law": fitted,
        "axes": axes,
    }
    for side, constants in fitted.items():
        print(
            f"{side}: seconds = {constants['constant']:.2f} + FLOPs / {constants['rate'] / 1e9:.0f} G; memory = {constants['factor']:.2f} * bytes"
        )
        for name, points in axes.items():
            points = [point for point in points if point["side"] == side]
            for row, key in enumerate(("seconds", "bytes")):
                shares = [point[key] / law(point, constants)[row] for point in points]
                print(f"  {name}: {key} {min(shares):.2f} to {max(shares):.2f} of the law")
    workload.write(args.out, result)
    draw(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
