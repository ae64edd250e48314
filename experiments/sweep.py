"""The paper's experiments: trains and evaluates a list of runs, and skips what is finished.

    python -m experiments.sweep table1 --preset blocks-transformation   # every row of Table 1
    python -m experiments.sweep methods                # all methods at equal budgets, blocks world
    python -m experiments.sweep rates --seeds 3        # the learning rate of each of them
    python -m experiments.sweep ablation --seeds 0     # one setting of Vision-EKIPL at a time
    python -m experiments.sweep stages --preset blocks-transformation --seeds 0   # SFT before RL
    python -m experiments.sweep table1 --preset counting-2b --processes 8   # each run on 8 GPUs
    python -m experiments.sweep table1 --dry-run       # prints the commands
    python -m experiments.sweep table1 --states 640 --eval-states 50   # flags of ekipl.py

Each run is an ordinary run of ekipl.py or sft.py under RUNS/PRESET/, with the settings of the
preset, the flags that are not the sweep's (sft.py gets those that it has) and, above these, the
row's own; predictions lie beside its model. Stopped at any moment, the same command goes on:
finished commands are skipped, a run with a checkpoint is resumed. A finished run keeps its model
and loses trainer.pt. The tables and figures are made from all runs that are finished.
"""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

import ekipl
from experiments.rows import LISTS, chosen, with_best_rates
from experiments.summary import summarise
from experiments.tasks import Task, program, tasks_of
from rollouts.asking import samples_for
from training import checkpointing, console, presets, storage
from training.console import UserError

# Of each process, whatever --jobs and the machine: with another number sums are rounded otherwise.
THREADS = os.environ.get("OMP_NUM_THREADS", "1")


def clear(path: Path) -> None:
    """Removes a run that was stopped before its first checkpoint. UserError for anything else."""
    ours = path.is_dir() and not path.is_symlink()
    if ours:
        files = {file.name for file in path.iterdir()} - {"config.json.tmp"}
        ours = not files or "config.json" in files
    if not ours:
        raise UserError(f"{path} is in the way, and no run of this program: move it")
    storage.hold(path, "wait until that run has ended, or stop it first")
    shutil.rmtree(path)
    storage.let_go(path)


def carry_out(task: Task, before: Future | None, processes: int) -> None:
    """Runs the commands that are not finished; the log lies beside the run.

    UserError with the last line of a command that fails.
    """
    if before is not None:
        before.result()
    task.path.parent.mkdir(parents=True, exist_ok=True)
    for i, command in enumerate(task.commands):
        mark, *later = task.marks[i:]
        text = shlex.join(command)
        if mark.exists():
            if (then := mark.read_text()) != text:
                other = f"{task.path} was made by another command ({then})"
                raise UserError(f"{other}: choose another --runs")
        else:
            for stale in later:
                stale.unlink(missing_ok=True)
            execute(task, command, processes)
            mark.write_text(text)
        drop_optimizer(task)


def execute(task: Task, command: list[str], processes: int) -> None:
    """Runs a command, or what is left of it. UserError with its last line if it fails."""
    name, *flags = command
    if name != "evaluate.py" and os.path.lexists(task.path):  # it was stopped
        if checkpointing.checkpoints(task.path) or os.path.lexists(task.path / "model"):
            flags = ["--resume", str(task.path)]
        else:
            clear(task.path)
    log = task.path.with_name(f"{task.name}.log")
    with open(log, "a") as file:
        ended = subprocess.run(
            [*program(name, processes), *flags],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": THREADS},
            check=False,
        )
    if ended.returncode:
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        raise UserError(f"{task.name}: {lines[-1] if lines else 'no output'} (log: {log})")


def drop_optimizer(task: Task) -> None:
    """Removes AdamW's moments of a finished run, two thirds of its checkpoint; the model stays."""
    (task.path / "model" / "trainer.pt").unlink(missing_ok=True)


def carry_all_out(tasks: list[Task], jobs: int, processes: int) -> list[str]:
    """`jobs` tasks at a time, each after the one it starts from. Returns what went wrong."""
    problems, futures = [], {}
    with ThreadPoolExecutor(jobs) as pool:
        # A task comes after the one it waits for, so that one of them is always running.
        for task in tasks:
            before = futures.get(task.waits_for)
            futures[task.name] = pool.submit(carry_out, task, before, processes)
        bar = tqdm(as_completed(futures.values()), total=len(futures), desc="sweep")
        for future in bar:
            if error := future.exception():
                if not isinstance(error, UserError):
                    raise error
                problems.append(str(error))
                bar.write(str(error))
    return list(dict.fromkeys(problems))


FLAGS = {
    "--rows": dict(default="", metavar="NAME,NAME", help="these rows of the list only"),
    "--rates": dict(
        type=Path,
        metavar="FILE",
        help="rates.json of the list of rates: each row takes the learning rate that is best there",
    ),
    "--seeds": dict(default="0,1,2", metavar="SEED,SEED", help="default 0,1,2"),
    "--jobs": dict(
        type=int,
        default=1,
        help=f"runs at a time, each of {THREADS} threads (OMP_NUM_THREADS; default 1)",
    ),
    "--processes": dict(
        type=int,
        default=1,
        help="of each run: torchrun's --nproc_per_node, one for each GPU (default 1)",
    ),
    "--stage1": dict(
        type=int, default=1600, help="questions of SFT before RL (default 1600, Reason-RFT's)"
    ),
    "--test-states": dict(type=int, default=300, help="questions of each test set (default 300)"),
    "--pass-k": dict(default="", metavar="K,K", help="also Pass@k, as in evaluate.py"),
    "--runs": dict(default="runs/sweep", help="where the runs go (default runs/sweep)"),
    "--out": dict(
        type=Path, help="where tables, figures and metrics go (default RUNS/PRESET/results)"
    ),
    "--dry-run": dict(action="store_true", help="print the commands"),
}


def arguments(argv: list[str]):
    """The flags of the sweep, `config` among them, and those for the training runs."""
    parser = console.Parser(
        prog="python -m experiments.sweep",
        description=__doc__.split("\n\n")[0],
        epilog="Other flags are those of ekipl.py and go to the training runs.",
        allow_abbrev=False,
    )
    parser.add_argument("list", choices=LISTS, help="which rows")
    parser.add_argument(
        "--preset",
        choices=presets.PRESETS,
        default="blocks",
        help="task, data, model and settings (default blocks: counting)",
    )
    for flag, options in FLAGS.items():
        parser.add_argument(flag, **options)
    args, extra = parser.parse_known_args(argv)
    if not re.fullmatch(r"[0-9]{1,18}(,[0-9]{1,18})*", args.seeds):
        raise UserError("--seeds wants numbers such as 0,1,2")
    if min(args.jobs, args.processes, args.stage1, args.test_states) < 1:
        raise UserError("--jobs, --processes, --stage1 and --test-states must be at least 1")
    args.seeds = list(dict.fromkeys(int(seed) for seed in args.seeds.split(",")))
    if own := {"--seed", "--name", "--resume"} & {word.partition("=")[0] for word in extra}:
        raise UserError(f"the sweep chooses {min(own)} for each run")
    samples_for(args.pass_k)
    args.config, _ = ekipl.parse(["--preset", args.preset, *extra])
    keyless = args.dry_run or args.config.offline
    ekipl.check(dataclasses.replace(args.config, offline=keyless), args.processes, resuming=False)
    return args, extra


def run(argv: list[str]) -> None:
    args, extra = arguments(argv)
    rows = with_best_rates(LISTS[args.list](args.config, args.stage1), args.rates)
    whole = tasks_of(rows, args, extra)
    tasks = tasks_of(chosen(rows, args.rows), args, extra)
    if args.dry_run:
        torchrun = f"torchrun --standalone --nproc_per_node {args.processes}"
        start = torchrun if args.processes > 1 else "python"
        for task in tasks:
            for command in task.commands:
                print(start, shlex.join(command))
        return
    root = Path(args.runs) / args.preset
    out = args.out or root / "results"
    for directory in (root, out):
        with storage.writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
    storage.hold(root, "wait until that sweep has ended, or choose another --runs")
    problems = carry_all_out(tasks, args.jobs, args.processes)
    finished = [task for task in whole if task.finished]  # also those of an earlier sweep
    if any(task.listed for task in finished):
        summarise(args.list, finished, out)
    storage.let_go(root)
    if problems:
        failed = f"{len(problems)} of {len(tasks)} runs failed, the first one: {problems[0]}"
        raise UserError(f"{failed}; the same command tries them again")


def main() -> None:
    console.command("experiments.sweep", run)


if __name__ == "__main__":
    main()
