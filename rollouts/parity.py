"""Parity: does the engine sample from what the policy scores? Prompts, pixel limits and numbers."""

import math
import sys

import torch
from tqdm import tqdm

from policy import Policy, Prompt, pack
from sampling import Group
from training.console import UserError
from training.distributed import autocast

# mean |difference| of a token's log-probability, in nats
PARITY_TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 0.1,  # healthy engines show 0.01 to 0.04
}
PARITY_GROUPS = 4  # groups of a process that are scored in a check


def check_prompt(prompt: Prompt, found: list[int], image_token_id: int) -> None:
    """UserError unless vLLM's prompt is the policy's, token by token."""
    expected = prompt.input_ids.tolist()
    if found == expected:
        return
    first = 0
    while found[first : first + 1] == expected[first : first + 1]:
        first += 1
    theirs = f"{len(found)} tokens, {found.count(image_token_id)} of images"
    ours = f"{len(expected)}, {expected.count(image_token_id)}"
    raise UserError(
        f"parity: state {prompt.state.id} has another prompt in vLLM ({theirs}) than in the policy "
        f"({ours}); first difference at {first}. Likely causes: pixel limits, chat template"
    )


def check_pixels(limits: dict, policy: Policy) -> None:
    """UserError unless both resize images to the same limits."""
    own = dict(policy.processor.image_processor.size)
    if any(limits[edge] != own[edge] for edge in ("shortest_edge", "longest_edge")):
        raise UserError(
            f"parity: images are resized to {limits} pixels by vLLM, to {own} by the policy"
        )


def gaps(policy: Policy, groups: list[Group], bf16: bool) -> torch.Tensor:
    """|difference| of log-probability, engine and policy, for each sampled token of some groups."""
    prompts, actions, theirs = [], [], []
    for group in groups[:PARITY_GROUPS]:
        sampled = [action for action in group.actions if action.token_logps]
        if sampled:
            prompts.append(group.prompt)
            actions.append([action.tokens for action in sampled])
            for action in sampled:
                theirs += action.token_logps
    batch, device = pack(prompts, actions), policy.suppressed_ids.device
    with torch.no_grad(), autocast(device, bf16):
        ours = policy(batch.to(device)).cpu()[batch.action_mask]  # (tokens,)
    return (ours - torch.tensor(theirs)).abs()


def check_gaps(gap: torch.Tensor, dtype: torch.dtype, first: bool) -> float:
    """The mean gap, in nats. Beyond PARITY_TOLERANCE the first check raises UserError, a later one
    warns: nothing but the choice of actions depends on the engine's numbers."""
    mean, worst, bound = float(gap.mean()), float(gap.max()), PARITY_TOLERANCE[dtype]
    if not mean <= bound:  # NaN too
        figures = f"mean of {len(gap)}; largest {worst:.2g}; allowed in {str(dtype)[6:]}: {bound:g}"
        problem = (
            f"parity: log-probabilities of vLLM and of the policy differ by {mean:.2g} a token "
            f"({figures}). Likely causes: weights that were not synced, caches of older weights, "
            "another temperature, images resized differently. --rollout transformers does without "
            "vLLM"
        )
        if first or not math.isfinite(mean):
            raise UserError(problem)
        tqdm.write(f"warning: {problem}", file=sys.stderr)  # above the progress bar
    return mean
