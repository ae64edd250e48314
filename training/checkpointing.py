"""Checkpoints: saved so that a run can be killed at any moment, and resumed exactly.

A checkpoint is written beside its place, synced to the disk and renamed, so that the last complete
one is always whole. All randomness follows from the seed and the step, so weights, optimizer and
step are the whole state.
"""

import os
import pickle
import re
import shutil
from pathlib import Path

import torch

from training import console, curves, lora, storage
from training.console import UserError
from training.distributed import (
    World,
    full,
    full_state,
    local,
    must_be_sharded,
    parameters_of,
    sharded_state,
)
from training.storage import sync, writing

UNREADABLE = (  # what torch.load and load_state_dict raise on a damaged file
    OSError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
)


def save_checkpoint(
    path: Path,
    step: int,
    policy,
    weights: dict | None,
    optimizer: dict,
    processes: int = 1,
    adapter: dict | None = None,
) -> None:
    """Writes checkpoint-STEP, makes it `model`, and removes the older ones. UserError if it cannot.

    weights, optimizer, adapter: full tensors, by name and as a state dict, so that any number of
    processes can read them. weights: None for an adapter alone.
    """
    final = path / f"checkpoint-{step:06d}"
    aside = path / f"{final.name}.tmp"
    trainer = {"step": step, "processes": processes, "optimizer": optimizer}
    trainer["threads"] = torch.get_num_threads()
    with writing(path):
        shutil.rmtree(aside, ignore_errors=True)
        if weights is not None:
            policy.save(aside, weights)
        if adapter:
            lora.save_adapter(aside, policy.model, adapter)
        torch.save(trainer, aside / "trainer.pt")
        for file in [*path.glob("*.jsonl"), *aside.rglob("*"), aside]:
            sync(file)  # before the name says that it is complete
        os.rename(aside, final)
        publish(path)
        for old in checkpoints(path)[:-1]:
            shutil.rmtree(old, ignore_errors=True)


def publish(path: Path) -> None:
    """Makes `model` the newest checkpoint: a link, or a copy if the file system has no links.

    A run that is killed here can be resumed, and does it again then.
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
        for file in [*new.rglob("*"), new]:
            sync(file)
    model = path / "model"
    if os.path.lexists(model) and (is_directory(new) or is_directory(model)):
        os.rename(model, old)  # only links and files can be replaced in one step
    os.replace(new, model)
    sync(path)
    remove(old)


def is_directory(path: Path) -> bool:
    """Whether it is a directory itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()


def remove(path: Path) -> None:
    """A file, a link or a whole directory, if it is there."""
    if is_directory(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def checkpoints(path: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = {}  # by step
    for entry in path.glob("checkpoint-*"):
        if (name := re.fullmatch(r"checkpoint-(\d+)", entry.name)) and entry.is_dir():
            found[int(name[1])] = entry
    return [found[step] for step in sorted(found)]


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


def model_of(config, resume: Path | None) -> str | Path:
    """Where a run's model is: what it starts from, or its last checkpoint; with LoRA, which leaves
    all but the adapter as it was, always the first. UserError if there is no checkpoint."""
    newest = last_checkpoint(resume) if resume else None
    return config.start if newest is None or config.lora_rank else newest


def restore(optimizer: torch.optim.Optimizer, resume: Path, world: World) -> int:
    """Loads the optimizer of the run's last checkpoint. Returns the steps done by then.

    Records of later steps are dropped. UserError if there is nothing that training can go on from.
    """
    file = last_checkpoint(resume) / "trainer.pt"
    if not file.exists():
        raise UserError(
            f"{file} is missing (experiments.sweep drops it from finished runs): nothing to go on "
            f"with; --model {resume}/model starts a new run from its weights"
        )
    try:
        # To the CPU first: Adam's step counters have to stay there. Mapped, so that the processes
        # of a machine do not each read it into memory.
        trainer = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        optimizer.load_state_dict(sharded_state(trainer["optimizer"], optimizer))
        start, processes = int(trainer["step"]), int(trainer["processes"])
        threads = int(trainer.get("threads", torch.get_num_threads()))
    except UNREADABLE:
        raise UserError(f"{resume}: its checkpoint has no usable trainer.pt") from None
    if problem := unsound(optimizer):
        raise UserError(f"{resume} cannot go on: {problem} of its checkpoint; start a new run")
    if world.rank == 0:
        warn_of_differences(resume, processes, threads, world)
        for name in ("metrics.jsonl", "samples.jsonl"):
            storage.forget_after(resume / name, start)
        with writing(resume / "model"):
            publish(resume)  # the run may have been killed before it did
    return start


def warn_of_differences(resume: Path, processes: int, threads: int, world: World) -> None:
    """Says why a resumed run differs from one that was never stopped, if it does."""
    if processes != world.size:
        console.say(
            f"{resume} was made by {processes} processes and goes on with {world.size}: "
            "with other samples than if it had never stopped"
        )
    now = torch.get_num_threads()
    if world.device.type == "cpu" and threads != now:
        console.say(
            f"{resume} was made with {threads} threads and goes on with {now}: sums are rounded "
            f"differently; OMP_NUM_THREADS={threads} keeps them the same"
        )


def unsound(optimizer: torch.optim.Optimizer) -> str | None:
    """What is wrong with AdamW's state, so that it cannot be used; None if nothing is."""
    for parameter in parameters_of(optimizer):
        for name, value in optimizer.state.get(parameter, {}).items():
            value = torch.as_tensor(value)
            if name != "step" and value.shape != parameter.shape:
                return f"AdamW's {name} is of another shape than its weights"
            if not local(value).isfinite().all():
                return f"AdamW's {name} holds what is no finite number (NaN or infinity)"
    return None


def full_weights(policy: torch.nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """`full_state` of the model's weights by name, tied ones once; an adapter is merged."""
    if not lora.adapted(policy.model):
        return full_state(dict(lora.merged(policy.model)), rank)
    weights = {}
    for name, value in lora.merged(policy.model):
        value, dtype = full(value), torch.promote_types(value.dtype, torch.float32)
        # To the CPU: on a GPU it would be a second model.
        weights[name] = value.to("cpu", dtype) if rank == 0 else None
    return weights


def save(
    path: Path,
    step: int,
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    last: bool = True,
) -> None:
    """A checkpoint and the pictures so far, by the first process; the others wait for it.

    last: whether a run with LoRA, whose checkpoints are adapters, writes the merged model too.
    """
    must_be_sharded(policy)
    adapter = {name: value.detach() for name, value in lora.adapter(policy.model).items()}
    weights = full_weights(policy, world.rank) if last or not adapter else None
    adapter = full_state(adapter, world.rank)
    state = full_state(optimizer.state_dict(), world.rank)
    if world.rank == 0:
        save_checkpoint(path, step, policy, weights, state, world.size, adapter)
        curves.draw_run(path / "metrics.jsonl", path.name)
    world.broadcast(None)
