"""TODO training.checkpointing"""

import os
import pickle
import re
import shutil
from pathlib import Path

import torch

from training import console, curves, storage
from training.console import UserError
from training.distributed import World, collected, own, shared_out, weights_of
from training.storage import sync, writing


def save_checkpoint(
    path: Path, step: int, policy, weights: dict, optimizer: dict, processes: int = 1
) -> None:
    """Writes checkpoint-STEP, makes it `model`, and removes the older ones. UserError if it cannot be written.

    weights, optimizer: whole tensors, by name and as a state dict; so another number of processes, or none of them, can read it.
    """
    with writing(path):
        _save_checkpoint(
            path, policy, weights, {"step": step, "processes": processes, "optimizer": optimizer}
        )


def _save_checkpoint(path: Path, policy, weights: dict, trainer: dict) -> None:
    step = trainer["step"]
    final = path / f"checkpoint-{step:06d}"
    aside = path / f"{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    import torch  # seconds, which data.py, blocks.py and the cache of answers do without

    trainer["threads"] = torch.get_num_threads()
    policy.save(aside, weights)
    torch.save(trainer, aside / "trainer.pt")
    for file in [
        *path.glob("*.jsonl"),
        *aside.iterdir(),
        aside,
    ]:  # before the name says that it is complete
        sync(file)
    os.rename(aside, final)
    publish(path)
    for old in checkpoints(path)[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def publish(path: Path) -> None:
    """Makes `model` the newest checkpoint: a link, or where the file system has none a copy of its model.

    Whoever is killed here leaves a run that can be resumed, and the resumed run does it again.
    """
    if not (found := checkpoints(path)):
        return
    newest, new, old = found[-1], path / "model.tmp", path / "model.old"
    remove(new)
    remove(old)
    try:
        new.symlink_to(newest.name)
    except (OSError, NotImplementedError):
        shutil.copytree(newest, new, ignore=shutil.ignore_patterns("trainer.pt"))
        for file in [*new.iterdir(), new]:
            sync(file)
    model = path / "model"
    if os.path.lexists(model) and (is_directory(new) or is_directory(model)):
        os.rename(model, old)  # only links and files can be replaced in one step
    os.replace(new, model)
    sync(path)
    remove(old)


def is_directory(path: Path) -> bool:
    """Whether it is one itself, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def remove(path: Path) -> None:
    """A file, a link or a whole directory, if it is there."""
    if is_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def checkpoints(path: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        found
        for found in path.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", found.name) and found.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(path: Path) -> Path:
    """The newest complete checkpoint. UserError if there is none."""
    found = checkpoints(path)
    if not found and (path / "model" / "trainer.pt").is_file():
        return path / "model"  # a copy of the run, with what the link pointed to in its place
    if not found:
        raise UserError(
            f"{path} was stopped before its first checkpoint: start again with another --name"
        )
    return found[-1]


def restore(optimizer: torch.optim.Optimizer, resume: Path, world: World) -> int:
    """The optimizer as the last checkpoint of the run has it; returns the steps done by then, and forgets the records of later ones."""
    file = last_checkpoint(resume) / "trainer.pt"
    if not file.exists():
        raise UserError(
            f"{file} is missing (sweep.py drops it when a run has finished): nothing to go on with; "
            f"--model {resume}/model starts a new run from its weights"
        )
    # To the CPU first: Adam's step counters have to stay there. Mapped, so that not every process
    # of a machine reads all of it into memory.
    try:
        trainer = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        optimizer.load_state_dict(shared_out(trainer["optimizer"], optimizer))
        start, processes = int(trainer["step"]), int(trainer["processes"])
        threads = int(trainer.get("threads", torch.get_num_threads()))
    except (
        OSError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ):
        raise UserError(f"{resume}: its checkpoint has no usable trainer.pt") from None
    if broken := unsound(optimizer):
        raise UserError(f"{resume} cannot go on: {broken} of its checkpoint; start a new run")
    if world.rank == 0:
        went_on_otherwise(resume, processes, threads, world)
        for file in ("metrics.jsonl", "samples.jsonl"):
            storage.forget_after(resume / file, start)
        with storage.writing(resume / "model"):
            publish(resume)  # the run may have been killed before it did
    return start


def went_on_otherwise(resume: Path, processes: int, threads: int, world: World) -> None:
    """Tells what keeps a resumed run from being the run never stopped."""
    if processes != world.size:
        console.say(
            f"{resume} was made by {processes} processes and goes on with {world.size}: with other samples than had it never stopped"
        )
    now = torch.get_num_threads()
    if world.device.type == "cpu" and threads != now:
        console.say(
            f"{resume} was made with {threads} threads and goes on with {now}: sums are rounded otherwise, OMP_NUM_THREADS={threads} keeps them"
        )


def unsound(optimizer: torch.optim.Optimizer) -> str | None:
    """What of AdamW's state no training can go on from, None if nothing is."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                value = torch.as_tensor(value)
                if name != "step" and value.shape != parameter.shape:
                    return f"AdamW's {name} is of another shape than its weights"
                if not own(value).isfinite().all():
                    return f"AdamW's {name} holds what is no finite number (NaN or infinity)"
    return None


def save(
    path: Path, step: int, policy: torch.nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> None:
    """A checkpoint and the picture so far, written by the first process of what all have; nobody runs ahead of it."""
    weights, state = weights_of(policy, world.rank), collected(optimizer.state_dict(), world.rank)
    if world.rank == 0:
        save_checkpoint(path, step, policy, weights, state, world.size)
        curves.draw_run(path / "metrics.jsonl", path.name)
    world.agree(None)
