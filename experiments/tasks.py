"""The tasks of a sweep: for each row and seed the commands that train and evaluate it."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import ekipl
import sft
from data.state import SETS
from experiments.rows import Row
from training.settings import flag

ROOT = Path(__file__).resolve().parents[1]
# Settings of training that evaluate.py has as flags too.
SHARED = ("max_new_tokens", "data", "data_cache", "rollout", "min_pixels", "max_pixels", "cache")


@dataclass
class Task:
    """The commands of one row and seed, in order. Logs and marks lie beside `path`, its run."""

    name: str
    path: Path
    commands: list[list[str]]
    waits_for: str = ""  # the task whose model it starts from
    listed: bool = True  # in the table

    @property
    def marks(self) -> list[Path]:
        """A file for each command, written when it has ended well; it holds the command."""
        count = len(self.commands)
        return [self.path.with_name(f"{self.name}.{i}.done") for i in range(count)]

    @property
    def finished(self) -> bool:
        return all(mark.exists() for mark in self.marks)


def tasks_of(rows: list[Row], args, extra: list[str]) -> list[Task]:
    """A task for each row and seed; a row that trains nothing has one task.

    args: the flags of the sweep. extra: flags for the training runs.
    """
    root, tasks = Path(args.runs) / args.preset, []
    for row in rows:
        for seed in args.seeds if row.program else args.seeds[:1]:
            name = f"{row.name}-seed{seed}" if row.program else row.name
            before = f"{row.after}-seed{seed}" if row.after else ""
            commands = []
            if row.program:
                command = [row.program, "--preset", args.preset, "--seed", str(seed)]
                command += ["--runs", str(root), "--name", name]
                command += [*known(row.program, extra), *row.flags]
                command += ["--model", str(root / before / "model")] if before else []
                commands.append(command)
            if row.listed:
                commands.append(evaluation(row, root / name, args))
            tasks.append(Task(name, root / name, commands, before, row.listed))
    return tasks


def evaluation(row: Row, path: Path, args) -> list[str]:
    """The command that evaluates a row's model on the test sets of its task."""
    config = args.config
    command = ["evaluate.py", str(path / "model") if row.program else row.model]
    sets = [f"{config.task}-val"] if args.list == "rates" else SETS[config.task]
    command += ["--sets", *sets]
    command += ["--states", str(args.test_states), "--pass-k", args.pass_k]
    for name in SHARED:
        if value := getattr(config, name):
            command += [flag(name), str(value)]
    command += ["--offline"] if config.offline else []
    if config.expert_tokens != type(config).expert_tokens:
        command += ["--expert-tokens", str(config.expert_tokens)]
    for mode in ("answer", "bare"):
        command += ["--mode", mode] if mode in row.flags else []
    command += ["--request", row.request] if row.request else []
    return [*command, "--out", str(path / "predictions")]


def known(program: str, flags: list[str]) -> list[str]:
    """Those of ekipl.py's flags, with their values, that a program has: sft.py has no GRPO."""
    config = sft.Config if program == "sft.py" else ekipl.Config
    names = {setting.name for setting in dataclasses.fields(config)}
    kept, keep = [], True
    for word in flags:
        if word.startswith("--"):
            name = word.partition("=")[0].removeprefix("--").removeprefix("no-")
            keep = name.replace("-", "_") in names
        if keep:
            kept.append(word)
    return kept


def program(name: str, processes: int) -> list[str]:
    """What starts a program at the root, under torchrun if it is to have several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / name)]
