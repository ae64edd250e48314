"""A model's directory in Hugging Face layout, read as a stranger's files.

Code that comes with a model is never run (`auto_map`, pickled weights), no memory is allocated that
its weights do not fill, and what would fail when a checkpoint is written fails here: each is a
ValueError of one line.

    directory = directory_of("Qwen/Qwen2-VL-2B-Instruct")   # downloads; a directory is itself
    config = read_config(directory)
    processor = read_processor(directory, config)
    model = read_model(directory, config, dtype=torch.float32)
"""

from __future__ import annotations

import json
import logging
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging as transformers_logging

from training.families import FAMILIES, known, why_not_packed

transformers_logging.disable_progress_bar()  # of loading and saving: programs show their own
LOG = logging.getLogger("pretrained")

HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
DESCRIPTION = ["*.json", "*.jinja", "*.txt"]
OBJECTS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.json",
)
MOST_LAYERS = 1000  # a list as long is made before anything else is known of a model
NUMBERS = ("F64", "F32", "F16", "BF16")  # safetensors' names
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p")
SAMPLING += ("epsilon_cutoff", "eta_cutoff")


def one_line(error: Exception, width: int = 240) -> str:
    """What went wrong, of an error that may fill a screen; a bare "'key'" with the error's name."""
    text = " ".join(str(error).split())
    if not isinstance(error, (ValueError, OSError)) or not text:
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= width else text[: width - 3].rstrip() + "..."


def directory_of(model: str | Path, weights: bool = True) -> Path:
    """Where a model's files are; those of a hub id are downloaded first, unless they were before.

    weights: without them only what describes the model. ValueError if there is no such directory,
    or the hub does not give the files.
    """
    if Path(model).is_dir():
        return Path(model)
    if not HUB_ID.fullmatch(str(model)):
        raise ValueError("there is no directory here, and no model of the hub has such a name")
    try:
        wanted = [*DESCRIPTION, "*.safetensors"] if weights else DESCRIPTION
        return Path(snapshot_download(str(model), allow_patterns=wanted))
    except RepositoryNotFoundError:
        raise ValueError(
            "there is no directory here, and the hub has no such model, or not for this account"
        ) from None
    except Exception as error:  # the library's, those of its HTTP client, those of the disk
        raise ValueError(
            "there is no directory here, and the hub does not give it "
            f"({one_line(error.__cause__ or error, 80)}). By hand: "
            f"hf download {model} --local-dir DIR, then --model DIR (evaluate.py DIR)"
        ) from error


def json_object(file: Path) -> dict:
    """A JSON file that must hold an object. ValueError, with the file's name, if it does not."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not readable JSON ({one_line(error, 100)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} holds a {type(value).__name__}, not an object")
    return value


@cache  # policy and reference start from one directory
def _tell_of_code(directory: Path) -> None:
    LOG.warning("%s: code that comes with a model (auto_map) is never run", directory)


@contextmanager
def library(action: str):
    """Calls of the library: without its long reports, and whatever it raises as a ValueError."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # of damaged files it may be of any kind
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{action} needs code that comes with the model (auto_map), which is never run"
            ) from error
        raise ValueError(f"{action} does not work: {one_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(level)


# ---------------------------------------------------------------------------------------- the parts


def read_config(directory: Path) -> PreTrainedConfig:
    """The model's config. ValueError if it is not of a family that we train."""
    if not (directory / "config.json").exists():
        if (directory / "adapter_config.json").exists():
            raise ValueError("it holds an adapter (LoRA): merge it into its model first")
        if (directory / "adapter").exists():
            raise ValueError("its run with --lora-rank has not ended: the end merges the adapter")
        raise ValueError("it has no config.json")
    stored = {
        name: json_object(directory / name) for name in OBJECTS if (directory / name).exists()
    }
    config = stored["config.json"]
    code = any("auto_map" in values for values in stored.values())
    if config.get("model_type") not in FAMILIES:
        raise ValueError(other_family(config, code))
    if config.get("quantization_config"):
        raise ValueError("its weights are quantised: start from the model with whole weights")
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for name in ("num_hidden_layers", "depth") if isinstance(part, dict) else ():
            if isinstance(part.get(name), int) and part[name] > MOST_LAYERS:
                raise ValueError(f"config.json: {name} {part[name]} is more than {MOST_LAYERS}")
    if code:
        _tell_of_code(directory)
    with library("its config.json"):
        found = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    found._attn_implementation = "sdpa"  # a name of its own may be a kernel of the hub: code, too
    if hasattr(found, "auto_map"):
        del found.auto_map  # a checkpoint of ours comes without that code
    text = found.text_config
    text.attention_dropout = 0.0  # Eq 2 compares two passes, which must not differ by chance
    if reason := why_not_packed(text):
        raise ValueError(reason)
    heads, key_heads = text.num_attention_heads, text.num_key_value_heads
    named = getattr(text, "head_dim", None)  # Qwen3-VL's heads have a size of their own
    whole = min(heads, key_heads, text.hidden_size) > 0 and heads % key_heads == 0
    if not whole or (not named and text.hidden_size % heads):
        raise ValueError(
            f"config.json: {text.hidden_size} hidden values, {heads} heads and {key_heads} "
            "key heads do not divide each other"
        )
    return found


def other_family(config: dict, code: bool) -> str:
    """Why a config.json of another family is refused. code: whether files of the model name some
    (auto_map)."""
    text = config.get("text_config")
    reason = why_not_packed(text if isinstance(text, dict) else config)
    return (
        f"its model type is {config.get('model_type')!r}, we train {', '.join(FAMILIES)}"
        + (f"; {reason}" if reason else "")
        + (", and never run code that comes with a model" if code else "")
    )


def read_processor(directory: Path, config: PreTrainedConfig) -> ProcessorMixin:
    """Tokenizer and image processor. ValueError if they do not fit the model."""
    if not any((directory / name).exists() for name in OBJECTS[2:4]):
        raise ValueError("it has no preprocessor_config.json")
    if not any((directory / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise ValueError("it has no tokenizer.json")
    with library("its processor"):
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    images = getattr(processor, "image_processor", None)
    if images is None or not hasattr(processor, "tokenizer"):
        raise ValueError("it has no image processor (preprocessor_config.json), or no tokenizer")
    vision, tokenizer = config.vision_config, processor.tokenizer
    for name, value in (
        ("patch_size", vision.patch_size),
        ("merge_size", vision.spatial_merge_size),
        ("temporal_patch_size", vision.temporal_patch_size),
    ):
        if getattr(images, name, None) != value:
            raise ValueError(
                f"its image processor has {name} {getattr(images, name, None)}, its model {value}"
            )
    least, most = (dict(images.size or {}).get(edge) for edge in ("shortest_edge", "longest_edge"))
    if not isinstance(least, int) or not isinstance(most, int) or not 1 <= least <= most:
        raise ValueError(f"its image processor has no usable limits of pixels ({least} to {most})")
    tokenizer.init_kwargs.pop("auto_map", None)  # nor does a checkpoint name it
    if tokenizer.eos_token_id is None:
        raise ValueError("its tokenizer has no eos_token, which ends a response")
    known, room = max(tokenizer.get_vocab().values()), config.text_config.vocab_size
    if known >= room:
        raise ValueError(f"its tokenizer has ids up to {known}, its model {room} embeddings")
    return processor


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights. ValueError unless all are here, as safetensors."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        return [directory / "model.safetensors"]
    if index.exists():
        weight_map = json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index.name} has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        for name in names:
            if Path(name).name != name or not (directory / name).is_file():
                raise ValueError(f"it has no file {name!r}, which {index.name} names")
        return [directory / name for name in names]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        raise ValueError(
            "its weights are pickles, which can run code when they are read: "
            "it needs model.safetensors"
        )
    raise ValueError("it has no model.safetensors")


def check_size(directory: Path, config: PreTrainedConfig) -> None:
    """ValueError if the weights do not nearly fill the model that the config describes.

    Nothing of that size is allocated: the model is made without memory, of the weights only the
    headers are read.
    """
    held = 0
    for file in weight_files(directory):
        with safe_open(file, "pt") as opened:  # reads the header alone
            for name in opened.keys():
                part = opened.get_slice(name)
                if part.get_dtype() not in NUMBERS:
                    raise ValueError(f"its weight {name} is of {part.get_dtype()}: quantised?")
                size = 1
                for length in part.get_shape():
                    size *= length
                held += size
    with library("its config.json"), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > 2 * held:  # a few that are missing are named later
        raise ValueError(
            f"its config.json describes {described:,} parameters, its weights are {held:,} numbers"
        )


def read_model(
    directory: Path, config: PreTrainedConfig, dtype: torch.dtype, attention: dict[str, str]
) -> PreTrainedModel:
    """The model with every weight from its files.

    attention: the implementation, by part of the config. ValueError if a weight is missing, of
    another shape or left over, or if a checkpoint of the model could not be written.
    """
    check_size(directory, config)
    with library("its model"):
        model, info = AutoModelForImageTextToText.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    # Hugging Face would leave these random, with a warning.
    if bad := [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]:
        raise ValueError(f"{len(bad)} weights are missing or of another shape, e.g. {min(bad)}")
    # A tied head is often saved beside the embeddings; rotary frequencies were, long ago.
    known = ("lm_head.weight", "inv_freq")
    if left := [name for name in info["unexpected_keys"] if not name.endswith(known)]:
        raise ValueError(
            f"{len(left)} weights have no place in what its config.json describes, e.g. {min(left)}"
        )
    writable(model.generation_config)
    with library("writing its config"):
        model.config.validate()
        model.config.to_json_string()
    return model


def writable(generation: GenerationConfig) -> None:
    """Drops settings without effect, which the library reads and does not write.

    What has an effect stays, for whoever generates with a checkpoint (sampling.py says everything
    itself). ValueError for settings that cannot be written for another reason.
    """
    idle = []
    if generation.do_sample is not True:
        idle += SAMPLING
    if generation.num_beams in (None, 1):
        idle += ["early_stopping", "length_penalty"]
    if generation.return_dict_in_generate is not True:
        idle += generation.extra_output_flags
    if generation.pad_token_id is not None and generation.pad_token_id < 0:
        idle += ["pad_token_id"]
    for name in idle:
        if getattr(generation, name, None) is not None:
            setattr(generation, name, None)
    with library("writing its generation_config.json"):
        generation.validate(strict=True)
        generation.to_json_string()


# -------------------------------------------------------------------------------- without weights


def described(model: str | Path) -> tuple[PreTrainedConfig, dict[str, int]]:
    """A model's config, and the fewest and most pixels of an image ("shortest_edge" and
    "longest_edge", as its processor names them). Some are known without the hub (families.py).

    ValueError as `read_config` and `read_processor` raise it.
    """
    if found := known(str(model)):
        return found
    directory = directory_of(model, weights=False)
    config = read_config(directory)
    return config, dict(read_processor(directory, config).image_processor.size)
