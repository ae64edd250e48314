"""Evaluation: greedy accuracy on test sets (Table 1's number) and Pass@k (Fig. 5).

    python evaluate.py tiny --sets counting-id counting-ood    # a model's directory or hub id
    python evaluate.py runs/NAME/model --pass-k 1,2,4,8        # every test set of the run's task
    python evaluate.py tiny --request "check ."                # under another prompt
    python evaluate.py careful --sets counting-id              # an expert itself
    python evaluate.py score runs/NAME/predictions --legacy    # saved predictions, without a model

Responses are saved first, one line a question (data/predictions.py), and scored from there. An
evaluation that was stopped goes on where it was. A response depends on its question alone, not on
batches or on the number of processes (torchrun shards the questions).

Accuracy is what Table 1 reports (rewards.py, `accuracy_score`): a count, a choice or a quantity is
right or wrong, a sequence of functions has Reason-RFT's partial credit. "exact" is the share of
answers that are wholly right, as Pass@k counts them; it differs from accuracy for sequences only.
A set that has parts (kinds of questions) is reported as a whole, then each part as SET/PART.
`--legacy` scores as Reason-RFT's own code does, `--protocol reason-rft` asks as it does.

Beside a run, data, test sets, pixels, length limit and prompt are those of its config.json, unless
a flag says otherwise. `python -m experiments.report` makes tables and figures from predictions.
"""

import math
import re
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from data.legacy import MATH_VERIFY, need_math_verify
from rollouts import asking
from training import console
from training.console import Parser, UserError

LEGACY = f"score as Reason-RFT's code does; needs {MATH_VERIFY}"


def parse(argv: list[str]) -> Namespace:
    """The flags as they stand, of an evaluation or, with a `directory`, of `score`."""
    if argv[:1] == ["score"]:
        parser = Parser(prog="evaluate.py score", description="Scores saved predictions again.")
        text = "predictions, such as runs/NAME/predictions"
        parser.add_argument("directory", type=Path, help=text)
        parser.add_argument("--legacy", action="store_true", help=LEGACY)
        return parser.parse_args(argv[1:])
    parser = Parser(
        prog="evaluate.py",
        description="Answers test sets with a model or an expert, saves the responses, "
        "and scores them.",
    )
    add = parser.add_argument
    add("model", help="a directory in Hugging Face layout, a hub id, or an expert's name")
    asking.add_flags(parser)
    add("--legacy", action="store_true", help=LEGACY)
    add("--cache", default="experts.sqlite", help="answers of APIs (default experts.sqlite)")
    add("--offline", action="store_true", help="answers of APIs come from the cache alone")
    add(
        "--expert-tokens",
        type=int,
        default=512,
        help="length limit of an API's answer, in its own tokens, thoughts included (default 512)",
    )
    add(
        "--out",
        help="directory of the predictions (default: predictions beside a run's model, "
        "else predictions/NAME)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":  # --help and mistakes do not wait for torch, whose import takes seconds
    console.early("evaluate.py", parse)

from blocks.scripted import is_scripted
from data.lengths import Room
from data.predictions import Prediction, claim, predict, read_predictions, with_parts
from data.sets import WORLDS, Part, load_set, reports
from experts import roster
from experts.answering import ExpertAnswers, is_expert
from experts.settings import ExpertSettings
from policy import Policy
from rewards import accuracy_score, format_reward, wholly_right
from rollouts.answering import ModelAnswers, answer_greedily
from rollouts.choice import make_sampler
from sampling import Action, Sampler
from training import storage
from training.distributed import World
from training.metrics import mean
from training.settings import place_of


def score_predictions(
    predictions: list[Prediction], ks: list[int] = (), legacy: bool = False
) -> dict[str, float]:
    """Means over the questions: accuracy with its 95 % interval (low, high), exact, format, tokens,
    truncated, and pass@k of each k.
    """
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
    counts = [(len(p.samples), right_samples(p, legacy)) for p in predictions if ks]
    for k in ks:
        result[f"pass@{k}"] = mean(pass_at_k(n, c, k) for n, c in counts)
    return result


def right_samples(prediction: Prediction, legacy: bool = False) -> int:
    """How many of Pass@k's samples are wholly right."""
    truth, kind = prediction.answer, prediction.kind
    return sum(wholly_right(text, truth, kind, legacy) for text in prediction.samples)


def predictions_of(states, actions: list[Action]) -> list[Prediction]:
    """One action for each state, as predictions."""
    predictions = []
    for state, action in zip(states, actions, strict=True):
        length, truncated = len(action.tokens), action.truncated
        predictions.append(Prediction.of(state, action.text, length, truncated))
    return predictions


def greedy_accuracy(sampler: Sampler, sets: dict[str, list], world: World) -> dict[str, float]:
    """Greedy accuracy on each test set and its parts, as "eval/SET" and "eval/SET/PART"; each
    process answers its shard.
    """
    answered = {}
    for name, states in sets.items():
        actions = world.gather(answer_greedily(sampler, world.shard(states)))
        answered[name] = predictions_of(states, actions)
    result = {}
    for name, predictions in with_parts(answered).items():
        result[f"eval/{name}"] = score_predictions(predictions)["accuracy"]
    return result


def interval(values: list[float], z: float = 1.96) -> tuple[float, float]:
    """A 95 % interval of the mean of values in [0, 1].

    It is Wilson's, with the variance of the values in place of p (1 - p), which partial credit does
    not reach. For rights and wrongs both are the same, and it does not vanish at 0 and 1.
    """
    n, p = len(values), mean(values)
    ratio = 1.0  # of the two variances
    if 0 < p < 1:
        ratio = mean((value - p) ** 2 for value in values) / (p * (1 - p))
    z2 = z * z * ratio
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Fig. 5: the chance that one of k answers is right, unbiased from c right ones of n:
    1 - C(n - c, k) / C(n, k).

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def print_scores(predictions: dict[str, list[Prediction]], legacy: bool) -> None:
    """A line for each set and each of its parts. UserError if no question has a prediction."""
    empty = [name for name, ps in predictions.items() if not ps]
    predictions = {name: ps for name, ps in predictions.items() if ps}
    if not predictions:
        raise UserError(f"no question of {', '.join(empty)} was answered: nothing to score")
    fewest = asking.MAX_K
    for ps in predictions.values():
        fewest = min(fewest, *(len(p.samples) for p in ps))
    ks = [2**i for i in range(10) if 2**i <= fewest]
    head = "set                       n     accuracy  95 % interval  exact  format  tokens"
    print(f"{head}  truncated" + "".join(f"  pass@{k}" for k in ks))
    for name, ps in with_parts(predictions).items():
        s = score_predictions(ps, ks, legacy)
        percent = {key: 100 * value for key, value in s.items()}
        line = f"{name:24s} {s['n']:5d} {percent['accuracy']:9.1f}"
        line += f" {percent['low']:8.1f} to{percent['high']:5.1f} {percent['exact']:6.1f}"
        line += f" {percent['format']:7.1f} {s['tokens']:7.1f} {percent['truncated']:10.1f}"
        line += "".join(f"  {percent[f'pass@{k}']:{4 + len(str(k))}.1f}" for k in ks)
        print(line, flush=True)
    for name in empty:
        print(f"{name:24s}     0  no answers")


def settle(args) -> list[str]:
    """Sets what was not given. Returns lines that say which a run or a protocol gave. UserError for
    what cannot be asked."""
    args.place = place_of(args.model)  # where its files are
    notes = asking.settle(args)
    if not 1 <= args.expert_tokens <= 10**6:
        raise UserError(f"--expert-tokens must be 1 to {10**6}, not {args.expert_tokens}")
    if args.legacy:
        need_math_verify()
    if is_expert(args.model) and is_scripted(args.model) and args.data != "blocks":
        knows = f"the scripted expert '{args.model}' knows the blocks world only"
        raise UserError(f"{knows}, not --data {args.data}")
    if args.request and is_scripted(args.model):
        raise UserError(f"the scripted expert '{args.model}' reads no prompt: leave --request out")
    return notes


def directory_for(args) -> Path:
    """Where the predictions go."""
    path = Path(args.place)
    if args.out:
        return Path(args.out)
    if (path.parent / "metrics.jsonl").exists():
        return path.parent / "predictions"
    return Path("predictions") / re.sub(r"\W+", "-", args.model).strip("-")


def questions_of(args, room: Room | None) -> dict[str, Part]:
    """The first `--states` questions of each test set. room: where a model's prompt has to fit.

    UserError if `--request` makes a prompt of a world too long, whose own are short.
    """
    config = Namespace(data=args.data, data_cache=args.data_cache, eval_states=args.states or 300)
    sets = {}
    for name in args.sets:
        states = load_set(name, config, args.mode, room=room)
        sets[name] = Part(states, 0, min(len(states), args.states or len(states)))
        for state in sets[name] if room and args.request and args.data in WORLDS else ():
            if long := room.problem(state, [image.size for image in state.images]):
                raise UserError(f"--request: {long}")
    return sets


def open_answers(args, world: World, out: Path) -> tuple[dict, ModelAnswers | ExpertAnswers]:
    """The questions of each set and who answers them; the directory `out` is claimed for them."""
    expert = is_expert(args.model)
    pixels = {"min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    try:
        room = None
        if not expert:
            room = Room(args.place, args.max_new_tokens, request=args.request, **pixels)
        sets = questions_of(args, room)
        if expert:
            settings = ExpertSettings(
                cache=args.cache, offline=args.offline, expert_tokens=args.expert_tokens
            )
            answerer = roster.make_experts(args.model, settings)[0]
        else:
            answerer = Policy.load(args.place, **pixels).to(world.device).requires_grad_(False)
    except ValueError as error:
        raise UserError(str(error)) from None
    world.first(lambda: claim(out, asking.settings_of(args)))
    if expert:
        return sets, ExpertAnswers(answerer, args.samples)
    sampler = make_sampler(
        args.rollout,
        answerer,
        args.place,
        args.max_new_tokens,
        bf16=True,
        max_model_len=room.longest,
    )
    return sets, ModelAnswers(sampler, args.temperature, args.samples, args.top_p, args.top_k)


def answer_command(args: Namespace) -> None:
    """Answers test sets, saves the predictions and prints their scores."""
    notes = settle(args)
    world, out = World.join("auto"), directory_for(args)
    sets, answers = open_answers(args, world, out)
    if world.rank == 0:
        for line in [*notes, *reports(list(sets.values()))[0]]:
            print(line, file=sys.stderr)
    ids = {}
    for name, questions in sets.items():
        states = [replace(state, ask=args.request) for state in questions]
        predict(answers, states, out / f"{name}.jsonl", world)
        ids[name] = {state.id for state in states}
    if isinstance(answers, ModelAnswers):
        answers.sampler.close()
    storage.let_go(out)
    if world.rank == 0:
        saved = read_predictions(out)
        answered = {}
        for name in sets:
            answered[name] = [p for p in saved.get(name, []) if p.id in ids[name]]
        print_scores(answered, args.legacy)
        print(f"predictions: {out}")
    world.leave()


def score_command(args: Namespace) -> None:
    if args.legacy:
        need_math_verify()
    print_scores(read_predictions(args.directory), args.legacy)


def run(argv: list[str]) -> None:
    args = parse(argv)
    if "directory" in args:
        score_command(args)
    else:
        answer_command(args)


def main() -> None:
    console.command("evaluate.py", run)


if __name__ == "__main__":
    main()
