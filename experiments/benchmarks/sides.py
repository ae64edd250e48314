"""The sides of the comparison, each in a process of its own: ours, TRL's GRPOTrainer, plain PyTorch with repeated prompts.

A side builds its trainer once and then makes a step whenever it is told to, so that the sides can take turns. A step is of one kind: "warm-up",
"time", "memory" or "profile" (workload.Recorder). It has two measured phases:

    rollout   from states to actions: pictures and text prepared, `generate` with exactly T tokens an action
    train     log-probs under the reference, forward, backward, clipping of the gradient, AdamW

and "step" is all of it by the wall clock. The actions of a rollout are thrown away; every side trains on the workload's fixed ones. In the first,
where all have the same weights, a side tells the policy's log-probs of those actions, in every step the norm of the gradient.
"""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.utils import logging

from ekipl import Config, update
from experiments.benchmarks import workload
from experiments.benchmarks.workload import Recorder, Workload
from grpo import ekipl_loss, group_advantages
from policy import Policy, pack
from rollouts.transformers_sampler import TransformersSampler
from sampling import Action, Group, select
from training.distributed import World, autocast


class Worker:
    """A side in a process of its own, spawned: it sees nothing of the others. steps: what it will be asked for, in this order."""

    def __init__(self, side: str, work: Workload, path: Path, steps: list[str], threads: int):
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(side, work, path, steps, threads, theirs), daemon=True
        )
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
    """This process's end of the line to the one that says whose turn it is."""

    def __init__(self, connection):
        self.connection, self.device = connection, "cuda" if torch.cuda.is_available() else "cpu"
        self.news: str | dict = "ready"

    def tell(self) -> None:
        self.connection.send(self.news)

    def begin(self, kind: str) -> Recorder:
        """Waits for its turn. Tells of the step before only now: what a side does between two steps must not disturb another side's."""
        self.tell()
        self.connection.recv()
        return Recorder(self.device, kind)

    def end(self, recorder: Recorder, logp: torch.Tensor | None, grad_norm: float) -> None:
        """logp: (B, G, T)."""
        self.news = recorder.record(
            logp=None if logp is None else logp.float().cpu().numpy(), grad_norm=grad_norm
        )


# ---------------------------------------------------------------------------------------------- ours


def ours(work: Workload, path: Path, steps: list[str], turns: Turns) -> None:
    """Policy, TransformersSampler, select and update, as ekipl.py's loop calls them."""
    world = World.join("auto")
    config = Config(
        batch_size=work.states, micro_batch=work.micro_batch, group_size=work.group_size, num_samples=work.group_size, experts="none",
        beta=work.beta, lr=work.lr,
    )  # fmt: skip
    policy = Policy.load(path, gradient_checkpointing=work.gradient_checkpointing).to(world.device)
    reference = Policy.load(path).to(world.device).requires_grad_(False)
    roller = Policy(policy.model, policy.processor).to(world.device).train()
    roller.eos_id = int(policy.suppressed_ids[0])  # never sampled: every action gets all its tokens
    for scorer in (
        policy,
        reference,
    ):  # TRL scores all words, special tokens too; here as well, so that the numbers can be compared
        scorer.suppressed_ids = scorer.suppressed_ids[:0]
    sampler = TransformersSampler(roller, work.action_tokens, bf16=config.bf16)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=work.lr, weight_decay=0.0)
    states, tokens, rewards = (
        workload.make_states(work, policy.processor),
        workload.make_actions(work, policy.tokenizer),
        workload.make_rewards(work),
    )
    for number, kind in enumerate(steps):
        logp = None
        if number == 0:
            with torch.no_grad(), autocast(world.device, config.bf16):
                logp = policy(pack(policy.encode(states), tokens).to(world.device))
        recorder = turns.begin(kind)
        with recorder.phase("rollout"):
            prompts = roller.encode(states)
            sampled = sampler.sample(prompts, work.group_size, seed=number) if work.rollout else []
        assert all(
            len(action.tokens) == work.action_tokens for group in sampled for action in group
        )
        groups = []
        for b, prompt in enumerate(prompts):
            actions = [Action(ids, "", "policy") for ids in tokens[b]]
            groups.append(
                Group(states[b], prompt, actions, format=rewards[b], accuracy=[0.0] * len(actions))
            )
        select(groups, work.group_size, config.advantage, "policy_first", config.selection, None)
        with recorder.phase("train"):
            updated = update(config, policy, reference, optimizer, groups, world, work.lr)
        turns.end(recorder, logp, updated["grad_norm"])


# ---------------------------------------------------------------------------------------------- plain PyTorch


def plain(work: Workload, path: Path, steps: list[str], turns: Turns) -> None:
    """Each action in a row of its own, with its prompt and its picture, all logits at once: what one writes first."""
    device = torch.device(turns.device)
    processor = AutoProcessor.from_pretrained(path)
    processor.tokenizer.padding_side = "left"
    model, reference = (
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).to(device)
        for _ in range(2)
    )
    model.generation_config = GenerationConfig()
    if work.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    G, T = work.group_size, work.action_tokens
    settings = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, num_return_sequences=G, min_new_tokens=T, max_new_tokens=T, suppress_tokens=workload.suppressed_ids(path),
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.lr, weight_decay=0.0)
    states = workload.make_states(work, processor)
    actions = torch.tensor(
        workload.make_actions(work, processor.tokenizer), device=device
    )  # (B, G, T)
    advantages = group_advantages(
        torch.tensor(workload.make_rewards(work), device=device)
    )  # (B, G)

    def inputs(chosen):
        text = [
            processor.apply_chat_template(
                state.messages(), tokenize=False, add_generation_prompt=True
            )
            for state in chosen
        ]
        return processor(
            text=text,
            images=[image for state in chosen for image in state.images],
            padding=True,
            return_tensors="pt",
        ).to(device)

    def logps(network, prompts, ids):
        """(b, G, T) of b prompts, each of them G times."""
        rows = ids.flatten(0, 1)  # (b G, T)
        batch = {
            name: prompts[name].repeat_interleave(G, 0)
            for name in ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        }
        batch["pixel_values"] = (
            prompts["pixel_values"]
            .unflatten(0, (len(ids), -1))
            .repeat_interleave(G, 0)
            .flatten(0, 1)
        )  # pictures are of one size
        batch["input_ids"] = torch.cat([batch["input_ids"], rows], 1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(rows)], 1)
        batch["mm_token_type_ids"] = torch.cat(
            [batch["mm_token_type_ids"], torch.zeros_like(rows)], 1
        )
        with autocast(device, True):
            logits = network(**batch, logits_to_keep=T + 1, use_cache=False).logits[
                :, :-1
            ]  # (b G, T, V)
        return logits.float().log_softmax(-1).gather(-1, rows[..., None]).view(ids.shape)

    for number, kind in enumerate(steps):
        first = None
        recorder = turns.begin(kind)
        with recorder.phase("rollout"):
            model.eval()
            with torch.no_grad(), autocast(device, True):
                if work.rollout:
                    model.generate(**inputs(states), generation_config=settings)
            model.train()
            parts = [
                inputs(states[b : b + work.micro_batch])
                for b in range(0, work.states, work.micro_batch)
            ]
        with recorder.phase("train"):
            optimizer.zero_grad(set_to_none=True)
            for part, ids, advantage in zip(
                parts, actions.split(work.micro_batch), advantages.split(work.micro_batch)
            ):
                with torch.no_grad():
                    ref = logps(reference, part, ids)
                logp = logps(model, part, ids)
                mask = torch.ones_like(ids, dtype=torch.bool)
                (
                    ekipl_loss(logp, logp.detach(), ref, mask, advantage, beta=work.beta)[0]
                    / work.states
                ).backward()
                if number == 0:
                    first = logp.detach() if first is None else torch.cat([first, logp.detach()])
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        turns.end(recorder, first, float(norm))


# ---------------------------------------------------------------------------------------------- TRL


def trl(work: Workload, path: Path, steps: list[str], turns: Turns) -> None:
    """GRPOTrainer.train(), its own loop, with clocks around its methods (trl 1.16.0, trainer/grpo_trainer.py).

    rollout: `_generate` (processor, `generate`, decoding). train: `_get_per_token_logps_and_entropies` under the reference, `compute_loss`,
    `accelerator.backward`, clipping, the optimizer's step. Its second run of the processor, rewards, advantages and shuffling are in "step" only.
    Settings that make it do the same as the others: beta, loss_type "grpo" (tokens averaged within an action), no correction of the KL term;
    one optimizer step for the B x G actions, micro-batches of as many rows. Others are its defaults, its fused AdamW too. It computes each
    token's entropy in every forward pass of training, for its log; that cannot be turned off.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    processor = AutoProcessor.from_pretrained(path)
    states, tokens, rewards = (
        workload.make_states(work, processor),
        workload.make_actions(work, processor.tokenizer),
        workload.make_rewards(work),
    )
    G, T = work.group_size, work.action_tokens
    settings = GRPOConfig(
        output_dir=str(path / "trl"), max_steps=len(steps), use_cpu=turns.device == "cpu", bf16=turns.device == "cuda",
        per_device_train_batch_size=work.micro_batch * G, gradient_accumulation_steps=work.states // work.micro_batch,
        num_generations=G, max_completion_length=T, generation_kwargs={"min_new_tokens": T, "suppress_tokens": workload.suppressed_ids(path)},
        beta=work.beta, loss_type="grpo", use_bias_correction_kl=False, gradient_checkpointing=work.gradient_checkpointing,
        learning_rate=work.lr, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, shuffle_dataset=False,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, seed=work.seed,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )  # fmt: skip
    rows = [
        {
            "prompt": [{"role": "user", "content": state.messages()[0]["content"][-1]["text"]}],
            "images": list(state.images),
        }
        for state in states
    ]
    flat = [reward for group in rewards for reward in group]
    trainer = GRPOTrainer(
        str(path), lambda completions, **_: flat, settings, Dataset.from_list(rows)
    )  # it loads model and processor itself
    trainer.remove_callback(PrinterCallback)
    now: dict = {}  # of this step

    def timed(owner, name, phase):
        method = getattr(owner, name)

        def inside(*arguments, **named):
            with now["recorder"].phase(phase):
                return method(*arguments, **named)

        setattr(owner, name, inside)

    generate, score, clip = (
        trainer._generate_single_turn,
        trainer._get_per_token_logps_and_entropies,
        trainer._clip_grad_norm,
    )

    def fixed_actions(*arguments, **named):
        sampled = generate(*arguments, **named)[0] if work.rollout else []
        assert all(len(ids) == T for ids in sampled)
        return [list(ids) for group in tokens for ids in group], None

    def keep_logps(model, input_ids, *arguments, **named):
        if torch.is_grad_enabled():  # the training pass, timed in compute_loss
            result = score(model, input_ids, *arguments, **named)
            now["logps"] |= {
                tuple(ids): logp
                for ids, logp in zip(input_ids[:, -T:].tolist(), result[0].detach())
            }  # rows are shuffled
            return result
        with now["recorder"].phase("train"):
            return score(model, input_ids, *arguments, **named)

    def keep_norm(model):
        with now["recorder"].phase("train"):
            now["norm"] = clip(model)
        return now["norm"]

    (
        trainer._generate_single_turn,
        trainer._get_per_token_logps_and_entropies,
        trainer._clip_grad_norm,
    ) = fixed_actions, keep_logps, keep_norm
    timed(trainer, "_generate", "rollout")
    timed(trainer, "compute_loss", "train")
    timed(trainer.accelerator, "backward", "train")

    class Turn(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            now.clear()
            now.update(recorder=turns.begin(steps[state.global_step]), logps={})

        def on_pre_optimizer_step(self, *_, **__):
            now["optimizer"] = now["recorder"].phase("train")
            now["optimizer"].__enter__()

        def on_optimizer_step(self, *_, **__):
            now["optimizer"].__exit__(None, None, None)

        def on_step_end(self, args, state, control, **_):
            logp = torch.stack(
                [torch.stack([now["logps"][tuple(ids)] for ids in group]) for group in tokens]
            )  # (B, G, T)
            turns.end(now["recorder"], logp if state.global_step == 1 else None, float(now["norm"]))

    trainer.add_callback(Turn())
    trainer.train()


SIDES = {"ours": ours, "trl": trl, "plain": plain}
