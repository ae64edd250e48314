"""The class that keeps tokens out of vLLM's answers, as each of its two model runners loads and
calls it.

V2 serves GPUs alone, but its loader and its order of calls can be had without one: with either
build of vLLM.
"""

from types import SimpleNamespace

import numpy
import pytest
import torch

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.v1.sample import logits_processor as v1
from vllm.v1.worker.gpu.sample import logits_processor as v2
from vllm.v1.worker.gpu.sample import sampler as v2_sampler

from rollouts.vllm_engine import suppressing

IDS, CPU = [0, 3, 9], torch.device("cpu")


def logits() -> torch.Tensor:
    return torch.randn(5, 10, generator=torch.Generator().manual_seed(0))


def assert_suppressed(found: torch.Tensor) -> None:
    others = [token for token in range(10) if token not in IDS]
    assert bool((found[:, IDS] == -torch.inf).all())
    assert torch.equal(found[:, others], logits()[:, others])


def test_runner_v1_loads_it_and_gives_the_tokens_probability_0():
    (kind,) = v1._load_custom_logitsprocs([suppressing(IDS)])
    processor = kind(None, CPU, False)
    assert not processor.is_argmax_invariant()  # or greedy answers would go without
    assert_suppressed(processor.apply(logits()))


def loaded_by_v2():
    states = SimpleNamespace(
        device=CPU,
        max_num_reqs=8,
        vocab_size=10,
        all_token_ids=None,
        prompt_len=None,
        prefill_len=None,
        total_len=None,
    )
    kind = suppressing(IDS)
    v2.build_custom_logits_processors_params_validator([kind])(SamplingParams())
    (processor,) = v2.build_custom_logits_processors(None, states, False, [kind])
    return processor


class Untouched:
    """A stage of V2's sampler that has nothing to do for any request."""

    def add_request(self, *_) -> bool:
        return False

    def __getattr__(self, name: str):
        return lambda logits, *_: logits


def test_runner_v2_loads_it_and_gives_the_tokens_probability_0_in_every_request():
    sampler = v2_sampler.Sampler.__new__(v2_sampler.Sampler)
    sampler.logits_processors = [loaded_by_v2()]
    sampler.sampling_states = sampler.thinking_budget_state = Untouched()
    sampler.logprob_token_ids_state, sampler.trace_replay_state = Untouched(), None
    sampler.needs_logits_processing = numpy.zeros(8, dtype=bool)
    slots = numpy.array([6, 1, 2, 7, 0])  # a row of logits is whichever request's it is
    for slot in slots:
        sampler.add_request(slot, SamplingParams(temperature=1.0))
    rows = torch.from_numpy(slots)
    found = sampler.apply_sampling_params(
        logits(), rows, rows, slots, rows, rows, rows * 0, slots, skip_top_k_top_p=True
    )
    assert_suppressed(found)
