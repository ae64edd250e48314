"""Vision-EKIPL: GRPO whose groups hold the best actions of the policy and of external experts (paper, Sections 3.2 and 4.1).

    python ekipl.py                                      # the blocks world on a laptop: minutes, no GPU, no key
    python ekipl.py --experts none                       # plain GRPO
    torchrun --nproc_per_node 8 ekipl.py ...             # the same over 8 processes, one GPU each; --parallel fsdp shares a large model out
    python ekipl.py --resume runs/NAME                   # goes on exactly where the last checkpoint was

One step:

    states -> N actions of the policy + N of each expert (Eq 4-6) -> rewards (Eq 7) -> top G -> advantages (Eq 1)
           -> log-probs of the kept actions, policy and reference -> loss (Eq 2, 3; estimator A, B or C) -> AdamW

The batch is global: `batch_size` states a step over all processes. The loss is a sum over groups, divided by the number of
groups in the global batch before any micro-batching, so that micro-batches, accumulation and processes do not change the gradient.
Every random number follows from seed, step and process, never from what happened before; so a run that is resumed with as many
processes is the run never stopped.

Departures from the paper, and readings of what it leaves open, are in README.md ("Where the paper is silent").
"""

import dataclasses
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import grpo
from data.lengths import room_of
from data.sets import reports, test_sets, training_states
from evaluate import greedy_accuracy
from experts import roster
from experts.roster import api_counts, api_metrics, make_experts, run_ahead, try_out
from experts.settings import ExpertSettings
from policy import PackedBatch, Policy, pack
from rollouts import choice
from sampling import (
    Group,
    add_expert_logps,
    log_weights,
    select,
    summary,
    total_groups,
    transcripts,
)
from training import checkpointing, console, curves, plan, settings, storage
from training.checkpointing import restore, save
from training.console import UserError
from training.distributed import (
    World,
    accumulating,
    autocast,
    clear_gradients,
    clip_gradients,
    deterministic,
)
from training.metrics import step_metrics
from training.presets import PRESETS
from training.rundir import log, open_run, take
from training.settings import Settings, learning_rate, option
from training.stopwatch import Stopwatch

AHEAD = 2  # steps that requests to APIs run ahead of the training


# ---------------------------------------------------------------------------------------------- settings


@dataclass
class Config(Settings, ExpertSettings):
    """All settings of a run: those of settings.py, and these."""

    # the total group (Eq 4-6) and what is kept of it
    group_size: int = option(8, "G: actions kept, a state; at most N x (experts + 1)")
    selection: str = option(
        "top", "which G are kept: the best, or any (a control)", ("top", "random")
    )
    ties: str = option(
        "auto",
        "which of equal rewards are kept first: the policy's (paper's Fig. 4), or any. auto: any for the estimators is and snis, "
        "whose weights take the kept for a fair sample of the best; else the policy's",
        ("auto", "policy_first", "random"),
    )
    temperature: float = option(
        1.0, "of sampling and of scoring: the policy is softmax(logits / temperature)"
    )
    # the objective (Eq 1-3, A.2)
    advantage: str = option(
        "candidates",
        "whose mean and std Eq 1 takes: of all M candidates, or of the G selected (then a group of perfect actions teaches nothing)",
        ("candidates", "selected"),
    )
    estimator: str = option(
        "uncorrected",
        "A.7: uncorrected (A) is the paper's, is (B) weights each action by pi_old/q, which is faithful to the policy's own distribution and "
        "so removes most of what experts teach, snis (C) normalises the weights, with a bias where few of the kept are the policy's",
        grpo.ESTIMATORS,
    )
    clip_eps: float = option(0.2, "epsilon of Eq 3: how far the ratio may move")
    beta: float = option(0.01, "weight of the KL term of Eq 3 (paper: 0.04); 0 loads no reference")
    updates_per_batch: int = option(
        1,
        "gradient steps on each batch of actions; with 1 the ratio is always 1 and nothing is clipped",
    )
    # what is measured and kept
    parity_every: int = option(
        20,
        "compare vLLM's log-probabilities with the policy's at the first step and every so many; 0: never",
    )
    log_groups: int = option(2, "whole groups a step that go to samples.jsonl")


def parse(argv: list[str]) -> tuple[Config, Path | None]:
    """The settings that the command line asks for, and the run to resume if it does."""
    return settings.parse(Config, PRESETS, __doc__.split("\n\n")[0], argv)


def check(config: Config, world: int, resuming: bool) -> None:
    """UserError for settings that cannot work, before anything is loaded."""
    experts = roster.check(config)
    if config.estimator != "uncorrected" and (
        silent := [name for name in experts if name.startswith("gemini:")]
    ):
        raise UserError(
            f"--estimator {config.estimator} needs every expert's density, and {silent[0]} tells none: use --estimator uncorrected"
        )
    settings.check(config, world, resuming)
    settings.must(config, 1, "group_size", "updates_per_batch")
    settings.must(config, 0, "beta", "clip_eps", "parity_every", "log_groups")
    settings.above_zero(config, "temperature")
    candidates = config.num_samples * (len(experts) + 1)
    if config.group_size > candidates:
        raise UserError(
            f"--group-size {config.group_size} is more than the {candidates} candidates of a state "
            f"(--num-samples {config.num_samples} x {len(experts) + 1} sources)"
        )


@dataclass
class MicroBatch:
    """Some groups of a batch, packed, with what does not change over the updates: pi_old, pi_ref, advantages and weights."""

    groups: list[Group]
    packed: PackedBatch
    advantages: torch.Tensor  # (B, G)
    ref_logp: torch.Tensor | None  # (B, G, T)
    old_logp: torch.Tensor | None = (
        None  # (B, G, T); None until the policy has scored the batch for the first time
    )
    log_weights: torch.Tensor | None = None  # (B, G), log w_S


def padded(rows: list[list], fill) -> torch.Tensor:
    """Rows of different lengths as one tensor."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def update(
    config: Config,
    policy,
    reference: Policy | None,
    optimizer,
    groups: list[Group],
    world: World,
    lr: float,
    lap=lambda phase: None,
) -> dict:
    """Eq 2 and 3 on the kept actions of this process's groups; `updates_per_batch` steps of AdamW.

    policy: as World.data_parallel returns it. Returns per-group rows of what was measured in the last update, the
    loss (of this process's groups, over the global number of groups) and the norm of the gradient before clipping.
    lap: is told each phase that has ended (metrics.Stopwatch).
    """
    device, total = world.device, config.batch_size
    order = sorted(
        range(len(groups)),
        key=lambda i: sum(len(action.tokens) for action in groups[i].kept_actions),
    )
    batches = []
    for start in range(0, len(order), config.micro_batch):  # similar lengths together: less padding
        chosen = [groups[i] for i in order[start : start + config.micro_batch]]
        packed = pack(
            [group.prompt for group in chosen],
            [[a.tokens for a in group.kept_actions] for group in chosen],
        ).to(device)
        lap("packing")
        with torch.no_grad(), autocast(device, config.bf16):
            ref_logp = reference(packed) if reference is not None else None
        lap("reference")
        batches.append(
            MicroBatch(
                chosen,
                packed,
                padded([group.advantages for group in chosen], 0.0).to(device),
                ref_logp,
            )
        )

    rows, loss_sum, norms = {}, 0.0, []
    for group in optimizer.param_groups:
        group["lr"] = lr
    for _ in range(config.updates_per_batch):
        clear_gradients(policy, optimizer)
        if (
            config.updates_per_batch > 1 and batches[0].old_logp is None
        ):  # pi_old is the policy before the first update
            with torch.no_grad(), autocast(device, config.bf16):
                for batch in batches:
                    batch.old_logp = policy(batch.packed)
            lap("forward")
        measured = []
        for i, batch in enumerate(batches):
            with accumulating(policy, last=i == len(batches) - 1):
                with autocast(device, config.bf16):
                    logp = policy(batch.packed)  # (B, G, T)
                if (
                    batch.old_logp is None
                ):  # one update: pi_old is pi_theta, and the ratio is 1 with a gradient
                    batch.old_logp = logp.detach()
                if batch.log_weights is None:
                    batch.log_weights = log_weights(batch.groups, batch.old_logp, config.group_size)
                if config.estimator != "uncorrected" and batch.log_weights is None:
                    raise UserError(
                        f"--estimator {config.estimator} needs every expert's density, and one of {config.experts} tells none"
                    )
                loss, stats = grpo.ekipl_loss(
                    logp, batch.old_logp, batch.ref_logp, batch.packed.action_mask, batch.advantages,
                    estimator=config.estimator, log_weights=batch.log_weights, clip_eps=config.clip_eps, beta=config.beta,
                )  # fmt: skip
                lap("forward")
                (
                    loss * world.size / total
                ).backward()  # DDP and FSDP take the mean over processes; the loss is a sum over groups
                lap("backward")
            measured.append((batch, loss.detach(), stats))
        for batch, loss, stats in measured:
            loss_sum += loss.item() / total / config.updates_per_batch
            measure(rows, batch, stats)
        norms.append(clip_gradients(policy, config.max_grad_norm))
        if not math.isfinite(norms[-1]):
            raise UserError(f"the gradient is not finite (norm {norms[-1]}): lower --lr")
        optimizer.step()
        lap("optimizer")
    return {
        "rows": [rows[id(group)] for group in groups],
        "loss": loss_sum,
        "grad_norm": sum(norms) / len(norms),
    }


def measure(rows: dict[int, dict], batch: MicroBatch, stats: dict[str, torch.Tensor]) -> None:
    """Adds to `rows`, by group, what the last update saw: (G,) lists for grpo.diagnostics."""
    weights = batch.log_weights.exp() if batch.log_weights is not None else None
    for b, group in enumerate(batch.groups):
        n = len(group.kept)
        rows[id(group)] = {name: values[b, :n].tolist() for name, values in stats.items()}
        rows[id(group)]["weights"] = weights[b, :n].tolist() if weights is not None else None


# ---------------------------------------------------------------------------------------------- the run


def train(config: Config, resume: Path | None, world: World) -> Path:
    """The whole run: returns its directory. Its last checkpoint is runs/NAME/model."""
    deterministic(world)
    take(resume, world)
    room = room_of(config, checkpointing.last_checkpoint(resume) if resume else config.start)
    questions, order = training_states(config, room=room)
    tests = test_sets(config, room=room) if config.eval_every else {}

    def asked(step: int) -> list:
        """This process's states of a step."""
        return [
            questions[i]
            for i in world.mine(order[step * config.batch_size : (step + 1) * config.batch_size])
        ]

    experts = make_experts(config.experts, config, densities=config.estimator != "uncorrected")
    try_out(experts, lambda: asked(0)[0], config.num_samples)
    model = config.start
    try:
        load = dict(temperature=config.temperature, **config.pixels)
        policy = Policy.load(
            checkpointing.last_checkpoint(resume) if resume else model,
            gradient_checkpointing=config.gradient_checkpointing,
            **load,
        )
        if config.freeze_vision:
            policy.freeze_vision()
        policy = world.place(policy, config.parallel, config.bf16)
        reference = (
            world.place(
                Policy.load(model, **load).requires_grad_(False), config.parallel, config.bf16
            )
            if config.beta
            else None
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    plan.check_disk(dataclasses.replace(config, states=len(questions)), policy, resume)
    path = open_run(config, resume, world, *reports([questions, *tests.values()]))
    tests = {name: list(test) for name, test in tests.items()}
    config = dataclasses.replace(
        config, states=len(questions)
    )  # what there is; config.json keeps what was asked for
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    # The engine takes what is left of the GPU when moments and gradients are counted as to come: so
    # before they are there.
    sampler = choice.sampler_of(config, policy, model, room.longest)
    learner = world.data_parallel(policy)
    start = restore(optimizer, resume, world) if resume else 0
    ties = (
        config.ties
        if config.ties != "auto"
        else ("policy_first" if config.estimator == "uncorrected" else "random")
    )

    bar = tqdm(
        total=config.steps,
        initial=start,
        desc=path.name,
        disable=world.rank > 0,
        dynamic_ncols=True,
    )
    if start == 0 and config.eval_every:
        record = {"step": 0, "states": 0, **greedy_accuracy(sampler, tests, world)}
        log(path, [record], [], bar, world)
    watch = Stopwatch(world.device)
    for step in range(start, config.steps):
        # ---- states
        states = asked(step)
        for ahead in range(
            step if step == start else step + AHEAD, min(step + AHEAD + 1, config.steps)
        ):
            run_ahead(experts, lambda: asked(ahead), config.num_samples)
        # ---- actions and their rewards (Eq 4-7)
        seed = random.Random(f"{config.seed} {step} {world.rank}").getrandbits(62)
        expert_seed = random.Random(f"{config.seed} {step}").getrandbits(62)
        groups = total_groups(
            states, sampler, experts, config.num_samples, seed, expert_seed, watch.lap
        )
        sampler.sleep()
        parity = (
            sampler.check_parity(groups)
            if config.parity_every and (step == start or step % config.parity_every == 0)
            else {}
        )
        # ---- the top G, and their advantages (Eq 1)
        select(
            groups, config.group_size, config.advantage, ties, config.selection, random.Random(seed)
        )
        add_expert_logps(groups, experts)
        watch.lap("selection")
        # ---- the update (Eq 2, 3)
        lr = learning_rate(config, step)
        updated = update(config, learner, reference, optimizer, groups, world, lr, watch.lap)
        clear_gradients(learner, optimizer)  # where they go, the engine wakes to so much more room
        sampler.sync_weights()
        watch.lap("sync")
        # ---- evaluate, log, save
        last = step + 1 == config.steps
        record = {"step": step + 1, "states": (step + 1) * config.batch_size}
        record |= step_metrics(world.gather(summary(groups, updated)))
        record |= {
            "loss": sum(world.gather([updated["loss"]])),
            "grad_norm": updated["grad_norm"],
            "lr": lr,
        }
        record |= api_metrics(world.gather([api_counts(experts)]))
        record |= parity
        watch.lap("logging")
        if config.eval_every and ((step + 1) % config.eval_every == 0 or last):
            record |= greedy_accuracy(sampler, tests, world)
            watch.lap("evaluation")
        record |= watch.read()  # logging and saving: those of the step before
        log(path, [record], transcripts(step + 1, groups[: config.log_groups]), bar, world)
        if last or (config.save_every and (step + 1) % config.save_every == 0):
            sampler.sleep()  # whole tensors need room, and of a sharded policy the rollouts may have bfloat16 copies
            save(path, step + 1, policy, optimizer, world)
            if not last:
                sampler.sync_weights()
        watch.lap("logging")
    bar.close()
    sampler.close()
    if (
        world.rank == 0 and start == config.steps
    ):  # killed after the last checkpoint, perhaps before the picture
        curves.draw_run(path / "metrics.jsonl", path.name)
    storage.let_go(path)
    return path


def run(argv: list[str]) -> str:
    transformers_logging.disable_progress_bar()  # of loading and saving: one bar is enough
    config, resume = parse(argv)
    if config.plan:
        return plan.report(config)
    check(config, int(os.environ.get("WORLD_SIZE", 1)), resume is not None)
    world = World.join(config.device)
    path = train(config, resume, world)
    world.leave()
    return f"done: {path}/curves.png shows the run, {path}/time.png its time, {path}/samples.jsonl its groups, {path}/model is the model"


def main() -> None:
    console.command("ekipl.py", run, "--resume RUN goes on from the last checkpoint")


if __name__ == "__main__":
    main()
