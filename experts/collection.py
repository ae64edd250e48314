"""Buying the answers of experts to many states, ahead of training."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait

from tqdm import tqdm

from experts.cache import Cache
from experts.purse import Buyer, OverBudget, Purse
from experts.settings import CollectSettings
from training.console import UserError

WAITS = 5  # pauses in a row, of api_expert.PAUSE seconds each, before a failing API is given up
FIRST_WAITS = 2  # the same for one that has not answered yet


class Collection:
    """Buys answers in the order of the states, as many requests at a time as allowed.

    An API that fails again and again is left alone for a while, as in training, and the states that
    failed in that time are asked again. A state that fails while the API is well gets one more try,
    at the end. UserError for a server that was never reached, and for an API that stays down for
    WAITS pauses (FIRST_WAITS, if it never answered).
    """

    def __init__(self, experts: list[Buyer], states: list, config: CollectSettings, bar: tqdm):
        self.experts, self.config, self.bar = experts, config, bar
        self.todo = deque(itertools.product(states, experts))
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
            self.ask_later(expert)  # only counts them: there is no money left

    def most(self) -> int:
        return self.config.expert_requests * len(self.experts)

    def begin(self, state, expert: Buyer) -> None:
        job = expert.job(state, self.config.num_samples)
        if job is None:  # the cache has all of its answers
            self.bar.update(1)
        else:
            self.running[job] = state, expert

    def end(self) -> None:
        """Waits for a request to end, and deals with all that have."""
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
        """Whether waiting will not help: a withdrawn key, or a server that was never there."""
        never = not expert.answered and not getattr(error, "reached", True)
        return never or getattr(error, "final", False)

    def ask_later(self, expert: Buyer) -> None:
        """States that failed lately although the API is well get one more try, at the end."""
        for state in self.row[expert]:
            if (key := (id(state), expert.name)) in self.retried or self.over:
                self.without += 1
                self.bar.update(1)
            else:
                self.retried.add(key)
                self.todo.append((state, expert))
        self.row[expert] = []

    def wait_out(self) -> None:
        """While an API is left alone no API is asked. Then the states that failed are."""
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


def buy(
    specs: list[str], states: list, cache: Cache, config: CollectSettings, purse: Purse
) -> None:
    """Fills the cache and prints what was bought. UserError if some states stay without answers."""
    experts = [Buyer(spec, cache, config, purse) for spec in specs]
    unknown = [expert.name for expert in experts if expert.price is None]
    if purse.budget < math.inf and unknown:
        raise UserError(
            f"--budget needs a price, and the table has none of {unknown[0]}: "
            "give it with --price in,out"
        )
    with tqdm(total=len(states) * len(experts), desc="collect", dynamic_ncols=True) as bar:
        bought = Collection(experts, states, config, bar)
        bought.run()
    answers, requests = (bought.counts.get(name, 0) for name in ("answers", "requests"))
    cost = "" if unknown else f", ${purse.spent:.4f}"
    if purse.assumed:
        cost += (
            f" (${purse.assumed:.4f} of it assumed: the most that calls of unknown cost can cost)"
        )
    where = f"they are in {config.cache}"
    print(f"bought {answers:.0f} answers with {requests:.0f} requests{cost}; {where}")
    if bought.over:
        again = "the same command with a larger budget goes on"
        print(f"stopped at the budget: {bought.over}; {again}")
    if bought.without:
        why = "; ".join(f"{name}: {reason}" for name, reason in bought.reasons.items())
        raise UserError(
            f"{bought.without} states stayed without answers ({why}): "
            "the same command asks them again"
        )
