"""Rollouts by vLLM (Eq 4): one engine in each process, held in step with the policy.

    rollouts -> sleep -> parity check, update -> wake, sync the weights, drop the caches -> rollouts

The engine samples from the distribution that policy.py scores: the same prompt tokens and pixels,
softmax(logits / temperature) over the tokens that a response may hold, top_p 1. It is a second
model, so three things keep the two equal: `sync_weights` after every update, which also drops all
that the old weights computed; a comparison of the prompt's token ids at every call; and
`check_parity`, which scores some of the sampled actions with the policy (parity.py).

On a GPU the engine sleeps while the policy learns (level 1: weights in host memory, no KV cache).
`rollouts.choice` imports this module only where vLLM is wanted.
"""

import atexit
import random
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch.distributed.tensor import DTensor
from vllm import SamplingParams
from vllm.exceptions import VLLMError

from policy import Policy, Prompt
from rollouts.parity import check_gaps, check_pixels, check_prompt, gaps
from rollouts.vllm_engine import derived_max_model_len, first_line, start_engine
from sampling import Action, Group, Sampler
from training.console import UserError
from training.distributed import full
from training.lora import merged
from training.metrics import POLICY


class VLLMSampler(Sampler):
    """Rollouts by an in-process vLLM engine, on the policy's device.

    model: the directory or hub id that the engine starts from; its weights are the policy's before
    the first action. bf16: the engine's dtype on a GPU, else float32. images: how many a state has
    at most. gpu_memory_utilization: the share of the GPU that the engine may take while awake, 0:
    what the trainer will leave. max_model_len: tokens of prompt and action, 0: what `images` of the
    processor's largest size, 1,024 words and an action need, at most the model's own limit.
    """

    seeds_each_state = True

    def __init__(
        self,
        policy: Policy,
        model: str,
        max_new_tokens: int,
        bf16: bool = False,
        images: int = 2,
        gpu_memory_utilization: float = 0.0,
        max_model_len: int = 0,
    ):
        super().__init__(policy, max_new_tokens, bf16)
        if not 0.01 <= policy.temperature <= 2:
            raise UserError(
                f"vLLM samples at temperatures from 0.01 to 2 only, not {policy.temperature}"
            )
        self.cuda = policy.suppressed_ids.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda and bf16 else torch.float32
        self.max_model_len = max_model_len or derived_max_model_len(policy, images, max_new_tokens)
        self.llm = start_engine(
            policy, model, self.dtype, self.max_model_len, images, gpu_memory_utilization
        )
        (self.inside,) = self.llm.apply_model(lambda model: model)  # vLLM's own model
        self._parameters = {name for name, _ in self.inside.named_parameters()}
        self._load_weights, self.inside.load_weights = self.inside.load_weights, self._recording
        self._asleep = self._checked = False
        atexit.register(self.close)  # also where an error ends the run while the engine is asleep
        self.sync_weights()

    # ------------------------------------------------------------------ actions

    def sample(self, prompts: list[Prompt], n: int, seed: int) -> list[list[Action]]:
        """n actions for each prompt (Eq 4), with their log-probabilities. The same seed gives the
        same actions: vLLM derives the n seeds of a prompt from that of its state."""
        parameters = []
        for prompt in prompts:
            own = random.Random(f"{seed} {prompt.state.id}").getrandbits(62)
            settings = dict(n=n, temperature=self.policy.temperature, seed=own, logprobs=0)
            parameters.append(self._parameters_of(**settings))
        return self._generate(prompts, parameters)

    def greedy(self, prompts: list[Prompt]) -> list[Action]:
        """One action for each prompt: the most probable token each time."""
        parameters = [self._parameters_of(temperature=0.0)] * len(prompts)
        return [actions[0] for actions in self._generate(prompts, parameters)]

    def _parameters_of(self, **settings) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_new_tokens,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=0.0,
            repetition_penalty=1.0,
            detokenize=False,
            ignore_eos=True,
            stop_token_ids=[self.policy.eos_id],
            **settings,
        )

    def _generate(
        self, prompts: list[Prompt], parameters: list[SamplingParams]
    ) -> list[list[Action]]:
        requests = [self._request(prompt) for prompt in prompts]
        try:
            outputs = self.llm.generate(requests, parameters, use_tqdm=False)
        except (VLLMError, ValueError) as error:
            raise UserError(f"vLLM refuses a prompt: {first_line(error)}") from error
        groups = []
        for prompt, output in zip(prompts, outputs, strict=True):
            check_prompt(prompt, output.prompt_token_ids, self.policy.model.config.image_token_id)
            groups.append([self._action(completion) for completion in output.outputs])
        return groups

    def _request(self, prompt: Prompt) -> dict:
        """A prompt as vLLM takes it. UserError if it is too long: vLLM would cut the action short
        without a word."""
        length = len(prompt.input_ids)
        if self.max_model_len - length < self.max_new_tokens:
            raise UserError(
                f"state {prompt.state.id}: its prompt of {length} tokens and an action of "
                f"{self.max_new_tokens} do not fit --max-model-len {self.max_model_len}: raise it, "
                "lower --max-new-tokens, or use smaller images"
            )
        request = {"prompt": self.policy.prompt_text(prompt.state)}
        if prompt.state.images:
            request["multi_modal_data"] = {"image": list(prompt.state.images)}
        return request

    def _action(self, completion) -> Action:
        tokens, logps = list(completion.token_ids), None
        if completion.logprobs:
            steps = zip(completion.logprobs, tokens, strict=True)
            logps = [step[token].logprob for step, token in steps]
        text = self.policy.tokenizer.decode(tokens, skip_special_tokens=True)
        return Action(
            tokens, text, POLICY, truncated=completion.finish_reason == "length", token_logps=logps
        )

    # ------------------------------------------------------------------ weights and memory

    def sleep(self) -> None:
        """Leaves the GPU to the trainer until `sync_weights`. On a CPU it does nothing."""
        if self.cuda:
            # Level 2 would drop the weights, and with some models more than is synced.
            self.llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # PyTorch still holds what the trainer has freed
            self.llm.wake_up()
            self._asleep = False

    def sync_weights(self) -> None:
        """Loads the policy's weights into the engine, and drops all that the old ones computed.

        To be called after every update. UserError if the engine has a parameter that gets no value,
        or the policy one that the engine does not know.
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
                f"the weight sync left {len(missing)} of vLLM's parameters as they were, "
                f"e.g. {min(missing)}"
            )
        if self.policy.model.config.tie_word_embeddings:
            # On a CPU the head computes with a repacked copy, which the reload forgets.
            head = self.inside.language_model.lm_head
            head.quant_method.process_weights_after_loading(head)
        self._drop_caches()

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter once, tied ones too, by their names in the checkpoint, adapters merged.

        By reference, so that there is no second copy of the model. A sharded one is gathered as it
        is handed over, in the engine's dtype, so that no process holds more than one of them.
        """
        for name, value in merged(self.policy.model):
            yield name, full(value.to(self.dtype)) if isinstance(value, DTensor) else value

    def _recording(self, weights) -> set[str]:
        """vLLM's own `load_weights`, recorded; vLLM itself only logs what is missing."""
        self._loaded = self._load_weights(weights)
        return self._loaded

    def _drop_caches(self) -> None:
        """Drops keys and values of prompts, and image features: equal prompts would find them."""
        if not self.llm.reset_prefix_cache():  # it refuses in silence while blocks are in use
            raise UserError("vLLM kept keys and values of older weights: a request still runs")
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def close(self) -> None:
        """Ends the engine, once, while torchrun's process group is still there.

        It is woken first: each block of sleeping memory would be freed twice, and CUDA would print
        an error for it.
        """
        atexit.unregister(self.close)
        with suppress(RuntimeError):  # no room to wake, after another error: that one is to be read
            self._wake()
        self.llm.llm_engine.engine_core.shutdown()

    # ------------------------------------------------------------------ parity

    def check_parity(self, groups: list[Group]) -> dict[str, float]:
        """Compares the engine's log-probabilities of some sampled actions with the policy's.

        Returns "parity", the mean |difference| of a token's log-probability, in nats. UserError if
        the pixel limits differ, or if the mean is beyond PARITY_TOLERANCE at the first check; later
        that is a warning. To be called before the policy is updated.
        """
        check_pixels(self.pixel_limits(), self.policy)
        mean = check_gaps(gaps(self.policy, groups, self.bf16), self.dtype, not self._checked)
        self._checked = True
        return {"parity": mean}

    def pixel_limits(self) -> dict[str, int]:
        """The fewest and most pixels of an image: {"shortest_edge": ..., "longest_edge": ...}.

        vLLM's `_get_vision_info` prefers those of its call to those with which its processor was
        built, which a preprocessor_config.json with min_pixels and max_pixels decides.
        """
        info = self.llm.llm_engine.renderer.get_mm_processor().info
        call = info._merge_and_resolve_mm_processor_kwargs({}).get("images_kwargs", {})
        return info._get_vision_size(call, default_size=info.get_image_processor().size)
