"""What each measure against a slow step is worth: a step of the default run without one of them.

    python -m experiments.benchmarks.gains --out gains-cpu.json

A step is that of `python ekipl.py`: 64 states of the blocks world, the tiny Qwen2-VL, N = G = 8,
two scripted experts. Every variant makes its rollouts and its update in turn with the step as it
is, with the same seeds, after a turn that is not counted; the ratios are of one turn. All variants
have a gradient of the same norm in the update (asserted). Variants of the rollout whose actions
have another length draw other random numbers, so rollouts are compared by the token.
"""

import dataclasses
import math
import random
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from tqdm import tqdm
from transformers import AttentionInterface, StoppingCriteria
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import attention
import ekipl
import sampling
from data.sets import training_states
from experiments.benchmarks import measuring
from experiments.benchmarks.measuring import spread, three
from experts.roster import make_experts
from policy import Policy, pack
from rollouts import transformers_sampler
from training import console, distributed, presets
from training.console import Parser, UserError
from training.distributed import World


class NeverEarly(StoppingCriteria):
    """Goes on until the last row has ended, which `generate` notices by itself."""

    def __init__(self, width: int, eos_id: int):
        pass

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def repeated_keys(module, query, key, value, attention_mask, **kwargs):
    """attention.attend without its second case: each query head gets a copy of its keys."""
    if kwargs.get("shared_prefix") is not None:
        return attention.attend(module, query, key, value, attention_mask, **kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def prefilled_n_times(prompts, n, policy, prefilled=transformers_sampler.prefilled):
    repeated = []
    for prompt in prompts:
        repeated += [prompt] * n
    return prefilled(repeated, 1, policy)


def pack_with_own_prompts(prompts, actions):
    """Each action behind a prompt and a picture of its own."""
    repeated, alone = [], []
    for prompt, group in zip(prompts, actions):
        repeated += [prompt] * len(group)
        alone += [[action] for action in group]
    batch = pack(repeated, alone)
    shape = (len(prompts), len(actions[0]), -1)
    return dataclasses.replace(
        batch, token_at=batch.token_at.view(shape), action_mask=batch.action_mask.view(shape)
    )


def pack_with_equal_actions(prompts, actions):
    """Equal actions each in a place of their own: packed as if they differed in the first token,
    which is then put back.
    """
    marked, firsts = [], []
    for group in actions:
        marked.append([[-1 - g, *action[1:]] for g, action in enumerate(group)])
        firsts += [action[0] for action in group]
    batch = pack(prompts, marked)
    for ids in (batch.input_ids, batch.predicted):
        ids[ids < 0] = torch.tensor(firsts)
    return batch


ATTENTION = AttentionInterface._global_mapping
REPEATED = {attention.SHARED_PREFIX: repeated_keys}
SAMPLER = transformers_sampler
ROLLOUT = {  # by measure, what takes it away from a step
    "finished rows leave as soon as half have finished": lambda step: patch.object(
        SAMPLER, "HalfFinished", NeverEarly
    ),
    "query heads share their keys": lambda step: patch.dict(ATTENTION, REPEATED),
    "prompt and picture are encoded once, not N times": lambda step: patch.object(
        SAMPLER, "prefilled", prefilled_n_times
    ),
}
UPDATE = {
    "actions share their prompt": lambda step: patch.object(ekipl, "pack", pack_with_own_prompts),
    "equal actions are scored once": lambda step: patch.object(
        ekipl, "pack", pack_with_equal_actions
    ),
    "pictures and words are prepared once, not for each pass": lambda step: patch.object(
        ekipl, "pack", step.prepared_again
    ),
}


class Step:
    """The parts of a step of ekipl.py, with a policy whose weights are the same in each call."""

    def __init__(self, config: ekipl.Config, threads: int):
        torch.set_num_threads(threads)
        self.config, self.world, self.norms = config, World.join("auto"), []
        distributed.deterministic(self.world)
        self.policy = Policy.load(config.start).to(self.world.device)
        self.reference = Policy.load(config.start).to(self.world.device).requires_grad_(False)
        self.sampler = SAMPLER.TransformersSampler(
            self.policy, config.max_new_tokens, bf16=config.bf16
        )
        questions, order = training_states(config)
        self.states = [questions[i] for i in order[: config.batch_size]]
        self.prompts = self.policy.encode(self.states)
        experts = make_experts(config.experts, config, densities=False)
        self.groups = sampling.total_groups(
            self.states, self.sampler, experts, config.num_samples, 0, 0
        )
        sampling.give_rewards(self.groups)
        size, baseline, rng = config.group_size, config.advantage, random.Random(0)
        sampling.select(self.groups, size, baseline, "policy_first", config.selection, rng)

    def prepared_again(self, prompts, actions):
        """ekipl.pack behind two more runs of the processor: the reference's and the policy's."""
        for _ in range(2):
            prompts = self.policy.encode([prompt.state for prompt in prompts])
        return pack(prompts, actions)

    def rollout(self, seed: int) -> float:
        """Seconds per 1,000 tokens."""
        start, tokens = time.perf_counter(), 0
        groups = self.sampler.sample(self.prompts, self.config.num_samples, seed)
        seconds = time.perf_counter() - start
        for group in groups:
            tokens += sum(len(action.tokens) for action in group)
        return 1000 * seconds / tokens

    def update(self, seed: int) -> float:
        """Seconds of packing, reference, forward, backward, clipping, AdamW, at a rate of 0."""
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.0, weight_decay=0.0)
        models = self.policy, self.reference
        start = time.perf_counter()
        updated = ekipl.update(self.config, *models, optimizer, self.groups, self.world, 0.0)
        seconds = time.perf_counter() - start
        self.norms.append(updated["grad_norm"])
        return seconds


def measure(step: Step, runs: int) -> list[dict]:
    """A row for each variant: how many times the seconds of the step as it is."""
    rows = []
    for phase, variants in (("rollout", ROLLOUT), ("update", UPDATE)):
        part, seconds = getattr(step, phase), {name: [] for name in ["", *variants]}
        for seed in tqdm(range(runs + 1), desc=phase):
            for name in seconds:
                with variants[name](step) if name else nullcontext():
                    seconds[name].append(part(seed))
        for name in variants:
            ratios = [other / ours for ours, other in zip(seconds[""][1:], seconds[name][1:])]
            rows.append({"phase": phase, "measure": name, "ratio": spread(ratios)})
    same = math.isclose(min(step.norms), max(step.norms), rel_tol=1e-4)
    assert same, f"the variants' gradients differ: {step.norms}"
    return rows


def table(rows: list[dict]) -> str:
    """Markdown, as in README.md."""
    ratio = "times the seconds without it: min / median / max"
    lines = [f"| phase | measure | {ratio} |", "|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['phase']} | {row['measure']} | {three(row['ratio'])} |")
    return "\n".join(lines)


def run(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m experiments.benchmarks.gains", description=__doc__.split("\n\n")[0]
    )
    names = [name for name in presets.PRESETS if name.startswith("blocks")]
    parser.add_argument("--preset", default="blocks", choices=names)
    parser.add_argument("--batch-size", type=int, help="states, instead of the preset's")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args(argv)
    if args.runs < 1:
        raise UserError(f"--runs must be at least 1, not {args.runs}")
    size = ["--batch-size", str(args.batch_size)] if args.batch_size else []
    config, _ = ekipl.parse(["--preset", args.preset, *size])
    rows = measure(Step(config, args.threads), args.runs)
    print(table(rows))
    result = {"preset": args.preset, "runs": args.runs, "rows": rows}
    measuring.write(args.out, measuring.machine() | result)


def main() -> None:
    console.command("experiments.benchmarks.gains", run, "nothing was written")


if __name__ == "__main__":
    main()
