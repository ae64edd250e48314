"""The command line of the experts: buys answers before a training run, and looks at what was bought.

    python -m experts.collect --preset blocks --experts openai:gpt-4o --dry-run          # requests, tokens, dollars, hours
    python -m experts.collect --preset blocks --experts openai:gpt-4o --budget 20        # buys, in the order of training
    python -m experts.collect stats CACHE | export CACHE > answers.jsonl | verify CACHE

`collect` takes every flag of ekipl.py, so that it asks what that run will ask. Each answer is in the cache before it counts; so
stopping, by hand, by the budget or by kill -9, loses nothing that had arrived, and the same command goes on from there.
"""

import argparse
import dataclasses
import json
import math
import os
import signal
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass

from tqdm import tqdm

from data.lengths import room_of
from data.sets import training_states
from experts import apis
from experts.api_expert import VENDORS
from experts.apis import parse_price
from experts.cache import Cache, request_id
from experts.purse import Buyer, OverBudget, Purse
from experts.roster import check, expert_specs
from experts.settings import ExpertSettings
from training import console, settings
from training.console import Parser, UserError
from training.presets import PRESETS
from training.settings import Settings


@dataclass
class CollectSettings(Settings, ExpertSettings):
    """What decides which states are asked, and whom: the flags of ekipl.py less those of the objective."""


# Assumed by --dry-run where the cache has no calls of this expert to learn from.
ANSWER_TOKENS = 200  # of a thought and its answer
CALL_SECONDS = 3.0  # the upper end of the paper's "1-3 seconds per query"
WAITS = 5  # pauses in a row, of experts.PAUSE seconds each, before a failing API is given up
FIRST_WAITS = 2  # the same for one that has not answered yet


def states_to_ask(config: CollectSettings) -> list:
    """The states of training in its order, each once."""
    questions, order = training_states(
        dataclasses.replace(config, batch_size=1), room=room_of(config, config.start)
    )  # fewer than a batch may be asked as well
    return [questions[i] for i in tqdm(list(dict.fromkeys(order)), desc="states", leave=False)]


def api_specs(config: CollectSettings, offline: bool) -> list[str]:
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
    spec: str, states: list, n: int, config: CollectSettings, cache: Cache | None
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


def dry_run(config: CollectSettings) -> None:
    states = states_to_ask(config)
    cache = Cache(config.cache, read_only=True) if os.path.lexists(config.cache) else None
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


class Collection:
    """Buying the answers of experts to states, in order, as many requests at a time as allowed.

    An API that fails again and again is left alone for a while, as in training, and the states that failed in that time are asked
    again. A state that fails while the API is well gets one more try, at the end. A server that was never reached, or an API that stays down for WAITS pauses (FIRST_WAITS, if it never answered), ends it: UserError.
    """

    def __init__(self, experts: list[Buyer], states: list, config: CollectSettings, bar: tqdm):
        self.experts, self.config, self.bar = experts, config, bar
        self.todo = deque((state, expert) for state in states for expert in experts)
        self.running: dict[Future, tuple] = {}
        self.row = {expert: [] for expert in experts}  # of failed states, since the last success
        self.retried: set[tuple[int, str]] = set()  # failed although the API was well
        self.waits = dict.fromkeys(experts, 0)  # pauses, since the last success
        self.reasons: dict[str, str] = {}
        self.counts: dict[str, float] = {}
        self.without, self.over = 0, None

    def run(self) -> None:
        while self.todo or self.running:
            while not self.over and self.todo and len(self.running) < self.most():
                self.begin(*self.todo.popleft())
            if self.running:
                self.end()
            elif self.over:
                break
            self.wait_out()
            if not self.todo and not self.running:
                for expert in self.experts:
                    self.ask_later(expert)
        for expert in self.experts:
            self.ask_later(expert)  # counts them: there is no money left

    def most(self) -> int:
        return self.config.expert_requests * len(self.experts)

    def begin(self, state, expert: Buyer) -> None:
        if expert.complete(state, self.config.num_samples):
            self.bar.update(1)
        else:
            self.running[expert.job(state, self.config.num_samples)] = state, expert

    def end(self) -> None:
        """Takes in what has come."""
        for job in wait(self.running, return_when=FIRST_COMPLETED).done:
            state, expert = self.running.pop(job)
            expert.forget(state)
            try:
                problem = expert.problem(job)
            except OverBudget as error:
                self.over = error
                continue
            for name, value in expert.metrics().items():
                self.counts[name] = self.counts.get(name, 0.0) + value
            if problem:
                self.row[expert].append(state)
                self.reasons[expert.name] = problem
                if expert.off and self.lasting(expert, job.exception()):
                    self.stop(expert)
            else:
                if not expert.off:
                    self.ask_later(expert)
                self.waits[expert] = 0
                self.bar.update(1)
            spent, requests = expert.purse.spent, self.counts.get("requests", 0)
            self.bar.set_postfix_str(
                f"${spent:.2f}" if expert.price else f"{requests:.0f} requests"
            )

    def lasting(self, expert: Buyer, error: Exception) -> bool:
        """Whether waiting will not help: a key withdrawn, say, or a server that never was there."""
        never = not expert.answered and not getattr(error, "reached", True)
        return never or getattr(error, "final", False)

    def ask_later(self, expert: Buyer) -> None:
        """The states that failed lately, although the API is well, get one more try, at the end."""
        for state in self.row[expert]:
            if (key := (id(state), expert.name)) in self.retried or self.over:
                self.without += 1
                self.bar.update(1)
            else:
                self.retried.add(key)
                self.todo.append((state, expert))
        self.row[expert] = []

    def wait_out(self) -> None:
        """While an API is left alone nobody is asked; then the states that failed are."""
        for expert in self.experts:
            if expert.off and not self.over:
                while self.running:
                    self.end()
                self.waits[expert] += 1
                if self.waits[expert] > (WAITS if expert.answered else FIRST_WAITS):
                    self.stop(expert)
                self.bar.set_postfix_str(f"waits for {expert.name}")
                while expert.off:
                    time.sleep(min(1.0, max(0.0, expert.off_until - time.monotonic())))
                self.todo.extendleft((state, expert) for state in reversed(self.row[expert]))
                self.row[expert] = []

    def stop(self, expert: Buyer) -> None:
        raise UserError(
            f"{expert.identity} fails again and again: {self.reasons[expert.name]}; "
            f"what arrived is in {self.config.cache}, the same command goes on"
        )


def collect(config: CollectSettings, budget: float | None) -> None:
    """Fills the cache for the states of training. UserError if the API will not answer, or some states stay without."""
    specs = api_specs(config, offline=False)
    states = states_to_ask(config)
    with closing(Cache(config.cache)) as cache:
        buy(specs, states, cache, config, Purse(budget))


def buy(
    specs: list[str], states: list, cache: Cache, config: CollectSettings, purse: Purse
) -> None:
    experts = [Buyer(spec, cache, config, purse) for spec in specs]
    unknown = [expert.name for expert in experts if expert.price is None]
    if purse.budget < math.inf and unknown:
        raise UserError(
            f"--budget needs a price, and the table has none of {unknown[0]}: give it with --price in,out"
        )
    with tqdm(total=len(states) * len(experts), desc="collect", dynamic_ncols=True) as bar:
        bought = Collection(experts, states, config, bar)
        bought.run()
    answers, requests = (bought.counts.get(name, 0) for name in ("answers", "requests"))
    cost = "" if unknown else f", ${purse.spent:.4f}"
    if purse.assumed:
        cost += f" (${purse.assumed:.4f} of it assumed, the most that what no server told the cost of can cost)"
    print(
        f"bought {answers:.0f} answers with {requests:.0f} requests{cost}; they are in {config.cache}"
    )
    if bought.over:
        print(
            f"stopped at the budget: {bought.over}; the same command with a larger budget goes on"
        )
    if bought.without:
        why = "; ".join(f"{name}: {reason}" for name, reason in bought.reasons.items())
        raise UserError(
            f"{bought.without} states stayed without answers ({why}): the same command asks them again"
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


def look(command: str, cache: Cache) -> None:
    """stats, export or verify. UserError if there is a fault."""
    try:
        if command == "stats":
            stats(cache)
        elif command == "export":
            for entry in cache.entries():
                print(json.dumps(entry, ensure_ascii=False))
    except (ValueError, TypeError, KeyError, OverflowError):  # values that no program wrote
        raise UserError(
            f"{cache.path} is damaged: python -m experts.collect verify {cache.path} tells where"
        ) from None
    if command == "verify":
        if faults := cache.faults():
            raise UserError(f"{cache.path}: {'; '.join(faults[:5])}")
        unsigned = cache.undigested()
        older = f"; in {unsigned} of them, bought before there were digests, changes go unnoticed"
        print(f"{cache.path}: {len(cache.entries())} answers, no fault{older if unsigned else ''}")


def run(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m experts.collect",
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
    if not argv or argv[0] not in (*commands.choices, "-h", "--help"):
        argv = ["collect", *argv]
    args, rest = parser.parse_known_args(argv)
    if args.command == "collect":
        if args.budget is not None and not args.budget > 0:
            raise UserError("--budget must be above 0")
        config, _ = settings.parse(CollectSettings, PRESETS, __doc__.split("\n\n")[0], rest)
        if args.dry_run:
            config.offline = True  # needs no key
        settings.check(config, 1, resuming=True)
        check(config)
        dry_run(config) if args.dry_run else collect(config, args.budget)
    elif rest:
        raise UserError(f"{args.command} takes a cache and nothing more, not {rest[0]}")
    else:
        with closing(Cache(args.cache, read_only=True)) as cache:
            look(args.command, cache)


def main() -> None:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the cache is closed too
    try:
        console.command(
            "experts.collect", run, "what had arrived is in the cache, the same command goes on"
        )
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
