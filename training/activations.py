"""What autograd keeps of a forward pass, added up tensor by tensor, before any model is loaded.

tests/training/test_plan.py compares it with measurements.
"""

from dataclasses import dataclass

from training.families import head_size

LOGIT_CHUNK = 512  # Policy's
BYTES_OF_A_LOGIT = 12  # float32: log-softmax, its gradient and that of the logits


@dataclass
class MicroBatch:
    """B prompts of P tokens with G actions of T tokens each, in one row of N = B (P + G T) tokens.

    patches: of all their images.
    """

    B: int
    P: int
    G: int
    T: int
    patches: int

    @property
    def N(self) -> int:
        return self.B * (self.P + self.G * self.T)


def kept_by_layer(config, batch: MicroBatch, half: bool, sharded: bool) -> tuple[float, float]:
    """Bytes that autograd keeps of a layer of the language model, and of its input alone.

    The input alone is what gradient checkpointing keeps. half: computed in bfloat16. With float32
    weights (ddp) the hidden states stay float32, and every linear layer keeps a copy of its input;
    with weights gathered in bfloat16 (sharded) they are bfloat16, and linear layers share it.
    """
    text, B, P, A, T = config.text_config, batch.B, batch.P, batch.B * batch.G, batch.T
    c, width = 2 if half else 4, head_size(text) * text.num_attention_heads
    # Queries, keys, values, outputs of the prompts; queries, outputs of the actions; the keys and
    # values that they see, of as many heads as there are queries; the input of o_proj.
    attention = c * width * (4 * B * P + 2 * A * T + 2 * A * (P + T) + batch.N)
    if config.model_type == "qwen3_vl":  # of queries and keys: what the norms take in and give out
        heads = text.num_attention_heads + text.num_key_value_heads
        attention += (4 + c) * head_size(text) * heads * batch.N
    mlp = c * 4 * text.intermediate_size * batch.N  # gate, its SiLU, up, their product
    if not half:
        norms = 6 * 4  # two norms: input, normalised, output for linear layers
    elif sharded:
        norms = 2 * 4 + 4 * 2  # inputs of norms are taken to float32
    else:
        norms = 4 * 4 + 5 * 2  # inputs and normalised; the inputs of q, k, v, gate, up
    hidden = text.hidden_size * batch.N  # entries of the hidden states
    return attention + mlp + norms * hidden, (2 if half and sharded else 4) * hidden


def kept_by_block(config, batch: MicroBatch, half: bool) -> tuple[float, float]:
    """The same of a block of the vision tower.

    Inputs and outputs of two norms, queries, keys, all of qkv, outputs twice, and the MLP's.
    """
    vision = config.vision_config
    if config.model_type == "qwen2_vl":  # QuickGELU: its input, the sigmoid, their product
        width, mlp = vision.embed_dim, 3 * vision.embed_dim * vision.mlp_ratio
    elif config.model_type == "qwen2_5_vl":  # as in a layer of the language model
        width, mlp = vision.hidden_size, 4 * vision.intermediate_size
    else:  # GELU: its input and its output
        width, mlp = vision.hidden_size, 2 * vision.intermediate_size
    entries = (2 if half else 4) * batch.patches
    return entries * (11 * width + mlp), entries * width


def kept_by_deepstack(config, batch: MicroBatch, half: bool) -> float:
    """The same of what Qwen3-VL's vision tower gives out on the way: normalised, GELU's input and
    its output, for each of its levels. And of its learned positions: four neighbours of each patch,
    in float32."""
    vision = config.vision_config
    if config.model_type != "qwen3_vl":
        return 0
    levels = 3 * len(vision.deepstack_visual_indexes)
    return vision.hidden_size * batch.patches * ((2 if half else 4) * levels + 4 * 4)


def activations(
    config,
    batch: MicroBatch,
    half: bool,
    sharded: bool,
    checkpointing: bool,
    frozen: bool = False,
    rank: int = 0,
) -> tuple[float, float]:
    """Bytes kept of a whole forward pass, and the most that comes and goes in the backward pass.

    That is at one of four moments: the logits of a chunk; the head's gradient, when a further
    chunk's is added to it; the gradients of a layer's MLP, with checkpointing together with the
    layer computed again; the gradient of the embeddings, when what was kept is gone. The gradient
    of a tied vocabulary waits from the head until there. frozen: nothing of the vision tower is
    kept. rank: of an adapter (LoRA), beside which nothing has a gradient; 0: there is none.
    """
    text = config.text_config
    layers, blocks = text.num_hidden_layers, config.vision_config.depth
    layer, layer_input = kept_by_layer(config, batch, half, sharded)
    layer += (2 if half else 4) * 7 * rank * batch.N  # between A and B of seven linear layers
    block, block_input = (0, 0) if frozen else kept_by_block(config, batch, half)
    deepstack = 0 if frozen else kept_by_deepstack(config, batch, half)
    c = 2 if half else 4
    mask = c * batch.B * batch.G * batch.T * (batch.P + batch.T)  # the same in all layers
    predicted = batch.B * batch.G * batch.T
    # Entries of the embeddings, and of the head, as far as they have a gradient.
    table = 0 if rank else text.vocab_size * text.hidden_size
    chunks = 2 if predicted > LOGIT_CHUNK else 1  # or more
    logits = BYTES_OF_A_LOGIT * min(LOGIT_CHUNK, predicted) * text.vocab_size
    logits += c * table * (chunks - 1)
    head = c * table * (2 * chunks - 1)  # the sum so far, a chunk's, their sum
    gradients = 3 * c * text.intermediate_size * batch.N
    embeddings = (c if sharded else 4) * table
    waiting = embeddings if config.tie_word_embeddings else 0
    # Patches, merger, embeddings, last norm, the hidden states that predict.
    ends = block + deepstack + 6 * 4 * text.hidden_size * batch.N
    if checkpointing:
        kept = layers * layer_input + blocks * block_input + mask + ends
        backward = max(layer + gradients, block)
    else:
        kept, backward = layers * layer + blocks * block + mask + ends, gradients
    return kept, max(logits, head, waiting + backward, embeddings + 2 * waiting - kept)
