"""TRL's side of the comparison: GRPOTrainer.train(), its own loop, with clocks around its methods.

Written for trl 1.16.0, trainer/grpo_trainer.py.

    rollout   `_generate` (processor, `generate`, decoding)
    train     `_get_per_token_logps_and_entropies` under the reference, `compute_loss`,
              `accelerator.backward`, clipping, the optimizer's step

Its second run of the processor, rewards, advantages and shuffling are in "step" only. Settings that
make it do the same as the others: beta, loss_type "grpo" (tokens averaged within an action), no
correction of the KL term; one optimizer step for the B x G actions, micro-batches of as many rows.
Others are its defaults, its fused AdamW too. It computes each token's entropy in every forward pass
of training, for its log; that cannot be turned off.
"""

from pathlib import Path

import torch
from transformers import AutoProcessor, PrinterCallback, TrainerCallback

from experiments.benchmarks import workload
from experiments.benchmarks.workload import Workload


class Turn(TrainerCallback):
    """Begins and ends the steps of the trainer, and holds the figures of the present one."""

    def __init__(self, steps: list[str], turns, tokens: list[list[list[int]]]):
        self.steps, self.turns, self.tokens = steps, turns, tokens
        self.logps: dict[tuple, torch.Tensor] = {}  # by action: the trainer shuffles the rows
        self.norm = 0.0

    def on_step_begin(self, args, state, control, **_):
        self.logps.clear()
        self.recorder = self.turns.begin(self.steps[state.global_step])

    def on_pre_optimizer_step(self, *_, **__):
        self.optimizer = self.recorder.phase("train")
        self.optimizer.__enter__()

    def on_optimizer_step(self, *_, **__):
        self.optimizer.__exit__(None, None, None)

    def on_step_end(self, args, state, control, **_):
        groups = []
        for group in self.tokens:
            groups.append(torch.stack([self.logps[tuple(ids)] for ids in group]))  # (G, T)
        first = torch.stack(groups) if state.global_step == 1 else None  # (B, G, T)
        self.turns.end(self.recorder, first, float(self.norm))

    def time(self, owner, name: str, phase: str) -> None:
        """Puts a clock around a method."""
        method = getattr(owner, name)

        def timed(*arguments, **named):
            with self.recorder.phase(phase):
                return method(*arguments, **named)

        setattr(owner, name, timed)

    def watch(self, trainer, work: Workload) -> None:
        """Replaces the trainer's methods: fixed actions, log-probs and norms kept, clocks."""
        generate = trainer._generate_single_turn
        score = trainer._get_per_token_logps_and_entropies
        clip = trainer._clip_grad_norm

        def fixed_actions(*arguments, **named):
            sampled = generate(*arguments, **named)[0] if work.rollout else []
            assert all(len(ids) == work.action_tokens for ids in sampled)
            actions = []
            for group in self.tokens:
                actions += map(list, group)
            return actions, None

        def keep_logps(model, input_ids, *arguments, **named):
            if torch.is_grad_enabled():  # the training pass, timed in compute_loss
                result = score(model, input_ids, *arguments, **named)
                rows = input_ids[:, -work.action_tokens :].tolist()
                for ids, logp in zip(rows, result[0].detach()):
                    self.logps[tuple(ids)] = logp
                return result
            with self.recorder.phase("train"):
                return score(model, input_ids, *arguments, **named)

        def keep_norm(model):
            with self.recorder.phase("train"):
                self.norm = clip(model)
            return self.norm

        trainer._generate_single_turn = fixed_actions
        trainer._get_per_token_logps_and_entropies = keep_logps
        trainer._clip_grad_norm = keep_norm
        self.time(trainer, "_generate", "rollout")
        self.time(trainer, "compute_loss", "train")
        self.time(trainer.accelerator, "backward", "train")


def trl(work: Workload, path: Path, steps: list[str], turns) -> None:
    """turns: sides.Turns."""
    from datasets import Dataset  # these two are installed for this benchmark alone
    from trl import GRPOTrainer

    processor = AutoProcessor.from_pretrained(path)
    rows, rewards = [], []
    for state in workload.make_states(work, processor):
        text = state.messages()[0]["content"][-1]["text"]
        prompt = [{"role": "user", "content": text}]
        rows.append({"prompt": prompt, "images": list(state.images)})
    for group in workload.make_rewards(work):
        rewards += group
    settings = settings_of(work, path, len(steps), turns.device)
    # It loads model and processor itself.
    data = Dataset.from_list(rows)
    trainer = GRPOTrainer(str(path), lambda completions, **_: rewards, settings, data)
    trainer.remove_callback(PrinterCallback)
    turn = Turn(steps, turns, workload.make_actions(work, processor.tokenizer))
    turn.watch(trainer, work)
    trainer.add_callback(turn)
    trainer.train()


def settings_of(work: Workload, path: Path, steps: int, device: str):
    """A GRPOConfig."""
    from trl import GRPOConfig

    sampling = {
        "min_new_tokens": work.action_tokens,
        "suppress_tokens": workload.suppressed_ids(path),
    }
    return GRPOConfig(
        output_dir=str(path / "trl"),
        max_steps=steps,
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        per_device_train_batch_size=work.micro_batch * work.group_size,
        gradient_accumulation_steps=work.states // work.micro_batch,
        num_generations=work.group_size,
        max_completion_length=work.action_tokens,
        generation_kwargs=sampling,
        beta=work.beta,
        loss_type="grpo",
        use_bias_correction_kl=False,
        gradient_checkpointing=work.gradient_checkpointing,
        learning_rate=work.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=work.seed,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )
