"""Data-parallel efficiency: the same global batch in one process and in several.

    python -m experiments.benchmarks.processes --out processes-cpu.json

Three ways to train on the same states, taking turns, each process with one thread (or one GPU):

    one       python ekipl.py                     the global batch in one process
    shared    torchrun --nproc_per_node P         the global batch shared by P processes
    apart     P times python ekipl.py at once     each with the batch of one process of "shared"

one / shared is the speed-up. Two hyperthreads of a core are no two cores, so it is compared with
what the machine gives to processes that have nothing to wait for: apart / shared is the efficiency,
1 if sharing gradients and waiting for the slower process cost nothing. Seconds are those of a step
without evaluation, logging and saving, the median over the steps but the first, from metrics.jsonl.
"""

import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from tqdm import tqdm

from experiments.benchmarks import measuring
from experiments.benchmarks.measuring import spread
from experiments.tasks import program
from training import console, storage
from training.console import Parser, UserError

LEFT_OUT = {"seconds/evaluation", "seconds/logging"}


def start(
    out: Path, name: str, batch: int, steps: int, processes: int, rest: list[str]
) -> subprocess.Popen:
    size = ["--batch-size", str(batch), "--states", str(batch * steps), "--eval-every", "0"]
    return subprocess.Popen(
        [*program("ekipl.py", processes), *size, "--runs", str(out), "--name", name, *rest],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def seconds(out: Path, runs: dict[str, subprocess.Popen]) -> float:
    """Of a step of the slowest run, when all have ended. UserError if one failed."""
    medians = []
    for name, process in runs.items():
        errors = process.communicate()[1]
        if process.returncode:
            raise UserError(f"{name}: {errors[-700:]}")
        history = storage.read(out / name / "metrics.jsonl")
        records = [record for record in history if "loss" in record]
        medians.append(statistics.median(map(step_seconds, records[1:])))
    return max(medians)


def step_seconds(record: dict) -> float:
    phases = [key for key in record if key.startswith("seconds/") and key not in LEFT_OUT]
    return sum(record[key] for key in phases)


def turn(out: Path, args, rest: list[str]) -> dict[str, float]:
    """Seconds of a step, each of the three ways once."""
    P, batch, steps = args.processes, args.batch_size, args.steps
    found = {}
    for name, processes in (("one", 1), ("shared", P)):
        found[name] = seconds(out, {name: start(out, name, batch, steps, processes, rest)})
    apart = {}
    for i in range(P):
        name, flags = f"apart-{i}", [*rest, "--seed", str(i)]
        apart[name] = start(out, name, batch // P, steps, 1, flags)
    found["apart"] = seconds(out, apart)
    return found


def run(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m experiments.benchmarks.processes",
        description="Data-parallel efficiency. Further flags go to ekipl.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=2, help="P")
    parser.add_argument("--batch-size", type=int, default=64, help="states of the global batch")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    args, rest = parser.parse_known_args(argv)
    if args.steps < 2 or args.turns < 1 or not 1 <= args.processes <= args.batch_size:
        raise UserError(
            "--steps must be at least 2, --turns at least 1, --processes 1 to --batch-size"
        )
    with tempfile.TemporaryDirectory() as folder:
        turns = [turn(Path(folder) / str(i), args, rest) for i in tqdm(range(args.turns))]
    names = ("processes", "batch_size", "steps", "turns")
    result = measuring.machine() | {name: getattr(args, name) for name in names}
    result["seconds"] = {}
    for way in ("one", "shared", "apart"):
        result["seconds"][way] = spread([turn[way] for turn in turns])
    result["speed_up"] = spread([turn["one"] / turn["shared"] for turn in turns])
    result["efficiency"] = spread([turn["apart"] / turn["shared"] for turn in turns])
    for name in ("seconds", "speed_up", "efficiency"):
        print(name, result[name])
    measuring.write(args.out, result)


def main() -> None:
    console.command("experiments.benchmarks.processes", run, "nothing was written")


if __name__ == "__main__":
    main()
