"""What the benchmarks compute: models by size, states, fixed actions.

A workload is one training step: B states with one square picture each, G actions of exactly T
tokens a state. All sides of a comparison get the same weights (one directory in Hugging Face
layout), pictures, prompts, actions and rewards. Actions are random words that end with EOS: the
cost of a step does not depend on which words they are.
"""

import dataclasses
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from blocks.dataset import BlocksSet
from data.state import State
from policy import Policy
from training.settings import place_of

TINY = Path(place_of("tiny"))
IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
# The made models: 33 million parameters, and Qwen2-VL-2B's own config (Qwen/Qwen2-VL-2B-Instruct,
# config.json). With the initializer range of "mid" log-probs differ by nats from token to token, so
# that an error shows in them.
MADE = {
    "mid": dict(
        text=dict(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=6
        ),
        rope=dict(rope_theta=1e4, mrope_section=[8, 12, 12]),
        vision=dict(depth=8, embed_dim=256, num_heads=4),
        initializer_range=0.05,
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
    """One training step."""

    model: str  # "tiny", or one of MADE
    states: int  # B
    micro_batch: int  # states in a forward pass
    group_size: int  # G = N
    image_tokens: int  # of a state, a square number
    action_tokens: int  # T
    vocabulary: int
    gradient_checkpointing: bool = False
    beta: float = 0.04  # with a reference pass
    lr: float = 1e-6
    rollout: bool = True  # False: the training step alone
    seed: int = 0


def changed(work: Workload, args, *names: str) -> Workload:
    """The workload with those of its fields that the command line gives."""
    changes = {name: getattr(args, name) for name in names}
    return dataclasses.replace(work, **{name: value for name, value in changes.items() if value})


WORKLOADS = {  # states, micro-batch, G, image tokens, T, vocabulary
    "tiny": Workload("tiny", 8, 8, 8, 16, 40, 256),
    "mid": Workload("mid", 1, 1, 8, 400, 128, 8192),
    "2b": Workload("2b", 2, 1, 8, 1225, 512, 151936, gradient_checkpointing=True),
}


def save_model(work: Workload, path: Path) -> None:
    """Writes model and processor of a workload in Hugging Face layout.

    Its pictures have `image_tokens` tokens, neither more nor fewer.
    """
    processor = AutoProcessor.from_pretrained(TINY)
    torch.manual_seed(work.seed)
    if work.model == "tiny":
        model = Qwen2VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
        if work.vocabulary != model.config.text_config.vocab_size:
            model.resize_token_embeddings(work.vocabulary)
    else:
        processor.image_processor.patch_size = 14
        # On a GPU where there is one: these are up to two billion random numbers.
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Qwen2VLForConditionalGeneration(made_config(work, processor.tokenizer))
        if work.model == "2b":  # half the disk; all sides load the same float32 from it
            model = model.to(torch.bfloat16)
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
    sizes = MADE[work.model]
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in IDS.items()}
    text = dict(
        sizes["text"],
        rope_parameters=dict(sizes["rope"], rope_type="default"),
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        vocab_size=work.vocabulary,
        initializer_range=sizes["initializer_range"],
        max_position_embeddings=32768,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(
        sizes["vision"],
        hidden_size=text["hidden_size"],
        initializer_range=sizes["initializer_range"],
        mlp_ratio=4,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def pixels(work: Workload, processor) -> int:
    """The side of a workload's pictures, in pixels."""
    side, images = math.isqrt(work.image_tokens), processor.image_processor
    if side * side != work.image_tokens:
        raise ValueError(
            f"pictures are square: image_tokens must be a square number, not {work.image_tokens}"
        )
    return side * images.patch_size * images.merge_size


def make_states(work: Workload, processor) -> list[State]:
    """Questions of the blocks world, their pictures enlarged to the workload's size."""
    questions, side = BlocksSet("counting-train", work.states), pixels(work, processor)
    states = []
    for i in range(work.states):
        state = questions[i]
        picture = state.images[0].resize((side, side))
        states.append(State(state.id, (picture,), state.question, state.answer, state.kind))
    return states


def inputs_of(states: list[State], processor):
    """A model's inputs for the prompts, one a row."""
    template, text, images = processor.apply_chat_template, [], []
    for state in states:
        text.append(template(state.messages(), tokenize=False, add_generation_prompt=True))
        images += state.images
    return processor(text=text, images=images, padding=True, return_tensors="pt")


def prompt_tokens(state: State, processor) -> int:
    """Of one prompt, with its image tokens."""
    return inputs_of([state], processor)["input_ids"].shape[1]


def make_actions(work: Workload, tokenizer) -> list[list[list[int]]]:
    """actions[b][g]: T - 1 random words and EOS."""
    rng = random.Random(work.seed)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    words = sorted(set(tokenizer.get_vocab().values()) - special)
    actions = []
    for _ in range(work.states):
        group = []
        for _ in range(work.group_size):
            chosen = rng.choices(words, k=work.action_tokens - 1)
            group.append([*chosen, tokenizer.eos_token_id])
        actions.append(group)
    return actions


def make_rewards(work: Workload) -> list[list[float]]:
    """rewards[b][g]: 0, 1 or 2, not all equal in a group, so that none is dead (but for G = 1)."""
    rewards = []
    for b in range(work.states):
        rewards.append([float((b + g) % 3) for g in range(work.group_size)])
    return rewards
