"""A budget for all threads: the most that a request may cost is put aside before it is sent."""

import math
import threading

from experts import apis, clients
from experts.api_expert import ApiExpert
from experts.cache import Cache, Reply
from experts.clients import ApiError
from experts.settings import ExpertSettings
from training.console import UserError


class OverBudget(UserError):
    """The next request could cost more than is left."""


class Purse:
    """The money that all threads may spend together. budget: USD, None without a limit.

    Before a request the most that it can cost is put aside, and given back when its cost is known.
    An unknown cost counts as the most. The most is estimated from the prompt and the length limit
    of the answers; once a request costs more, the next ones are expected to cost as much more.
    """

    def __init__(self, budget: float | None):
        self.budget = math.inf if budget is None else budget
        self.spent = self.assumed = 0.0  # USD; assumed: for requests of unknown cost
        self.aside: dict[object, float] = {}
        # factor: how many times `most` a request has cost; known: whether the cost of any one is
        self.factor, self.known = 1.0, False
        self.change = threading.Condition()

    def hold(self, key: object, most: float, attempts: int) -> bool:
        """Puts aside `attempts` times `most`; only once, and False, if no more is left.

        Waits for the cost of running requests if that may help. OverBudget if it does not.
        """
        with self.change:
            while True:
                one = most * self.factor
                left = self.budget - self.spent - sum(self.aside.values())
                alone = not self.aside
                if self.known or alone or self.budget == math.inf:
                    fitting = [count for count in (attempts, 1) if count * one <= left]
                    if fitting:
                        self.aside[key] = fitting[0] * one
                        return fitting[0] > 1
                    if alone:
                        raise OverBudget(f"the next request could cost ${one:.4f}")
                self.change.wait()

    def pay(self, key: object, cost: float, most: float, unknown: int) -> None:
        """A request's cost: `cost`, and `unknown` attempts for at most `most` each."""
        with self.change:
            if most > 0:
                self.factor = max(self.factor, cost / most)
            self.known = self.known or cost > 0 or unknown > 0
            assumed = unknown * most * self.factor
            self.spent, self.assumed = self.spent + cost + assumed, self.assumed + assumed
            self.aside.pop(key, None)
            self.change.notify_all()


class Buyer(ApiExpert):
    """An API that is asked for no more than is left in the purse."""

    def __init__(self, spec: str, cache: Cache, config: ExpertSettings, purse: Purse):
        super().__init__(spec, cache, config)
        self.purse = purse

    def ask(self, state, n: int) -> Reply:
        if self.price is None:
            return super().ask(state, n)
        key, prompt = object(), apis.prompt_tokens(self.vendor, state)
        most = apis.dollars(self.price, prompt, n * self.max_tokens)
        retry = self.purse.hold(key, most, attempts=1 + clients.RETRIES)
        cost, unknown = 0.0, 1
        try:
            reply = self.api.ask(state, n, retry)
            unknown, *wasted = reply.beside
            cost = apis.dollars(self.price, *wasted)
            cost += apis.dollars(self.price, reply.input_tokens, reply.output_tokens) or 0.0
            return reply
        except ApiError as error:
            unknown, *wasted = error.beside
            cost = apis.dollars(self.price, *wasted)
            raise
        finally:
            self.purse.pay(key, cost, most, unknown)
