"""TODO experts.purse"""

import math
import threading

from experts import apis, clients
from experts.api_expert import ApiExpert
from experts.cache import Cache, Reply
from experts.clients import ApiError
from experts.settings import ExpertSettings
from training.console import UserError


class OverBudget(UserError):
    """One request more could cost more than there is."""


class Purse:
    """What may be spent, by all threads together. budget: USD, None without a limit.

    Before a request the most that it can cost is put aside, and given back when its cost is known.
    What a server does not tell counts as the most. That is an estimate of the prompt and the length
    limit of the answers; where a request turns out dearer, the next ones are taken for as much dearer.
    """

    def __init__(self, budget: float | None):
        self.budget = math.inf if budget is None else budget
        self.spent = self.assumed = 0.0  # USD; assumed: the part of spent that no server told
        self.aside: dict[object, float] = {}
        self.dearer, self.known = 1.0, False  # known: how dear one was
        self.change = threading.Condition()

    def hold(self, key: object, most: float, attempts: int) -> bool:
        """Puts aside `attempts` times `most`, or once if there is no more: then False. Waits for the cost of
        running requests if that may help. OverBudget if it does not."""
        with self.change:
            while True:
                one = most * self.dearer
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

    def pay(self, key: object, told: float, most: float, untold: int) -> None:
        """A request's cost: `told`, and `untold` attempts for at most `most` each."""
        with self.change:
            if most > 0:
                self.dearer = max(self.dearer, told / most)
            self.known = self.known or told > 0 or untold > 0
            assumed = untold * most * self.dearer
            self.spent, self.assumed = self.spent + told + assumed, self.assumed + assumed
            self.aside.pop(key, None)
            self.change.notify_all()


class Buyer(ApiExpert):
    """An API that is asked for no more than there is in the purse."""

    def __init__(self, spec: str, cache: Cache, config: ExpertSettings, purse: Purse):
        super().__init__(spec, cache, config)
        self.purse = purse

    def ask(self, state, n: int) -> Reply:
        if self.price is None:
            return super().ask(state, n)
        key, prompt = object(), apis.prompt_tokens(self.vendor, state)
        most = apis.dollars(self.price, prompt, n * self.max_tokens)
        retry = self.purse.hold(key, most, attempts=1 + clients.RETRIES)
        told, untold = 0.0, 1
        try:
            reply = self.api.ask(state, n, retry)
            untold, *wasted = reply.beside
            told = apis.dollars(self.price, *wasted)
            told += apis.dollars(self.price, reply.input_tokens, reply.output_tokens) or 0.0
            return reply
        except ApiError as error:
            untold, *wasted = error.beside
            told = apis.dollars(self.price, *wasted)
            raise
        finally:
            self.purse.pay(key, told, most, untold)
