"""Supervised fine-tuning: ANS-SFT, CoT-SFT, stage 1 of Reason-RFT (Section 4.1); imitation.

    python sft.py                                        # CoT-SFT on the blocks world
    python sft.py --method answer                        # ANS-SFT
    python sft.py --method rft --experts careful         # on an expert's right samples
    torchrun --nproc_per_node 8 sft.py --preset counting-2b
    python sft.py --resume runs/NAME                     # goes on exactly from the last checkpoint
    python ekipl.py --model runs/NAME/model              # RL from there

    method  prompt asks for         target, ended by EOS                              paper
    cot     a thought and an answer <think>{thought}</think> <answer>{answer}</answer> CoT-SFT
    answer  the answer alone        <answer>{answer}</answer>                          ANS-SFT, tags
    bare    nothing                 {answer}                                           as Reason-RFT
    rft     a thought and an answer the experts' right samples (experts/imitation.py)  ours
    distil  a thought and an answer all their samples                                  ours

The loss is the mean of -log pi_theta over the target tokens of the global batch, by the forward
pass that RL uses (policy.py): a micro-batch's sum is divided by the number of target tokens in the
whole batch over all processes, so micro-batches, accumulation and processes do not change the
gradient. (A mean of the micro-batches' means would give tokens of short targets more weight;
published comparisons of RL with SFT have rested on that.) With --loss-mean action, to compare with
RL's default, it is the mean over targets of the mean over each one's tokens.

rft is rejection-sampling fine-tuning, with experts in the place of the policy that is sampled. A
state has one target, with rft and distil up to G, which share its prompt in the forward pass. A
batch without any target changes no weight. CoT-SFT uses the records that have a thought. Run
directory, checkpoints, resume, learning rate and evaluation are those of ekipl.py.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from experts.settings import ExpertSettings
from training import console, settings
from training.console import UserError
from training.settings import Settings, learning_rate, option

METHODS = {  # that learn from the records, and the mode of the prompt
    "cot": "reason",
    "answer": "answer",
    "bare": "bare",
}


@dataclass
class Config(Settings, ExpertSettings):
    """All settings of a run: training/settings.py, experts/settings.py, and these."""

    method: str = option(
        "cot",
        "what is learnt: cot, a thought and the answer (CoT-SFT); answer, the answer alone in its "
        "tags; bare, the answer as the whole response to the bare question (Reason-RFT's "
        "ANS-SFT; evaluate.py --mode bare); rft, the experts' right samples; distil, all of them "
        "(the other methods ignore --experts, --group-size and all that is about experts)",
        (*METHODS, "rft", "distil"),
    )
    # In the blocks world SFT is best at four times RL's rate (experiments/results).
    lr: float = option(2e-3, "peak learning rate (AdamW; linear warm-up, then cosine to 0)")
    group_size: int = option(
        8, "G: samples learnt per state at most, as many as RL keeps; any of those there are"
    )
    loss_mean: str = option(
        "token",
        "what tokens are averaged over: all target tokens of the batch; or their target, then "
        "targets, as RL's default averages actions",
        ("token", "action"),
    )

    @property
    def imitates(self) -> bool:
        """Whether it is experts that are learnt from, not the records."""
        return self.method not in METHODS

    @property
    def planned(self) -> "Config":
        """The settings as training/plan.py reads them: of responses sampled and learnt."""
        return replace(self, num_samples=1, group_size=self.group_size if self.imitates else 1)


def paper(task: str, size: str) -> dict:
    """The settings of Reason-RFT's scripts, which the paper's baselines adhere to (Section 4.1).

    Where the scripts set nothing: the defaults of LLaMA-Factory, which they call.
    """
    return dict(
        model=f"Qwen/Qwen2-VL-{size}-Instruct",
        data="reason-rft",
        task=task,
        epochs=1,
        lr=1e-5,
        warmup_steps=100,  # whatever the number of steps
        weight_decay=0.1,
        freeze_vision=True,  # LLaMA-Factory's freeze_vision_tower and freeze_multi_modal_projector
        max_grad_norm=1.0,  # the default of transformers
        batch_size=16,  # 8 GPUs x 1 x 2 steps of accumulation
        min_pixels=3136,
        max_pixels=262144,  # LLaMA-Factory's image_max_pixels at that time
        max_new_tokens=768,  # of their evaluation; in training they cut the whole at 4096 tokens
        expert_tokens=4096,  # as in RL, so that its answers in the cache are these
        micro_batch=1,
        gradient_checkpointing=True,
        eval_every=200,
        eval_states=200,
        save_every=200,
    )


PRESETS = settings.presets(paper)


def parse(argv: list[str]) -> tuple[Config, Path | None]:
    """The settings that the command line asks for, and the run to resume if there is one."""
    return settings.parse(Config, PRESETS, __doc__.split("\n\n")[0], argv)


if __name__ == "__main__":  # --help and mistakes do not wait for torch, whose import takes seconds
    console.early("sft.py", settings.glance(parse))

import torch

from data.lengths import room_of
from data.sets import reports, test_sets, training_states
from data.state import State
from ekipl import load_policy
from evaluate import greedy_accuracy
from experts import imitation
from experts.roster import Experts
from policy import Policy, pack
from rollouts import choice
from sampling import Action, Group, Sampler
from training import distributed, plan
from training.checkpointing import model_of, restore, save
from training.disk import check_disk
from training.distributed import World, accumulating, autocast, clear_gradients, clip_gradients
from training.rundir import open_run, take
from training.steplog import StepLog
from training.stopwatch import Stopwatch

# --------------------------------------------------------------------------------------- the loss


def target_text(state: State, method: str) -> str:
    """The response to learn. ValueError if it needs a thought and the state has none."""
    if method == "bare":
        return state.answer
    answer = f"<answer>\n{state.answer}\n</answer>"
    if method == "answer":
        return answer
    if not state.thought:
        raise ValueError(f"the state {state.id} has no thought to learn")
    return f"<think>\n{state.thought}\n</think>\n{answer}"


def examples(policy: Policy, states: list[State], method: str, max_tokens: int) -> list[Group]:
    """Each state with its target as the one action, which is kept; it is cut at max_tokens."""
    result = []
    for state, prompt in zip(states, policy.encode(states), strict=True):
        text = target_text(state, method)
        tokens, truncated = policy.tokens_of(text, max_tokens)
        result.append(Group(state, prompt, [Action(tokens, text, "record", truncated)], kept=[0]))
    return result


def update(
    config: Config, policy, optimizer, batch: list[Group], world: World, lr: float
) -> dict[str, float]:
    """One step of AdamW on this process's shard of a batch, whose kept actions are the targets.

    policy: as World.data_parallel returns it. Returns the batch's loss in nats per token, averaged
    as --loss-mean says, its number of target tokens, both over all processes, and the norm of the
    gradient before clipping.
    Without any target there is no step, and all three are 0.
    """
    ordered = sorted(batch, key=target_tokens)  # less padding
    total = sum(world.gather([target_tokens(group) for group in batch]))
    units = total  # what the mean is over: tokens or targets
    if config.loss_mean == "action":
        units = sum(world.gather([len(group.kept) for group in batch]))
    if not total:
        return {"loss": 0.0, "target_tokens": 0, "grad_norm": 0.0}
    starts = range(0, len(ordered), config.micro_batch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    clear_gradients(policy, optimizer)
    eos_id = getattr(policy, "module", policy).eos_id  # out of DDP's wrapper
    nats = torch.zeros((), device=world.device)  # read once, at the end: reading waits for the GPU
    for start in starts:
        part = ordered[start : start + config.micro_batch]
        with accumulating(policy, last=start == starts[-1]):
            # Every process makes as many passes: a state without target has an EOS that counts 0.
            targets = [group.kept_tokens or [[eos_id]] for group in part]
            packed = pack([group.prompt for group in part], targets).to(world.device)
            counts = torch.tensor([bool(group.kept) for group in part]).to(world.device)  # (B,)
            with autocast(world.device, config.bf16):
                logp = policy(packed)  # (B, G, T), 0 where there is no token
            logp = logp * counts[:, None, None]
            if config.loss_mean == "action":
                logp = logp / packed.action_mask.sum(-1, keepdim=True).clamp(min=1)  # (B, G, 1)
            loss = -logp.sum() / units
            # DDP and FSDP average over processes; the loss is a sum over tokens.
            (loss * world.size).backward()
        nats += loss.detach()
    norm = clip_gradients(policy, config.max_grad_norm)
    if not math.isfinite(norm):
        raise UserError(f"the gradient is not finite (norm {norm}): lower --lr")
    optimizer.step()
    return {"loss": sum(world.gather([nats.item()])), "target_tokens": total, "grad_norm": norm}


def target_tokens(group: Group) -> int:
    return sum(map(len, group.kept_tokens))


def truncated_share(groups: list[dict]) -> float:
    """The share of targets that were cut. groups: the `summary` of each group of a batch."""
    cut = []
    for group in groups:
        cut += [group["truncated"][k] for k in group["kept"]]
    return sum(cut) / max(1, len(cut))


# ---------------------------------------------------------------------------------------- the run


@dataclass
class Run:
    """Everything that the training loop works with."""

    config: Config  # with the real number of states
    path: Path
    states_of: Callable[[int], list[State]]  # this process's states of a step
    tests: dict[str, list[State]]
    experts: Experts | None  # None if it is the records that are learnt
    policy: Policy
    learner: torch.nn.Module  # the policy, in DDP's wrapper if there is one
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    start: int  # steps done by the run that is resumed


def prepare(config: Config, resume: Path | None, world: World) -> Run:
    """Loads all that a run needs and makes its directory, or takes up that of `resume`."""
    distributed.deterministic(world)
    take(resume, world)
    mode = METHODS.get(config.method, "reason")
    model = model_of(config, resume)
    room = room_of(config, model)
    questions, order = training_states(config, mode, config.method == "cot", room)
    tests = test_sets(config, mode, room) if config.eval_every else {}

    def states_of(step: int) -> list[State]:
        batch = order[step * config.batch_size : (step + 1) * config.batch_size]
        return [questions[i] for i in world.shard(batch)]

    experts = Experts(config, False, states_of) if config.imitates else None
    policy = load_policy(config, model, world, resume=resume)
    real = replace(config, states=len(questions))
    check_disk(real, policy, resume)
    path = open_run(config, resume, world, *reports([questions, *tests.values()]))
    tests = {name: list(test) for name, test in tests.items()}
    optimizer = torch.optim.AdamW(policy.parameters(), config.lr, weight_decay=config.weight_decay)
    # Before moments and gradients exist, as in ekipl.py.
    sampler = choice.sampler_of(config, policy, model, room.longest)
    learner = world.data_parallel(policy)
    start = restore(optimizer, resume, world) if resume else 0
    return Run(real, path, states_of, tests, experts, policy, learner, optimizer, sampler, start)


def batch_of(run: Run, step: int) -> list[Group]:
    """This process's states of a step, with the actions to learn."""
    config, states = run.config, run.states_of(step)
    if run.experts is None:
        return examples(run.policy, states, config.method, config.max_new_tokens)
    run.experts.prefetch(step, config.steps)
    return imitation.imitated(run.policy, states, run.experts, config)


def train(config: Config, resume: Path | None, world: World) -> Path:
    """The whole run. Returns its directory; its last checkpoint is runs/NAME/model."""
    run = prepare(config, resume, world)
    config, sampler = run.config, run.sampler
    log = StepLog(config, run.path, run.start, world)
    if run.start == 0 and config.eval_every:
        log.write({"step": 0, "states": 0, **greedy_accuracy(sampler, run.tests, world)})
    sampler.sleep()
    for step in range(run.start, config.steps):
        watch = Stopwatch()
        # ---- targets
        batch = batch_of(run, step)
        groups = world.gather([group.summary() for group in batch])
        lr, done = learning_rate(config, step), step + 1
        record = {"step": done, "states": done * config.batch_size}
        if run.experts is not None:
            record |= imitation.imitation_metrics(groups) | run.experts.metrics(world)
        watch.lap("targets")
        # ---- update
        record |= update(config, run.learner, run.optimizer, batch, world, lr)
        clear_gradients(run.learner, run.optimizer)
        record |= {"truncated": truncated_share(groups), "lr": lr}
        watch.lap("update")
        # ---- evaluate, log, save
        if config.evaluates_after(done):
            sampler.sync_weights()
            record |= greedy_accuracy(sampler, run.tests, world)
            sampler.sleep()
            watch.lap("evaluation")
        log.write(record | watch.read())
        if config.saves_after(done):
            save(run.path, done, run.policy, run.optimizer, world, last=done == config.steps)
    sampler.close()
    log.close()
    return run.path


def run(argv: list[str]) -> str:
    config, resume = parse(argv)
    if config.plan:
        return plan.report(config.planned)
    settings.check(config, int(os.environ.get("WORLD_SIZE", 1)), resume is not None)
    if config.imitates:
        imitation.check(config)
    world = World.join(config.device)
    path = train(config, resume, world)
    world.leave()
    return f"done: {path}/model is the model; python ekipl.py --model {path}/model goes on with RL"


def main() -> None:
    console.command("sft.py", run, "--resume RUN goes on from the last checkpoint")


if __name__ == "__main__":
    main()
