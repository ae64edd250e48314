"""Settings of a training run: dataclasses whose fields are the flags of the command line; presets.

`Settings` holds what every training program has; ekipl.py and sft.py add their own. The type,
default and help of a field are those of its flag, so --help, config.json and the code agree.
"""

import argparse
import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from training import rundir
from training.console import Parser, UserError

CACHE = "~/.cache/vision-ekipl"  # of what is downloaded and of what was checked
TASKS = ("counting", "structure", "transformation")
ROLLOUTS = ("auto", "vllm", "transformers")
TRACKERS = ("none", "tensorboard", "wandb")
PEFT = "peft==0.21.2"  # what --lora-rank needs
MOST = 10**8  # of any count: the order of more states than that does not fit into memory


def place_of(model: str) -> str:
    """The directory or hub id that --model means: "tiny" comes with this code."""
    tiny = Path(__file__).resolve().parents[1] / "blocks" / "tiny"
    return str(tiny) if model == "tiny" else model


def option(default, help: str, choices: tuple = ()):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """What every training run has to know. A preset sets several."""

    preset: str = option("blocks", "settings to start from; other flags change them")
    name: str = option("", "the run's directory under --runs (default: the preset, date and time)")
    runs: str = option("runs", "where run directories are made")
    plan: str = option(
        "",
        "start nothing, print the memory that a GPU needs and whether it fits: GB of a GPU, or "
        "GBxGPUS, such as 80x8",
    )
    seed: int = option(0, "of everything random: questions, order, sampling")
    # what is trained, on what
    model: str = option(
        "tiny",
        "what to start from: a directory in Hugging Face layout or a hub id; 'tiny' comes with "
        "this code",
    )
    data: str = option(
        "blocks",
        "questions: 'blocks' (the blocks world), 'reason-rft' (Reason-RFT-CoT, downloaded), or a "
        "directory with a copy of the latter",
    )
    data_cache: str = option(
        CACHE, "where 'reason-rft' is downloaded to, with a list of the images that were checked"
    )
    task: str = option("counting", "the task", TASKS)
    states: int = option(
        3200, "questions in the blocks world's training set (Reason-RFT-CoT has its own number)"
    )
    skip: int = option(0, "leave out the first questions, which another stage has learnt from")
    fraction: float = option(
        1.0,
        "share of the training set (less --skip) to use; smaller shares are parts of larger ones",
    )
    limit: int = option(0, "use at most so many questions of the training set; 0: all")
    epochs: int = option(1, "passes over the training set")
    min_pixels: int = option(0, "enlarge pictures to at least so many pixels; 0: the model's limit")
    max_pixels: int = option(0, "shrink pictures to at most so many pixels; 0: the model's limit")
    max_new_tokens: int = option(80, "length limit of a response, in tokens")
    # the optimizer
    batch_size: int = option(64, "states per step, over all processes")
    micro_batch: int = option(
        16, "states a forward pass of a process; fewer need less memory, the gradient is the same"
    )
    lr: float = option(5e-4, "peak learning rate (AdamW; linear warm-up, then cosine to 0)")
    warmup: float = option(0.05, "share of the steps in which the learning rate rises")
    warmup_steps: int = option(0, "number of steps in which it rises; 0: --warmup's share")
    weight_decay: float = option(0.0, "of AdamW")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    freeze_vision: bool = option(
        False, "train the language model only, not the vision tower and its projector"
    )
    lora_rank: int = option(
        0,
        "train an adapter of this rank for the language model (LoRA, by peft), which wants ten "
        "times the --lr or so; 0: train the model's own weights",
    )
    # the machine
    device: str = option("auto", "where to compute; auto: a GPU if any", ("auto", "cpu", "cuda"))
    parallel: str = option(
        "ddp",
        "under torchrun: each process holds the whole model (ddp), or a shard of model, gradients "
        "and optimizer (fsdp), for 7B",
        ("ddp", "fsdp"),
    )
    rollout: str = option(
        "auto",
        "what generates the policy's responses; auto: vLLM where it can run, else transformers",
        ROLLOUTS,
    )
    gpu_memory_utilization: float = option(
        0.0, "share of the GPU that vLLM may take while it generates; 0: what training will leave"
    )
    max_model_len: int = option(
        0, "vLLM's limit for prompt and response, in tokens; 0: what the longest question needs"
    )
    bf16: bool = option(
        True, "on a GPU, compute in bfloat16 (autocast; trained weights stay float32)"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, more time"
    )
    # what is measured and kept
    eval_every: int = option(
        25,
        "greedy evaluation on the task's test sets every so many steps, before the first and after "
        "the last; 0: never",
    )
    eval_states: int = option(100, "questions of each test set in an evaluation")
    save_every: int = option(
        25, "checkpoint every so many steps and after the last; 0: after the last only"
    )
    tracker: str = option(
        "none", "also report to TensorBoard or Weights & Biases (pip install ...)", TRACKERS
    )

    @property
    def steps(self) -> int:
        return self.states * self.epochs // self.batch_size

    def evaluates_after(self, step: int) -> bool:
        """Whether a step, counted from 1, ends with an evaluation."""
        return bool(self.eval_every) and (step % self.eval_every == 0 or step == self.steps)

    def saves_after(self, step: int) -> bool:
        """Whether a step, counted from 1, ends with a checkpoint."""
        return step == self.steps or (bool(self.save_every) and step % self.save_every == 0)

    @property
    def start(self) -> str:
        """The directory or hub id that `model` means."""
        return place_of(self.model)

    @property
    def pixels(self) -> dict[str, int | None]:
        """For `Policy.load`."""
        return {"min_pixels": self.min_pixels or None, "max_pixels": self.max_pixels or None}


def presets(paper) -> dict[str, dict]:
    """By name: the blocks world's tasks, and paper(task, size), the paper's for Reason-RFT-CoT."""
    named = {
        "blocks": {},
        "blocks-structure": {"task": "structure", "max_new_tokens": 48},
        "blocks-transformation": {"task": "transformation", "max_new_tokens": 96},
    }
    for task in TASKS:
        for size in ("2B", "7B"):
            named[f"{task}-{size.lower()}"] = paper(task, size)
    return named


# ------------------------------------------------------------------------------- the command line


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parser_of(kind: type[Settings], presets: dict[str, dict], about: str) -> Parser:
    """A command line with a flag for each field."""
    parser = Parser(description=about, allow_abbrev=False)
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with an earlier run, with its own settings"
    )
    for setting in dataclasses.fields(kind):
        choices = tuple(presets) if setting.name == "preset" else setting.metadata["choices"]
        text = setting.metadata["help"]
        if setting.default != "":
            text += f" (default: {setting.default})"
        text = text.replace("%", "%%")  # argparse formats it
        kinds = dict(type=setting.type, choices=choices or None)
        if setting.type is bool:
            kinds = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(flag(setting.name), default=None, help=text, **kinds)
    return parser


def parse(
    kind: type[Settings], presets: dict[str, dict], about: str, argv: list[str]
) -> tuple[Settings, Path | None]:
    """The settings that the command line asks for, and the run to resume if there is one.

    UserError for what cannot be read.
    """
    arguments = vars(parser_of(kind, presets, about).parse_args(argv))
    given = {name: value for name, value in arguments.items() if value is not None}
    if (resume := given.pop("resume", None)) is not None:
        if given:
            raise UserError(
                f"--resume goes on with the run's own settings: leave out {flag(next(iter(given)))}"
            )
        return stored_settings(kind, Path(resume)), Path(resume)
    preset = given.get("preset", kind.preset)
    names = {setting.name for setting in dataclasses.fields(kind)}  # a program may know fewer
    chosen = {name: value for name, value in presets[preset].items() if name in names}
    config = kind(**{**chosen, **given, "preset": preset})
    if (place := Path(config.model)).is_symlink():  # a run's `model` moves on with its checkpoints
        config.model = str(place.parent / place.readlink())
    return config, None


def glance(parse: Callable) -> Callable:
    """What `console.early` reads a command line with: flags and the values that make no sense.

    parse: as the programs have it.
    """

    def look(argv: list[str]) -> None:
        config, resume = parse(argv)
        if not config.plan:
            check(config, int(os.environ.get("WORLD_SIZE", 1)), resume is not None)

    return look


def stored_settings(kind: type[Settings], run: Path) -> Settings:
    """The settings of an earlier run, from its config.json. UserError if it is of another kind."""
    stored = rundir.read_config(run)
    fields = dataclasses.fields(kind)
    known = {setting.name for setting in fields}
    if not {"model", "seed", "states"} <= set(stored) <= known:
        raise UserError(
            f"{run} was made by another program or another version of this one: "
            "its settings have other names"
        )
    # A setting that an older version did not have: its default is what that version did.
    stored = {setting.name: setting.default for setting in fields} | stored
    for setting in fields:
        value, choices = stored[setting.name], setting.metadata["choices"]
        kinds = (int, float) if setting.type is float else (setting.type,)
        if type(value) not in kinds or (choices and value not in choices):
            raise UserError(f"{run}/config.json: {setting.name} cannot be {value!r}")
    return kind(**stored)


# ---------------------------------------------------------------------------------------- checks


def must(config: Settings, least: int, *names: str) -> None:
    """UserError for a setting that is less than `least`, or beyond any machine, or no number."""
    for name in names:
        value = getattr(config, name)
        if MOST < value < math.inf:
            raise UserError(f"{flag(name)} must be at most {MOST}")
        if not least <= value < math.inf:
            bound = "at least 1" if least else "0 or above"
            raise UserError(f"{flag(name)} must be {bound}, not {value}")


def above_zero(config: Settings, *names: str) -> None:
    """UserError for a setting that is not above 0, or no number."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"{flag(name)} must be above 0, not {getattr(config, name)}")


def check(config: Settings, world: int, resuming: bool) -> None:
    """UserError for settings that cannot work in any program, before anything is loaded.

    world: the number of processes.
    """
    must(config, 1, "states", "epochs", "batch_size", "micro_batch", "max_new_tokens")
    must(config, 0, "skip", "limit", "min_pixels", "max_pixels", "warmup", "warmup_steps")
    must(config, 0, "lora_rank", "weight_decay", "gpu_memory_utilization", "max_model_len")
    must(config, 0, "eval_every", "eval_states", "save_every")
    above_zero(config, "lr", "max_grad_norm")
    for wrong, message in contradictions(config, world):
        if wrong:
            raise UserError(message)
    if config.name and not resuming:
        rundir.must_be_new(Path(config.runs) / config.name)
    if config.device == "cuda":
        import torch  # seconds, which programs that load no model do without

        if not torch.cuda.is_available():
            raise UserError("--device cuda, but PyTorch sees no GPU here")


def contradictions(config: Settings, world: int) -> list[tuple[bool, str]]:
    """Mistakes and their messages, each with whether it was made."""
    size, least, most = config.batch_size, config.min_pixels, config.max_pixels
    return [
        (
            config.gpu_memory_utilization >= 1,
            "--gpu-memory-utilization is a share of the GPU, below 1",
        ),
        (
            config.lora_rank > 0 and find_spec("peft") is None,
            f"--lora-rank needs peft, which is not installed: pip install {PEFT}",
        ),
        (
            config.tracker != "none" and find_spec(config.tracker) is None,
            f"--tracker {config.tracker} is not installed: pip install {config.tracker}",
        ),
        (config.warmup > 1, "--warmup is a share of the steps, at most 1"),
        (
            not 0 < config.fraction <= 1,
            f"--fraction is a share of the training set, above 0 and at most 1, not "
            f"{config.fraction}",
        ),
        (0 < most < least, f"--min-pixels {least} is more than --max-pixels {most}"),
        (
            config.eval_every > 0 and config.eval_states < world,
            f"--eval-states must be at least 1 for each of {world} processes; "
            "--eval-every 0 evaluates never",
        ),
        (size < world, f"--batch-size {size} leaves some of {world} processes without a state"),
        (
            config.parallel == "fsdp" and size % world > 0,
            f"--parallel fsdp needs a --batch-size that {world} processes share evenly, not {size}",
        ),
        (config.states * config.epochs > MOST, f"--states times --epochs must be at most {MOST}"),
        (
            config.data == "blocks" and config.steps < 1,
            f"{config.states} states x {config.epochs} epochs are less than one batch of {size}",
        ),
    ]


def learning_rate(config: Settings, step: int) -> float:
    """Linear warm-up, then a cosine to 0 (Section 4.1). step: from 0."""
    warmup = config.warmup_steps or max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    angle = math.pi * (step - warmup) / max(1, config.steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(angle))
