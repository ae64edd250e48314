"""Rollouts by vLLM (Eq 4): one engine in each process, with weights that are provably in step with the policy's.

    rollouts -> sleep -> parity check, update -> wake, sync the weights, drop the caches -> rollouts

The engine samples from the very distribution that policy.py scores: the same prompt tokens and pixels, softmax(logits / temperature)
over the tokens that a response may hold, top_p 1. It is a second model beside the policy, and everything in which the two could drift apart
is held together here: weights by `sync_weights` after every update, with everything that was computed from the old ones dropped; prompts
by a comparison of token ids at every call; the numbers by `check_parity`, which scores some of the
sampled actions with the policy: it stops the run where the two disagree at the start, and warns
where they come to disagree later.

On a GPU the engine sleeps (level 1: weights in host memory, no KV cache) while the policy learns. On a CPU the same code runs
with vLLM's CPU build. This module is imported only where vLLM is wanted; `sampling.make_sampler` decides.
"""

import atexit
import math
import os
import random
import sys
from collections.abc import Iterator
from contextlib import suppress

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMError
from vllm.v1.sample.logits_processor import LogitsProcessor as RunnerV1Processor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as RunnerV2Processor

from policy import Policy, Prompt, pack
from sampling import Action, Group, Sampler
from training.console import UserError
from training.distributed import autocast, full, keeps_gradients, local
from training.metrics import POLICY
from training.pretrained import directory_of

# Before the import: the engine in this process (weights reach it without a copy, and it ends with us), no telemetry, no chatter.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

GIB = 2**30
TEXT_TOKENS = 1024  # what max_model_len leaves for a prompt's words
PARITY_TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 0.1,  # 0.01 to 0.04 is what healthy engines show
}  # mean |difference| of a token's log-probability, in nats
PARITY_GROUPS = 4  # of a process, scored in a check


class VLLMSampler(Sampler):
    """Rollouts with an in-process vLLM engine, on the policy's device.

    model: the directory or hub id that the engine starts from; its weights are the policy's before the first action.
    bf16: the engine's dtype on a GPU, else float32. images: how many a state has at most. gpu_memory_utilization: the share of the
    GPU that the engine may take while awake, 0: what the trainer will leave. max_model_len: tokens of prompt and action, 0: what
    `images` of the processor's largest size, TEXT_TOKENS words and an action need, at most the model's own limit.
    """

    seeds_each_state = True

    def __init__(
        self, policy: Policy, model: str, max_new_tokens: int, bf16: bool = False, images: int = 2,
        gpu_memory_utilization: float = 0.0, max_model_len: int = 0,
    ):  # fmt: skip
        super().__init__(policy, max_new_tokens, bf16)
        if not 0.01 <= policy.temperature <= 2:
            raise UserError(
                f"vLLM samples at temperatures from 0.01 to 2 only, not {policy.temperature}"
            )
        cuda = policy.suppressed_ids.device.type == "cuda"
        self.dtype = torch.bfloat16 if cuda and bf16 else torch.float32
        self.max_model_len = max_model_len or derived_max_model_len(policy, images, max_new_tokens)
        device_settings = dict(
            gpu_memory_utilization=gpu_memory_utilization or derived_gpu_memory_utilization(policy), enable_sleep_mode=True
        )  # fmt: skip
        if not cuda:
            torch._dynamo.config.disable = (
                True  # compiling vLLM's helpers in the first call would take longer than it saves
            )
            device_settings = dict(
                kv_cache_memory_bytes=GIB, enforce_eager=True,
                block_size=32,  # the n actions of a short prompt share whole blocks of its KV cache
                # A prompt prefilled in two steps would have its random numbers rewound, which a CPU's generator cannot do.
                enable_chunked_prefill=False, max_num_batched_tokens=max(8192, self.max_model_len), max_num_seqs=512,
            )  # fmt: skip
        set_num_threads = torch.set_num_threads
        try:
            self.llm = LLM(
                str(directory_of(model)), trust_remote_code=False, dtype=self.dtype, max_model_len=self.max_model_len, seed=0, logprobs_mode="processed_logprobs", use_tqdm_on_load=False,
                mm_processor_kwargs={"size": dict(policy.processor.image_processor.size)}, limit_mm_per_prompt={"image": images, "video": 0},
                mm_processor_cache_gb=0,  # it would keep the pixels of every training state in host memory
                logits_processors=[suppressing(policy.suppressed_ids.tolist())],
                # Under torchrun the processes are joined already: each takes a group of its own in there, and no port.
                distributed_executor_backend="external_launcher" if dist.is_initialized() and dist.get_world_size() > 1 else None,
                **device_settings,
            )  # fmt: skip
        except (VLLMError, ValueError, RuntimeError, AssertionError) as error:
            raise UserError(
                f"vLLM cannot start ({first_line(error)}); --rollout transformers does without"
            ) from error
        torch.set_num_threads = (
            set_num_threads  # vLLM's CPU build puts a function there that only warns
        )
        (self.inside,) = self.llm.apply_model(lambda model: model)  # vLLM's own model
        self._parameters = {name for name, _ in self.inside.named_parameters()}
        self._load_weights, self.inside.load_weights = self.inside.load_weights, self._recording
        self._asleep = self._checked = False
        atexit.register(self.close)  # also where a mistake ends the run while the engine is asleep
        self.sync_weights()

    # ------------------------------------------------------------------------------------------ actions

    def sample(self, prompts: list[Prompt], n: int, seed: int) -> list[list[Action]]:
        """n actions for each prompt (Eq 4), with their log-probabilities. The same seed gives the same actions."""
        own = [
            random.Random(f"{seed} {prompt.state.id}").getrandbits(62) for prompt in prompts
        ]  # the n actions' seeds follow it
        return self._generate(
            prompts,
            [
                self._parameters_of(n=n, temperature=self.policy.temperature, seed=s, logprobs=0)
                for s in own
            ],
        )

    def greedy(self, prompts: list[Prompt]) -> list[Action]:
        """The most probable token each time: one action for each prompt."""
        return [
            actions[0]
            for actions in self._generate(
                prompts, [self._parameters_of(temperature=0.0)] * len(prompts)
            )
        ]

    def _parameters_of(self, **settings) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_new_tokens, top_p=self.top_p, top_k=self.top_k, min_p=0.0, repetition_penalty=1.0, detokenize=False,
            ignore_eos=True, stop_token_ids=[self.policy.eos_id], **settings,
        )  # fmt: skip

    def _generate(
        self, prompts: list[Prompt], parameters: list[SamplingParams]
    ) -> list[list[Action]]:
        requests = []
        for prompt in prompts:
            room = self.max_model_len - len(prompt.input_ids)
            if room < self.max_new_tokens:  # vLLM would cut the action short without a word
                raise UserError(
                    f"state {prompt.state.id}: its prompt of {len(prompt.input_ids)} tokens and an action of {self.max_new_tokens} do not fit "
                    f"--max-model-len {self.max_model_len}: raise it, lower --max-new-tokens, or use smaller images"
                )
            request = {"prompt": self.policy.prompt_text(prompt.state)}
            requests.append(
                request
                | (
                    {"multi_modal_data": {"image": list(prompt.state.images)}}
                    if prompt.state.images
                    else {}
                )
            )
        try:
            outputs = self.llm.generate(requests, parameters, use_tqdm=False)
        except (VLLMError, ValueError) as error:
            raise UserError(f"vLLM refuses a prompt: {first_line(error)}") from error
        for prompt, output in zip(prompts, outputs, strict=True):
            check_prompt(prompt, output.prompt_token_ids, self.policy.model.config.image_token_id)
        return [[self._action(completion) for completion in output.outputs] for output in outputs]

    def _action(self, completion) -> Action:
        tokens = list(completion.token_ids)
        logps = (
            [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)]
            if completion.logprobs
            else None
        )
        text = self.policy.tokenizer.decode(tokens, skip_special_tokens=True)
        return Action(
            tokens, text, POLICY, truncated=completion.finish_reason == "length", token_logps=logps
        )

    # ------------------------------------------------------------------------------------------ weights and memory

    def sleep(self) -> None:
        """Leaves the GPU to the trainer until `sync_weights`. A CPU has no such thing."""
        if self.policy.suppressed_ids.device.type == "cuda":
            self.llm.sleep(
                level=1
            )  # level 2 would drop the weights, and with some models more than `sync_weights` brings back
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # what the trainer freed is still PyTorch's
            self.llm.wake_up()
            self._asleep = False

    def sync_weights(self) -> None:
        """The policy's weights into the engine, and away with all that the old ones computed. After every update.

        UserError if the engine has a parameter that gets no value, or the policy one that the engine does not know.
        """
        self._wake()
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights()})
        except (ValueError, KeyError) as error:
            raise UserError(
                f"vLLM does not know a weight of the policy: {first_line(error)}"
            ) from error
        if missing := self._parameters - self._loaded:
            raise UserError(
                f"the weight sync left {len(missing)} of vLLM's parameters as they were, e.g. {min(missing)}"
            )
        if (
            self.policy.model.config.tie_word_embeddings
        ):  # on a CPU the head computes with a repacked copy, which the reload forgets
            head = self.inside.language_model.lm_head
            head.quant_method.process_weights_after_loading(head)
        self._drop_caches()

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter once, tied ones too, by their names in the checkpoint; references, so that there is no second copy of the model.

        One that is sharded is gathered as it is handed over, in the engine's dtype: no process ever holds more than the engine itself asks for.
        """
        for name, parameter in self.policy.model.named_parameters():
            value = parameter.detach()
            yield name, full(value.to(self.dtype)) if isinstance(value, DTensor) else value

    def _recording(self, weights) -> set[str]:
        """vLLM's own `load_weights`, which tells what it loaded; vLLM itself would log what is missing and go on."""
        self._loaded = self._load_weights(weights)
        return self._loaded

    def _drop_caches(self) -> None:
        """Keys and values of prompts, image features: computed with other weights, found again by equal prompts and images."""
        if (
            not self.llm.reset_prefix_cache()
        ):  # it refuses, without an error, while blocks are in use
            raise UserError("vLLM kept keys and values of older weights: a request still runs")
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def close(self) -> None:
        """Ends the engine, once. (With the process it ends anyway, but torchrun's process group
        would be gone before.)

        It is woken first: of memory that sleeps, each block would be given back twice, and CUDA
        would print an error for it.
        """
        atexit.unregister(self.close)
        with suppress(RuntimeError):  # no room to wake, after another error: that one is to be read
            self._wake()
        self.llm.llm_engine.engine_core.shutdown()

    # ------------------------------------------------------------------------------------------ parity

    def check_parity(self, groups: list[Group]) -> dict[str, float]:
        """Scores the policy's own actions of some groups, and compares with the log-probabilities that vLLM sampled them with.

        Returns the mean |difference| of a token's log-probability, "parity", in nats. Beyond
        PARITY_TOLERANCE the first check raises UserError, with the figures and the likely causes; a
        later one prints that line and goes on, since nothing but the choice of actions depends on
        vLLM's numbers. UserError also if the pixel limits differ. Call it before the policy is
        updated.
        """
        policy = self.policy
        limits, own = self.pixel_limits(), dict(policy.processor.image_processor.size)
        if any(limits[edge] != own[edge] for edge in ("shortest_edge", "longest_edge")):
            raise UserError(
                f"parity: images are resized to {limits} pixels by vLLM, to {own} by the policy"
            )
        groups = [
            (group.prompt, sampled)
            for group in groups[:PARITY_GROUPS]
            if (sampled := [a for a in group.actions if a.token_logps])
        ]
        batch = pack(
            [prompt for prompt, _ in groups],
            [[action.tokens for action in sampled] for _, sampled in groups],
        )
        theirs = torch.tensor(
            [logp for _, sampled in groups for action in sampled for logp in action.token_logps]
        )
        device = policy.suppressed_ids.device
        with torch.no_grad(), autocast(device, self.bf16):
            ours = policy(batch.to(device)).cpu()[batch.action_mask]
        gap = (ours - theirs).abs()
        mean, worst, bound = float(gap.mean()), float(gap.max()), PARITY_TOLERANCE[self.dtype]
        if not mean <= bound:  # NaN too
            problem = (
                f"parity: log-probabilities of vLLM and of the policy differ by {mean:.2g} a token (mean of {len(gap)}; largest {worst:.2g}; "
                f"allowed in {str(self.dtype).removeprefix('torch.')}: {bound:g}). Likely causes: weights that were not synced, caches of "
                f"older weights, another temperature, images resized differently. --rollout transformers does without vLLM"
            )
            if not self._checked or not math.isfinite(mean):
                raise UserError(problem)
            tqdm.write(f"warning: {problem}", file=sys.stderr)  # above the progress bar
        self._checked = True
        return {"parity": mean}

    def pixel_limits(self) -> dict[str, int]:
        """The limits by which the engine resizes an image: {"shortest_edge": fewest pixels, "longest_edge": most}.

        Those of its call, as vLLM's `_get_vision_info` takes them: they go before what its processor was built with,
        which a preprocessor_config.json with min_pixels and max_pixels decides.
        """
        info = self.llm.llm_engine.renderer.get_mm_processor().info
        call = info._merge_and_resolve_mm_processor_kwargs({}).get("images_kwargs", {})
        return info._get_vision_size(call, default_size=info.get_image_processor().size)


def check_prompt(prompt: Prompt, found: list[int], image_token_id: int) -> None:
    """UserError unless vLLM's prompt is the trainer's, token by token."""
    expected = prompt.input_ids.tolist()
    if found != expected:
        first = next(
            (
                i
                for i, (left, right) in enumerate(zip(found, expected, strict=False))
                if left != right
            ),
            min(len(found), len(expected)),
        )
        raise UserError(
            f"parity: state {prompt.state.id} has another prompt in vLLM ({len(found)} tokens, {found.count(image_token_id)} of images) than in the "
            f"policy ({len(expected)}, {expected.count(image_token_id)}); first difference at {first}. Likely causes: pixel limits, chat template"
        )


def suppressing(ids: list[int]) -> type:
    """Gives these tokens probability 0 in every request, as the policy does. (vLLM's own
    per-request lists cost Python time a token.)

    A class for either of vLLM's model runners, each of which takes its own kind alone: V2, which a
    GPU gets where Triton works, and V1.
    """

    class Suppress(RunnerV1Processor, RunnerV2Processor):
        def __init__(self, vllm_config, place, is_pin_memory: bool = False):
            device = place if isinstance(place, torch.device) else place.device  # V2: its requests
            self.ids = torch.tensor(ids, dtype=torch.long, device=device)

        def is_argmax_invariant(self) -> bool:  # asked by V1, and so is the next
            return False

        def update_state(self, batch_update) -> None:
            pass

        def add_request(self, req_idx: int, sampling_params) -> bool:  # asked by V2
            return True  # False would let it skip `apply` where a request asks for nothing else

        def apply(self, logits: torch.Tensor, context=None) -> torch.Tensor:
            return logits.index_fill_(1, self.ids, -torch.inf)  # in all rows, whosever they are

    return Suppress


def derived_max_model_len(policy: Policy, images: int, max_new_tokens: int) -> int:
    """Tokens of the longest prompt with an action: images of the largest size, words, the action; at most what the model knows."""
    vision = policy.model.config.vision_config
    image_tokens = (
        policy.processor.image_processor.size["longest_edge"]
        // (vision.patch_size * vision.spatial_merge_size) ** 2
    )
    needed = images * image_tokens + TEXT_TOKENS + max_new_tokens
    return min(needed, policy.model.config.text_config.max_position_embeddings)


def derived_gpu_memory_utilization(policy: Policy) -> float:
    """The share of the GPU that is left when the trainer has all that it keeps between updates, and a margin of 5 %.

    Policy and reference are there already, and nothing else may be: the rest is counted as to come,
    of a sharded policy this process's share. That is AdamW's two moments (8 bytes a parameter,
    float32), and the gradients (4) where DDP keeps them.
    """
    device = policy.suppressed_ids.device
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()  # what loading left over counts as used
    free, total = torch.cuda.mem_get_info(device)
    to_come = (12 if keeps_gradients(policy) else 8) * sum(
        local(parameter).numel() for parameter in policy.parameters() if parameter.requires_grad
    )
    share = (free - to_come) / total - 0.05
    if share < 0.05:
        raise UserError(
            f"the GPU has {free / GIB:.0f} GiB free and training needs {to_come / GIB:.0f}: nothing is left for vLLM. Use --beta 0 (no reference), "
            f"a smaller model, or --rollout transformers"
        )
    return round(min(share, 0.9), 3)


def first_line(error: Exception) -> str:
    """What went wrong, of an error that may fill a screen."""
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )[:300]
