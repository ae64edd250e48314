"""Imitation of experts by SFT: rft learns their right samples, distil all of them.

    states -> N samples of each expert -> rewards (Eq 7) -> at most G of them, drawn at random

What Vision-EKIPL is to be compared with: the same experts, asked as often (an API's answers come
from the same cache), and as many actions to learn, but without the policy's own and without
advantages. rft is rejection-sampling fine-tuning, with experts in the place of the policy.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from data.state import State
from experts import roster
from policy import Policy
from sampling import Expert, Group, expert_action, give_rewards
from training import settings
from training.console import UserError
from training.metrics import mean

FULL = 2.0  # the reward of a right sample: format and accuracy


def check(config) -> None:
    """UserError for settings that leave nothing to imitate, before anything is loaded."""
    if not roster.check(config):
        raise UserError(f"--method {config.method} learns from experts: name some with --experts")
    settings.must(config, 1, "group_size")


def imitated(policy: Policy, states: list[State], experts: Iterable[Expert], config) -> list[Group]:
    """For each state the N samples of each expert as actions with rewards; `kept` are the targets.

    They depend on the run's seed and the state alone, so every epoch has the same, whatever the
    number of processes. Where an API does not answer or no sample is right, fewer are kept or none.
    """
    groups = []
    for state, prompt in zip(states, policy.encode(states), strict=True):
        groups.append(Group(state, prompt, []))
    for expert in experts:
        samples_of = expert.sample(states, config.num_samples, config.seed)  # Eq 5
        for group, samples in zip(groups, samples_of, strict=True):
            for sample in samples:
                action = expert_action(policy, sample, expert.name, config.max_new_tokens)
                group.actions.append(action)
    give_rewards(groups)  # Eq 7
    for group in groups:
        rng = random.Random(f"{config.seed} targets {group.state.id}")
        keep(group, config.group_size, config.method == "rft", rng)
    return groups


def keep(group: Group, g: int, right_only: bool, rng: random.Random) -> None:
    """Sets `kept`: at most g actions, any of those that may be learnt, whoever wrote them."""
    wanted = []
    for i, reward in enumerate(group.rewards):
        if reward == FULL or not right_only:
            wanted.append(i)
    group.kept = rng.sample(wanted, min(g, len(wanted)))


def imitation_metrics(groups: list[dict]) -> dict[str, float]:
    """One step's figures. groups: the `summary` of each of its groups, from all processes.

    trained: number of actions learnt; skipped: 1 if there are none, so that the step changes no
    weight. right: the share of samples with the full reward. accuracy/NAME of an expert's samples,
    share/NAME of the actions learnt, as in training/metrics.py.
    """
    samples, learnt = [], []
    for g in groups:
        samples += zip(g["sources"], g["format"], g["accuracy"], strict=True)
        learnt += [g["sources"][k] for k in g["kept"]]
    right = [f + a == FULL for _, f, a in samples]
    result = {"trained": len(learnt), "skipped": float(not learnt)}
    result["right"] = mean(right) if right else 0.0
    for name in dict.fromkeys(source for source, _, _ in samples):
        result[f"accuracy/{name}"] = mean(a for source, _, a in samples if source == name)
        result[f"share/{name}"] = learnt.count(name) / max(1, len(learnt))
    return result
