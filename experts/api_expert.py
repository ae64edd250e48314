"""Experts: the external auxiliary models pi_1 .. pi_m whose actions join the policy's (Eq 5).

    careful, quick                           scripted, for the blocks world (scripted.py)
    openai:MODEL, gemini:MODEL               APIs with their vendors' SDKs (clients.py); keys from the environment only
    openai:MODEL@http://host:port/v1         any server that speaks OpenAI's chat completions

An expert has a name, samples n texts for each state, and tells the log-density of an action, or None if it cannot (the weights of
Appendix A need it). It gets the policy's own prompt, nothing more.

An API costs money and fails. So every answer is bought once and kept (cache.py), requests run ahead of the training, and a state
whose answers do not come in time goes on with the policy's actions alone: counted, logged, and never waited for longer than the
deadline. An API that fails again and again is left alone for a while.

    python experts.py collect --preset blocks --experts openai:MODEL --dry-run     # what it would cost; without --dry-run: buys
    python experts.py stats CACHE                                                  # also export, verify
"""

from __future__ import annotations

import logging
import math
import threading
import time
from concurrent.futures import Future, wait
from queue import SimpleQueue

from data.state import State
from experts import apis, clients, refusals
from experts.apis import parse_price
from experts.cache import Answer, Cache, Reply, request_id
from experts.clients import CUT, ApiError
from sampling import Action, Sample
from training.console import UserError

LOG = logging.getLogger("experts")
PAUSE = 120.0  # seconds that a failing API is left alone
VENDORS = {"openai": clients.OpenAI, "gemini": clients.Gemini}
BLOCKED = {  # finish reasons of answers that the API withheld, whole or in part
    "content_filter", "safety", "recitation", "blocklist", "prohibited_content", "spii", "language", "image_safety",
}  # fmt: skip


class Workers:
    """Threads for waiting. Unlike an executor's they do not keep the process from ending."""

    def __init__(self, count: int):
        self.queue = SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, work, *arguments) -> Future:
        job = Future()
        self.queue.put((job, work, arguments))
        return job

    def _work(self) -> None:
        while True:
            job, work, arguments = self.queue.get()
            if job.set_running_or_notify_cancel():
                try:
                    job.set_result(work(*arguments))
                except BaseException as error:
                    job.set_exception(error)


class ApiExpert:
    """A model behind an API, through the cache.

    settings (those of the run): expert_tokens, expert_deadline and expert_failures as `ekipl.Config` explains them, expert_requests,
    price, offline. densities: an answer that comes without its log-prob is no use to the estimator and left out.

    Which answers a state gets depends on the cache alone, never on a seed: those of index 0 .. n - 1. A blocked answer is kept in
    the cache, so that it is not paid for again, and is no action.
    """

    def __init__(self, spec: str, cache: Cache, settings, densities: bool = False):
        self.vendor, self.model, url = apis.split_name(spec)
        self.name, self.identity = (
            f"{self.vendor}:{self.model}",
            f"{self.vendor}:{self.model}@{url}",
        )
        self.cache, self.densities, self.offline = cache, densities, settings.offline
        self.max_tokens, self.deadline, self.patience = (
            settings.expert_tokens,
            settings.expert_deadline,
            settings.expert_failures,
        )
        self.price = apis.price_of(self.model, parse_price(settings.price))
        self.lock = threading.Lock()
        self.jobs: dict[str, Future] = {}  # by request, from its prefetch until its step
        self.answered = False  # ever; before, an error that lasts is the user's to mend
        self.in_a_row, self.off_until = 0, 0.0
        self.spoken, self.cut_in_a_row = False, 0  # see hear
        self.dense = True  # until an answer came without a density that is needed
        self.counts: dict[str, float] = {}
        self.models: set[str] = set()
        for call in cache.calls():
            if call["expert"] == self.identity:
                self.meet(call["model"])
        if not self.offline:
            self.connect(url)
            self.workers = Workers(settings.expert_requests)

    def connect(self, url: str) -> None:
        """Makes the SDK's client. UserError if it cannot be made, as with a proxy that it does not know."""
        if ending := apis.retirement(self.model, url):
            LOG.warning("%s: %s", self.name, ending[1])
        key = apis.key_of(self.vendor, url)
        try:
            self.api = VENDORS[self.vendor](self.model, url, key, self.max_tokens, self.deadline)
        except Exception as error:
            why = refusals.one_line(refusals.cause(error, url, self.deadline), key)
            raise UserError(f"{self.identity} cannot be asked: {why}") from None

    # ------------------------------------------------------------------------------------------ as an expert

    def prefetch(self, states: list[State], n: int) -> None:
        """Requests for these states, which are sampled soon, begin. Returns at once."""
        if not self.offline:
            for state in states:
                self.job(state, n)

    def introduce(self, state: State, n: int) -> None:
        """Asks for the first state, and waits until the SDK has given up. UserError if nobody answers."""
        job = None if self.offline else self.job(state, n)
        if job is None:
            return
        attempts = 1 + clients.RETRIES
        wait([job], timeout=(1 + attempts) * self.deadline + clients.RETRIES * refusals.LONGEST)
        problem = self.problem(job)
        if problem and not self.cache.get(request_id(self.content(state)), 1):
            raise UserError(f"{self.identity} does not answer: {problem}")

    def sample(self, states: list[State], n: int, seed: int = 0) -> list[list[Sample]]:
        """Waits for at most the deadline. UserError if offline and the cache lacks an answer; if the cache cannot be written;
        and if the API's first words are that it will never answer (a wrong key, an unknown model)."""
        if self.offline:
            found = [self.cache.get(request_id(self.content(state)), n) for state in states]
            for state, answers in zip(states, found, strict=True):
                if len(answers) < n:
                    raise UserError(
                        f"--offline: {self.cache.path} has no answer {len(answers)} of {self.identity} to state {state.id}: collect it first"
                    )
            self.count(cache_hits=n * len(states))
        else:
            jobs = [self.job(state, n) for state in states]
            wait([job for job in jobs if job is not None], timeout=self.deadline)
            problems = [self.problem(job) for job in jobs]
            found = []
            for state, job in zip(states, jobs, strict=True):
                request = request_id(self.content(state))
                self.jobs.pop(request, None)
                found.append(self.cache.get(request, n))
                self.count(cache_hits=n if job is None else 0)
            if any(found):
                self.answered = True
            if without := [
                problem
                for problem, answers in zip(problems, found, strict=True)
                if problem and len(answers) < n
            ]:
                self.count(states_without=len(without))
                LOG.warning(
                    "%s: %d of %d states go on without its actions: %s",
                    self.name,
                    len(without),
                    len(states),
                    without[0],
                )
        for answers in found:
            self.hear(answers)
        return [
            [sample for answer in answers if (sample := self.usable(answer))] for answers in found
        ]

    def logp(self, state: State, action: Action) -> float | None:
        """What the API told of its own sample; other actions it is taken never to say, the approximation of A.5 for unknown densities."""
        return action.expert_logp if action.source == self.name else -math.inf

    def usable(self, answer: Answer) -> Sample | None:
        """The answer as an action's text, as it is; None if it was blocked, or cut before it began."""
        cut = answer.finish in CUT
        if answer.text is None or answer.finish in BLOCKED or spent(answer):
            self.count(blocked=1)
            return None
        if self.densities and answer.logp is None:
            self.count(without_density=1)
            if self.dense:
                self.dense = False
                LOG.warning(
                    "%s: answers whose density is unknown are left out, as the estimator needs it",
                    self.name,
                )
            return None
        return Sample(answer.text, answer.logp, cut)

    def hear(self, answers: list[Answer]) -> None:
        """Tells when a model thinks its whole limit away: at the first state, else after as many in a
        row as failures would be told."""
        if any(not spent(answer) for answer in answers):
            self.spoken, self.cut_in_a_row = True, 0
        elif answers:
            self.cut_in_a_row += 1
            if self.cut_in_a_row == (self.patience if self.spoken else 1):
                LOG.warning(
                    "%s: all %d answers to a state were cut before they began: it thinks until the limit "
                    "of %d tokens; raise --expert-tokens", self.name, len(answers), self.max_tokens,
                )  # fmt: skip

    def meet(self, model: str) -> None:
        """Tells, once, that a model answers that is not the one asked for, or not the one so far."""
        with self.lock:
            if model in self.models or model == self.model:
                return
            self.models.add(model)
            several = len(self.models) > 1
        where = f"{self.cache.path} keeps which answer is whose"
        if not apis.same_model(self.model, model):
            LOG.warning(
                "%s: %s answers, which is not the model asked for; %s", self.name, model, where
            )
        elif several:
            LOG.warning(
                "%s: its answers are of several models: %s; %s", self.name,
                ", ".join(sorted(self.models)), where,
            )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """Counts since the last time: requests, answers, cache_hits, failures, states_without, blocked, seconds of the requests, and
        cost in USD where the price is known."""
        with self.lock:
            counts, self.counts = self.counts, {}
        return counts if self.price is None else {"cost": 0.0, **counts}

    # ------------------------------------------------------------------------------------------ asking

    def content(self, state: State) -> dict:
        return apis.request_content(self.identity, state, self.max_tokens)

    def complete(self, state: State, n: int) -> bool:
        """Whether the cache has all n answers to this state."""
        return len(self.cache.get(request_id(self.content(state)), n)) == n

    def job(self, state: State, n: int) -> Future | None:
        """The request for what the cache lacks of this state's n answers, begun if it is not; None if it lacks nothing."""
        content = self.content(state)
        request = request_id(content)
        if request in self.jobs:
            return self.jobs[request]
        found = len(self.cache.get(request, n))
        if found == n:
            return None
        if self.off:
            job = Future()
            job.set_exception(ApiError("it is switched off"))
            return job
        self.count(cache_hits=found)
        job = self.jobs[request] = self.workers.submit(self.fetch, content, state, n)
        return job

    def fetch(self, content: dict, state: State, n: int) -> None:
        """Asks until the cache holds n answers. ApiError if the API does not give them."""
        if self.off:
            raise ApiError("it is switched off")
        request = request_id(content)
        try:
            with self.cache.claimed(request, patience=10 * self.deadline):
                while missing := n - len(self.cache.get(request, n)):
                    reply = self.ask(state, missing)
                    self.cache.put(content, reply)
                    self.meet(reply.model)
                    cost = apis.dollars(self.price, reply.input_tokens, reply.output_tokens)
                    self.count(
                        requests=1,
                        answers=len(reply.answers),
                        seconds=reply.seconds,
                    )
                    self.pay(cost)
        except UserError:  # the cache cannot be written: no more is bought
            raise
        except Exception as error:
            if not isinstance(error, (ApiError, TimeoutError)):  # it costs this state only
                error = ApiError(refusals.one_line(f"{type(error).__name__}: {error}"))
            self.count(failures=1)
            if getattr(error, "billed", False):
                self.pay(None)
            self.failed(str(error))
            raise error from None
        self.answered, self.in_a_row = True, 0

    def forget(self, state: State) -> None:
        """A job that is done makes room for another try."""
        self.jobs.pop(request_id(self.content(state)), None)

    def ask(self, state: State, n: int) -> Reply:
        """Up to n answers for one request. ApiError if there is none."""
        return self.api.ask(state, n)

    def problem(self, job: Future | None) -> str | None:
        """Why a job brought nothing; None if it did. Gives it up if it is not done."""
        if job is None:
            return None
        if not job.done():
            job.cancel()  # if it has begun, its answers still go to the cache
            reason = f"no answer within {self.deadline:g} s"
            self.failed(reason)
            return reason
        try:
            job.result()
            return None
        except UserError:
            raise
        except Exception as error:
            if getattr(error, "final", False) and not self.answered:
                raise UserError(f"{self.identity}: {error}") from None
            return str(error) or type(error).__name__

    @property
    def off(self) -> bool:
        return time.monotonic() < self.off_until

    def failed(self, reason: str) -> None:
        with self.lock:
            self.in_a_row += 1
            if self.in_a_row < self.patience or self.off:
                return
            self.off_until = time.monotonic() + PAUSE
        LOG.warning(
            "%s: switched off for %g s after %d failures in a row, the last: %s",
            self.name,
            PAUSE,
            self.in_a_row,
            reason,
        )

    def pay(self, cost: float | None) -> None:
        """Counts what a reply costs, or, where tokens have a price, that nobody told how many."""
        if cost is not None:
            self.count(cost=cost)
        elif self.price:
            self.count(unpriced=1)

    def count(self, **more: float) -> None:
        with self.lock:
            for name, value in more.items():
                self.counts[name] = self.counts.get(name, 0) + value


def spent(answer: Answer) -> bool:
    """Whether the length limit ended an answer before its first letter."""
    return answer.finish in CUT and not (answer.text or "").strip()
