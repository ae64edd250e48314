"""Buys the answers of experts before a training run, and shows what was bought.

    python -m experts.collect --preset blocks --experts openai:gpt-4o --dry-run    # the cost
    python -m experts.collect --preset blocks --experts openai:gpt-4o --budget 20  # buys
    python -m experts.collect stats CACHE     # also: export CACHE > answers.jsonl, verify CACHE

Buying takes the flags of ekipl.py, less those of the objective, and asks in the order of training
for what that run will ask. Each answer is in the cache before it counts. So stopping, by hand, by
the budget or by kill -9, loses no answer that has arrived, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
from collections import Counter
from contextlib import closing

from experts.settings import CollectSettings
from training import console, settings
from training.console import Parser, UserError
from training.presets import PRESETS

LOOKS = {
    "stats": "what is in a cache",
    "export": "every answer as a line of JSON",
    "verify": "is the file whole?",
}

# ------------------------------------------------------------------ the command line


def parser() -> Parser:
    lines = argparse.RawDescriptionHelpFormatter
    program = Parser(
        prog="python -m experts.collect",
        description=__doc__,
        formatter_class=lines,
        allow_abbrev=False,
    )
    commands = program.add_subparsers(dest="command", required=True)
    for name, text in LOOKS.items():
        commands.add_parser(name, help=text).add_argument("cache", metavar="CACHE")
    text = "buy answers ahead of training; the default command, with the flags of ekipl.py"
    buying = commands.add_parser("collect", help=text, allow_abbrev=False)
    buying.add_argument("--budget", type=float, metavar="USD", help="spend no more in this call")
    buying.add_argument("--dry-run", action="store_true", help="count and estimate, ask nothing")
    return program


def parse(argv: list[str]) -> tuple[argparse.Namespace, CollectSettings | None]:
    """The command with its flags, and what to buy if it is "collect", the default."""
    if argv and argv[0] not in (*LOOKS, "collect", "-h", "--help"):
        argv = ["collect", *argv]
    args, rest = parser().parse_known_args(argv)
    if args.command == "collect":
        if args.budget is not None and not args.budget > 0:
            raise UserError("--budget must be above 0")
        return args, settings.parse(CollectSettings, PRESETS, __doc__.split("\n\n")[0], rest)[0]
    if rest:
        raise UserError(f"{args.command} takes a cache and nothing more, not {rest[0]}")
    return args, None


if __name__ == "__main__":  # --help and mistakes do not wait for torch, whose import takes seconds
    console.early("experts.collect", parse)

from tqdm import tqdm

from data.lengths import room_of
from data.sets import training_states
from experts import apis, estimate
from experts.api_expert import VENDORS
from experts.cache import Cache
from experts.collection import buy
from experts.purse import Purse
from experts.roster import check

# ------------------------------------------------------------------ buying


def states_to_ask(config: CollectSettings) -> list:
    """The states of training in its order, each once; those of the steps with experts."""
    single = dataclasses.replace(config, batch_size=1)  # also what would not fill a batch
    questions, order = training_states(single, room=room_of(config, config.start))
    if config.expert_steps:
        order = order[: config.expert_steps * config.batch_size]
    return [questions[i] for i in tqdm(list(dict.fromkeys(order)), desc="states", leave=False)]


def dry_run(specs: list[str], config: CollectSettings) -> None:
    """Prints what buying would cost; asks nothing."""
    states = states_to_ask(config)
    cache = Cache(config.cache, read_only=True) if os.path.lexists(config.cache) else None
    for spec in specs:
        estimate.show(spec, states, config, cache)


def collect(specs: list[str], config: CollectSettings, budget: float | None) -> None:
    """Fills the cache for the states of training. UserError if some stay without answers."""
    states = states_to_ask(config)
    with closing(Cache(config.cache)) as cache:
        buy(specs, states, cache, config, Purse(budget))


# ------------------------------------------------------------------ looking


def stats(cache: Cache) -> None:
    """By expert: calls, answers, finish reasons, tokens, seconds, dollars by the price table."""
    all_calls, all_entries = cache.calls(), cache.entries()
    for expert in dict.fromkeys(call["expert"] for call in all_calls):
        calls = [call for call in all_calls if call["expert"] == expert]
        entries = [entry for entry in all_entries if entry["expert"] == expert]
        states = len({entry["request"] for entry in entries})
        models = ", ".join(sorted({call["model"] for call in calls}))
        answers = f"{len(entries)} answers of {states} states in {len(calls)} calls"
        print(f"{expert}: {answers}, answered by {models}")
        finishes = Counter(entry["finish"] for entry in entries)
        ends = ", ".join(f"{finish} {count}" for finish, count in sorted(finishes.items()))
        with_logp = sum(entry["logp"] is not None for entry in entries)
        print(f"  ended {ends}; with log-prob {with_logp}")
        tokens_in = sum(call["input_tokens"] or 0 for call in calls)
        tokens_out = sum(call["output_tokens"] or 0 for call in calls)
        price = apis.price_of(apis.split_name(expert)[1])
        cost = apis.dollars(price, tokens_in, tokens_out)
        paid = f"${cost:.4f}" if cost is not None else "price unknown"
        seconds = sum(call["seconds"] for call in calls) / len(calls)
        print(f"  tokens {tokens_in} in, {tokens_out} out; {seconds:.2f} s a call; {paid}")


def look(command: str, cache: Cache) -> None:
    """stats, export or verify. UserError if there is a fault."""
    try:
        if command == "stats":
            stats(cache)
        elif command == "export":
            for entry in cache.entries():
                print(json.dumps(entry, ensure_ascii=False))
    except (ValueError, TypeError, KeyError, OverflowError):  # values that no program wrote
        verify = f"python -m experts.collect verify {cache.path}"
        raise UserError(f"{cache.path} is damaged: {verify} shows where") from None
    if command == "verify":
        if faults := cache.faults():
            raise UserError(f"{cache.path}: {'; '.join(faults[:5])}")
        unsigned = cache.undigested()
        older = f"; in {unsigned} of them, bought before there were digests, changes go unnoticed"
        print(f"{cache.path}: {len(cache.entries())} answers, no fault{older if unsigned else ''}")


# ------------------------------------------------------------------ what to do


def run(argv: list[str]) -> None:
    args, config = parse(argv)
    if config is None:
        with closing(Cache(args.cache, read_only=True)) as cache:
            look(args.command, cache)
        return
    if config.offline and not args.dry_run:
        raise UserError("--offline asks no API, so it buys nothing: leave it out")
    config.offline = args.dry_run  # which needs no key
    settings.check(config, 1, resuming=True)
    settings.must(config, 0, "expert_steps")
    specs = [spec for spec in check(config) if spec.partition(":")[0] in VENDORS]
    if not specs:
        raise UserError(f"--experts {config.experts} asks no API: name one, such as openai:gpt-4o")
    dry_run(specs, config) if args.dry_run else collect(specs, config, args.budget)


def main() -> None:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the cache is closed too
    stopped = "what had arrived is in the cache, the same command goes on"
    try:
        console.command("experts.collect", run, stopped)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
