"""The memory of one GPU, before anybody rents it.

    python ekipl.py --preset counting-7b --parallel fsdp --plan 80x8    # does it fit on 8 x 80 GB?
    python sft.py --preset counting-2b --plan 24                        # on one of 24 GB?

GB are 10^9 bytes. Weights, gradients, optimizer and reference are exact: bytes of a parameter times
parameters, counted on a model without memory (PyTorch's meta device; no weights are downloaded).
Activations (activations.py) are for the longest prompt and G different actions of full length. A
margin of 5 % is left for what a GPU takes besides: CUDA's own half GB, fragments.
"""

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from training import pretrained
from training.activations import MicroBatch, activations
from training.console import UserError
from training.disk import GB, MOMENTS, WEIGHT
from training.families import head_size
from training.settings import Settings

MARGIN = 0.05
WORDS = 256  # tokens of a prompt beside its images
ROWS = 512  # TransformersSampler's, at a time
GRAPHS = 25e6  # bytes a layer, about, of vLLM's CUDA graphs; it reports its own figure at its start
PHASES = {"generating": "generating", "learning": "learning", "step": "AdamW's step"}


@dataclass
class Sizes:
    """Parameters of a model: all, of a layer of the language model, of the vision tower with its
    projector, the rest outside of layers and blocks (embeddings, LM head, ...), and those of an
    adapter of rank 1."""

    total: int
    layer: int
    vision: int
    rest: int
    adapter: int


@dataclass
class Row:
    """Something that takes memory, in bytes of one GPU, in each phase of a training step."""

    name: str
    generating: float = 0.0
    learning: float = 0.0
    step: float = 0.0


def described(path: str) -> tuple[PreTrainedConfig, dict[str, int]]:
    """A model's config, and between how many pixels its processor keeps an image: "shortest_edge"
    and "longest_edge"."""
    try:
        return pretrained.described(path)
    except ValueError as error:
        raise UserError(f"cannot read the config of {path!r}: {error}") from None


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def sizes(config: PreTrainedConfig) -> Sizes:
    """Counts the parameters, tied ones once."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    layers = model.model.language_model.layers
    blocks, total = parameters(model.model.visual.blocks), parameters(model)
    linear = [part for part in layers[0].modules() if isinstance(part, torch.nn.Linear)]
    return Sizes(
        total=total,
        layer=parameters(layers) // len(layers),
        vision=parameters(model.model.visual),
        rest=total - parameters(layers) - blocks,
        adapter=len(layers) * sum(part.in_features + part.out_features for part in linear),
    )


def micro_batch(config: Settings, model, edges: dict[str, int], processes: int) -> MicroBatch:
    """The largest that the settings allow. edges: of `described`."""
    vision = model.vision_config
    pixels = min(config.max_pixels or edges["longest_edge"], edges["longest_edge"])
    if config.data == "blocks":
        pixels = min(pixels, max(64 * 64, config.min_pixels or edges["shortest_edge"]))
    images = 2 if config.task == "transformation" else 1
    merged = images * (pixels // (vision.patch_size * vision.spatial_merge_size) ** 2)
    B = min(config.micro_batch, -(-config.batch_size // processes))
    words = WORDS if config.data != "blocks" else WORDS // 4
    return MicroBatch(
        B=B,
        P=merged + words,
        G=getattr(config, "group_size", 1),
        T=config.max_new_tokens,
        patches=B * merged * vision.spatial_merge_size**2,
    )


# ------------------------------------------------------------------------------------- the memory


def trained(config: Settings, count: Sizes) -> int:
    """Parameters with a gradient and moments."""
    if config.lora_rank:
        return config.lora_rank * count.adapter
    return count.total - count.vision * config.freeze_vision


def memory(config: Settings, model, batch: MicroBatch, processes: int, half: bool) -> list[Row]:
    """What one of so many GPUs holds. half: the computation is in bfloat16."""
    count, sharded = sizes(model), config.parallel == "fsdp" and processes > 1
    shards = processes if sharded else 1
    mine, learnt = count.total / shards, trained(config, count) / shards  # parameters of this GPU
    # Between updates DDP keeps gradients in its buckets, and nobody else does.
    kept = 0 if sharded or processes == 1 else 4 * learnt
    rows = [Row("policy, float32", 4 * mine, 4 * mine, 4 * mine)]
    if config.lora_rank:
        frozen, name = (2 * mine, "bfloat16") if half else (4 * mine, "float32")
        rows = [
            Row(f"policy, frozen, {name}", frozen, frozen, frozen),
            Row("adapter, float32", 4 * learnt, 4 * learnt, 4 * learnt),
        ]
    rows += [
        Row("gradients, float32", kept, 4 * learnt, 4 * learnt),
        Row("AdamW, two moments, float32", 8 * learnt, 8 * learnt, 8 * learnt),
    ]
    if getattr(config, "beta", 0) and not config.lora_rank:  # else the same, without the adapter
        rows += [Row("reference, float32", 4 * mine, 4 * mine, 4 * mine)]
    rows += learning(config, model, batch, count, sharded, half)
    rows += [Row("roots of the second moments", step=4 * learnt)]
    return rows + generating(config, model, batch, count, processes, half)


def learning(
    config: Settings, model, batch: MicroBatch, count: Sizes, sharded: bool, half: bool
) -> list[Row]:
    """What comes and goes in forward and backward passes."""
    c, rank, rows = 2 if half else 4, config.lora_rank, []
    layer = (3 * c + 4) * count.layer  # a layer and the next, a gradient and its float32 buffer
    rest, copied = 2 * c * count.rest, count.total  # embeddings and head, their gradient
    if rank:
        adapter = rank * count.adapter / model.text_config.num_hidden_layers
        layer, rest = 2 * c * count.layer + (c + 4) * adapter, c * count.rest
        copied = trained(config, count)
    if sharded:  # embeddings and head are gathered, with a gradient until the end
        rows += [Row("gathered parameters and their gradients", learning=rest + layer)]
    elif half:
        rows += [Row("weights as autocast copies them, bfloat16", learning=2 * copied)]
    checkpointing, frozen = config.gradient_checkpointing, config.freeze_vision or rank > 0
    in_half = sharded or rank > 0
    kept, passing = activations(model, batch, half, in_half, checkpointing, frozen, rank)
    rows += [
        Row("activations", learning=kept),
        Row("logits, or a layer in its backward pass", learning=passing),
    ]
    if sharded and not rank:  # last of all, when a layer's buffers and all that was kept are gone
        more = max(0, 4 * count.rest - (kept + passing + layer))
        rows += [Row("more for the float32 sum of embeddings and head", learning=more)]
    return rows


def generating(
    config: Settings, model, batch: MicroBatch, count: Sizes, processes: int, half: bool
) -> list[Row]:
    """What rollouts take, without vLLM's CUDA graphs."""
    text, c, name = model.text_config, 2 if half else 4, "bfloat16" if half else "float32"
    width = head_size(text) * text.num_key_value_heads
    token = 2 * c * width * text.num_hidden_layers  # its keys and values
    length = batch.P + config.max_new_tokens
    if config.rollout != "transformers":
        return [
            Row(f"vLLM: weights, {name}", generating=c * count.total),
            Row("vLLM: keys and values, at least", generating=token * length),
        ]
    rows = []
    if (half and not config.lora_rank) or (config.parallel == "fsdp" and processes > 1):
        rows += [Row(f"all parameters, {name}", generating=c * count.total)]
    actions = -(-config.batch_size // processes) * getattr(config, "num_samples", 1)
    cache = token * min(ROWS, actions) * (batch.P + batch.T)
    return [*rows, Row("keys and values", generating=cache)]


def with_graphs(config: Settings, model, batch: MicroBatch, processes: int) -> list[Row]:
    """`memory`, which is that of tensors, and vLLM's CUDA graphs.

    The graphs are the driver's, and stay where they are while the engine sleeps.
    """
    rows = memory(config, model, batch, processes, config.bf16)
    if config.rollout != "transformers":
        graphs = GRAPHS * model.text_config.num_hidden_layers
        rows += [Row("vLLM: CUDA graphs, about", graphs, graphs, graphs)]
    return rows


def totals(rows: list[Row]) -> list[float]:
    """Bytes while generating, learning, and in the step."""
    sums = []
    for phase in PHASES:
        sums.append(sum(getattr(row, phase) for row in rows))
    return sums


# ------------------------------------------------------------------------------------- the report


def short_of(config: Settings, gigabytes: float, processes: int) -> float:
    """How many bytes are missing at the worst moment; below 0: what is left."""
    model, edges = described(config.start)
    batch = micro_batch(config, model, edges, processes)
    rows = with_graphs(config, model, batch, processes)
    return max(totals(rows)) - (1 - MARGIN) * gigabytes * GB


def remedy(config: Settings, gigabytes: float, processes: int) -> str:
    """Flags with which it fits: the first of these that are enough together, if need be with LoRA;
    "" if none are."""
    changes = {
        "--micro-batch 1": dict(micro_batch=1),
        "--gradient-checkpointing": dict(gradient_checkpointing=True),
    }
    tried = config
    if processes > 1 and config.batch_size % processes == 0:
        changes["--parallel fsdp"] = dict(parallel="fsdp")
    if getattr(config, "beta", 0) and not config.lora_rank:
        changes["--beta 0 (no KL term)"] = dict(beta=0.0)
    flags = []
    for flag, change in changes.items():
        changed = dataclasses.replace(config, **change)
        if changed != config:
            config = changed
            flags.append(flag)
            if short_of(config, gigabytes, processes) <= 0:
                return " ".join(flags)
    if config.lora_rank:
        return ""
    with_lora = dataclasses.replace(tried, lora_rank=16)
    if short_of(with_lora, gigabytes, processes) <= 0:
        return "--lora-rank 16"
    flags = remedy(with_lora, gigabytes, processes)
    return flags and f"--lora-rank 16 {flags}"


def parse(text: str) -> tuple[float, int]:
    """ "80x8" -> 80.0, 8: gigabytes of a GPU, GPUs.

    Without a number of GPUs those of this torchrun, or one. UserError for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:x(\d+))?", text)
    if not found or not float(found[1]) or found[2] == "0":
        raise UserError(f"--plan is GB of a GPU, or GBxGPUS such as 80x8, not {text!r}")
    return float(found[1]), int(found[2] or os.environ.get("WORLD_SIZE", 1))


def report(config: Settings) -> str:
    """The plan as text: a table in GB, and whether it fits."""
    gigabytes, processes = parse(config.plan)
    model, edges = described(config.start)
    batch = micro_batch(config, model, edges, processes)
    rows = with_graphs(config, model, batch, processes)
    count = sizes(model)
    name = Path(config.start).name if Path(config.start).is_dir() else config.start
    how = config.parallel if processes > 1 else "one process"
    lines = [
        f"{name}: {count.total / GB:.3f} billion parameters, {processes} x {gigabytes:g} GB, {how}",
        f"a micro-batch: {batch.B} x ({batch.P} tokens of prompt + {batch.G} actions of "
        f"{batch.T}) = {batch.N:,} tokens, {batch.patches:,} patches of images",
        "",
        f"{'GB of one GPU':44}" + "".join(f"{phase:>14}" for phase in PHASES.values()),
    ]
    for row in [*rows, Row("sum", *totals(rows))]:
        values = (row.generating, row.learning, row.step)
        cells = [f"{value / GB:14.2f}" if value else f"{'-':>14}" for value in values]
        lines.append(f"{row.name:44}" + "".join(cells))
    lines += ["", verdict(config, gigabytes, processes)]
    left = (1 - MARGIN) * gigabytes * GB - totals(rows)[0]
    if config.rollout != "transformers" and left > 0:
        lines.append(
            f"vLLM may have what is left while generating, {left / GB:.1f} GB more of keys and "
            "values"
        )
    return "\n".join(lines + other_memory(config, count, processes))


def verdict(config: Settings, gigabytes: float, processes: int) -> str:
    short = short_of(config, gigabytes, processes)
    limit = f"{gigabytes:g} GB less {MARGIN:.0%}"
    if short <= 0:
        return f"fits: {-short / GB:.1f} GB of {limit} are left at the worst moment"
    flags = remedy(config, gigabytes, processes)
    advice = (
        f"it fits with {flags}"
        if flags
        else ("more GPUs with --parallel fsdp, larger ones, or a smaller model")
    )
    return f"does not fit: {short / GB:.1f} GB too much for {limit}; {advice}"


def other_memory(config: Settings, count: Sizes, processes: int) -> list[str]:
    """What the machine and its disk have to hold."""
    loaded = (2 if config.lora_rank and config.bf16 else 4) * count.total / GB
    saving = WEIGHT * count.total / GB
    checkpoint = saving + MOMENTS * trained(config, count) / GB
    if config.parallel == "fsdp" and processes > 1:
        saving += checkpoint
    lines = [
        f"in the memory of the machine: {loaded:.0f} GB for each GPU while weights are loaded; "
        f"{saving:.0f} in the first while it saves"
    ]
    if config.rollout != "transformers":
        # PyTorch rounds each block up to a power of two.
        asleep = (2 if config.bf16 else 4) * count.total / GB
        lines.append(
            f"and, pinned, vLLM's weights while it sleeps: {asleep:.0f} to {2 * asleep:.0f} GB for "
            "each GPU, as their blocks fall"
        )
    share = " (12 bytes a parameter)" if not config.freeze_vision else ""
    room = f"a checkpoint{share}, twice that while the next one is saved"
    if config.lora_rank:
        checkpoint += WEIGHT * trained(config, count) / GB  # the adapter, beside the model
        room = "for adapter and merged model at the end; other checkpoints are adapters"
    lines.append(f"on the disk: {checkpoint:.1f} GB {room}")
    return lines
