"""Actions and groups: N actions of the policy and of each expert (Eq 4-6), rewarded (Eq 7).

    states -> total_groups (Eq 4-6) -> give_rewards (Eq 7) -> select: top G, advantages (Eq 1)

An `Action` is a whole response: the token ids up to and with EOS. The policy samples from
softmax(logits / temperature) over all tokens that a response may hold (top_p 1, no top_k), because
policy.py scores that distribution: a truncated one would bias the ratio of Eq 2. An expert's text
becomes an action by the same tokenizer, with the same EOS and length limit, and nothing in it is
repaired.
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
from training.metrics import POLICY
from training.stopwatch import Stopwatch

TIES = ("policy_first", "any_expert", "random")  # whose action comes first among equal rewards

# ------------------------------------------------------------------------------ actions and groups


@dataclass
class Action:
    """One response. tokens end with EOS unless truncated; text is without it.

    source: "policy" or an expert's name. expert_logp: log-density in nats under the expert that
    wrote it, None if unknown. token_logps: of each token when it was sampled, if the sampler
    reports them.
    """

    tokens: list[int]
    text: str
    source: str
    truncated: bool = False
    expert_logp: float | None = None
    token_logps: list[float] | None = None


@dataclass(frozen=True)
class Sample:
    """An expert's response. logp: log-density of the text in nats, None if unknown.

    truncated: the expert was cut off before it had finished.
    """

    text: str
    logp: float | None = None
    truncated: bool = False


@dataclass
class Group:
    """A state, its M candidate actions (the policy's first), and all that is computed of them.

    format, accuracy: (M,), the parts of each reward.
    kept: indices of the G actions that train the policy, best first.
    advantages: (G,), of the kept actions in their order.
    expert_logps: (G, m), log-density of each kept action under each expert that took part, -inf
        where it never writes this; None if a density is unknown.
    selection: "top" G or any at "random"; the weights of A.5 depend on it.
    measured: (G,) lists of what the last update measured: objective, kl, clip_fraction, and
        weights, None where a density is unknown.
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
    measured: dict[str, list[float] | None] = field(default_factory=dict)

    @property
    def rewards(self) -> list[float]:
        """(M,), R = R_format + R_accuracy (Eq 7)."""
        return [f + a for f, a in zip(self.format, self.accuracy, strict=True)]

    @property
    def kept_actions(self) -> list[Action]:
        return [self.actions[i] for i in self.kept]

    @property
    def kept_of_experts(self) -> list[bool]:
        return [action.source != POLICY for action in self.kept_actions]

    @property
    def kept_tokens(self) -> list[list[int]]:
        return [action.tokens for action in self.kept_actions]

    @property
    def mixture(self) -> list[float]:
        """(m + 1,), alpha of A.5: each source's share of the draws, the policy's first."""
        sources = [action.source for action in self.actions]
        return [sources.count(source) / len(sources) for source in dict.fromkeys(sources)]

    def summary(self) -> dict:
        """What the metrics need of this group, small enough to gather from all processes."""
        return {
            "sources": [action.source for action in self.actions],
            "format": self.format,
            "accuracy": self.accuracy,
            "tokens": [len(action.tokens) for action in self.actions],
            "truncated": [action.truncated for action in self.actions],
            "kept": self.kept,
            "advantages": self.advantages,
            **self.measured,
        }

    def transcript(self, step: int) -> dict:
        """The whole group as a record for people to read."""
        advantages = dict(zip(self.kept, self.advantages, strict=True))
        actions = []
        for i, (action, reward) in enumerate(zip(self.actions, self.rewards, strict=True)):
            actions.append(
                {
                    "source": action.source,
                    "text": action.text,
                    "format": self.format[i],
                    "accuracy": self.accuracy[i],
                    "reward": reward,
                    "kept": i in advantages,
                    "advantage": advantages.get(i),
                }
            )
        return {
            "step": step,
            "state": self.state.id,
            "question": self.state.question,
            "answer": self.state.answer,
            "actions": actions,
        }


# ------------------------------------------------------------- where actions come from (Eq 4, 5)


class Sampler:
    """Where the policy's actions come from (Eq 4): `sample` and `greedy`.

    The other methods are for a sampler that has weights of its own. bf16: compute in bfloat16 on a
    GPU, as the policy is scored there. seeds_each_state: whether a state's actions, with the same
    seed, stay the same whatever else is sampled beside it.
    """

    seeds_each_state = False
    top_p, top_k = 1.0, 0  # of `sample`; only evaluation draws from less than is scored

    def __init__(self, policy: Policy, max_new_tokens: int, bf16: bool):
        self.policy, self.max_new_tokens, self.bf16 = policy, max_new_tokens, bf16

    def sample(self, prompts: list[Prompt], n: int, seed: int) -> list[list[Action]]:
        """n actions for each prompt, drawn at the policy's temperature."""
        raise NotImplementedError

    def greedy(self, prompts: list[Prompt]) -> list[Action]:
        """The most probable token each time: one action for each prompt."""
        raise NotImplementedError

    def sleep(self) -> None:
        """Leaves the device's memory to the trainer, until `sync_weights`."""

    def sync_weights(self) -> None:
        """Takes over the policy's weights after an update."""

    def check_parity(self, groups: list[Group]) -> dict[str, float]:
        """How far its log-probs are from the policy's, as metrics. UserError if too far at the
        first check, later a warning."""
        return {}

    def close(self) -> None:
        """Ends it, while the process group that it may use still exists."""


class Expert(Protocol):
    """An auxiliary model pi_j (Eq 5)."""

    name: str

    def sample(self, states: list[State], n: int, seed: int) -> list[list[Sample]]:
        """n responses per state, fewer where it fails. They depend on at most seed and state: an
        API's come from the cache and ignore the seed."""

    def logp(self, state: State, action: Action) -> float | None:
        """log pi_j(action | state) in nats: -inf for an action it never writes, None if unknown."""


def expert_action(policy: Policy, sample: Sample, source: str, max_new_tokens: int) -> Action:
    """An expert's text as an action: the policy's tokens, EOS at the end, cut at the length limit.

    Special tokens in the text are dropped: the policy cannot sample them, and an image token would
    break the forward pass.
    """
    tokens, truncated = policy.tokens_of(sample.text, max_new_tokens, ended=not sample.truncated)
    text = policy.tokenizer.decode(tokens, skip_special_tokens=True)
    return Action(tokens, text, source, truncated, sample.logp)


def total_groups(
    states: list[State],
    sampler: Sampler,
    experts: list[Expert],
    n: int,
    seed: int,
    expert_seed: int,
    watch: Stopwatch | None = None,
) -> list[Group]:
    """Eq 4-6: for each state n actions of the policy and n of each expert, in one group.

    The group is smaller where an expert gives fewer. seed: the policy's, different in each
    process. expert_seed: the experts', which each combine it with the state.
    """
    watch = watch or Stopwatch()
    policy = sampler.policy
    prompts = policy.encode(states)
    watch.lap("preprocessing")
    candidates = sampler.sample(prompts, n, seed)  # Eq 4
    watch.lap("rollout")
    for expert in experts:
        samples_of = expert.sample(states, n, expert_seed)  # Eq 5
        for actions, samples in zip(candidates, samples_of, strict=True):
            for sample in samples:  # Eq 6
                actions.append(expert_action(policy, sample, expert.name, sampler.max_new_tokens))
    watch.lap("experts")
    return [Group(*parts) for parts in zip(states, prompts, candidates, strict=True)]


def give_rewards(groups: list[Group]) -> None:
    """Eq 7: sets `format` and `accuracy` of each group, the parts of its actions' rewards."""
    for group in groups:
        answer, kind = group.state.answer, group.state.kind
        group.format = [format_reward(action.text) for action in group.actions]
        group.accuracy = [accuracy_reward(action.text, answer, kind) for action in group.actions]


# ------------------------------------------------------------------------------------- selection


def select_top_g(
    rewards,
    g: int,
    ties: str = "policy_first",
    selection: str = "top",
    rng: random.Random | None = None,
    own: int = 0,
) -> list[int]:
    """The indices of the g actions to keep, by descending reward (Section 3.2, "Action Selection").

    rewards: (M,), the policy's `own` actions first, then the experts' in the order of their names.
    ties: "policy_first" is a stable sort, so that the policy's actions win among equal rewards, and
    the experts' share falls as the policy improves (Fig. 4); an expert wins over those named after
    it. "any_expert": the policy's first, then any of the experts'. "random": any. selection:
    "random" keeps any g, the control that shows what selection is worth. rng: for the choices.
    Raises ValueError if g is not between 1 and M, or for another word.
    """
    rewards = [float(reward) for reward in rewards]
    if not 1 <= g <= len(rewards):
        raise ValueError(f"cannot keep {g} of {len(rewards)} actions")
    if ties not in TIES or selection not in ("top", "random"):
        raise ValueError(
            f"ties are {', '.join(TIES)}, not {ties!r}; "
            f"selection is top or random, not {selection!r}"
        )
    rng, order = rng or random, list(range(len(rewards)))
    if "random" in (ties, selection):
        rng.shuffle(order)
    elif ties == "any_expert":
        order[own:] = rng.sample(order[own:], len(rewards) - own)
    if selection == "top":
        order.sort(key=lambda i: -rewards[i])
    return order[:g]


def select(
    groups: list[Group],
    g: int,
    baseline: str,
    ties: str,
    selection: str,
    rng: random.Random,
    scale: bool = True,
) -> None:
    """Sets `kept`, `selection` and `advantages` (Eq 1) of each group.

    A group of fewer than g actions keeps them all. baseline: whose mean and std Eq 1 takes, of all
    "candidates" or of the "selected". scale: whether it divides by the std.
    """
    for group in groups:
        own = sum(action.source == POLICY for action in group.actions)
        most = min(g, len(group.actions))
        group.kept = select_top_g(group.rewards, most, ties, selection, rng, own)
        group.selection = selection
        rewards = torch.tensor(group.rewards)  # (M,)
        kept = rewards[group.kept]  # (G,)
        compared = rewards if baseline == "candidates" else None
        group.advantages = grpo.group_advantages(kept, compared, scale=scale).tolist()


# ---------------------------------------------------------------------------------- weights (A.5)


def add_expert_logps(groups: list[Group], experts: list[Expert]) -> None:
    """Sets `expert_logps` of each group, which Appendix A's weights need. Unknown stays None."""
    for group in groups:
        sources = {action.source for action in group.actions}
        present = [expert for expert in experts if expert.name in sources]
        rows, known = [], True  # (G, m)
        for action in group.kept_actions:
            rows.append([expert.logp(group.state, action) for expert in present])
            known = known and None not in rows[-1]
        if known:
            group.expert_logps = rows


def group_log_weights(groups: list[Group], old_logp: torch.Tensor, g: int) -> torch.Tensor | None:
    """A.5: log w_S = log pi_old - log q_S of each kept action. None if a density is unknown.

    old_logp: (B, G, T). Returns (B, G), 0 for an absent action.
    """
    if any(group.expert_logps is None for group in groups):
        return None
    policy_logp = old_logp.sum(-1).double().cpu()  # (B, G), whole actions
    result = torch.zeros(policy_logp.shape)
    for row, group in enumerate(groups):
        n, m = len(group.kept), len(group.mixture) - 1
        own = policy_logp[row, :n]  # (G,)
        experts = torch.tensor(group.expert_logps, dtype=torch.float64).reshape(n, m)  # (G, m)
        components = torch.cat([own[:, None], experts], dim=1)  # (G, m + 1)
        proposal = grpo.mixture_logp(components, group.mixture)  # (G,) log q
        survival = 1.0  # q(S): where any G are kept, S holds every action
        if group.selection == "top":
            survival = grpo.selection_probability(group.rewards, min(g, len(group.actions)))
        proposal = grpo.selected_proposal_logp(proposal, survival)  # (G,) log q_S
        result[row, :n] = grpo.log_importance_weights(own, proposal)
    return result.to(old_logp.device)
