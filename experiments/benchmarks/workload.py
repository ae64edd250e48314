"""What the benchmarks compute: models by size, states, fixed actions; what a step costs by arithmetic; clocks and memory.

A workload is one training step: B states with one square picture each, G actions of exactly T tokens a state. Every side of a comparison gets the
same weights (one directory in Hugging Face layout), pictures, prompts, actions and rewards. Actions are random words that end with EOS:
what a step costs does not depend on which words they are.
"""

import ctypes
import json
import math
import os
import platform
import random
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoConfig, AutoProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from blocks.dataset import BlocksSet
from data.state import State
from policy import Policy

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "blocks" / "tiny"
LOGIT_CHUNK = 512  # Policy's default: on how many tokens at a time its LM head runs
IDS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip

# The made models: 33 million parameters, and Qwen2-VL-2B's own config (Qwen/Qwen2-VL-2B-Instruct, config.json).
MADE = {
    "mid": dict(
        text=dict(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=6
        ),
        rope=dict(rope_theta=1e4, mrope_section=[8, 12, 12]),
        vision=dict(depth=8, embed_dim=256, num_heads=4),
        initializer_range=0.05,  # log-probabilities that differ by nats from token to token, so that an error shows in them
    ),
    "2b": dict(
        text=dict(
            hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12
        ),
        rope=dict(rope_theta=1e6, mrope_section=[16, 24, 24]),
        vision=dict(depth=32, embed_dim=1280, num_heads=16),
        initializer_range=0.02,
    ),
}


@dataclass(frozen=True)
class Workload:
    """One training step. states, micro_batch: B, and how many of them a forward pass takes. image_tokens: of a state, a square number."""

    model: str  # "tiny", or one of MADE
    states: int
    micro_batch: int
    group_size: int  # G = N
    image_tokens: int
    action_tokens: int  # T
    vocabulary: int
    gradient_checkpointing: bool = False
    beta: float = 0.04  # with a reference pass
    lr: float = 1e-6
    rollout: bool = True  # False: the training step alone
    seed: int = 0


WORKLOADS = {
    "tiny": Workload(
        "tiny",
        states=8,
        micro_batch=8,
        group_size=8,
        image_tokens=16,
        action_tokens=40,
        vocabulary=256,
    ),
    "mid": Workload(
        "mid",
        states=1,
        micro_batch=1,
        group_size=8,
        image_tokens=400,
        action_tokens=128,
        vocabulary=8192,
    ),
    "2b": Workload(
        "2b",
        states=2,
        micro_batch=1,
        group_size=8,
        image_tokens=1225,
        action_tokens=512,
        vocabulary=151936,
        gradient_checkpointing=True,
    ),
}


# ---------------------------------------------------------------------------------------------- models and data


def save_model(work: Workload, path: Path) -> None:
    """Writes model and processor of a workload in Hugging Face layout. Its pictures have `image_tokens` tokens, neither more nor fewer."""
    processor = AutoProcessor.from_pretrained(TINY)
    torch.manual_seed(work.seed)
    if work.model == "tiny":
        model = Qwen2VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
        if work.vocabulary != model.config.text_config.vocab_size:
            model.resize_token_embeddings(work.vocabulary)
    else:
        processor.image_processor.patch_size = 14
        with torch.device(
            "cuda" if torch.cuda.is_available() else "cpu"
        ):  # up to two billion random numbers
            model = Qwen2VLForConditionalGeneration(made_config(work, processor.tokenizer))
        if work.model == "2b":
            model = model.to(
                torch.bfloat16
            )  # half the disk; every side loads the same float32 from it
    side = pixels(work, processor)
    processor.image_processor.size = {"shortest_edge": side * side, "longest_edge": side * side}
    model.save_pretrained(path)
    processor.save_pretrained(path)
    del model
    torch.cuda.empty_cache()  # the sides, in processes of their own, need the room


def empty_model(path: Path) -> Qwen2VLForConditionalGeneration:
    """The saved model without its weights."""
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(path))


def suppressed_ids(path: Path) -> list[int]:
    """The tokens that our policy never samples. No side does, here."""
    return Policy(empty_model(path), AutoProcessor.from_pretrained(path)).suppressed_ids.tolist()


def made_config(work: Workload, tokenizer) -> Qwen2VLConfig:
    made = MADE[work.model]
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in IDS.items()}
    text = dict(
        made["text"], rope_parameters=dict(made["rope"], rope_type="default"), num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=work.vocabulary,
        initializer_range=made["initializer_range"], max_position_embeddings=32768, attention_dropout=0.0, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = dict(
        made["vision"], hidden_size=text["hidden_size"], initializer_range=made["initializer_range"], mlp_ratio=4, patch_size=14,
        spatial_merge_size=2, temporal_patch_size=2,
    )  # fmt: skip
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def pixels(work: Workload, processor) -> int:
    """The side of a workload's pictures, in pixels."""
    side = math.isqrt(work.image_tokens)
    if side * side != work.image_tokens:
        raise ValueError(
            f"pictures are square: image_tokens must be a square number, not {work.image_tokens}"
        )
    return side * processor.image_processor.patch_size * processor.image_processor.merge_size


def make_states(work: Workload, processor) -> list[State]:
    """Questions of the blocks world, their pictures enlarged to the workload's size."""
    questions, side = BlocksSet("counting-train", work.states), pixels(work, processor)
    states = [questions[i] for i in range(work.states)]
    return [
        State(
            state.id,
            (state.images[0].resize((side, side)),),
            state.question,
            state.answer,
            state.kind,
        )
        for state in states
    ]


def make_actions(work: Workload, tokenizer) -> list[list[list[int]]]:
    """actions[b][g]: T - 1 random words and EOS."""
    rng, special = (
        random.Random(work.seed),
        set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder),
    )
    words = sorted(set(tokenizer.get_vocab().values()) - special)
    return [
        [
            [*rng.choices(words, k=work.action_tokens - 1), tokenizer.eos_token_id]
            for _ in range(work.group_size)
        ]
        for _ in range(work.states)
    ]


def make_rewards(work: Workload) -> list[list[float]]:
    """rewards[b][g]: 0, 1 or 2, and in no group all the same, so that no group is dead (but for G = 1)."""
    return [[float((b + g) % 3) for g in range(work.group_size)] for b in range(work.states)]


# ---------------------------------------------------------------------------------------------- what a step costs, by arithmetic


@dataclass(frozen=True)
class Cost:
    """Of one training step. tokens: that pass through the language model's layers; pairs: of tokens that attend; patches: of the vision tower."""

    tokens: int
    pairs: int
    patches: int
    flops: float  # multiply-add = 2; reference and policy forward, backward twice a forward; recomputing not counted
    bytes: float  # at the peak of a micro-batch's backward pass: what the layers keep (float32, no checkpointing), logits, gradients


def step_cost(work: Workload, config: Qwen2VLConfig, prompt_tokens: int, repeated: bool) -> Cost:
    """The law. repeated: prompt and picture G times, as other trainers; else once a state, [prompt, a_1, ..., a_G]."""
    text, vision = config.text_config, config.vision_config
    B, G, T, P = work.states, work.group_size, work.action_tokens, prompt_tokens
    H, I, E, V = text.hidden_size, text.intermediate_size, vision.embed_dim, text.vocab_size
    kv = H // text.num_attention_heads * text.num_key_value_heads
    times = G if repeated else 1
    patches = (
        times * work.image_tokens * vision.spatial_merge_size**2
    )  # of one state, as the next three
    tokens = times * P + G * T
    pairs = times * P * (P + 1) // 2 + G * (P * T + T * (T + 1) // 2)
    scored = G * T  # the LM head is needed for the actions' tokens only

    layer = 2 * H * H + 2 * H * kv + 3 * H * I  # weights of a layer
    forward = text.num_hidden_layers * (2 * layer * tokens + 4 * H * pairs) + 2 * H * V * scored
    window = (
        work.image_tokens * vision.spatial_merge_size**2
    )  # patches of one picture attend to each other
    merged = (E * vision.spatial_merge_size**2) ** 2 + E * vision.spatial_merge_size**2 * H
    embed = 3 * vision.temporal_patch_size * vision.patch_size**2 * E
    forward += patches * (
        vision.depth * (2 * (4 + 2 * vision.mlp_ratio) * E * E + 4 * E * window) + 2 * embed
    )
    forward += patches // vision.spatial_merge_size**2 * 2 * merged

    kept = (
        text.num_hidden_layers * tokens * (10 * H + 4 * kv + 4 * I)
    )  # inputs of norms, projections, attention and MLP
    kept += vision.depth * patches * (10 + 2 * vision.mlp_ratio) * E
    logits = (
        work.micro_batch * scored if repeated else min(LOGIT_CHUNK, work.micro_batch * scored)
    ) * V
    weights = (
        text.num_hidden_layers * layer
        + V * H
        + vision.depth * (4 + 2 * vision.mlp_ratio) * E * E
        + merged
        + embed
    )
    held = 4.0 * (
        work.micro_batch * kept + 3 * logits + weights
    )  # logits, their softmax, its gradient
    return Cost(B * tokens, B * pairs, B * patches, 4.0 * B * forward, held)


def matrix_rate(device: str) -> float:
    """The machine's measured rate of matrix products, FLOP/s, in the dtype in which the benchmarks compute: the best of five."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    seconds = []
    for _ in range(5):
        start = clock(device)
        a @ b
        seconds.append(clock(device) - start)
    return 2 * n**3 / min(seconds)


# ---------------------------------------------------------------------------------------------- clocks, memory, machine


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Memory:
    """The peak of memory in use since `reset`, above what was in use at `base`, in bytes: of the GPU's allocator, else this process's
    resident set (Linux)."""

    def __init__(self, device: str):
        self.device = device
        self.base()

    def base(self) -> None:
        if self.device == "cuda":
            self.start = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(
                0
            )  # what was freed goes back to the system, or it would hide what comes
            self.start = resident("VmRSS")
        self.reset()

    def reset(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS

    def peak(self) -> int:
        return (
            torch.cuda.max_memory_allocated() if self.device == "cuda" else resident("VmHWM")
        ) - self.start


def resident(name: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name + ":")
    )
    return int(line.split()[1]) * 1024


class Recorder:
    """Measures the phases of one step: seconds, which count if its kind is "time", for "memory" the peaks too, for "profile" the
    seconds of each operator in "train"."""

    def __init__(self, device: str, kind: str):
        self.device, self.kind, self.seconds, self.bytes, self.operators = device, kind, {}, {}, {}
        self.memory = Memory(device) if kind == "memory" else None
        self.begin = clock(device)

    @contextmanager
    def phase(self, name: str):
        """May be entered several times in a step: times add up, of peaks the largest counts."""
        if self.memory:
            self.memory.reset()
        with (
            torch.profiler.profile()
            if self.kind == "profile" and name == "train"
            else nullcontext() as profiler
        ):
            start = clock(self.device)
            yield
            self.seconds[name] = self.seconds.get(name, 0.0) + clock(self.device) - start
        for event in profiler.key_averages() if profiler else ():
            total = (
                event.self_device_time_total if self.device == "cuda" else event.self_cpu_time_total
            )
            self.operators[event.key] = self.operators.get(event.key, 0.0) + total / 1e6
        if self.memory:
            self.bytes[name] = max(self.bytes.get(name, 0), self.memory.peak())

    def record(self, **more) -> dict:
        self.seconds["step"] = clock(self.device) - self.begin
        return {
            "kind": self.kind,
            "seconds": self.seconds,
            "bytes": self.bytes,
            "operators": self.operators,
            **more,
        }


def machine() -> dict:
    """What a figure was measured on, and with what."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        lines = (
            Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        )
        name = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
            platform.machine(),
        )
        name += f", {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    return {"machine": name, "date": time.strftime("%Y-%m-%d")} | versions


def write(path: Path | None, result: dict) -> None:
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")
