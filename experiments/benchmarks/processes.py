"""Data-parallel efficiency: the same global batch in one process and in several, and what the machine itself could give.

    python -m experiments.benchmarks.processes --out benchmarks/processes-cpu.json

Three ways to train on the same states, taking turns, each process with one thread (or one GPU):

    one       python ekipl.py                     the global batch in one process
    shared    torchrun --nproc_per_node P         the global batch shared by P processes
    apart     P times python ekipl.py at once     each with the batch of one process of "shared", and nothing to wait for

one / shared is the speed-up. Two hyperthreads of a core are no two cores, so it is seen against what the machine gives to processes that
have nothing to do with each other: apart / shared is the efficiency, 1 if sharing gradients and waiting for the slower process cost nothing.
Seconds are those of a step without evaluation, logging and saving, the median over the steps but the first, from metrics.jsonl.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
from experiments.benchmarks import workload
from experiments.benchmarks.against_trl import spread
from experiments.sweep import program
from training import storage

LEFT_OUT = {"seconds/evaluation", "seconds/logging"}


def start(
    out: Path, name: str, batch: int, steps: int, processes: int, rest: list[str]
) -> subprocess.Popen:
    size = ["--batch-size", str(batch), "--states", str(batch * steps), "--eval-every", "0"]
    command = [*program("ekipl.py", processes), *size, "--runs", str(out), "--name", name, *rest]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def seconds(out: Path, made: dict[str, subprocess.Popen]) -> float:
    """Of a step, when all the runs have ended: the slowest run's. RuntimeError if one failed."""
    found = []
    for name, process in made.items():
        errors = process.communicate()[1]
        if process.returncode:
            raise RuntimeError(f"{name}: {errors[-2000:]}")
        records = [
            record for record in storage.read(out / name / "metrics.jsonl") if "loss" in record
        ][1:]
        phases = [
            sum(
                value
                for key, value in record.items()
                if key.startswith("seconds/") and key not in LEFT_OUT
            )
            for record in records
        ]
        found.append(statistics.median(phases))
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Data-parallel efficiency. Further flags go to ekipl.py."
    )
    parser.add_argument("--processes", type=int, default=2, help="P")
    parser.add_argument("--batch-size", type=int, default=64, help="states of the global batch")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    args, rest = parser.parse_known_args()
    P, share = args.processes, args.batch_size // args.processes
    made = {"one": [], "shared": [], "apart": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in tqdm(range(args.turns)):
            out = Path(folder) / str(turn)
            made["one"].append(
                seconds(out, {"one": start(out, "one", args.batch_size, args.steps, 1, rest)})
            )
            made["shared"].append(
                seconds(out, {"shared": start(out, "shared", args.batch_size, args.steps, P, rest)})
            )
            apart = {
                f"apart-{i}": start(
                    out, f"apart-{i}", share, args.steps, 1, [*rest, "--seed", str(i)]
                )
                for i in range(P)
            }
            made["apart"].append(seconds(out, apart))
    result = workload.machine() | {
        "processes": P,
        "batch_size": args.batch_size,
        "steps": args.steps,
        "turns": args.turns,
    }
    result |= {"seconds": {name: spread(values) for name, values in made.items()}}
    result["speed_up"] = spread([one / shared for one, shared in zip(made["one"], made["shared"])])
    result["efficiency"] = spread(
        [apart / shared for apart, shared in zip(made["apart"], made["shared"])]
    )
    for name in ("seconds", "speed_up", "efficiency"):
        print(name, result[name])
    workload.write(args.out, result)


if __name__ == "__main__":
    main()
