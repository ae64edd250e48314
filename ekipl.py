"""Vision-EKIPL: GRPO on the best actions of the policy and of experts (Sections 3.2 and 4.1).

    python ekipl.py                             # the blocks world: minutes, no GPU, no key
    python ekipl.py --experts none              # plain GRPO
    torchrun --nproc_per_node 8 ekipl.py ...    # 8 processes, one GPU each; --parallel fsdp shards
    python ekipl.py --resume runs/NAME          # resumes from the last checkpoint

    states -> N actions of the policy + N of each expert (Eq 4-6) -> rewards (Eq 7) -> top G
           -> advantages (Eq 1) -> log-probs of the kept actions, policy and reference
           -> loss (Eq 2, 3; estimator A, B or C) -> AdamW

The batch is global: micro-batches, accumulation and processes do not change the gradient. Every
random number follows from seed, step and process: on a CPU a resumed run equals one never stopped.
"""

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from experts.settings import MixtureSettings
from training import console, method, settings
from training.console import UserError
from training.method import MethodSettings
from training.presets import PRESETS
from training.settings import Settings, learning_rate, option

# --------------------------------------------------------------------------------------- settings


@dataclass
class Config(Settings, MixtureSettings, MethodSettings):
    """All settings of a run; training/method.py has those of the method itself."""

    parity_every: int = option(
        20, "compare vLLM's log-probs with the policy's at first and every so many steps; 0: never"
    )
    log_groups: int = option(2, "whole groups per step written to samples.jsonl")


def parse(argv: list[str]) -> tuple[Config, Path | None]:
    """The settings that the command line asks for, and the run to resume if there is one."""
    return settings.parse(Config, PRESETS, __doc__.split("\n\n")[0], argv)


if __name__ == "__main__":  # --help and mistakes do not wait for torch, whose import takes seconds
    console.early("ekipl.py", settings.glance(parse))

import torch
from torch.nn.utils.rnn import pad_sequence

import grpo
from data.lengths import room_of
from data.sets import reports, test_sets, training_states
from data.state import State
from evaluate import greedy_accuracy
from experts import roster
from policy import PackedBatch, Policy, pack
from rollouts import choice
from sampling import Group, add_expert_logps, give_rewards, group_log_weights, select, total_groups
from training import distributed, lora, plan
from training.checkpointing import last_checkpoint, model_of, restore, save
from training.disk import check_disk
from training.distributed import World, accumulating, autocast, clear_gradients, clip_gradients
from training.metrics import step_metrics
from training.neighbours import EXPERT_TERMS, action_length
from training.rundir import open_run, take
from training.steplog import StepLog
from training.stopwatch import Stopwatch


def check(config: Config, world: int, resuming: bool) -> None:
    """UserError for settings that cannot work, before anything is loaded."""
    experts = roster.check(config, config.estimator)
    settings.check(config, world, resuming)
    settings.must(config, 0, "expert_steps", "parity_every", "log_groups")
    method.check(config, len(experts))


# ------------------------------------------------------------------------------------- the update


@dataclass
class MicroBatch:
    """Some groups, packed, and the tensors of their kept actions that no update changes."""

    groups: list[Group]
    packed: PackedBatch
    advantages: torch.Tensor  # (B, G)
    expert: torch.Tensor  # (B, G), true on an expert's action
    ref_logp: torch.Tensor | None  # (B, G, T)
    old_logp: torch.Tensor | None = None  # (B, G, T); None until the policy has scored the batch
    log_w: torch.Tensor | None = None  # (B, G), log w_S; None where a density is unknown

    def set_old(self, old_logp: torch.Tensor, config: Config) -> None:
        """pi_old of the actions, and the weights w_S that follow from it (A.5)."""
        self.old_logp = old_logp
        self.log_w = group_log_weights(self.groups, old_logp, config.group_size)
        if config.corrected and self.log_w is None:
            raise UserError(f"--estimator {config.estimator} needs the density of every expert")

    def measure(self, stats: dict[str, torch.Tensor]) -> None:
        """Sets `measured` of each group. stats: (B, G) each, as ekipl_loss returns them."""
        columns = dict(stats, weights=None if self.log_w is None else self.log_w.exp())
        for b, group in enumerate(self.groups):
            for name, values in columns.items():
                known = values is not None
                group.measured[name] = values[b, : len(group.kept)].tolist() if known else None


def micro_batches(config, reference, groups: list[Group], device, watch) -> list[MicroBatch]:
    """The groups in micro-batches of similar lengths (less padding), scored by the reference."""
    ordered = sorted(groups, key=lambda group: sum(map(len, group.kept_tokens)))
    batches = []
    for start in range(0, len(ordered), config.micro_batch):
        chosen = ordered[start : start + config.micro_batch]
        packed = pack([group.prompt for group in chosen], [group.kept_tokens for group in chosen])
        packed = packed.to(device)
        watch.lap("packing")
        with torch.no_grad(), autocast(device, config.bf16):
            ref_logp = None if reference is None else reference(packed)  # (B, G, T)
        watch.lap("reference")
        rows = [torch.tensor(group.advantages) for group in chosen]
        advantages = pad_sequence(rows, batch_first=True).to(device)  # (B, G)
        rows = [torch.tensor(group.kept_of_experts) for group in chosen]
        expert = pad_sequence(rows, batch_first=True).to(device)  # (B, G)
        batches.append(MicroBatch(chosen, packed, advantages, expert, ref_logp))
    return batches


def update(
    config: Config, policy, reference, optimizer, groups, world: World, lr: float, watch=None
) -> dict[str, float]:
    """Eq 2 and 3 on the kept actions of this process's groups; `updates_per_batch` steps of AdamW.

    policy: as World.data_parallel returns it. reference: as Run has it. Returns the loss (of
    these groups, over the global number) and the gradient's norm before clipping, means over
    updates. Sets groups' `measured`.
    """
    device, watch = world.device, watch or Stopwatch(world.device)
    batches = micro_batches(config, reference, groups, device, watch)
    tokens = 0.0  # of a group, mean over the global batch
    if config.loss_mean == "token":
        own = sum(sum(map(len, group.kept_tokens)) for group in groups)
        tokens = sum(world.gather([own])) / config.batch_size
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr
    loss_sum, norms = 0.0, []
    for number in range(config.updates_per_batch):
        clear_gradients(policy, optimizer)
        if number == 0 and config.updates_per_batch > 1:  # pi_old: the policy before all updates
            with torch.no_grad(), autocast(device, config.bf16):
                for batch in batches:
                    batch.set_old(policy(batch.packed), config)
            watch.lap("forward")
        results = []
        for batch in batches:
            with accumulating(policy, last=batch is batches[-1]):
                loss, stats = loss_of(config, policy, batch, device, tokens)
                watch.lap("forward")
                # DDP and FSDP average over processes; the loss is a sum over groups.
                (loss * world.size / config.batch_size).backward()
                watch.lap("backward")
            results.append((batch, loss.detach(), stats))
        for batch, loss, stats in results:  # now: to read numbers is to wait for the GPU
            loss_sum += loss.item() / config.batch_size / config.updates_per_batch
            batch.measure(stats)
        norms.append(clip_gradients(policy, config.max_grad_norm))
        if not math.isfinite(norms[-1]):
            raise UserError(f"the gradient is not finite (norm {norms[-1]}): lower --lr")
        optimizer.step()
        watch.lap("optimizer")
    return {"loss": loss_sum, "grad_norm": sum(norms) / len(norms)}


def loss_of(config: Config, policy, batch: MicroBatch, device: torch.device, tokens: float):
    """Loss and statistics as grpo.ekipl_loss returns them. tokens: as action_length takes them."""
    with autocast(device, config.bf16):
        logp = policy(batch.packed)  # (B, G, T)
    if batch.old_logp is None:  # one update: pi_old is pi_theta, the ratio is 1 with a gradient
        batch.set_old(logp.detach(), config)
    mask = batch.packed.action_mask  # (B, G, T)
    term = EXPERT_TERMS[config.expert_loss]
    return grpo.ekipl_loss(
        logp,
        batch.old_logp,
        batch.ref_logp,
        mask,
        batch.advantages,
        estimator=config.estimator,
        log_weights=batch.log_w,
        clip_eps=config.clip_eps,
        beta=config.beta,
        length=action_length(config.loss_mean, mask, tokens, config.max_new_tokens),
        expert=(batch.expert, term) if term else None,
    )


# ---------------------------------------------------------------------------------------- the run


@dataclass
class Run:
    """Everything that the training loop works with."""

    config: Config  # with the real number of states
    path: Path
    states_of: Callable[[int], list[State]]  # this process's states of a step
    tests: dict[str, list[State]]
    experts: roster.Experts
    policy: Policy
    reference: Callable[[PackedBatch], torch.Tensor] | None  # (B, G, T), no gradient
    learner: torch.nn.Module  # the policy, in DDP's wrapper if there is one
    optimizer: torch.optim.Optimizer
    sampler: choice.Sampler
    start: int  # steps done by the run that is resumed


def load_policy(config, path, world, temperature=1.0, trained=True, resume=None) -> Policy:
    """The model at `path`, or a shard of it, with `resume`'s adapter. UserError if damaged."""
    options = dict(config.pixels, gradient_checkpointing=trained and config.gradient_checkpointing)
    options["dtype"] = lora.frozen_dtype(config, world.device)
    try:
        policy = Policy.load(path, temperature=temperature, **options)
        if not trained:
            policy.requires_grad_(False)
        elif config.lora_rank:
            lora.add_adapter(policy.model, config, last_checkpoint(resume) if resume else None)
        elif config.freeze_vision:
            policy.freeze_vision()
        return world.place(policy, config.parallel, config.bf16)
    except ValueError as error:
        raise UserError(str(error)) from None


def prepare(config: Config, resume: Path | None, world: World) -> Run:
    """Loads all that a run needs and makes its directory, or takes up that of `resume`."""
    distributed.deterministic(world)
    take(resume, world)
    model = model_of(config, resume)
    room = room_of(config, model)
    questions, order = training_states(config, room=room)
    tests = test_sets(config, room=room) if config.eval_every else {}

    def states_of(step: int) -> list[State]:
        batch = order[step * config.batch_size : (step + 1) * config.batch_size]
        return [questions[i] for i in world.shard(batch)]

    experts = roster.Experts(config, config.corrected, states_of, config.expert_steps)
    policy, reference = load_policy(config, model, world, config.temperature, resume=resume), None
    if config.beta and config.lora_rank:
        reference = lora.without_adapter(policy)
    elif config.beta:
        reference = load_policy(config, config.start, world, config.temperature, trained=False)
    real = replace(config, states=len(questions))
    check_disk(real, policy, resume)
    path = open_run(config, resume, world, *reports([questions, *tests.values()]))
    tests = {name: list(test) for name, test in tests.items()}
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, weight_decay=config.weight_decay)
    # Before moments and gradients exist, which vLLM leaves room for.
    sampler = choice.sampler_of(config, policy, config.start, room.longest)
    learner = world.data_parallel(policy)
    start = restore(optimizer, resume, world) if resume else 0
    return Run(
        real, path, states_of, tests, experts, policy, reference, learner, optimizer, sampler, start
    )


def train_step(run: Run, step: int, world: World, watch: Stopwatch) -> tuple[list[Group], dict]:
    """One step of the method. Returns this process's groups and the record of metrics.jsonl."""
    config, sampler, experts = run.config, run.sampler, run.experts
    # ---- rollouts: N actions of the policy and of each expert (Eq 4-6)
    seed = random.Random(f"{config.seed} {step} {world.rank}").getrandbits(62)
    expert_seed = random.Random(f"{config.seed} {step}").getrandbits(62)
    experts.prefetch(step, config.steps)
    states, joining = run.states_of(step), experts.at(step)
    groups = total_groups(states, sampler, joining, config.num_samples, seed, expert_seed, watch)
    # ---- rewards (Eq 7)
    give_rewards(groups)
    if config.experts_when == "unsolved":
        roster.drop_where_solved(groups)
    watch.lap("rewards")
    sampler.sleep()
    due = config.parity_every and (step == run.start or step % config.parity_every == 0)
    parity = sampler.check_parity(groups) if due else {}
    # ---- selection: the top G, and their advantages (Eq 1)
    how = (config.advantage, config.tie_rule, config.selection, random.Random(seed))
    select(groups, config.group_size, *how, config.advantage_std)
    add_expert_logps(groups, experts)
    watch.lap("selection")
    # ---- update (Eq 2, 3)
    lr = learning_rate(config, step)
    result = update(config, run.learner, run.reference, run.optimizer, groups, world, lr, watch)
    clear_gradients(run.learner, run.optimizer)  # free this memory before vLLM wakes
    sampler.sync_weights()
    watch.lap("sync")
    record = {"step": step + 1, "states": (step + 1) * config.batch_size}
    record |= step_metrics(world.gather([group.summary() for group in groups]))
    record |= {"loss": sum(world.gather([result["loss"]])), "grad_norm": result["grad_norm"]}
    return groups, record | {"lr": lr} | experts.metrics(world) | parity


def train(config: Config, resume: Path | None, world: World) -> Path:
    """The whole run (A.6). Returns its directory; its last checkpoint is runs/NAME/model."""
    run = prepare(config, resume, world)
    config, sampler = run.config, run.sampler
    log = StepLog(config, run.path, run.start, world)
    if run.start == 0 and config.eval_every:
        log.write({"step": 0, "states": 0, **greedy_accuracy(sampler, run.tests, world)})
    watch = Stopwatch(world.device)
    for step in range(run.start, config.steps):
        groups, record = train_step(run, step, world, watch)
        watch.lap("logging")
        done = step + 1
        if config.evaluates_after(done):
            record |= greedy_accuracy(sampler, run.tests, world)
            watch.lap("evaluation")
        record |= watch.read()  # logging and saving: those of the step before
        log.write(record, groups[: config.log_groups])
        if config.saves_after(done):
            sampler.sleep()  # full tensors need the memory that gathered copies may hold
            save(run.path, done, run.policy, run.optimizer, world, last=done == config.steps)
            if done < config.steps:
                sampler.sync_weights()
        watch.lap("logging")
    sampler.close()
    log.close()
    return run.path


def run(argv: list[str]) -> str:
    config, resume = parse(argv)
    if config.plan:
        return plan.report(config)
    check(config, int(os.environ.get("WORLD_SIZE", 1)), resume is not None)
    world = World.join(config.device)
    path = train(config, resume, world)
    world.leave()
    return f"done: {path} has curves.png, time.png, samples.jsonl (groups) and model, the policy"


def main() -> None:
    console.command("ekipl.py", run, "--resume RUN goes on from the last checkpoint")


if __name__ == "__main__":
    main()
