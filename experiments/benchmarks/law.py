"""What a training step costs, by arithmetic (README.md, "The law")."""

from dataclasses import dataclass

from transformers import Qwen2VLConfig

from experiments.benchmarks.workload import Workload

LOGIT_CHUNK = 512  # Policy's default: on how many tokens at a time its LM head runs


@dataclass(frozen=True)
class Cost:
    """The cost of one training step."""

    tokens: int  # that pass through the language model's layers
    pairs: int  # of tokens that attend
    patches: int  # of the vision tower
    # Multiply-add = 2; reference and policy forward, backward twice a forward, no recomputing.
    flops: float
    # At the peak of a micro-batch's backward pass: activations (float32, no checkpointing), logits,
    # gradients.
    bytes: float


def step_cost(work: Workload, config: Qwen2VLConfig, prompt_tokens: int, repeated: bool) -> Cost:
    """repeated: prompt and picture G times, as other trainers do; else once a state,
    [prompt, a_1, ..., a_G].
    """
    text, vision = config.text_config, config.vision_config
    B, G, T, P = work.states, work.group_size, work.action_tokens, prompt_tokens
    H, V = text.hidden_size, text.vocab_size
    times = G if repeated else 1
    merge = vision.spatial_merge_size**2
    patches = times * work.image_tokens * merge  # of one state, as the next three
    tokens = times * P + G * T
    pairs = times * P * (P + 1) // 2 + G * (P * T + T * (T + 1) // 2)
    scored = G * T  # the LM head is needed for the actions' tokens only

    layers, layer, blocks, embed = text.num_hidden_layers, *weights(config)
    merger = (vision.embed_dim * merge) ** 2 + vision.embed_dim * merge * H
    forward = layers * (2 * layer * tokens + 4 * H * pairs) + 2 * H * V * scored
    window = work.image_tokens * merge  # patches of one picture attend to each other
    attention = vision.depth * 4 * vision.embed_dim * window
    forward += patches * (2 * blocks + attention + 2 * embed)
    forward += patches // merge * 2 * merger

    kept = activations(config, tokens, patches)
    positions = work.micro_batch * scored
    logits = (positions if repeated else min(LOGIT_CHUNK, positions)) * V
    parameters = layers * layer + V * H + blocks + merger + embed
    # Logits, their softmax and its gradient are there at once.
    held = 4.0 * (work.micro_batch * kept + 3 * logits + parameters)
    return Cost(B * tokens, B * pairs, B * patches, 4.0 * B * forward, held)


def weights(config: Qwen2VLConfig) -> tuple[int, int, int]:
    """Weights of a layer of the language model, of the vision blocks and the patch embedding."""
    text, vision = config.text_config, config.vision_config
    H, E = text.hidden_size, vision.embed_dim
    layer = 2 * H * H + 2 * H * key_width(config) + 3 * H * text.intermediate_size
    blocks = vision.depth * (4 + 2 * vision.mlp_ratio) * E * E
    return layer, blocks, 3 * vision.temporal_patch_size * vision.patch_size**2 * E


def key_width(config: Qwen2VLConfig) -> int:
    """Of the keys, and of the values."""
    text = config.text_config
    return text.hidden_size // text.num_attention_heads * text.num_key_value_heads


def activations(config: Qwen2VLConfig, tokens: int, patches: int) -> int:
    """Numbers that the layers keep: inputs of norms, projections, attention and MLP."""
    text, vision = config.text_config, config.vision_config
    width = 10 * text.hidden_size + 4 * key_width(config) + 4 * text.intermediate_size
    kept = text.num_hidden_layers * tokens * width
    return kept + vision.depth * patches * (10 + 2 * vision.mlp_ratio) * vision.embed_dim
