"""Actions: drawn from the policy and the experts (Eq 4, 5), united (Eq 6), rewarded (Eq 7), and the top G of them kept.

    states -> N actions of the policy + N of each expert -> rewards -> top G -> advantages: one `Group` per state

An `Action` is a whole response: the token ids up to and with EOS. The policy samples from softmax(logits / temperature) over
the tokens that a response may hold, all of it: top_p 1 and no top_k, because that is the distribution which policy.py
scores; a truncated one would bias the ratio of Eq 2. An expert's text becomes an action by the same tokenizer, with the
same EOS and the same length limit, and earns its format reward like any other: nothing in it is repaired.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Protocol

import torch

import grpo
from data.state import State
from policy import Policy, Prompt
from rewards import accuracy_reward, format_reward


class Expert(Protocol):
    """An auxiliary model."""

    name: str

    def sample(self, states: list[State], n: int, seed: int) -> list[list[Sample]]:
        """n responses for each state, fewer where it fails; the same seed and state give the same responses."""

    def logp(self, state: State, action: Action) -> float | None:
        """log pi_j(action | state) in nats: -inf for an action it never says, None if the density is unknown."""


def summary(groups: list[Group], row: dict) -> list[dict]:
    """What the metrics need of each group, small enough to be gathered from all processes."""
    return [
        {
            "sources": [action.source for action in group.actions],
            "format": group.format,
            "accuracy": group.accuracy,
            "tokens": [len(action.tokens) for action in group.actions],
            "truncated": [action.truncated for action in group.actions],
            "kept": group.kept,
            "advantages": group.advantages,
            **measured,
        }
        for group, measured in zip(groups, row["rows"], strict=True)
    ]


def transcripts(step: int, groups: list[Group]) -> list[dict]:
    """Whole groups for people to read."""
    records = []
    for group in groups:
        advantages = dict(zip(group.kept, group.advantages, strict=True))
        records.append({
            "step": step,
            "state": group.state.id,
            "question": group.state.question,
            "answer": group.state.answer,
            "actions": [
                {"source": action.source, "text": action.text, "reward": reward, "kept": i in advantages, "advantage": advantages.get(i)}
                for i, (action, reward) in enumerate(zip(group.actions, group.rewards, strict=True))
            ],
        })  # fmt: skip
    return records


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


def log_weights(groups: list[Group], old_logp: torch.Tensor, g: int) -> torch.Tensor | None:
    """log w_S = log pi_old - log q_S of each kept action (A.5), (B, G); 0 for an absent one; None if a density is unknown."""
    if any(group.expert_logps is None for group in groups):
        return None
    policy_logp = old_logp.sum(-1).double().cpu()  # (B, G), whole actions
    result = torch.zeros(policy_logp.shape)
    for row, group in enumerate(groups):
        own = policy_logp[row, : len(group.kept)]  # (G,)
        experts = torch.tensor(group.expert_logps, dtype=torch.float64).reshape(
            len(own), len(group.mixture) - 1
        )  # (G, m)
        proposal = grpo.mixture_logp(
            torch.cat([own[:, None], experts], dim=1), group.mixture
        )  # (G,) log q
        survival = 1.0  # q(S): where any G are kept, S holds every action
        if group.selection == "top":
            survival = grpo.selection_probability(group.rewards, min(g, len(group.actions)))
        proposal = grpo.selected_proposal_logp(proposal, survival)  # (G,) log q_S
        result[row, : len(own)] = grpo.log_importance_weights(own, proposal)
    return result.to(old_logp.device)
