"""How a model is asked in an evaluation: the flags of evaluate.py, and where they get values.

A flag that is not given takes its value from --protocol, else from the config.json of the run
beside which the model lies, else from DEFAULTS.
"""

import hashlib
import math
import re
from itertools import chain
from pathlib import Path

from data.reading import SPECIAL_TOKEN
from data.state import MODES, SET_NAMES, SETS
from training import rundir
from training.console import Parser, UserError
from training.settings import CACHE, ROLLOUTS, flag

ALL_SETS = list(chain.from_iterable(SETS.values()))
DEFAULTS = {
    "data": "blocks",
    "data_cache": CACHE,
    "sets": ALL_SETS,
    "mode": "reason",
    "max_new_tokens": 96,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
}
# As Reason-RFT evaluates its own models; it asks every question.
PROTOCOLS = {"reason-rft": dict(max_new_tokens=768, temperature=0.1, top_p=0.9, top_k=50)}
MAX_K = 1024  # of Pass@k: as many samples of one question are drawn at a time
MAX_STATES = 10**6  # of a set in an evaluation, which has them all in memory

FLAGS = {
    "--sets": dict(
        nargs="+", metavar="SET", help="test sets (default: those of the run's task, else all)"
    ),
    "--data": dict(
        help="blocks, reason-rft (downloads), or the directory of a copy of Reason-RFT-CoT "
        "(default: the run's, else blocks)"
    ),
    "--data-cache": dict(help=f"where reason-rft is downloaded to (default {CACHE})"),
    "--states": dict(
        type=int,
        help="questions of each set (default: 300 of the blocks world, all of Reason-RFT-CoT)",
    ),
    "--mode": dict(
        choices=MODES,
        help="what the prompt asks for: answer and bare are those of sft.py's methods "
        "(default: the run's, else reason)",
    ),
    "--request": dict(
        default="",
        metavar="WORDS",
        help='words that follow each question in place of the project\'s own, such as "check ." '
        "(a tokenizer of whole words, as tiny/ has, reads others as unknown)",
    ),
    "--min-pixels": dict(type=int, help="enlarge pictures to at least so many pixels"),
    "--max-pixels": dict(type=int, help="shrink pictures to at most so many pixels"),
    "--pass-k": dict(
        default="",
        metavar="K,K",
        help="also Pass@k for these k, from as many samples as the largest, at temperature 1",
    ),
    "--protocol": dict(
        choices=tuple(PROTOCOLS),
        help="ask as Reason-RFT does: all questions, 768 tokens, temperature 0.1, top-p 0.9, "
        "top-k 50; --legacy adds its score",
    ),
    "--temperature": dict(type=float, help="of the response that is scored (default 0, greedy)"),
    "--top-p": dict(type=float, help="nucleus from which that response is sampled (default 1)"),
    "--top-k": dict(type=int, help="likeliest tokens it is sampled from; 0, the default: all"),
    "--max-new-tokens": dict(type=int, help="length limit (default: the run's, else 96)"),
    "--rollout": dict(
        choices=ROLLOUTS, default="auto", help="what generates: auto is vLLM where it can run"
    ),
}


def add_flags(parser: Parser) -> None:
    for name, options in FLAGS.items():
        parser.add_argument(name, **options)


def settle(args) -> list[str]:
    """Sets `args.samples` and every flag that is not given. UserError for one that cannot be used.

    Returns lines that say which values a protocol or a run gave.
    """
    args.samples = samples_for(args.pass_k)
    notes, run = [], run_of(args.place)
    if args.protocol:
        notes += fill(args, f"--protocol {args.protocol}", PROTOCOLS[args.protocol])
    if run:
        notes += fill(args, f"{run}/config.json", settings_of_run(run))
    fill(args, "defaults", DEFAULTS)
    check(args)
    return notes


def fill(args, source: str, values: dict) -> list[str]:
    """Sets the flags that are still unset, and returns a line that lists them."""
    flags = []
    for name, value in values.items():
        if value is not None and getattr(args, name) is None:
            setattr(args, name, value)
            text = " ".join(value) if isinstance(value, (list, tuple)) else value
            flags.append(f"{flag(name)} {text}")
    return [f"as {source} says: {' '.join(flags)}"] if flags else []


def run_of(model: str) -> Path | None:
    """The directory of the run that made this model, None if it is no run's."""
    path = Path(model).parent
    return path if (path / "metrics.jsonl").exists() and (path / "config.json").exists() else None


def settings_of_run(run: Path) -> dict:
    """What a run's config.json says of how its model is asked. UserError if it is not readable."""
    config = rundir.read_config(run)
    kinds = {"data": str, "data_cache": str, "task": str}
    kinds |= {"max_new_tokens": int, "min_pixels": int, "max_pixels": int}
    for name, kind in kinds.items():
        if type(config.get(name)) is not kind:
            raise UserError(f"{run}/config.json: {name} cannot be {config.get(name)!r}")
    if config["task"] not in SETS:
        raise UserError(f"{run}/config.json: there is no task {config['task']!r}")
    method = config.get("method")  # of sft.py
    return {
        "data": config["data"],
        "data_cache": config["data_cache"],
        "sets": SETS[config["task"]],
        "mode": method if method in MODES else "reason",
        "max_new_tokens": config["max_new_tokens"],
        "min_pixels": config["min_pixels"] or None,
        "max_pixels": config["max_pixels"] or None,
    }


def samples_for(pass_k: str) -> int:
    """How many samples these k need. UserError if this is no list of k."""
    if not pass_k:
        return 0
    listed = re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", pass_k)
    ks = [int(k) for k in pass_k.split(",")] if listed else [0]
    if not 1 <= min(ks) <= max(ks) <= MAX_K:
        raise UserError(f"--pass-k wants numbers from 1 to {MAX_K}, such as 1,2,4,8, not {pass_k}")
    return max(ks)


def check(args) -> None:
    """UserError for a flag that cannot be used."""
    for name in args.sets:
        if name.endswith("-train"):
            raise UserError(f"{name} is a training set: --sets names test sets")
        if name not in SET_NAMES:
            raise UserError(f"there is no set '{name}'; there are {', '.join(ALL_SETS)}")
    for name in ("states", "max_new_tokens", "min_pixels", "max_pixels"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} must be at least 1, not {value}")
    if (args.states or 1) > MAX_STATES:
        raise UserError(f"--states must be at most {MAX_STATES}, not {args.states}")
    if not 0 <= args.temperature < math.inf:
        raise UserError(f"--temperature must be at least 0, not {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1, not {args.top_p}")
    if args.top_k < 0:
        raise UserError(f"--top-k must be at least 0, not {args.top_k}")
    if args.request:
        check_request(args)


def check_request(args) -> None:
    """UserError for words that cannot follow a question, or not in this mode or protocol."""
    if args.protocol:
        raise UserError(f"--protocol {args.protocol} asks in its own way, without --request")
    if args.mode == "bare":
        raise UserError("mode bare asks nothing but the question: --request needs another --mode")
    if not args.request.strip() or not args.request.isprintable():
        raise UserError("--request wants words in one line of ordinary text")
    if SPECIAL_TOKEN.search(args.request):  # an image token would break the forward pass
        raise UserError("--request holds a special token")


def settings_of(args) -> dict:
    """What predictions depend on, as their settings.json has it.

    Weights are known by their content, since a run's `model` is replaced as it goes on.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(args.place).glob("*.safetensors")):
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    names = ("max_new_tokens", "temperature", "samples", "data", "mode", "min_pixels", "max_pixels")
    settings = {"model": args.model, "weights": digest.hexdigest()[:16]}
    settings |= {name: getattr(args, name) for name in names}
    if (args.top_p, args.top_k) != (1.0, 0):
        settings |= {"top_p": args.top_p, "top_k": args.top_k}
    if args.request:
        settings["request"] = args.request
    return settings
