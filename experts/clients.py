"""What all clients of APIs share: one request in, one `Reply` with up to n answers out.

openai_client.py and gemini_client.py add what a vendor's SDK does in its own way. A parameter that
a server refuses is left out from then on, and a warning says so once. Retries are the SDK's own,
in one layer, and wait as long as the server asks. An attempt ends after `timeout` seconds even if
its body still drips in. No redirect to another server is followed: it would take the key along.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import replace
from urllib.parse import urljoin, urlsplit

from data.state import State
from experts import apis, refusals
from experts.cache import Answer, Reply

LOG = logging.getLogger("experts")
RETRIES = 2  # by the SDK, after a first attempt
PATIENCE = 16  # refusals of a parameter before a request is given up
NO_LIMIT = "nothing limits the length, and the cost, of an answer"
REFUSED = {  # what it means if a server takes no such parameter
    "logprobs": "the density of its answers is unknown",
    "temperature": "it samples at its own temperature, and the density of its answers is unknown",
    "max_tokens": NO_LIMIT,
    "max_output_tokens": NO_LIMIT,
    "max_completion_tokens": "max_tokens takes its place",
}
Tokens = tuple[int | None, int | None]  # in and out; None if unknown


class ApiError(Exception):
    """A request that brought no answer.

    final: asking again will not help (a wrong key, an unknown model). billed: the server answered,
    and will want to be paid. reached: a server was there at all. beside: as in `Reply`.
    """

    def __init__(
        self, message: str, final: bool = False, billed: bool = False, reached: bool = True
    ):
        super().__init__(message)
        self.final, self.billed, self.reached, self.beside = final, billed, reached, (0, 0, 0)


class Api:
    """One model behind an SDK. Several threads may use it at once.

    timeout: seconds that one attempt may take. without: parameters that the server has refused.
    most: answers to a request, where the server has refused to give more. here: what the request
    of this thread costs, and whether the SDK may try again.
    """

    VENDOR, COUNT = "", "n"  # COUNT: the protocol's name for the number of answers

    def __init__(self, model: str, url: str, key: str, max_tokens: int, timeout: float):
        self.model, self.url, self.key = model, url, key
        self.max_tokens, self.timeout = max_tokens, timeout
        self.without: frozenset[str] = frozenset()
        self.most: int | None = None
        self.lock = threading.Lock()
        self.here = threading.local()

    def ask(self, state: State, n: int, retry: bool = True) -> Reply:
        """Up to n answers from one request, or n blocked ones if the server refuses this prompt for
        its content. ApiError if there is none. retry: try again after a failure that may pass."""
        self.here.retry, self.here.lost, self.here.wasted = retry, 0, (0, 0)
        try:
            reply = self.request(state, n)
        except ApiError as error:
            error.beside = self.here.lost, *self.here.wasted
            raise
        return replace(reply, beside=(self.here.lost, *self.here.wasted))

    def request(self, state: State, n: int) -> Reply:
        """`ask`, without the costs beside the reply."""
        without, most, started = self.without, self.most, time.monotonic()
        for patience in range(PATIENCE, -1, -1):
            count = min(n, most or n)
            parameters = self.parameters(count, without)
            try:
                answers, model, used = self.call(state, parameters)
            except ApiError:
                raise
            except Exception as error:  # an SDK may raise anything
                status, body = self.reply(error)
                if refusals.filtered(status, body):
                    answers = [Answer(None, "prompt_content_filter")] * n
                    model, used = None, (0, 0)
                else:
                    refused = refusals.refused_parameter(status, body, list(parameters))
                    if not patience or not refused:
                        raise self.explain(error) from None
                    if refused == self.COUNT and count > 1:
                        most = refusals.most_answers(body, count)
                    else:
                        without |= {refused}
                    continue
            self.learn(without, most)
            if "temperature" in without:  # the distribution is unknown, so the densities are too
                answers = [Answer(answer.text, answer.finish) for answer in answers]
            return Reply(answers[:n], model or self.model, *used, time.monotonic() - started)
        raise AssertionError("the last refusal is raised")

    # ------------------------------------------------------------------ what a vendor's client adds

    def parameters(self, n: int, without: frozenset[str]) -> dict:
        """Those of a request for n answers, by the protocol's names, less the refused ones."""
        raise NotImplementedError

    def call(self, state: State, parameters: dict) -> tuple[list[Answer], str | None, Tokens]:
        """One request: its answers, the model that gave them, tokens. Raises what the SDK does."""
        raise NotImplementedError

    def reply(self, error: Exception) -> tuple[int | None, object]:
        """Status and body of the reply behind an error; (None, "") if there was none."""
        raise NotImplementedError

    # ------------------------------------------------------------------ for the vendors' clients

    def settle(self, used: Tokens, useful: bool) -> None:
        """The cost of an attempt is known. (No token of a prompt means that it is not.)"""
        if used[0] and used[1] is not None:
            self.here.lost -= 1
            if not useful:
                self.waste(used)

    def failed(self, used: Tokens) -> None:
        """An attempt ended with an error. It is not billed, unless the reply names tokens."""
        self.here.lost -= 1
        if None not in used:
            self.waste(used)

    def waste(self, used: tuple[int, int]) -> None:
        tokens_in, tokens_out = self.here.wasted
        self.here.wasted = tokens_in + used[0], tokens_out + used[1]

    def parsed(self, text: str) -> dict:
        """A reply of status 200, empty if it is no object. ApiError if it is no JSON."""
        body = refusals.parsed(text)
        if isinstance(body, str):
            start = refusals.one_line(body, self.key)[:80]
            raise ApiError(f"the server's answer is no JSON: {start}")
        return body if isinstance(body, dict) else {}

    def stay(self, here: str, there: str) -> None:
        """ApiError if a redirect leads to another server: another scheme, host or port."""
        old, new = urlsplit(here), urlsplit(urljoin(here, there))
        if (old.scheme, old.netloc.lower()) != (new.scheme, new.netloc.lower()):
            where = refusals.one_line(f"{new.scheme}://{apis.shown(new.netloc)}", self.key)
            raise ApiError(
                f"the server redirects to {where}: write that address if it is right", True
            )

    def late(self, until: float) -> None:
        """ApiError once an attempt has taken too long."""
        if time.monotonic() > until:
            raise ApiError(f"the answer was not complete within {self.timeout:g} s", billed=True)

    # ------------------------------------------------------------------ what a server refuses

    def learn(self, without: frozenset[str], most: int | None) -> None:
        """Keeps what a request that succeeded had to leave out. A warning says so once."""
        with self.lock:
            new = without - self.without
            fewer = most is not None and most < (self.most or math.inf)
            self.without |= without
            self.most = most if fewer else self.most
        name = f"{self.VENDOR}:{self.model}"
        for parameter in sorted(new):
            means = REFUSED.get(parameter, "one answer a request")
            LOG.warning(f"{name}: the server refuses {parameter}, which is left out: {means}")
        if fewer:
            LOG.warning(f"{name}: the server gives at most {most} answers a request")

    def explain(self, error: Exception) -> ApiError:
        """One line, without a key, however the server may have echoed it."""
        status, body = self.reply(error)
        if status is None:
            text = refusals.cause(error, self.url, self.timeout)
        else:
            text = refusals.said(status, body)
        text = refusals.one_line(text, self.key)
        if status in (401, 403) and self.key == apis.NO_KEY:
            text += f" (no key was sent: export {apis.OTHERS_KEY})"
        return ApiError(text, refusals.lasting(status, body), reached=status is not None)
