"""The command line of the experts: buys answers before a training run, and looks at what was bought.

    python experts.py collect --preset blocks --experts openai:gpt-4o --dry-run          # requests, tokens, dollars, hours
    python experts.py collect --preset blocks --experts openai:gpt-4o --budget 20        # buys, in the order of training
    python experts.py stats CACHE | export CACHE > answers.jsonl | verify CACHE

`collect` takes every flag of ekipl.py, so that it asks what that run will ask. Each answer is in the cache before it counts; so
stopping, by hand, by the budget or by kill -9, loses nothing that had arrived, and the same command goes on from there.
"""

import argparse
import dataclasses
import json
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from tqdm import tqdm

import apis
import ekipl
import runs
from cache import Cache, request_id
from data import training_states
from experts import VENDORS, ApiExpert, expert_specs, parse_price
from runs import Parser, UserError

# Assumed by --dry-run where the cache has no calls of this expert to learn from.
ANSWER_TOKENS = 200  # of a thought and its answer
CALL_SECONDS = 3.0  # the upper end of the paper's "1-3 seconds per query"


def states_to_ask(config: ekipl.Config) -> list:
    """The states of training in its order, each once."""
    questions, order = training_states(
        dataclasses.replace(config, batch_size=1), room=config.room(config.start)
    )  # fewer than a batch may be asked as well
    return [questions[i] for i in tqdm(list(dict.fromkeys(order)), desc="states", leave=False)]


def api_specs(config: ekipl.Config, offline: bool) -> list[str]:
    try:
        specs = [
            spec
            for spec in expert_specs(config.experts, offline)
            if spec.partition(":")[0] in VENDORS
        ]
    except ValueError as error:
        raise UserError(str(error)) from None
    if not specs:
        raise UserError(f"--experts {config.experts} asks no API: name one, such as openai:gpt-4o")
    return specs


# ---------------------------------------------------------------------------------------------- what it would cost


def estimate(
    spec: str, states: list, n: int, config: ekipl.Config, cache: Cache | None
) -> dict[str, float | None]:
    """Of one expert: requests, answers, input and output tokens, dollars (None if no price is known), hours; and the most that the length
    limit allows, and what asking for one answer at a time would cost."""
    vendor, model, url = apis.split_name(spec)
    identity = f"{vendor}:{model}@{url}"
    calls = [call for call in cache.calls() if call["expert"] == identity] if cache else []
    bought = sum(entry["expert"] == identity for entry in cache.entries()) if cache else 0
    told = [call["output_tokens"] for call in calls if call["output_tokens"] is not None]
    per_answer = sum(told) / bought if told and bought else ANSWER_TOKENS
    seconds = sum(call["seconds"] for call in calls) / len(calls) if calls else CALL_SECONDS
    requests = answers = inputs = singly = 0
    for state in states:
        request = request_id(apis.request_content(identity, state, config.expert_tokens))
        if missing := n - (len(cache.get(request, n)) if cache else 0):
            tokens = apis.prompt_tokens(vendor, state)
            requests, answers, inputs, singly = (
                requests + 1,
                answers + missing,
                inputs + tokens,
                singly + missing * tokens,
            )
    price = apis.price_of(model, parse_price(config.price))
    return {
        "requests": requests, "answers": answers, "input_tokens": inputs, "output_tokens": answers * per_answer,
        "dollars": apis.dollars(price, inputs, answers * per_answer), "most": apis.dollars(price, inputs, answers * config.expert_tokens),
        "singly": apis.dollars(price, singly, answers * per_answer), "hours": requests * seconds / config.expert_requests / 3600,
        "per_answer": per_answer, "seconds": seconds, "learnt": bool(calls),
    }  # fmt: skip


def dry_run(config: ekipl.Config) -> None:
    states = states_to_ask(config)
    cache = Cache(config.cache, read_only=True) if Path(config.cache).exists() else None
    for spec in api_specs(config, offline=True):
        e = estimate(spec, states, config.num_samples, config, cache)
        source = "as in the cache" if e["learnt"] else "assumed"
        print(
            f"{spec}: {len(states)} states, {len(states) - e['requests']} of them in the cache: {e['requests']} requests for {e['answers']} answers"
        )
        print(
            f"  tokens   {e['input_tokens'] / 1e6:.3f} million in, {e['output_tokens'] / 1e6:.3f} million out ({e['per_answer']:.0f} an answer, {source})"
        )
        if e["dollars"] is None:
            print(
                "  dollars  unknown: no price of this model in the table; give one with --price in,out"
            )
        else:
            of = "--price" if config.price else f"prices of {apis.PRICES_OF}"
            bounds = f"{e['most']:.2f} if every answer were {config.expert_tokens} tokens long; {e['singly']:.2f} asking for each answer alone"
            print(f"  dollars  {e['dollars']:.2f} ({of}); {bounds}")
        print(
            f"  hours    {e['hours']:.2f} with {config.expert_requests} requests at a time, {e['seconds']:.1f} s each, {source}"
        )


# ---------------------------------------------------------------------------------------------- buying


def beyond(budget: float | None, spent: dict, running: dict, most: float) -> bool:
    """Whether one request more could cost more than there is, should all that run be as dear as they can."""
    return (
        budget is not None
        and spent["cost"] + sum(reserved for _, reserved in running.values()) + most > budget
    )


def collect(config: ekipl.Config, budget: float | None) -> None:
    """Fills the cache for the states of training. UserError if the API will not answer, or some states stay without."""
    specs = api_specs(config, offline=False)
    states, cache = states_to_ask(config), Cache(config.cache)
    experts = [ApiExpert(spec, cache, config) for spec in specs]
    if budget is not None and (
        unknown := [expert.name for expert in experts if expert.price is None]
    ):
        raise UserError(
            f"--budget needs a price, and the table has none of {unknown[0]}: give it with --price in,out"
        )
    spent, failed, stopped = {"cost": 0.0, "requests": 0.0}, {}, False
    with tqdm(total=len(states) * len(experts), desc="collect", dynamic_ncols=True) as bar:
        running: dict[Future, tuple[ApiExpert, float]] = {}  # with the most that each can cost

        def finish_one() -> None:
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                expert, _ = running.pop(job)
                problem = expert.problem(job)  # UserError where it is one
                if problem:
                    failed[expert.name] = problem
                    failed["count"] = failed.get("count", 0) + 1
                for name, value in expert.metrics().items():
                    spent[name] = spent.get(name, 0.0) + value
                bar.update(1)
                bar.set_postfix_str(
                    f"${spent['cost']:.2f}" if expert.price else f"{spent['requests']:.0f} requests"
                )
                if expert.off:
                    raise UserError(
                        f"{expert.identity} fails again and again: {problem}; what arrived is in {config.cache}, the same command goes on"
                    )

        for state, expert in ((state, expert) for state in states for expert in experts):
            most = (
                apis.dollars(
                    expert.price,
                    apis.prompt_tokens(expert.vendor, state),
                    config.num_samples * config.expert_tokens,
                )
                or 0.0
            )
            while running and (
                len(running) >= config.expert_requests * len(experts)
                or beyond(budget, spent, running, most)
            ):
                finish_one()
            if not expert.complete(state, config.num_samples):
                if stopped := beyond(budget, spent, running, most):
                    break
                running[expert.job(state, config.num_samples)] = expert, most
            else:
                bar.update(1)
        while running:
            finish_one()
    cost = f", ${spent['cost']:.4f}" if all(expert.price for expert in experts) else ""
    print(
        f"bought {spent.get('answers', 0):.0f} answers with {spent['requests']:.0f} requests{cost}; they are in {config.cache}"
    )
    if stopped:
        print(
            f"stopped at the budget: the next request could cost ${most:.4f}; the same command with a larger budget goes on"
        )
    if count := failed.pop("count", 0):
        raise UserError(
            f"{count} states stayed without answers ({'; '.join(f'{name}: {why}' for name, why in failed.items())}): the same command asks them again"
        )


# ---------------------------------------------------------------------------------------------- looking


def stats(cache: Cache) -> None:
    """By expert: calls, answers, how they ended, tokens, seconds, dollars by the table of prices."""
    calls, entries = cache.calls(), cache.entries()
    for expert in dict.fromkeys(call["expert"] for call in calls):
        own, said = (
            [call for call in calls if call["expert"] == expert],
            [entry for entry in entries if entry["expert"] == expert],
        )
        tokens = [
            sum(call[side] or 0 for call in own) for side in ("input_tokens", "output_tokens")
        ]
        cost = apis.dollars(apis.price_of(apis.split_name(expert)[1]), *tokens)
        ends = ", ".join(
            f"{finish} {sum(e['finish'] == finish for e in said)}"
            for finish in sorted({e["finish"] for e in said})
        )
        models = ", ".join(sorted({c["model"] for c in own}))
        print(
            f"{expert}: {len(said)} answers of {len({e['request'] for e in said})} states in {len(own)} calls, answered by {models}"
        )
        print(f"  ended {ends}; with log-prob {sum(e['logp'] is not None for e in said)}")
        paid = f"${cost:.4f}" if cost is not None else "price unknown"
        print(
            f"  tokens {tokens[0]} in, {tokens[1]} out; {sum(c['seconds'] for c in own) / len(own):.2f} s a call; {paid}"
        )


def run(argv: list[str]) -> None:
    parser = Parser(
        prog="experts.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("stats", "what is in a cache"),
        ("export", "every answer as a line of JSON"),
        ("verify", "is the file whole?"),
    ):
        commands.add_parser(name, help=text).add_argument("cache", metavar="CACHE")
    buying = commands.add_parser(
        "collect",
        help="buy answers ahead of training; takes every flag of ekipl.py as well",
        allow_abbrev=False,
    )
    buying.add_argument(
        "--budget", type=float, metavar="USD", help="spend no more than this in this call"
    )
    buying.add_argument("--dry-run", action="store_true", help="count and estimate, ask nothing")
    args, rest = parser.parse_known_args(argv)
    if args.command == "collect":
        if args.budget is not None and not args.budget > 0:
            raise UserError("--budget must be above 0")
        config, resume = ekipl.parse(rest)
        if args.dry_run:
            config.offline = True  # needs no key
        ekipl.check(config, 1, resuming=True)
        dry_run(config) if args.dry_run else collect(config, args.budget)
    elif rest:
        raise UserError(f"{args.command} takes a cache and nothing more, not {rest[0]}")
    else:
        cache = Cache(args.cache, read_only=True)
        if args.command == "stats":
            stats(cache)
        elif args.command == "export":
            for entry in cache.entries():
                print(json.dumps(entry, ensure_ascii=False))
        elif faults := cache.faults():
            raise UserError(f"{args.cache}: {'; '.join(faults[:5])}")
        else:
            print(f"{args.cache}: {len(cache.entries())} answers, no fault")


def main() -> None:
    runs.command("experts.py", run, "what had arrived is in the cache, the same command goes on")
