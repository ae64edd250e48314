"""Evaluation: greedy accuracy on test sets (Table 1's number), Pass@k (Fig. 5), Table 1 and Figures 3 to 5.

    python evaluate.py tiny --sets counting-id counting-ood            # a model's directory or hub id
    python evaluate.py runs/NAME/model --pass-k 1,2,4,8,16,32,64       # every set; predictions go to runs/NAME/predictions
    python evaluate.py careful --sets counting-id                      # an expert itself
    python evaluate.py score runs/NAME/predictions --legacy            # scores what is saved again, without a model
    python evaluate.py table runs/A-seed0 runs/A-seed1 runs/B --out table1
    python evaluate.py figures runs/A-seed0 runs/B-seed0 --out figures

Answering and scoring are apart: what was said is saved, one line a question, and scored from there. An evaluation that was
stopped goes on where it was. What is said depends on the question alone, not on batches or processes (torchrun shares the questions out).

Accuracy is what Table 1 reports (rewards.py, `accuracy_score`): a count, a choice or a quantity is right or wrong, a sequence of functions has
Reason-RFT's partial credit. "exact" is the share of answers that are wholly right, as Pass@k counts them; it differs from accuracy for
sequences only. `--legacy` scores as Reason-RFT's own code does, `--protocol reason-rft` asks as it does.

Beside a run, data, test sets, pixels, length limit and prompt are those of its config.json, unless a flag says otherwise.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import re
import sys
from pathlib import Path

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from blocks.scripted import ACCURACY
from data.lengths import Room
from data.predictions import Prediction, prediction, read_predictions
from data.sets import Part, load_set, reports
from data.state import MODES, SETS, State
from experts.answering import ExpertAnswers, is_expert
from experts.roster import make_experts
from experts.settings import ExpertSettings
from policy import Policy
from rewards import MATH_VERIFY, accuracy_score, format_reward, need_math_verify, wholly_right
from rollouts.answering import ModelAnswers, answer_greedily
from rollouts.choice import make_sampler
from sampling import Action, Sampler
from training import console, rundir, storage
from training.console import Parser, UserError
from training.distributed import World
from training.settings import CACHE, ROLLOUTS, place_of

ALL_SETS = [name for names in SETS.values() for name in names]
DEFAULTS = dict(
    data="blocks", data_cache=CACHE, sets=ALL_SETS, mode="reason", max_new_tokens=96,
    temperature=0.0, top_p=1.0, top_k=0,
)  # fmt: skip
# Reason-RFT's evaluation of its own models: every question, and this.
PROTOCOLS = {"reason-rft": dict(max_new_tokens=768, temperature=0.1, top_p=0.9, top_k=50)}
MAX_K = 1024  # of Pass@k: as many samples of one question are drawn at a time
MAX_STATES = 10**6  # of a set in an evaluation, which has them all in memory


def score_predictions(
    predictions: list[Prediction], ks: list[int] = (), legacy: bool = False
) -> dict[str, float]:
    """Means over the questions: accuracy with its 95 % interval (low, high), exact, format, tokens, truncated, pass@k of each k."""
    accuracy = [accuracy_score(p.text, p.answer, p.kind, legacy) for p in predictions]
    low, high = interval(accuracy)
    result = {
        "n": len(predictions),
        "accuracy": mean(accuracy),
        "low": low,
        "high": high,
        "exact": mean(wholly_right(p.text, p.answer, p.kind, legacy) for p in predictions),
        "format": mean(format_reward(p.text, legacy) for p in predictions),
        "tokens": mean(p.tokens for p in predictions),
        "truncated": mean(p.truncated for p in predictions),
    }
    for k in ks:
        result[f"pass@{k}"] = mean(
            pass_at_k(len(p.samples), right_samples(p, legacy), k) for p in predictions
        )
    return result


def right_samples(prediction: Prediction, legacy: bool = False) -> int:
    """How many of Pass@k's samples are wholly right."""
    truth, kind = prediction.answer, prediction.kind
    return sum(wholly_right(text, truth, kind, legacy) for text in prediction.samples)


def score(states, actions: list[Action]) -> dict[str, float]:
    """`score_predictions` of one action for each state, as the scorers read it (`State.reading`)."""
    pairs = zip(states, actions, strict=True)
    return score_predictions(
        [
            Prediction("", s.answer, s.kind, s.reading(a.text), len(a.tokens), a.truncated)
            for s, a in pairs
        ]
    )


def greedy_accuracy(sampler: Sampler, sets: dict[str, list], world: World) -> dict[str, float]:
    """Greedy accuracy on each test set, shared among the processes."""
    result = {}
    for name, states in sets.items():
        share = world.shard(states)
        actions = world.gather(answer_greedily(sampler, share))
        result[f"eval/{name}"] = score(states, actions)["accuracy"]
    return result


def mean(values) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values)


def interval(values: list[float], z: float = 1.96) -> tuple[float, float]:
    """A 95 % interval of the mean of values in [0, 1]: Wilson's, with the values' own variance in place of p (1 - p).

    For rights and wrongs it is Wilson's interval itself, which does not shrink to nothing at 0 and 1; partial credit varies less.
    """
    n, p = len(values), mean(values)
    share = (
        mean((value - p) ** 2 for value in values) / (p * (1 - p)) if 0 < p < 1 else 1.0
    )  # 1 for rights and wrongs
    z2 = z * z * share
    middle, half = (
        (p + z2 / (2 * n)) / (1 + z2 / n),
        math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n),
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Fig. 5: the chance that k answers hold a right one, 1 - C(n - c, k) / C(n, k), unbiased from c right ones of n.

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def predict(answers, states: list[State], file: Path, world: World, batch: int = 64) -> None:
    """Appends the predictions that `file` lacks, a batch at a time, shared among the processes; the first one writes."""
    done = world.first(  # an interruption may have cut the last line short
        lambda: {record["id"] for record in storage.mend(file, lambda r: bool(prediction(r)))}
    )
    missing = [state for state in states if state.id not in done]
    bar = tqdm(
        total=len(states),
        initial=len(states) - len(missing),
        desc=file.stem,
        disable=world.rank > 0,
        leave=False,
    )
    for start in range(0, len(missing), batch * world.size):
        chunk = missing[start : start + batch * world.size]
        share = world.shard(chunk)
        predictions = world.gather(answers(share) if share else [])
        if world.rank == 0:
            storage.append(
                file,
                [
                    dataclasses.asdict(prediction)
                    for prediction in predictions
                    if prediction is not None
                ],
            )
        bar.update(len(chunk))
    bar.close()


def questions_of(name: str, args, room: Room | None) -> Part:
    """The first `--states` questions of a test set. UserError if there is no such set."""
    if name.endswith("-train"):
        raise UserError(f"{name} is a training set: --sets names test sets")
    whole = load_set(
        name,
        argparse.Namespace(
            data=args.data, data_cache=args.data_cache, eval_states=args.states or 300
        ),
        args.mode,
        room=room,
    )
    return Part(whole, 0, min(len(whole), args.states or len(whole)))


def settings_of(args) -> dict:
    """What predictions depend on. Weights are known by their content, since a run's `model` is replaced as it goes on."""
    digest = hashlib.sha256()
    for file in sorted(Path(args.place).glob("*.safetensors")):
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return {
        "model": args.model, "weights": digest.hexdigest()[:16], "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature, "samples": args.samples, "data": args.data, "mode": args.mode,
        "min_pixels": args.min_pixels, "max_pixels": args.max_pixels,
        **({"top_p": args.top_p, "top_k": args.top_k} if (args.top_p, args.top_k) != (1.0, 0) else {}),
    }  # fmt: skip


def run_of(model: str) -> Path | None:
    """The directory of the run that this is the model of, if it is one's."""
    path = Path(model).parent
    return path if (path / "metrics.jsonl").exists() and (path / "config.json").exists() else None


def settings_of_run(run: Path) -> dict:
    """What a run's own config.json says of how its model is to be asked, by flag. UserError if it is not readable."""
    config = rundir.read_config(run)
    kinds = {"data": str, "data_cache": str, "task": str, "max_new_tokens": int, "min_pixels": int, "max_pixels": int}  # fmt: skip
    for name, kind in kinds.items():
        if type(config.get(name)) is not kind:
            raise UserError(f"{run}/config.json: {name} cannot be {config.get(name)!r}")
    if config["task"] not in SETS:
        raise UserError(f"{run}/config.json: there is no task {config['task']!r}")
    method = config.get("method")  # of sft.py
    return {
        "data": config["data"], "data_cache": config["data_cache"], "sets": SETS[config["task"]],
        "mode": method if method in MODES else "reason", "max_new_tokens": config["max_new_tokens"],
        "min_pixels": config["min_pixels"] or None, "max_pixels": config["max_pixels"] or None,
    }  # fmt: skip


def settle(args) -> list[str]:
    """Sets what no flag says: by --protocol, else as the run beside which the model lies, else by default. Returns lines that tell."""
    run, told = run_of(args.place), []
    sources = [(f"--protocol {args.protocol}", PROTOCOLS.get(args.protocol, {}))]
    if run:
        sources.append((f"{run}/config.json", settings_of_run(run)))
    for source, found in [*sources, ("", DEFAULTS)]:
        taken = {
            name: value
            for name, value in found.items()
            if value is not None and getattr(args, name) is None
        }
        vars(args).update(taken)
        flags = [
            f"--{name.replace('_', '-')} {' '.join(value) if isinstance(value, (list, tuple)) else value}"
            for name, value in taken.items()
        ]
        if source and flags:
            told.append(f"as {source} says: {' '.join(flags)}")
    return told


def claim(out: Path, settings: dict) -> None:
    """Makes the directory of predictions. UserError if it holds those of other settings."""
    file = out / "settings.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        storage.hold(out, "wait until that has ended, or choose another --out")
        if not file.exists():
            storage.write_aside(file, json.dumps(settings, indent=2) + "\n")
        found = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot use {out} for predictions: {error}") from None
    for name in [*settings, *found]:
        if found.get(name) != settings.get(name):
            raise UserError(
                f"{out} holds predictions with another {name} ({found.get(name)}, not {settings.get(name)}): choose another --out"
            )


# ---------------------------------------------------------------------------------------------- the commands


def print_scores(predictions: dict[str, list[Prediction]], legacy: bool) -> None:
    """A line for each set. UserError if no question of any set has an answer."""
    empty = [name for name, ps in predictions.items() if not ps]
    predictions = {name: ps for name, ps in predictions.items() if ps}
    if not predictions:
        raise UserError(f"no question of {', '.join(empty)} was answered: nothing to score")
    ks = [
        2**i
        for i in range(10)
        if all(2**i <= len(p.samples) for ps in predictions.values() for p in ps)
    ]
    print(
        "set                       n     accuracy  95 % interval  exact  format  tokens  truncated"
        + "".join(f"  pass@{k}" for k in ks)
    )
    for name, ps in predictions.items():
        s = score_predictions(ps, ks, legacy)
        line = f"{name:24s} {s['n']:5d} {100 * s['accuracy']:9.1f} {100 * s['low']:8.1f} to{100 * s['high']:5.1f} {100 * s['exact']:6.1f} {100 * s['format']:7.1f} {s['tokens']:7.1f} {100 * s['truncated']:10.1f}"
        print(
            line + "".join(f"  {100 * s[f'pass@{k}']:{4 + len(str(k))}.1f}" for k in ks), flush=True
        )
    for name in empty:
        print(f"{name:24s}     0  no answers")


def samples_for(pass_k: str) -> int:
    """How many samples these k need. UserError for what is no list of k."""
    if not pass_k:
        return 0
    listed = re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", pass_k)
    ks = [int(k) for k in pass_k.split(",")] if listed else [0]
    if not 1 <= min(ks) <= max(ks) <= MAX_K:
        raise UserError(f"--pass-k wants numbers from 1 to {MAX_K}, such as 1,2,4,8, not {pass_k}")
    return max(ks)


LEGACY = f"score as Reason-RFT's code does; needs {MATH_VERIFY}"


def answer_command(argv: list[str]) -> None:
    parser = Parser(
        prog="evaluate.py",
        description="Answers test sets with a model or an expert, saves what it says, and scores it.",
    )
    parser.add_argument(
        "model",
        help="a directory in Hugging Face layout, such as runs/NAME/model, a hub id, or an expert's name",
    )
    parser.add_argument(
        "--sets",
        nargs="+",
        metavar="SET",
        help="test sets (default: those of the run's task, else all)",
    )
    parser.add_argument(
        "--data",
        help="as the run beside the model, else blocks; blocks, reason-rft (downloads), or the directory of a copy of Reason-RFT-CoT",
    )
    parser.add_argument("--data-cache", help=f"where reason-rft is downloaded to (default {CACHE})")
    parser.add_argument(
        "--states",
        type=int,
        help="questions of each set (default: 300 of the blocks world, all of Reason-RFT-CoT)",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="what the prompt asks for: answer and bare are those of sft.py's methods (default: the run's, else reason)",
    )
    parser.add_argument(
        "--min-pixels",
        type=int,
        help="enlarge pictures to at least so many pixels, as the training did",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        help="shrink pictures to at most so many pixels, as the training did",
    )
    parser.add_argument(
        "--pass-k",
        default="",
        metavar="K,K",
        help="also Pass@k for these k, from as many samples as the largest, at temperature 1",
    )
    parser.add_argument(
        "--protocol",
        choices=tuple(PROTOCOLS),
        help="ask as Reason-RFT does: all questions, 768 tokens, temperature 0.1, top-p 0.9, top-k 50; with --legacy also its score",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="of the answer that counts (default 0, greedy)",
    )
    parser.add_argument(
        "--top-p", type=float, help="draw that answer from the likeliest tokens of so much mass"
    )
    parser.add_argument(
        "--top-k", type=int, help="draw that answer from so many tokens; 0: from all"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, help="length limit (default: the run's, else 96)"
    )
    parser.add_argument(
        "--rollout",
        choices=ROLLOUTS,
        default="auto",
        help="what generates: auto is vLLM where it can run",
    )
    parser.add_argument("--legacy", action="store_true", help=LEGACY)
    parser.add_argument(
        "--cache",
        default="experts.sqlite",
        help="answers of an expert behind an API (default experts.sqlite)",
    )
    parser.add_argument(
        "--offline", action="store_true", help="an API's answers come from the cache alone"
    )
    parser.add_argument(
        "--expert-tokens",
        type=int,
        default=512,
        help="length limit of an API's answer, in its own tokens, thoughts included (default 512)",
    )
    parser.add_argument(
        "--out",
        help="directory of the predictions (default: predictions beside a run's model, else predictions/NAME)",
    )
    args = parser.parse_args(argv)
    args.place = place_of(args.model)  # where its files are
    args.samples = samples_for(args.pass_k)
    if not 1 <= args.expert_tokens <= 10**6:
        raise UserError(f"--expert-tokens must be 1 to {10**6}, not {args.expert_tokens}")
    told = settle(args)
    if args.legacy:
        need_math_verify()
    if unknown := [n for n in args.sets if n not in ALL_SETS and not n.endswith("-train")]:
        raise UserError(
            f"there is no set '{unknown[0]}' to answer; there are {', '.join(ALL_SETS)}"
        )
    if (
        min(
            value
            for value in (args.states, args.min_pixels, args.max_pixels, args.max_new_tokens)
            if value is not None
        )
        < 1
        or (args.states or 1) > MAX_STATES
        or not 0 <= args.temperature < math.inf
        or not 0 < args.top_p <= 1
        or args.top_k < 0
    ):
        raise UserError(
            f"--states must be 1 to {MAX_STATES}, --max-new-tokens and pixels at least 1, --temperature and --top-k at least 0, "
            f"--top-p above 0 and at most 1"
        )
    if is_expert(args.model) and args.model in ACCURACY and args.data != "blocks":
        raise UserError(
            f"the scripted expert '{args.model}' knows the blocks world only, not --data {args.data}"
        )
    world = World.join("auto")
    path = Path(args.place)
    beside = (
        path.parent / "predictions"
        if (path.parent / "metrics.jsonl").exists()
        else Path("predictions") / re.sub(r"\W+", "-", args.model).strip("-")
    )
    out = Path(args.out) if args.out else beside
    try:
        room = Room(
            args.place, args.max_new_tokens, min_pixels=args.min_pixels, max_pixels=args.max_pixels
        )
        asked = None if is_expert(args.model) else room
        sets = {name: questions_of(name, args, asked) for name in args.sets}
        experts = (
            make_experts(
                args.model,
                ExpertSettings(
                    cache=args.cache, offline=args.offline, expert_tokens=args.expert_tokens
                ),
            )
            if is_expert(args.model)
            else []
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if not experts:
        try:
            policy = (
                Policy.load(args.place, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
                .to(world.device)
                .requires_grad_(False)
            )
        except ValueError as error:
            raise UserError(str(error)) from None
    world.first(lambda: claim(out, settings_of(args)))
    if experts:
        answers = ExpertAnswers(experts[0], args.samples)
    else:
        sampler = make_sampler(
            args.rollout,
            policy,
            args.place,
            args.max_new_tokens,
            bf16=True,
            max_model_len=room.longest,
        )
        answers = ModelAnswers(sampler, args.temperature, args.samples, args.top_p, args.top_k)
    if world.rank == 0:
        for line in [*told, *reports(list(sets.values()))[0]]:
            print(line, file=sys.stderr)
    wanted = {}
    for name, questions in sets.items():
        states = list(questions)
        predict(answers, states, out / f"{name}.jsonl", world)
        wanted[name] = {state.id for state in states}
    if not experts:
        sampler.close()
    storage.let_go(out)
    if world.rank == 0:
        found = read_predictions(out)
        print_scores(
            {name: [p for p in found.get(name, []) if p.id in wanted[name]] for name in sets},
            args.legacy,
        )
        print(f"predictions: {out}")
    world.leave()


def score_command(argv: list[str]) -> None:
    parser = Parser(prog="evaluate.py score", description="Scores saved predictions again.")
    parser.add_argument(
        "directory", type=Path, help="of predictions, such as runs/NAME/predictions"
    )
    parser.add_argument("--legacy", action="store_true", help=LEGACY)
    args = parser.parse_args(argv)
    if args.legacy:
        need_math_verify()
    print_scores(read_predictions(args.directory), args.legacy)


def run(argv: list[str]) -> None:
    transformers_logging.disable_progress_bar()  # of loading: one bar is enough
    score_command(argv[1:]) if argv[:1] == ["score"] else answer_command(argv)


def main() -> None:
    console.command("evaluate.py", run)


if __name__ == "__main__":
    main()
