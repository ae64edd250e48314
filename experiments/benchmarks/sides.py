"""The sides of the comparison, each in a process: ours, TRL's GRPOTrainer, plain PyTorch.

A side builds its trainer once and then makes a step whenever it is its turn. A step is of one kind:
"warm-up", "time", "memory" or "profile" (measuring.Recorder). It has two measured phases:

    rollout   from states to actions: pictures and text prepared, `generate` with exactly T tokens
              an action
    train     log-probs under the reference, forward, backward, clipping of the gradient, AdamW

and "step" is all of it by the wall clock. The actions of a rollout are thrown away; every side
trains on the workload's fixed ones. In the first step, where all have the same weights, a side
reports the policy's log-probs of those actions, in every step the norm of the gradient.
"""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.utils import logging

from ekipl import Config, update
from experiments.benchmarks import workload
from experiments.benchmarks.measuring import Recorder
from experiments.benchmarks.trl_side import trl
from experiments.benchmarks.workload import Workload
from grpo import ekipl_loss, group_advantages
from policy import Policy, pack
from rollouts.transformers_sampler import TransformersSampler
from sampling import Action, Group, select
from training.distributed import World, autocast


class Worker:
    """A side in a process of its own, spawned: it sees nothing of the others.

    steps: the kinds of its steps, in order.
    """

    def __init__(self, side: str, work: Workload, path: Path, steps: list[str], threads: int):
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (side, work, path, steps, threads, theirs)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # else the end of the process would not end our waiting
        self.connection.recv()  # everything is loaded

    def step(self) -> dict:
        """The record of the next step. EOFError if the process died."""
        self.connection.send("go")
        return self.connection.recv()

    def close(self) -> None:
        self.process.join()


def serve(
    side: str, work: Workload, path: Path, steps: list[str], threads: int, connection
) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(threads)
    torch.manual_seed(work.seed)
    turns = Turns(connection)
    SIDES[side](work, path, steps, turns)
    turns.tell()


class Turns:
    """This process's end of the connection to the parent, which gives the turns."""

    def __init__(self, connection):
        self.connection, self.device = connection, "cuda" if torch.cuda.is_available() else "cpu"
        self.news: str | dict = "ready"

    def tell(self) -> None:
        self.connection.send(self.news)

    def begin(self, kind: str) -> Recorder:
        """Reports the step before and waits for the next turn.

        It reports no earlier: a side must not disturb another one's step between two of its own.
        """
        self.tell()
        self.connection.recv()
        return Recorder(self.device, kind)

    def end(self, recorder: Recorder, logp: torch.Tensor | None, grad_norm: float) -> None:
        """logp: (B, G, T)."""
        logp = None if logp is None else logp.float().cpu().numpy()
        self.news = recorder.record(logp=logp, grad_norm=grad_norm)


def ours(work: Workload, path: Path, steps: list[str], turns: Turns) -> None:
    """Policy, TransformersSampler, select and update, as ekipl.py's loop calls them."""
    world = World.join("auto")
    config = Config(
        batch_size=work.states,
        micro_batch=work.micro_batch,
        group_size=work.group_size,
        num_samples=work.group_size,
        experts="none",
        beta=work.beta,
        lr=work.lr,
    )
    policy = Policy.load(path, gradient_checkpointing=work.gradient_checkpointing).to(world.device)
    reference = Policy.load(path).to(world.device).requires_grad_(False)
    roller = Policy(policy.model, policy.processor).to(world.device).train()
    roller.eos_id = int(policy.suppressed_ids[0])  # never sampled: every action gets all its tokens
    # TRL scores special tokens too; here as well, so that the numbers can be compared.
    for scorer in (policy, reference):
        scorer.suppressed_ids = scorer.suppressed_ids[:0]
    sampler = TransformersSampler(roller, work.action_tokens, bf16=config.bf16)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=work.lr, weight_decay=0.0)
    states = workload.make_states(work, policy.processor)
    tokens, rewards = workload.make_actions(work, policy.tokenizer), workload.make_rewards(work)
    for number, kind in enumerate(steps):
        logp = None
        if number == 0:
            with torch.no_grad(), autocast(world.device, config.bf16):
                logp = policy(pack(policy.encode(states), tokens).to(world.device))
        recorder = turns.begin(kind)
        with recorder.phase("rollout"):
            prompts = roller.encode(states)
            sampled = sampler.sample(prompts, work.group_size, seed=number) if work.rollout else []
        for group in sampled:
            assert all(len(action.tokens) == work.action_tokens for action in group)
        groups = []
        for b, prompt in enumerate(prompts):
            actions = [Action(ids, "", "policy") for ids in tokens[b]]
            wrong = [0.0] * len(actions)
            groups.append(Group(states[b], prompt, actions, format=rewards[b], accuracy=wrong))
        select(groups, work.group_size, config.advantage, "policy_first", config.selection, None)
        with recorder.phase("train"):
            updated = update(config, policy, reference, optimizer, groups, world, work.lr)
        turns.end(recorder, logp, updated["grad_norm"])


class Plain:
    """Each action in a row of its own, with its prompt and its picture, all logits at once: the
    first version that one would write.
    """

    def __init__(self, work: Workload, path: Path, device: torch.device):
        self.work, self.device = work, device
        self.processor = AutoProcessor.from_pretrained(path)
        self.processor.tokenizer.padding_side = "left"
        self.model, self.reference = (
            AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).to(device)
            for _ in range(2)
        )
        self.model.generation_config = GenerationConfig()
        if work.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.settings = GenerationConfig(
            do_sample=True,
            top_k=0,
            top_p=1.0,
            num_return_sequences=work.group_size,
            min_new_tokens=work.action_tokens,
            max_new_tokens=work.action_tokens,
            suppress_tokens=workload.suppressed_ids(path),
            eos_token_id=self.processor.tokenizer.eos_token_id,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=work.lr, weight_decay=0.0)
        self.states = workload.make_states(work, self.processor)
        tokens = workload.make_actions(work, self.processor.tokenizer)
        self.actions = torch.tensor(tokens, device=device)  # (B, G, T)
        rewards = torch.tensor(workload.make_rewards(work), device=device)  # (B, G)
        self.advantages = group_advantages(rewards)  # (B, G)

    def inputs(self, states):
        return workload.inputs_of(states, self.processor).to(self.device)

    def logps(self, network, prompts, ids: torch.Tensor) -> torch.Tensor:
        """Log-probs of b prompts' actions, (b, G, T); each prompt is there G times. ids: alike."""
        G, T = self.work.group_size, self.work.action_tokens
        rows = ids.flatten(0, 1)  # (b G, T)
        names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        batch = {name: prompts[name].repeat_interleave(G, 0) for name in names}
        pixels = prompts["pixel_values"].unflatten(0, (len(ids), -1))  # pictures are of one size
        batch["pixel_values"] = pixels.repeat_interleave(G, 0).flatten(0, 1)
        ones, zeros = torch.ones_like(rows), torch.zeros_like(rows)
        batch["input_ids"] = torch.cat([batch["input_ids"], rows], 1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], ones], 1)
        batch["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], zeros], 1)
        with autocast(self.device, True):
            logits = network(**batch, logits_to_keep=T + 1, use_cache=False).logits
        logits = logits[:, :-1]  # (b G, T, V)
        return logits.float().log_softmax(-1).gather(-1, rows[..., None]).view(ids.shape)

    def rollout(self) -> list:
        """Generates, and returns the inputs of the micro-batches."""
        self.model.eval()
        if self.work.rollout:
            with torch.no_grad(), autocast(self.device, True):
                self.model.generate(**self.inputs(self.states), generation_config=self.settings)
        self.model.train()
        starts = range(0, self.work.states, self.work.micro_batch)
        return [self.inputs(self.states[b : b + self.work.micro_batch]) for b in starts]

    def train(self, parts: list) -> tuple[torch.Tensor, float]:
        """Log-probs before the step, (B, G, T), and the norm of the gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        work, logps = self.work, []
        chunks = self.actions.split(work.micro_batch), self.advantages.split(work.micro_batch)
        for part, ids, advantage in zip(parts, *chunks):
            with torch.no_grad():
                ref = self.logps(self.reference, part, ids)
            logp = self.logps(self.model, part, ids)
            mask = torch.ones_like(ids, dtype=torch.bool)
            loss = ekipl_loss(logp, logp.detach(), ref, mask, advantage, beta=work.beta)[0]
            (loss / work.states).backward()
            logps.append(logp.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return torch.cat(logps), float(norm)


def plain(work: Workload, path: Path, steps: list[str], turns: Turns) -> None:
    """Plain PyTorch (`Plain`)."""
    side = Plain(work, path, torch.device(turns.device))
    for number, kind in enumerate(steps):
        recorder = turns.begin(kind)
        with recorder.phase("rollout"):
            parts = side.rollout()
        with recorder.phase("train"):
            logps, norm = side.train(parts)
        turns.end(recorder, logps if number == 0 else None, norm)


SIDES = {"ours": ours, "trl": trl, "plain": plain}
