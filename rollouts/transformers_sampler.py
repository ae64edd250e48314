"""Rollouts by transformers' `generate` (Eq 4), on any device.

It samples from the distribution that policy.py scores. Left to itself, `generate` encodes prompt
and images N times, and computes ended rows until the last one ends. So prompts are encoded here,
once for their N actions, and ended rows leave on the way.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from policy import Policy, Prompt, joined
from sampling import Action, Sampler
from training.distributed import autocast, reshard, unshard
from training.metrics import POLICY


class TransformersSampler(Sampler):
    """Rollouts by `generate`, `rows` responses at a time.

    Responses differ in length from process to process. So every process gathers all parameters of
    a sharded policy, and keeps them until `sleep`.
    """

    def __init__(self, policy: Policy, max_new_tokens: int, rows: int = 512, bf16: bool = False):
        super().__init__(policy, max_new_tokens, bf16)
        self.rows = rows
        self.sync_weights()

    def sleep(self) -> None:
        reshard(self.policy)

    def sync_weights(self) -> None:
        unshard(self.policy)

    def sample(self, prompts: list[Prompt], n: int, seed: int) -> list[list[Action]]:
        """n actions for each prompt (Eq 4). The same seed gives the same actions."""
        return self._generate(prompts, n, seed)

    def greedy(self, prompts: list[Prompt]) -> list[Action]:
        """One action for each prompt: the most probable token each time."""
        return [actions[0] for actions in self._generate(prompts, 1, None)]

    def _generate(self, prompts: list[Prompt], n: int, seed: int | None) -> list[list[Action]]:
        policy, per_call = self.policy, max(1, self.rows // n)
        settings = self._settings(greedy=seed is None)
        groups = []
        with generating(policy, seed), autocast(policy.suppressed_ids.device, self.bf16):
            for start in range(0, len(prompts), per_call):
                inputs = prefilled(prompts[start : start + per_call], n, policy)
                actions = [self._action(tokens) for tokens in self._continue(inputs, settings)]
                groups += [actions[i : i + n] for i in range(0, len(actions), n)]
        return groups

    def _settings(self, greedy: bool) -> GenerationConfig:
        """Every option is set: unset ones come from the checkpoint (Qwen2-VL: top_k 1)."""
        draw = dict(do_sample=False)
        if not greedy:
            draw = dict(temperature=self.policy.temperature, top_k=self.top_k, top_p=self.top_p)
            draw["do_sample"] = True
        return GenerationConfig(
            max_length=None,
            num_return_sequences=1,
            num_beams=1,
            repetition_penalty=1.0,
            suppress_tokens=self.policy.suppressed_ids.tolist() or None,
            eos_token_id=self.policy.eos_id,
            pad_token_id=self.policy.eos_id,
            **draw,
        )

    def _continue(self, inputs: dict, settings: GenerationConfig) -> list[list[int]]:
        """The responses of `prefilled` rows: tokens up to EOS, its padding, or the length limit.

        `generate` stops whenever half of the rows have ended, and goes on with the others alone.
        """
        responses = [[] for _ in inputs["input_ids"]]
        rows = torch.arange(len(responses), device=inputs["input_ids"].device)  # not ended
        left = self.max_new_tokens
        while len(rows):
            width = inputs["input_ids"].shape[1]
            settings.max_new_tokens = left
            half = StoppingCriteriaList([HalfFinished(width, settings.eos_token_id)])
            # synced_gpus: all parameters are here, so other processes need not keep step.
            ids = self.policy.model.generate(
                **inputs, generation_config=settings, stopping_criteria=half, synced_gpus=False
            )  # (rows, width + t)
            written = ids[:, width:]  # (rows, t)
            for row, tokens in zip(rows.tolist(), written.tolist(), strict=True):
                responses[row] += tokens
            t = written.shape[1]
            left -= t
            keep = (written != settings.eos_token_id).all(-1).nonzero()[:, 0] if left else rows[:0]
            rows, cache = rows[keep], inputs["past_key_values"]
            cache.batch_select_indices(keep)
            positions = inputs["position_ids"][:, keep]  # (4, rows, width)
            ahead = torch.arange(1, t + 1, device=rows.device)  # (t,)
            inputs = {
                "input_ids": ids[keep],
                "attention_mask": F.pad(inputs["attention_mask"][keep], (0, t), value=1),
                "position_ids": torch.cat([positions, positions[..., -1:] + ahead], dim=-1),
                "past_key_values": cache,
            }
        return responses

    def _action(self, tokens: list[int]) -> Action:
        truncated = self.policy.eos_id not in tokens
        if not truncated:  # what follows EOS is padding
            tokens = tokens[: tokens.index(self.policy.eos_id) + 1]
        text = self.policy.tokenizer.decode(tokens, skip_special_tokens=True)
        return Action(tokens, text, POLICY, truncated)


class HalfFinished(StoppingCriteria):
    """Stops all rows as soon as half of them have an EOS after the first `width` tokens."""

    def __init__(self, width: int, eos_id: int):
        self.width, self.eos_id = width, eos_id

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        ended = (input_ids[:, self.width :] == self.eos_id).any(-1)  # (rows,)
        return (ended.float().mean() >= 0.5).expand(len(ended))


@contextmanager
def generating(policy: Policy, seed: int | None):
    """No gradients, eval mode (checkpointing forbids the KV cache), random numbers from `seed`."""
    device = policy.suppressed_ids.device
    training, own = policy.training, policy.model.generation_config
    policy.model.generation_config = GenerationConfig()  # else its options fill in for unset ones
    policy.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed or 0)
            yield
    finally:
        policy.train(training)
        policy.model.generation_config = own


def prefilled(prompts: list[Prompt], n: int, policy: Policy) -> dict:
    """Inputs for `generate` that continue each of B prompts n times, with keys and values computed.

    Prompts are padded on the left, since `generate` continues all rows from the last column. It
    also wants a plain order of the tokens in front of the three M-RoPE positions. The last token
    of a prompt is left to it.
    """
    device, width = policy.suppressed_ids.device, max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), policy.eos_id)  # (B, W)
    mask = torch.zeros_like(ids)  # (B, W)
    positions = torch.zeros(3, len(prompts), width, dtype=torch.long)  # (3, B, W)
    for row, prompt in enumerate(prompts):
        pad = width - len(prompt.input_ids)
        ids[row, pad:] = prompt.input_ids
        mask[row, pad:] = 1
        positions[:, row, pad:] = prompt.position_ids
    order = (mask.cumsum(-1) - 1).clamp(min=0)[None]  # (1, B, W)
    positions = torch.cat([order, positions])  # (4, B, W)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    images = {}
    for name in ("pixel_values", "image_grid_thw"):
        parts = joined([getattr(prompt, name) for prompt in prompts])
        images |= {} if parts is None else {name: parts.to(device)}
    start = {name: value[..., :-1] for name, value in inputs.items()}
    cache = DynamicCache()
    policy.model.model(**start, **images, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(n)
    repeated = {name: value.repeat_interleave(n, dim=-2) for name, value in inputs.items()}
    return {**repeated, "past_key_values": cache}
