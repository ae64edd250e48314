"""LoRA (Hu et al. 2021): of a linear layer's weight W, only a correction of low rank is trained.

    W' = W + (ALPHA / R) B A        A: (R, in), random; B: (out, R), 0 at the start

Every linear layer of the language model has one, attention and MLP alike (Schulman et al. 2025,
"LoRA Without Regret"). All else is frozen, and on a GPU held in bfloat16, the dtype of the
computation and of the published weights; A and B are float32. peft makes the layers, and is
imported here alone. A checkpoint holds the adapter in peft's format, the last one the merged model
as well, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from training.console import UserError
from training.distributed import full

# The same for all R, so that the best learning rate hardly depends on R (Hu et al., Section 4.1).
ALPHA = 32
LAYERS = r"model\.language_model\.layers\.\d+\.\w+\.\w+_proj"  # attention's four, the MLP's three
NAME = "default"  # peft's, of the one adapter
FILE = Path("adapter") / "adapter_model.safetensors"


def frozen_dtype(config, device: torch.device) -> torch.dtype:
    """What a run's weights are loaded in. config: of training/settings.py."""
    half = config.lora_rank and config.bf16 and device.type == "cuda"
    return torch.bfloat16 if half else torch.float32


def add_adapter(model: torch.nn.Module, config, checkpoint: Path | None = None) -> None:
    """Freezes the model and gives its language model an adapter, the one of a checkpoint if any.
    Before `World.place`. UserError if the checkpoint's is damaged or does not fit."""
    import peft  # seconds

    how = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=ALPHA,
        target_modules=LAYERS,
        base_model_name_or_path=config.start,
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # the same A in every process
        peft.inject_adapter_in_model(how, model, NAME)
    for layer in adapted(model).values():
        layer.cast_input_dtype_enabled = False  # autocast does; peft would keep a float32 copy
    for parameter in adapter(model).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    if checkpoint:
        read_adapter(model, checkpoint)


def adapted(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers that have an adapter, by name; none without LoRA."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def adapter(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """A and B of all layers, by name: all that is trained. Empty without LoRA."""
    return {name: value for name, value in model.named_parameters() if ".lora_" in name}


def without_adapter(policy):
    """The reference: the model of the start, called as the policy is, under torch.no_grad()."""
    layers = adapted(policy.model).values()

    def reference(batch) -> torch.Tensor:  # (B, G, T)
        scales = [layer.scaling[NAME] for layer in layers]
        try:
            for layer in layers:  # peft's own switch freezes A and B, which FSDP would remember
                layer.scaling[NAME] = 0.0
            return policy(batch)
        finally:
            for layer, scale in zip(layers, scales, strict=True):
                layer.scaling[NAME] = scale

    return reference


def merged(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight of a model without adapter that stands for this one, by its name there.

    Tied weights once. W' is whole, and float32 at least: bfloat16, which vLLM computes with, loses
    a correction of less than half a unit in the last place of W. Other weights are the model's own,
    sharded if they are. With FSDP every process has to take part.
    """
    layers = adapted(model)
    for name, parameter in model.named_parameters():
        place, _, kind = name.rpartition(".base_layer.")
        value = parameter.detach()
        if place and kind == "weight":
            layer = layers[place]
            A, B = (full(part[NAME].weight.detach()) for part in (layer.lora_A, layer.lora_B))
            value = full(value) + layer.scaling[NAME] * (B @ A)  # (out, in)
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), value


def stored_name(name: str) -> str:
    """The name that peft gives a parameter of an adapter in a file."""
    return "base_model.model." + name.replace(f".{NAME}.", ".")


def save_adapter(directory: Path, model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Writes the adapter as peft does. values: whole, by the names of `adapter`."""
    (directory / FILE).parent.mkdir(parents=True)
    model.peft_config[NAME].save_pretrained(directory / FILE.parent)
    stored = {stored_name(name): value.contiguous().cpu() for name, value in values.items()}
    save_file(stored, directory / FILE, {"format": "pt"})


def shapes(values: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in values.items()}


def read_adapter(model: torch.nn.Module, directory: Path) -> None:
    """Sets the adapter to a checkpoint's. UserError if that is not there, damaged or another's."""
    own = {stored_name(name): value for name, value in adapter(model).items()}
    try:
        stored = load_file(directory / FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory / FILE} cannot be read: {error}") from None
    if shapes(own) != shapes(stored):
        raise UserError(f"{directory / FILE} is an adapter of another rank or of another model")
    if not all(value.isfinite().all() for value in stored.values()):
        raise UserError(f"{directory / FILE} holds what is no finite number (NaN or infinity)")
    for name, value in own.items():
        value.data.copy_(stored[name])
