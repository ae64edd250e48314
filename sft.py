"""Supervised fine-tuning on given responses: the baselines ANS-SFT and CoT-SFT, and stage 1 of Reason-RFT (paper, Section 4.1).

    python sft.py                                        # CoT-SFT on the blocks world
    python sft.py --method answer                        # ANS-SFT
    torchrun --nproc_per_node 8 sft.py --preset counting-2b
    python sft.py --resume runs/NAME                     # goes on exactly where the last checkpoint was
    python ekipl.py --model runs/NAME/model              # RL from there

    method    prompt asks for          target                                                        paper
    cot       a thought and an answer  <think>{thought}</think> <answer>{answer}</answer>, then EOS  CoT-SFT
    answer    the answer alone         <answer>{answer}</answer>, then EOS                           ANS-SFT, with tags as in RL
    bare      nothing                  {answer}, then EOS                                            ANS-SFT, as Reason-RFT's

The loss is the mean of -log pi_theta over the target tokens of the global batch, by the forward pass that RL uses (policy.py): the sum over
a micro-batch, divided by the number of target tokens in the whole batch over all processes, which is known before the first
forward pass. So micro-batches, accumulation and processes do not change the gradient. (A mean in each micro-batch, averaged, would give tokens of
short targets a greater weight; published comparisons of RL with SFT have rested on that.)

Run directory, checkpoints, resume, learning rate and evaluation are ekipl.py's. Of a training set whose records have no thoughts CoT-SFT
uses those that have one.
"""

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import blocks  # noqa: F401  makes --data blocks known
from data.lengths import room_of
from data.sets import reports, test_sets, training_states
from data.state import State
from evaluate import greedy_accuracy
from policy import Policy, Prompt, pack
from rollouts import choice
from training import checkpointing, console, curves, distributed, plan, rundir, settings, storage
from training.console import UserError
from training.distributed import World, accumulating, autocast, clear_gradients, clip_gradients
from training.settings import Settings, option

METHODS = {  # and what the prompt asks for (data.MODES)
    "cot": "reason",
    "answer": "answer",
    "bare": "bare",
}


@dataclass
class Config(Settings):
    """All settings of a run: those of settings.py, and this one."""

    method: str = option(
        "cot",
        "what is learnt: a thought and the answer (CoT-SFT), or the answer alone (ANS-SFT), in its tags, or bare as the response to the "
        "bare question (Reason-RFT's ANS-SFT; evaluate.py --mode bare)",
        tuple(METHODS),
    )


def paper(task: str, size: str) -> dict:
    """The paper's SFT baselines are Reason-RFT's (Section 4.1, "adhering to the settings in
    [52]"): these are its scripts' settings, and where they say nothing the defaults of
    LLaMA-Factory, which they call."""
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
        max_new_tokens=768,  # their limit when they evaluate; they cut prompt and target at 4096 tokens together
        micro_batch=1,
        gradient_checkpointing=True,
        eval_every=200,
        eval_states=200,
        save_every=200,
    )


PRESETS = settings.presets(paper)


def parse(argv: list[str]) -> tuple[Config, Path | None]:
    """The settings that the command line asks for, and the run to resume if it does."""
    return settings.parse(Config, PRESETS, __doc__.split("\n\n")[0], argv)


# ---------------------------------------------------------------------------------------------- the loss


@dataclass
class Example:
    """A prompt and the response to learn. tokens: ends with EOS unless truncated."""

    prompt: Prompt
    tokens: list[int]
    truncated: bool


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


def examples(policy: Policy, states: list[State], method: str, max_tokens: int) -> list[Example]:
    """Prompts and targets as tokens. What the policy cannot say (special tokens) is left out of a target, which is cut at max_tokens."""
    banned = set(policy.suppressed_ids.tolist()) | {policy.eos_id}
    made = []
    for state, prompt in zip(states, policy.encode(states), strict=True):
        ids = policy.tokenizer(target_text(state, method), add_special_tokens=False).input_ids
        tokens = [token for token in ids if token not in banned] + [policy.eos_id]
        made.append(Example(prompt, tokens[:max_tokens], len(tokens) > max_tokens))
    return made


def update(
    config: Config, policy, optimizer, batch: list[Example], world: World, lr: float
) -> dict:
    """One step of AdamW on this process's share of a batch.

    policy: as World.data_parallel returns it. Returns the batch's loss in nats per token, over all processes, how many
    tokens were learnt, and the norm of the gradient before clipping.
    """
    device = world.device
    total = sum(
        world.gather([len(example.tokens) for example in batch])
    )  # target tokens, over all processes
    order = sorted(
        range(len(batch)), key=lambda i: len(batch[i].tokens)
    )  # similar lengths together: less padding
    micro = [
        [batch[i] for i in order[start : start + config.micro_batch]]
        for start in range(0, len(order), config.micro_batch)
    ]
    for group in optimizer.param_groups:
        group["lr"] = lr
    clear_gradients(policy, optimizer)
    nats = torch.zeros((), device=device)  # read once, at the end: reading waits for the GPU
    for i, part in enumerate(micro):
        with accumulating(policy, last=i == len(micro) - 1):
            packed = pack(
                [example.prompt for example in part], [[example.tokens] for example in part]
            ).to(device)
            with autocast(device, config.bf16):
                logp = policy(packed)  # (B, 1, T), 0 where there is no token
            loss = -logp.sum() / total
            (
                loss * world.size
            ).backward()  # DDP and FSDP take the mean over processes; the loss is a sum over tokens
        nats += loss.detach()
    norm = clip_gradients(policy, config.max_grad_norm)
    if not math.isfinite(norm):
        raise UserError(f"the gradient is not finite (norm {norm}): lower --lr")
    optimizer.step()
    return {"loss": sum(world.gather([nats.item()])), "target_tokens": total, "grad_norm": norm}


# ---------------------------------------------------------------------------------------------- the run


def train(config: Config, resume: Path | None, world: World) -> Path:
    """The whole run: returns its directory. Its last checkpoint is runs/NAME/model."""
    distributed.deterministic(world)
    rundir.take(resume, world)
    mode = METHODS[config.method]
    start = checkpointing.last_checkpoint(resume) if resume else config.start
    room = room_of(config, start)
    questions, order = training_states(config, mode, config.method == "cot", room)
    tests = test_sets(config, mode, room) if config.eval_every else {}
    try:
        policy = Policy.load(
            start, gradient_checkpointing=config.gradient_checkpointing, **config.pixels
        )
        if config.freeze_vision:
            policy.freeze_vision()
        policy = world.place(policy, config.parallel, config.bf16)
    except ValueError as error:
        raise UserError(str(error)) from None
    plan.check_disk(dataclasses.replace(config, states=len(questions)), policy, resume)
    path = rundir.open_run(config, resume, world, *reports([questions, *tests.values()]))
    tests = {name: list(test) for name, test in tests.items()}
    config = dataclasses.replace(
        config, states=len(questions)
    )  # what there is; config.json keeps what was asked for
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    # Before moments and gradients are there, as in ekipl.py.
    sampler = choice.sampler_of(config, policy, str(start), room.longest)
    learner = world.data_parallel(policy)
    done = checkpointing.restore(optimizer, resume, world) if resume else 0

    bar = tqdm(
        total=config.steps, initial=done, desc=path.name, disable=world.rank > 0, dynamic_ncols=True
    )
    if done == 0 and config.eval_every:
        rundir.log(
            path,
            [{"step": 0, "states": 0, **greedy_accuracy(sampler, tests, world)}],
            [],
            bar,
            world,
        )
    sampler.sleep()
    for step in range(done, config.steps):
        clock = [time.perf_counter()]
        share = world.mine(order[step * config.batch_size : (step + 1) * config.batch_size])
        batch = examples(
            policy, [questions[i] for i in share], config.method, config.max_new_tokens
        )
        lr = settings.learning_rate(config, step)
        record = {"step": step + 1, "states": (step + 1) * config.batch_size}
        record |= update(config, learner, optimizer, batch, world, lr)
        clear_gradients(learner, optimizer)
        truncated = world.gather([float(example.truncated) for example in batch])
        clock.append(time.perf_counter())
        record |= {
            "truncated": sum(truncated) / len(truncated),
            "lr": lr,
            "seconds/update": clock[1] - clock[0],
        }
        last = step + 1 == config.steps
        if config.eval_every and ((step + 1) % config.eval_every == 0 or last):
            sampler.sync_weights()
            record |= greedy_accuracy(sampler, tests, world)
            sampler.sleep()
            record["seconds/evaluation"] = time.perf_counter() - clock[1]
        rundir.log(path, [record], [], bar, world)
        if last or (config.save_every and (step + 1) % config.save_every == 0):
            checkpointing.save(path, step + 1, policy, optimizer, world)
    bar.close()
    sampler.close()
    if (
        world.rank == 0 and done == config.steps
    ):  # killed after the last checkpoint, perhaps before the picture
        curves.draw_run(path / "metrics.jsonl", path.name)
    storage.let_go(path)
    return path


def run(argv: list[str]) -> str:
    transformers_logging.disable_progress_bar()  # of loading and saving: one bar is enough
    config, resume = parse(argv)
    if config.plan:
        return plan.report(config)
    settings.check(config, int(os.environ.get("WORLD_SIZE", 1)), resume is not None)
    world = World.join(config.device)
    path = train(config, resume, world)
    world.leave()
    return f"done: {path}/model is the model; python ekipl.py --model {path}/model goes on with RL"


def main() -> None:
    console.command("sft.py", run, "--resume RUN goes on from the last checkpoint")


if __name__ == "__main__":
    main()
