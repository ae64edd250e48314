"""The families of models that can be a policy: what differs between them, and what is refused.

    Qwen2-VL     patches of 14 x 14 pixels, four of them a token
    Qwen2.5-VL   the same; its vision tower attends in windows, and now and then to the whole image
    Qwen3-VL     patches of 16 x 16; its heads are normalised and may be wider or narrower than the
                 hidden values shared out among them; what three blocks of its vision tower give out
                 is added to what the first three layers of the language model give out (deepstack)

policy.py runs them all in one way; no other place asks for a family but activations.py, which adds
up what each keeps.
"""

from __future__ import annotations

import re

from transformers import PreTrainedConfig, Qwen2VLConfig, Qwen3VLConfig

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
NOT_PACKED = {  # layers in which actions cannot share a prompt (attention.py), and why
    "linear_attention": "which pass on one state from token to token through the whole row",
    "sliding_attention": "which see the nearest tokens of the row (a sliding window)",
}


def head_size(text: PreTrainedConfig) -> int:
    """Values of a head of the language model. Qwen3-VL's config gives it, the others share out."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def why_not_packed(text: dict | PreTrainedConfig) -> str:
    """Why actions of a language model cannot share a prompt in one row; "" if they can.

    text: its config, or as config.json has it. Full attention is all that attention.py knows.
    """
    values = text if isinstance(text, dict) else text.to_dict()
    kinds = values.get("layer_types") or []
    kinds = {str(kind) for kind in kinds} if isinstance(kinds, list) else set()
    if values.get("full_attention_interval"):  # Qwen3-Next's config.json names no layer
        kinds.add("linear_attention")
    for kind in sorted(kinds - {"full_attention"}):
        reason = NOT_PACKED.get(kind, "which attention.py does not know")
        return f"it has {kind} layers, {reason}: its actions cannot share a prompt there"
    return ""


# -------------------------------------------------------------------------------- without weights


def qwen2_vl(size: str) -> Qwen2VLConfig:
    """Qwen2-VL-2B or 7B, as the config.json of Qwen/Qwen2-VL-2B-Instruct or 7B-Instruct has it."""
    hidden, intermediate, heads, key_heads, words = {
        "2B": (1536, 8960, 12, 2, 151936),
        "7B": (3584, 18944, 28, 4, 152064),
    }[size]
    text = dict(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=28,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=words,
        max_position_embeddings=32768,
    )
    vision = dict(depth=32, embed_dim=1280, hidden_size=hidden, num_heads=16, mlp_ratio=4)
    vision |= dict(patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=size == "2B")


def qwen3_vl(size: str) -> Qwen3VLConfig:
    """Qwen3-VL-2B, 4B or 8B, as the config.json of Qwen/Qwen3-VL-2B-Instruct and so on has it."""
    hidden, intermediate, layers, heads = {
        "2B": (2048, 6144, 28, 16),
        "4B": (2560, 9728, 36, 32),
        "8B": (4096, 12288, 36, 32),
    }[size]
    depth, width, inner, levels = (24, 1024, 4096, [5, 11, 17])
    if size == "8B":
        depth, width, inner, levels = (27, 1152, 4304, [8, 16, 24])
    text = dict(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=262144,
    )
    vision = dict(depth=depth, hidden_size=width, intermediate_size=inner, num_heads=16)
    vision |= dict(out_hidden_size=hidden, deepstack_visual_indexes=levels, patch_size=16)
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=size != "8B")


def known(model: str) -> tuple[PreTrainedConfig, dict[str, int]] | None:
    """What is known of a model of the hub without the hub: its config, and its limits of pixels,
    as its preprocessor_config.json names them. None of any other."""
    if found := re.fullmatch(r"Qwen/Qwen2-VL-(2B|7B)(-Instruct)?", model):
        return qwen2_vl(found[1]), {"shortest_edge": 3136, "longest_edge": 12845056}
    if found := re.fullmatch(r"Qwen/Qwen3-VL-(2B|4B|8B)-Instruct", model):
        return qwen3_vl(found[1]), {"shortest_edge": 65536, "longest_edge": 16777216}
    return None
