"""The memory of one GPU, before anybody rents it.

    python ekipl.py --preset counting-7b --parallel fsdp --plan 80x8      # does it fit on 8 GPUs of 80 GB? GB are 10^9 bytes
    python sft.py --preset counting-2b --plan 24                          # on one of 24 GB?

Weights, gradients, optimizer and reference are exact: bytes of a parameter times parameters, counted on a model without memory (PyTorch's meta
device; no weights are downloaded). Activations are what autograd keeps of the layers, added up tensor by tensor in `kept_by_layer` and `kept_by_block`
for the longest prompt and G different actions of full length. tests/test_plan.py compares both with measurements.
What a GPU takes beside (CUDA's own half GB, fragments) is left a margin of 5 %.
"""

import dataclasses
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from training import pretrained
from training.console import UserError
from training.settings import Settings

GB = 10**9
MARGIN = 0.05
WORDS = 256  # tokens of a prompt beside its images
LOGIT_CHUNK = 512  # Policy's
BYTES_OF_A_LOGIT = 12  # float32: log-softmax, its gradient and that of the logits
ROWS = 512  # TransformersSampler's, at a time
GRAPHS = 25e6  # bytes a layer, about, of vLLM's CUDA graphs; it tells its own figure when it starts
WEIGHTS, MOMENTS = 4, 8  # bytes of a parameter in a checkpoint
PHASES = {"generating": "generating", "learning": "learning", "step": "AdamW's step"}


@dataclass
class Sizes:
    """Parameters of a model: all, of a layer of the language model, of a block of the vision tower, and the rest (embeddings, LM head, ...)."""

    total: int
    layer: int
    block: int
    rest: int


@dataclass
class Row:
    """Something that takes memory, in bytes of one GPU: while actions are generated, in forward and backward passes, and in the optimizer's step."""

    name: str
    generating: float = 0.0
    learning: float = 0.0
    step: float = 0.0


def described(path: str) -> tuple[PreTrainedConfig, int]:
    """A model's config, and to how many pixels its processor shrinks an image."""
    try:
        config, edges = pretrained.described(path)
    except ValueError as error:
        raise UserError(f"cannot read the config of {path!r}: {error}") from None
    return config, edges["longest_edge"]


def sizes(config: PreTrainedConfig) -> Sizes:
    """Counts the parameters, tied ones once."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    total, layers, block = (
        sum(parameter.numel() for parameter in part.parameters())
        for part in (model, model.model.language_model.layers, model.model.visual.blocks)
    )
    return Sizes(
        total,
        layers // config.text_config.num_hidden_layers,
        block // config.vision_config.depth,
        total - layers - block,
    )


# ---------------------------------------------------------------------------------------------- activations


@dataclass
class MicroBatch:
    """B prompts of P tokens with G actions of T tokens each, in one row of N = B (P + G T) tokens; their images have so many patches."""

    B: int
    P: int
    G: int
    T: int
    patches: int

    @property
    def N(self) -> int:
        return self.B * (self.P + self.G * self.T)


def kept_by_layer(config, batch: MicroBatch, half: bool, sharded: bool) -> tuple[float, float]:
    """Bytes that autograd keeps of a layer of the language model, and of its input alone (gradient checkpointing).

    half: computed in bfloat16, where the weights stay float32 (ddp) the hidden states do too, and every linear layer keeps a copy of its input;
    where they are gathered in bfloat16 (sharded) hidden states are bfloat16 and linear layers share it.
    """
    text, B, P, A, T = config.text_config, batch.B, batch.P, batch.B * batch.G, batch.T
    # queries, keys, values, outputs of the prompts; queries, outputs of the actions; keys, values that they see, of as many heads as there are queries
    attention = text.hidden_size * (4 * B * P + 2 * A * T + 2 * A * (P + T))
    mlp = 4 * text.intermediate_size * batch.N  # gate, its SiLU, up, their product
    if not half:
        norms = (
            7 * 4
        )  # two norms: input, normalised, output, which linear layers keep; and the input of o_proj
    elif sharded:
        norms = 2 * 4 + 5 * 2  # inputs of norms are taken to float32
    else:
        norms = 4 * 4 + 6 * 2  # inputs and normalised; the inputs of q, k, v, o, gate, up
    hidden = 2 if half and sharded else 4
    return (2 if half else 4) * (
        attention + mlp
    ) + norms * text.hidden_size * batch.N, hidden * text.hidden_size * batch.N


def kept_by_block(config, batch: MicroBatch, half: bool) -> tuple[float, float]:
    """The same of a block of the vision tower: inputs and outputs of two norms, queries, keys, all of qkv, outputs twice, and the MLP's."""
    vision = config.vision_config
    if config.model_type == "qwen2_vl":
        width, mlp = (
            vision.embed_dim,
            3 * vision.embed_dim * vision.mlp_ratio,
        )  # QuickGELU: its input, the sigmoid, their product
    else:
        width, mlp = vision.hidden_size, 4 * vision.intermediate_size
    return (2 if half else 4) * (11 * width + mlp) * batch.patches, (
        2 if half else 4
    ) * width * batch.patches


def activations(
    config, batch: MicroBatch, half: bool, sharded: bool, checkpointing: bool
) -> tuple[float, float]:
    """Bytes kept of a whole forward pass, and the most that comes and goes beside them in the backward pass.

    That is at one of four moments: the logits of a chunk; the head's gradient, when a further
    chunk's is added to it; the gradients of a layer's MLP, with checkpointing together with the
    layer computed again; the gradient of the embeddings, when what was kept is gone. The gradient
    of a tied vocabulary waits from the head until there.
    """
    layers, blocks = config.text_config.num_hidden_layers, config.vision_config.depth
    layer, layer_input = kept_by_layer(config, batch, half, sharded)
    block, block_input = kept_by_block(config, batch, half)
    c = 2 if half else 4
    mask = c * batch.B * batch.G * batch.T * (batch.P + batch.T)  # the same in all layers
    predicted, words = batch.B * batch.G * batch.T, config.text_config.vocab_size
    table = words * config.text_config.hidden_size  # entries of the embeddings, and of the head
    chunks = 2 if predicted > LOGIT_CHUNK else 1  # or more
    logits = BYTES_OF_A_LOGIT * min(LOGIT_CHUNK, predicted) * words + c * table * (chunks - 1)
    head = c * table * (2 * chunks - 1)  # the sum so far, a chunk's, their sum
    gradients = 3 * c * config.text_config.intermediate_size * batch.N
    embeddings = (c if sharded else 4) * table
    waiting = embeddings if config.tie_word_embeddings else 0
    ends = (
        block + 6 * 4 * config.text_config.hidden_size * batch.N
    )  # patches, merger, embeddings, last norm, the hidden states that predict
    if checkpointing:
        kept = layers * layer_input + blocks * block_input + mask + ends
        backward = max(layer + gradients, block)
    else:
        kept, backward = layers * layer + blocks * block + mask + ends, gradients
    return kept, max(logits, head, waiting + backward, embeddings + 2 * waiting - kept)


# ---------------------------------------------------------------------------------------------- the table


def micro_batch(config: Settings, model, longest_edge: int, processes: int) -> MicroBatch:
    """The largest that the settings allow."""
    vision = model.vision_config
    pixels = min(config.max_pixels or longest_edge, longest_edge)
    if config.data == "blocks":
        pixels = min(pixels, max(64 * 64, config.min_pixels))
    images = 2 if config.task == "transformation" else 1
    patches = (
        images
        * (pixels // (vision.patch_size * vision.spatial_merge_size) ** 2)
        * vision.spatial_merge_size**2
    )
    share = -(-config.batch_size // processes)
    B = min(config.micro_batch, share)
    words = WORDS if config.data != "blocks" else WORDS // 4
    return MicroBatch(
        B,
        patches // vision.spatial_merge_size**2 + words,
        getattr(config, "group_size", 1),
        config.max_new_tokens,
        B * patches,
    )


def memory(config: Settings, model, batch: MicroBatch, processes: int, half: bool) -> list[Row]:
    """What one GPU of so many holds. half: the computation is in bfloat16."""
    count, text = sizes(model), model.text_config
    sharded = config.parallel == "fsdp" and processes > 1
    mine = count.total / (processes if sharded else 1)  # parameters
    c = 2 if half else 4
    rows = [
        Row("policy, float32", 4 * mine, 4 * mine, 4 * mine),
        # Between updates DDP keeps them in its buckets, and nobody else.
        Row("gradients, float32", 0 if sharded or processes == 1 else 4 * mine, 4 * mine, 4 * mine),
    ]
    rows += [Row("AdamW, two moments, float32", 8 * mine, 8 * mine, 8 * mine)]
    if getattr(config, "beta", 0):
        rows += [Row("reference, float32", 4 * mine, 4 * mine, 4 * mine)]
    if sharded:
        # Embeddings and head: gathered, with a gradient until the end of the backward pass. A layer and the next: gathered; one with its gradient
        # and the float32 buffer from which it is summed.
        rows += [
            Row(
                "gathered parameters and their gradients",
                learning=2 * c * count.rest + (3 * c + 4) * count.layer,
            )
        ]
    elif half:
        rows += [Row("weights as autocast copies them, bfloat16", learning=2 * count.total)]
    kept, passing = activations(model, batch, half, sharded, config.gradient_checkpointing)
    rows += [
        Row("activations", learning=kept),
        Row("logits, or a layer in its backward pass", learning=passing),
    ]
    if sharded:  # last of all, when a layer's buffers and all that was kept are gone
        gone = kept + passing + (3 * c + 4) * count.layer
        rows += [
            Row(
                "more for the float32 sum of embeddings and head",
                learning=max(0, 4 * count.rest - gone),
            )
        ]
    rows += [
        Row("roots of the second moments", step=4 * mine),
    ]

    width = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    token = 2 * c * width * text.num_hidden_layers  # keys and values
    actions = -(-config.batch_size // processes) * getattr(config, "num_samples", 1)
    if config.rollout == "transformers":
        if sharded or half:
            rows += [
                Row(
                    f"all parameters, {'bfloat16' if half else 'float32'}",
                    generating=c * count.total,
                )
            ]
        rows += [
            Row("keys and values", generating=token * min(ROWS, actions) * (batch.P + batch.T))
        ]
    else:
        rows += [
            Row(f"vLLM: weights, {'bfloat16' if half else 'float32'}", generating=c * count.total)
        ]
        rows += [
            Row(
                "vLLM: keys and values, at least",
                generating=token * (batch.P + config.max_new_tokens),
            )
        ]
    return rows


def with_graphs(config: Settings, model, batch: MicroBatch, processes: int) -> list[Row]:
    """`memory`, which is that of tensors, and vLLM's CUDA graphs, which are the driver's and
    stay where they are while the engine sleeps.
    """
    rows = memory(config, model, batch, processes, config.bf16)
    if config.rollout != "transformers":
        graphs = GRAPHS * model.text_config.num_hidden_layers
        rows += [Row("vLLM: CUDA graphs, about", graphs, graphs, graphs)]
    return rows


def totals(rows: list[Row]) -> list[float]:
    """Bytes while generating, learning, and in the step."""
    return [sum(getattr(row, phase) for row in rows) for phase in PHASES]


def short_of(config: Settings, gigabytes: float, processes: int) -> float:
    """How many bytes are missing at the worst moment; below 0: what is left."""
    model, longest_edge = described(config.start)
    batch = micro_batch(config, model, longest_edge, processes)
    rows = with_graphs(config, model, batch, processes)
    return max(totals(rows)) - (1 - MARGIN) * gigabytes * GB


def remedy(config: Settings, gigabytes: float, processes: int) -> str:
    """Flags with which it fits, the fewest and cheapest of these, one after the other; "" if none helps."""
    changes = [
        ("--micro-batch 1", dict(micro_batch=1)),
        ("--gradient-checkpointing", dict(gradient_checkpointing=True)),
    ]
    changes += (
        [("--parallel fsdp", dict(parallel="fsdp"))]
        if processes > 1 and config.batch_size % processes == 0
        else []
    )
    changes += [("--beta 0 (no KL term)", dict(beta=0.0))] if getattr(config, "beta", 0) else []
    said = []
    for text, change in changes:
        if any(getattr(config, name) != value for name, value in change.items()):
            config, said = dataclasses.replace(config, **change), [*said, text]
            if short_of(config, gigabytes, processes) <= 0:
                return " ".join(said)
    return ""


def parse(text: str) -> tuple[float, int]:
    """ "80x8" -> 80.0, 8: gigabytes of a GPU, GPUs. Without a number of GPUs those of this torchrun, or one. UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:x(\d+))?", text)
    if not found or not float(found[1]) or found[2] == "0":
        raise UserError(f"--plan is GB of a GPU, or GBxGPUS such as 80x8, not {text!r}")
    return float(found[1]), int(found[2] or os.environ.get("WORLD_SIZE", 1))


def report(config: Settings) -> str:
    """The plan as text: a table in GB, and whether it fits."""
    gigabytes, processes = parse(config.plan)
    model, longest_edge = described(config.start)
    batch = micro_batch(config, model, longest_edge, processes)
    rows = with_graphs(config, model, batch, processes)
    lines = [
        f"{Path(config.start).name if Path(config.start).is_dir() else config.start}: {sizes(model).total / GB:.3f} billion parameters, "
        f"{processes} x {gigabytes:g} GB, {config.parallel if processes > 1 else 'one process'}",
        f"a micro-batch: {batch.B} x ({batch.P} tokens of prompt + {batch.G} actions of {batch.T}) = {batch.N:,} tokens, {batch.patches:,} patches of images",
        "",
        f"{'GB of one GPU':44}" + "".join(f"{name:>14}" for name in PHASES.values()),
    ]
    figures = [(row.name, [row.generating, row.learning, row.step]) for row in rows] + [
        ("sum", totals(rows))
    ]
    lines += [
        f"{name:44}" + "".join(f"{value / GB:14.2f}" if value else f"{'-':>14}" for value in values)
        for name, values in figures
    ]
    short = short_of(config, gigabytes, processes)
    lines += [""]
    if short > 0:
        help = remedy(config, gigabytes, processes)
        lines += [f"does not fit: {short / GB:.1f} GB too much for {gigabytes:g} GB less {MARGIN:.0%}; " + (
            f"it fits with {help}" if help else "more GPUs with --parallel fsdp, larger ones, or a smaller model")]  # fmt: skip
    else:
        lines += [
            f"fits: {-short / GB:.1f} GB of {gigabytes:g} GB less {MARGIN:.0%} are left at the worst moment"
        ]
    if config.rollout != "transformers":
        left = (1 - MARGIN) * gigabytes * GB - totals(rows)[0]
        lines += (
            [
                f"vLLM may have what is left while generating, {left / GB:.1f} GB more of keys and values"
            ]
            if left > 0
            else []
        )
    lines += other_memory(config, sizes(model).total, processes)
    return "\n".join(lines)


def other_memory(config: Settings, total: int, processes: int) -> list[str]:
    """What the machine and its disk have to hold. total: parameters."""
    saving = 4 + 12 * (config.parallel == "fsdp" and processes > 1)
    lines = [
        f"in the memory of the machine: {4 * total / GB:.0f} GB for each GPU while weights are loaded; {saving * total / GB:.0f} in the first while it saves"
    ]
    if config.rollout != "transformers":
        asleep = (
            (2 if config.bf16 else 4) * total / GB
        )  # PyTorch rounds each block up to a power of two
        lines += [
            f"and, pinned, vLLM's weights while it sleeps: {asleep:.0f} to {2 * asleep:.0f} GB for each GPU, as their blocks fall"
        ]
    checkpoint = (WEIGHTS + MOMENTS) * total / GB
    return [
        *lines,
        f"on the disk: {checkpoint:.1f} GB a checkpoint (12 bytes a parameter), twice that while the next one is saved",
    ]


# ---------------------------------------------------------------------------------------------- the disk


def check_disk(config: Settings, policy: torch.nn.Module, resume: Path | None) -> None:
    """UserError if the disk has no room for what the run will save. config: with the number of
    states that there are.

    A checkpoint holds the weights and the moments of what is trained. The newest is whole before
    the one before it goes.
    """
    needed = sum(
        parameter.numel() * (WEIGHTS + MOMENTS * parameter.requires_grad)
        for parameter in policy.parameters()
    )
    if not resume and 0 < config.save_every < config.steps:
        needed *= 2
    place = resume or Path(config.runs)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"the disk of {place} has {free / GB:.1f} GB free, and checkpoints take {needed / GB:.1f} (12 bytes a parameter, twice while one "
            f"is saved): make room, or choose another --runs"
        )
