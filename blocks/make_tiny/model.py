"""The untrained model and its processor, in the classes of Qwen2-VL."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from blocks.dataset import vocabulary
from blocks.drawing import CELL
from blocks.scenes import GRID

SIDE, PATCH = GRID * CELL, 8
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> "
    "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
).split()
CHAT_TEMPLATE = (  # Qwen2-VL's, without the system prompt
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def build_processor() -> Qwen2VLProcessor:
    """A word-level tokenizer with added special tokens, and the processors of pictures.

    The vision and chat tokens must be added: the processor repeats an image token without spaces,
    which a tokenizer that splits at spaces would take for an unknown word.
    """
    words = {word: i for i, word in enumerate(["<unk>", *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    tokenizer.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL[1:],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    sizes = dict(patch_size=PATCH, merge_size=2, temporal_patch_size=2)
    limits = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=limits, **sizes),
        video_processor=Qwen2VLVideoProcessor(size=limits, **sizes),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer) -> Qwen2VLForConditionalGeneration:
    """An untrained model. Its heads have 32 dimensions, which every attention kernel takes."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    text = dict(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
        bos_token_id=None,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        tie_word_embeddings=True,
    )
    vision = dict(
        depth=2,
        embed_dim=96,
        num_heads=3,
        mlp_ratio=4,
        hidden_size=128,
        patch_size=PATCH,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def prompt_ids(tokenizer, images: int, text: str) -> list[int]:
    """The prompt as the processor makes it: each picture is 16 image tokens."""
    picture = f"<|vision_start|>{'<|image_pad|>' * GRID**2}<|vision_end|>"
    prompt = f"<|im_start|> user {picture * images}{text} <|im_end|> <|im_start|> assistant "
    return tokenizer(prompt).input_ids


def save(model, out: Path, dtype: torch.dtype) -> None:
    """Writes the weights in `dtype`; the model keeps its own."""
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied
    model.save_pretrained(out, state_dict=weights)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
