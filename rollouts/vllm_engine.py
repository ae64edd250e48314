"""A vLLM engine in this process: how it is started beside a policy, and with how much memory.

Everything in which it could differ from the policy is set here: the pixel limits, the tokens that
a response may hold, the dtype, no options from the checkpoint. On a CPU the same code runs with
vLLM's CPU build.
"""

import torch
import torch.distributed as dist
from vllm import LLM
from vllm.exceptions import VLLMError
from vllm.v1.sample.logits_processor import LogitsProcessor as RunnerV1Processor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as RunnerV2Processor

from policy import Policy
from training.console import UserError
from training.distributed import keeps_gradients, local
from training.pretrained import directory_of

GIB = 2**30
TEXT_TOKENS = 1024  # what max_model_len leaves for a prompt's words


def start_engine(
    policy: Policy, model: str, dtype: torch.dtype, max_model_len: int, images: int, share: float
) -> LLM:
    """The engine on the policy's device, with the weights of `model`. UserError if it cannot start.

    As `VLLMSampler` explains them; share: of the GPU, 0: what the trainer will leave.
    """
    if policy.suppressed_ids.device.type == "cuda":
        share = share or derived_gpu_memory_utilization(policy)
        device_settings = dict(gpu_memory_utilization=share, enable_sleep_mode=True)
    else:
        device_settings = cpu_settings(max_model_len)
    several = dist.is_initialized() and dist.get_world_size() > 1
    set_num_threads = torch.set_num_threads
    try:
        return LLM(
            str(directory_of(model)),
            trust_remote_code=False,
            dtype=dtype,
            max_model_len=max_model_len,
            seed=0,
            logprobs_mode="processed_logprobs",
            use_tqdm_on_load=False,
            mm_processor_kwargs={"size": dict(policy.processor.image_processor.size)},
            limit_mm_per_prompt={"image": images, "video": 0},
            mm_processor_cache_gb=0,  # it would keep the pixels of all training states in memory
            logits_processors=[suppressing(policy.suppressed_ids.tolist())],
            # Under torchrun the processes are joined already. Each makes a group of its own there.
            distributed_executor_backend="external_launcher" if several else None,
            **device_settings,
        )
    except (VLLMError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"vLLM cannot start ({first_line(error)}); --rollout transformers does without"
        ) from error
    finally:
        torch.set_num_threads = set_num_threads  # the CPU build puts one there that only warns


def cpu_settings(max_model_len: int) -> dict:
    """What a CPU needs. Turns compiling by torch._dynamo off in this process."""
    # Compiling vLLM's helpers in the first call would take longer than it saves.
    torch._dynamo.config.disable = True
    return dict(
        kv_cache_memory_bytes=GIB,
        enforce_eager=True,
        block_size=32,  # the n actions of a short prompt share whole blocks of its KV cache
        # A prompt in two steps would rewind its random numbers, which a CPU's generator cannot.
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(8192, max_model_len),
        max_num_seqs=512,
    )


def suppressing(ids: list[int]) -> type:
    """Gives these tokens probability 0 in every request, as the policy does. (vLLM's own lists,
    one a request, cost Python time for each token.)

    A class for both of vLLM's model runners, each of which takes its own kind alone: V2, which a
    GPU gets where Triton works, and V1.
    """

    class Suppress(RunnerV1Processor, RunnerV2Processor):
        def __init__(self, vllm_config, place, is_pin_memory: bool = False):
            device = place if isinstance(place, torch.device) else place.device  # V2: its requests
            self.ids = torch.tensor(ids, dtype=torch.long, device=device)

        def is_argmax_invariant(self) -> bool:  # V1 calls it, and the next one
            return False

        def update_state(self, batch_update) -> None:
            pass

        def add_request(self, req_idx: int, sampling_params) -> bool:  # V2 calls it
            return True  # with False it skips `apply` if a request asks for nothing else

        def apply(self, logits: torch.Tensor, context=None) -> torch.Tensor:
            return logits.index_fill_(1, self.ids, -torch.inf)  # (rows, V), all requests alike

    return Suppress


def derived_max_model_len(policy: Policy, images: int, max_new_tokens: int) -> int:
    """Tokens of the longest prompt and action: images of the largest size, words, the action. At
    most the model's own limit."""
    vision = policy.model.config.vision_config
    pixels_a_token = (vision.patch_size * vision.spatial_merge_size) ** 2
    image_tokens = policy.processor.image_processor.size["longest_edge"] // pixels_a_token
    needed = images * image_tokens + TEXT_TOKENS + max_new_tokens
    return min(needed, policy.model.config.text_config.max_position_embeddings)


def derived_gpu_memory_utilization(policy: Policy) -> float:
    """The share of the GPU that is left beside all that the trainer keeps, less a margin of 5 %.

    Policy and reference must be there already, and nothing else. The rest is to come, of a sharded
    policy the local part: AdamW's two moments (8 bytes a parameter, float32), and the gradients (4)
    where DDP keeps them.
    """
    device = policy.suppressed_ids.device
    torch.cuda.empty_cache()  # what loading left over counts as used
    free, total = torch.cuda.mem_get_info(device)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    parameters = sum(local(parameter).numel() for parameter in trained)
    to_come = (12 if keeps_gradients(policy) else 8) * parameters
    share = (free - to_come) / total - 0.05
    if share < 0.05:
        raise UserError(
            f"the GPU has {free / GIB:.0f} GiB free and training needs {to_come / GIB:.0f}: "
            "nothing is left for vLLM. Use --lora-rank 16, --beta 0 (no reference; with "
            "--lora-rank there is none), a smaller model, or --rollout transformers"
        )
    return round(min(share, 0.9), 3)


def first_line(error: Exception) -> str:
    """The first line of an error that may fill a screen."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
