"""The paper's experiments as one command: trains and evaluates a list of runs, several at a time, and skips what is done.

    python -m experiments.sweep table1 --preset blocks-transformation --seeds 0,1,2   # every row of Table 1, then the table and Figures 3 to 5
    python -m experiments.sweep ablation --seeds 0                                    # estimator, advantage, selection, ties, N, experts
    python -m experiments.sweep stages --preset blocks-transformation --seeds 0       # how much SFT before RL, and which experts after it
    python -m experiments.sweep table1 --preset counting-2b --processes 8             # each run on eight GPUs
    python -m experiments.sweep table1 --dry-run                                      # the commands alone
    python -m experiments.sweep table1 --states 640 --eval-states 50                  # what is left over are flags of the training runs

Each run is an ordinary run of ekipl.py or sft.py under RUNS/PRESET/, with the settings of the preset, the flags left over (sft.py gets those that it
knows) and, above these, the row's own; predictions lie beside its model. Stopped at any moment, the same command goes on: finished commands are
skipped, a run with a checkpoint is resumed. Of a finished run the model stays and trainer.pt goes.
The table and the figures are made from whatever is finished.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import ekipl
import evaluate
import sft
from data import predictions
from data.state import SETS
from experiments import report
from experts.roster import expert_specs
from training import checkpointing, console, curves, presets, storage
from training.console import UserError

HERE = Path(__file__).resolve().parents[1]
# Of each process, whatever --jobs and the machine: with another number sums are rounded otherwise.
THREADS = os.environ.get("OMP_NUM_THREADS", "1")


@dataclass
class Row:
    """A row of a table: its name, and what trains it. program: "" trains nothing, and `model` is evaluated as it is. after: the row whose
    model it starts from."""

    name: str
    program: str = ""
    flags: tuple[str, ...] = ()
    model: str = ""
    after: str = ""
    listed: bool = True  # in the table


def table1(config: ekipl.Config, stage1: int) -> list[Row]:
    """The methods of Table 1 (Section 4.1, "Baselines"). stage1: questions that Reason-RFT's first
    stage learns from; its second has the rest, but of the paper's structure task all. With the
    paper's data zero-shot and ANS-SFT have prompts of their own, as in Reason-RFT."""
    real = config.data != "blocks"
    rest = () if real and config.task == "structure" else ("--skip", str(stage1))
    zero_shot, answer = (("--mode", "answer"), "bare") if real else ((), "answer")
    experts = expert_specs(config.experts, offline=True)
    ours = [
        Row("Vision-EKIPL", "ekipl.py"),
        Row("Vision-EKIPL-after-SFT", "ekipl.py", rest, after="Stage-1"),
    ]
    return [
        *(Row(expert.partition("@")[0], model=expert) for expert in experts),
        Row("Zero-shot", flags=zero_shot, model=config.start),
        Row("ANS-SFT", "sft.py", ("--method", answer)),
        Row("CoT-SFT", "sft.py"),
        Row("Stage-1", "sft.py", ("--limit", str(stage1)), listed=False),
        Row("Reason-RFT-Zero", "ekipl.py", ("--experts", "none")),
        Row("Reason-RFT", "ekipl.py", ("--experts", "none", *rest), after="Stage-1"),
        *(ours if experts else ()),
    ]


def ablation(config: ekipl.Config, stage1: int) -> list[Row]:
    """What the paper never varied: one setting of Vision-EKIPL at a time."""
    if not (experts := expert_specs(config.experts, offline=True)):
        raise UserError("the ablation varies Vision-EKIPL, which needs --experts")
    changes = {
        "Vision-EKIPL": (),
        "estimator-is": ("--estimator", "is"),
        "estimator-snis": ("--estimator", "snis"),
        "advantage-selected": ("--advantage", "selected"),
        "ties-random": ("--ties", "random"),
        "selection-random": ("--selection", "random"),
        "N-2": ("--num-samples", "2", "--group-size", "6"),
        "N-4": ("--num-samples", "4"),
        "N-16": ("--num-samples", "16"),
        **{f"expert-{name.partition('@')[0]}": ("--experts", name) for name in experts},
        "GRPO": ("--experts", "none"),
        # as many candidates as with the experts, all the policy's: what selection alone is worth
        "GRPO-best": (
            "--experts",
            "none",
            "--num-samples",
            str(config.num_samples * (len(experts) + 1)),
        ),
    }
    return [Row(name, "ekipl.py", flags) for name, flags in changes.items()]


def stages(config: ekipl.Config, stage1: int) -> list[Row]:
    """SFT before RL: first stages from two fifths of `stage1` to twice it, so that SFT-then-GRPO is seen at its best; and Vision-EKIPL after the usual one,
    with each expert alone."""
    rows = []
    for size in (stage1 * 2 // 5, stage1, stage1 * 8 // 5, stage1 * 2):
        rows.append(Row(f"Stage-1-{size}", "sft.py", ("--limit", str(size)), listed=False))
        rows.append(
            Row(
                f"Reason-RFT-{size}",
                "ekipl.py",
                ("--experts", "none", "--skip", str(size)),
                after=f"Stage-1-{size}",
            )
        )
    for expert in expert_specs(config.experts, offline=True):
        flags = ("--experts", expert, "--skip", str(stage1))
        rows.append(
            Row(
                f"Vision-EKIPL-{stage1}-{expert.partition('@')[0]}",
                "ekipl.py",
                flags,
                after=f"Stage-1-{stage1}",
            )
        )
    return rows


LISTS = {"table1": table1, "ablation": ablation, "stages": stages}


# ---------------------------------------------------------------------------------------------- commands


@dataclass
class Task:
    """The commands of one row and seed, in order, and where it leaves its marks."""

    name: str
    path: Path
    commands: list[list[str]]
    waits_for: str = ""
    listed: bool = True


def known(program: str, flags: list[str]) -> list[str]:
    """Of ekipl.py's flags, with their values, those that the program has: sft.py knows nothing of experts."""
    names = {
        setting.name
        for setting in dataclasses.fields(sft.Config if program == "sft.py" else ekipl.Config)
    }
    kept, keep = [], True
    for word in flags:
        if word.startswith("--"):
            keep = (
                word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
                in names
            )
        kept += [word] if keep else []
    return kept


def tasks(rows: list[Row], args, extra: list[str]) -> list[Task]:
    """One task for each row and seed; what trains nothing has one alone."""
    made, root, config = [], Path(args.runs) / args.preset, args.config
    asked = ["--states", str(args.test_states), "--pass-k", args.pass_k]
    for setting in (
        "max_new_tokens",
        "data",
        "data_cache",
        "rollout",
        "min_pixels",
        "max_pixels",
        "cache",
    ):
        asked += (
            [f"--{setting.replace('_', '-')}", str(getattr(config, setting))]
            if getattr(config, setting)
            else []
        )
    asked += ["--offline"] if config.offline else []
    if config.expert_tokens != type(config).expert_tokens:
        asked += ["--expert-tokens", str(config.expert_tokens)]
    for row in rows:
        for seed in args.seeds if row.program else args.seeds[:1]:
            name = f"{row.name}-seed{seed}" if row.program else row.name
            path, commands = root / name, []
            if row.program:
                flags = [
                    "--preset",
                    args.preset,
                    "--seed",
                    str(seed),
                    "--runs",
                    str(root),
                    "--name",
                    name,
                    *known(row.program, extra),
                    *row.flags,
                ]
                flags += (
                    ["--model", str(root / f"{row.after}-seed{seed}" / "model")]
                    if row.after
                    else []
                )
                commands.append([row.program, *flags])
            model = str(path / "model") if row.program else row.model
            mode = [word for word in row.flags if word in ("answer", "bare")]
            mode = ["--mode", *mode] if mode else []
            if row.listed:
                commands.append(
                    [
                        "evaluate.py",
                        model,
                        "--sets",
                        *SETS[config.task],
                        *asked,
                        *mode,
                        "--out",
                        str(path / "predictions"),
                    ]
                )
            made.append(
                Task(
                    name, path, commands, f"{row.after}-seed{seed}" if row.after else "", row.listed
                )
            )
    return made


def marks(task: Task) -> list[Path]:
    """One file for each command, there when it is done; it holds the command."""
    return [task.path.with_name(f"{task.name}.{i}.done") for i in range(len(task.commands))]


def program(name: str, processes: int) -> list[str]:
    """What starts a program of this directory, under torchrun if it is to have several processes."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if processes > 1
        else []
    )
    return [sys.executable, *torchrun, str(HERE / name)]


def has_checkpoint(path: Path) -> bool:
    return bool(checkpointing.checkpoints(path)) or os.path.lexists(path / "model")


def clear(path: Path) -> None:
    """Removes a run that was stopped before its first checkpoint, and nothing else. UserError if something else is there."""
    if path.is_symlink() or not path.is_dir():
        raise UserError(f"{path} is in the way, and no run of this program: move it")
    left = {file.name for file in path.iterdir()} - {"config.json.tmp"}
    if left and "config.json" not in left:
        raise UserError(f"{path} is in the way, and no run of this program: move it")
    storage.hold(path, "wait until that run has ended, or stop it first")
    shutil.rmtree(path)
    storage.let_go(path)


def carry_out(task: Task, before: Future | None, processes: int) -> None:
    """Runs the commands that are not done yet. UserError with the last line of the one that fails; its log lies beside the run."""
    if before is not None:
        before.result()
    task.path.parent.mkdir(parents=True, exist_ok=True)
    for i, command in enumerate(task.commands):
        mark, *later = marks(task)[i:]
        log = task.path.with_name(f"{task.name}.log")
        said = shlex.join(command)
        if mark.exists() and mark.read_text() != said:
            raise UserError(
                f"{task.path} was made by another command ({mark.read_text()}): choose another --runs"
            )
        if mark.exists():
            drop_optimizer(task)
            continue
        if command[0] != "evaluate.py" and os.path.lexists(task.path):  # it was stopped
            if has_checkpoint(task.path):
                command = [command[0], "--resume", str(task.path)]
            else:
                clear(task.path)
        for stale in later:
            stale.unlink(missing_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": THREADS}
        with open(log, "a") as file:
            done = subprocess.run(
                [*program(command[0], processes), *command[1:]],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                check=False,
            )
        if done.returncode:
            last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
            raise UserError(f"{task.name}: {last[0] if last else 'no word'} (log: {log})")
        mark.write_text(said)
        drop_optimizer(task)


def drop_optimizer(task: Task) -> None:
    """Of a run that has finished the model is wanted, and no longer AdamW's moments: two thirds
    of its checkpoint.
    """
    (task.path / "model" / "trainer.pt").unlink(missing_ok=True)


def carry_all_out(made: list[Task], jobs: int, processes: int) -> list[str]:
    """`jobs` tasks at a time, each after the one it starts from. Returns what went wrong."""
    problems, futures = [], {}
    with ThreadPoolExecutor(jobs) as pool:
        for task in (
            made
        ):  # a task stands behind the one it waits for, so that one of them is always running
            futures[task.name] = pool.submit(
                carry_out, task, futures.get(task.waits_for), processes
            )
        bar = tqdm(as_completed(futures.values()), total=len(futures), desc="sweep")
        for future in bar:
            if error := future.exception():
                if not isinstance(error, UserError):
                    raise error
                problems.append(str(error))
                bar.write(str(error))
    return list(dict.fromkeys(problems))


# ---------------------------------------------------------------------------------------------- results

LAST = 10  # steps, over which the ablation's figures are averaged
FIGURES = (
    "expert_share",
    "dead_groups",
    "kl",
    "ess_share",
    "weight_var",
    "weight_q95",
    "bias_bound",
)


def comparison(finished: list[Task], out: Path) -> None:
    """A Markdown table: accuracy on the test sets, and the diagnostics' means over the last ten steps; mean over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for task in finished:
        scores = {
            name: evaluate.score_predictions(ps)["accuracy"]
            for name, ps in predictions.read_predictions(task.path / "predictions").items()
        }
        history = curves.metrics(task.path / "metrics.jsonl")
        records = [record for record in history if "loss" in record][-LAST:]
        scores |= {
            name: statistics.fmean(r[name] for r in records)
            for name in FIGURES
            if all(r.get(name) is not None for r in records)
        }
        for name, value in scores.items():
            found.setdefault(curves.method_of(task.name), {}).setdefault(name, []).append(value)
    columns = list(dict.fromkeys(name for row in found.values() for name in row))
    lines = ["| run | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, row in found.items():
        cells = [
            f"{statistics.fmean(row[c]) * (100 if '-' in c else 1):.{1 if '-' in c else 3}f}"
            if c in row
            else "-"
            for c in columns
        ]
        lines.append(f"| {name} | {max(map(len, row.values()))} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Accuracy on test sets in %; the other figures are means over the last {LAST} steps of training.",
    ]
    with storage.writing(out):
        out.write_text("\n".join(lines) + "\n")


def slim(record: dict) -> dict:
    """What tables and pictures are made of, in five digits: small enough to be kept with the code."""
    kept = [
        key
        for key in record
        if key in (*curves.PANELS, *curves.DASHED.values(), "step", "states", "loss")
        or key.startswith(("share/", "eval/", "seconds/"))
    ]
    return {
        key: float(f"{record[key]:.5g}") if isinstance(record[key], float) else record[key]
        for key in kept
    }


def results(kind: str, finished: list[Task], out: Path) -> None:
    """Tables and figures of what is finished, and the metrics that they are drawn from."""
    listed = [task for task in finished if task.listed]
    for task in finished:
        if (task.path / "metrics.jsonl").exists():
            (out / f"{task.name}.jsonl").write_text(
                "".join(
                    json.dumps(slim(record)) + "\n"
                    for record in storage.read(task.path / "metrics.jsonl")
                )
            )
    if kind != "table1":
        comparison(listed, out / f"{kind}.md")
        print((out / f"{kind}.md").read_text())
        return
    paths = [str(task.path) for task in listed]
    report.table_command([*paths, "--out", str(out / "table1")])
    report.figures_command([*paths, "--out", str(out)])


def run(argv: list[str]) -> None:
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
    parser.add_argument("--seeds", default="0,1,2", metavar="SEED,SEED", help="default 0,1,2")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help=f"runs at a time, each of {THREADS} threads (OMP_NUM_THREADS; default 1)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="of each run: torchrun's --nproc_per_node, one for each GPU (default 1)",
    )
    parser.add_argument(
        "--stage1",
        type=int,
        default=1600,
        help="questions of SFT before RL (default 1600, Reason-RFT's)",
    )
    parser.add_argument(
        "--test-states", type=int, default=300, help="questions of each test set (default 300)"
    )
    parser.add_argument(
        "--pass-k", default="", metavar="K,K", help="also Pass@k, as in evaluate.py"
    )
    parser.add_argument(
        "--runs", default="runs/sweep", help="where the runs are made (default runs/sweep)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where tables, figures and metrics go (default RUNS/PRESET/results)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    args, extra = parser.parse_known_args(argv)
    if (
        not re.fullmatch(r"[0-9]{1,18}(,[0-9]{1,18})*", args.seeds)
        or min(args.jobs, args.processes, args.stage1, args.test_states) < 1
    ):
        raise UserError(
            "--seeds wants numbers such as 0,1,2; --jobs, --processes, --stage1 and --test-states must be at least 1"
        )
    args.seeds = list(dict.fromkeys(int(seed) for seed in args.seeds.split(",")))
    if own := {"--seed", "--name", "--resume"} & {word.partition("=")[0] for word in extra}:
        raise UserError(f"{min(own)} is sweep.py's to choose, run by run")
    evaluate.samples_for(args.pass_k)
    args.config, _ = ekipl.parse(["--preset", args.preset, *extra])
    keyless = args.dry_run or args.config.offline
    ekipl.check(dataclasses.replace(args.config, offline=keyless), args.processes, resuming=False)
    made = tasks(LISTS[args.list](args.config, args.stage1), args, extra)
    if args.dry_run:
        start = (
            f"torchrun --standalone --nproc_per_node {args.processes}"
            if args.processes > 1
            else "python"
        )
        print(
            *(f"{start} {shlex.join(command)}" for task in made for command in task.commands),
            sep="\n",
        )
        return
    root = Path(args.runs) / args.preset
    out = args.out or root / "results"
    for directory in (root, out):
        with storage.writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
    storage.hold(root, "wait until that sweep has ended, or choose another --runs")
    problems = carry_all_out(made, args.jobs, args.processes)
    finished = [task for task in made if all(mark.exists() for mark in marks(task))]
    if any(task.listed for task in finished):
        results(args.list, finished, out)
    storage.let_go(root)
    if problems:
        raise UserError(
            f"{len(problems)} of {len(made)} runs failed, the first one: {problems[0]}; the same command tries them again"
        )


def main() -> None:
    console.command("experiments.sweep", run)


if __name__ == "__main__":
    main()
