"""An expert that is a model behind an API (Eq 5).

    openai:MODEL, gemini:MODEL             by their vendors' SDKs; keys from the environment only
    openai:MODEL@http://host:port/v1       any server that speaks OpenAI's chat completions

It gets the policy's own prompt, nothing more. An API costs money and fails. So every answer is
bought once and kept (cache.py), and requests run ahead of the training. A state whose answers do
not come by the deadline goes on with the policy's actions alone, and is counted and logged. An API
that fails again and again is left alone for a while.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from concurrent.futures import Future, wait

from data.state import State
from experts import apis, clients, refusals
from experts.apis import parse_price
from experts.cache import Answer, Cache, Reply, request_id
from experts.clients import ApiError
from experts.gemini_client import Gemini
from experts.openai_client import OpenAI
from experts.replies import BLOCKED, CUT
from experts.workers import Workers
from sampling import Action, Sample
from training.console import UserError

LOG = logging.getLogger("experts")
PAUSE = 120.0  # seconds that a failing API is left alone
VENDORS = {"openai": OpenAI, "gemini": Gemini}


class ApiExpert:
    """A model behind an API, through the cache.

    settings: the run's (`ExpertSettings`). densities: leave out answers without log-prob, which are
    of no use to the estimator.

    The cache alone decides which answers a state gets, never a seed: those of index 0 .. n - 1. A
    blocked answer stays in the cache, so that it is not paid for again, and is no action.
    """

    def __init__(self, spec: str, cache: Cache, settings, densities: bool = False):
        self.vendor, self.model, url = apis.split_name(spec)
        self.name = f"{self.vendor}:{self.model}"
        self.identity = f"{self.name}@{url}"
        self.cache, self.densities, self.offline = cache, densities, settings.offline
        self.max_tokens, self.deadline = settings.expert_tokens, settings.expert_deadline
        self.patience = settings.expert_failures
        self.price = apis.price_of(self.model, parse_price(settings.price))
        self.lock = threading.Lock()
        self.jobs: dict[str, Future] = {}  # by request, from its prefetch until its step
        self.answered = False  # ever; before, an error that lasts is the user's to mend
        self.in_a_row, self.off_until = 0, 0.0
        self.spoken, self.cut_in_a_row = False, 0  # see notice_cuts
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
        """Makes the SDK's client. UserError if that fails, such as for an unknown kind of proxy."""
        if ending := apis.retirement(self.model, url):
            LOG.warning(f"{self.name}: {ending[1]}")
        key = apis.key_of(self.vendor, url)
        try:
            self.api = VENDORS[self.vendor](self.model, url, key, self.max_tokens, self.deadline)
        except Exception as error:
            why = refusals.one_line(refusals.cause(error, url, self.deadline), key)
            raise UserError(f"{self.identity} cannot be asked: {why}") from None

    # ------------------------------------------------------------------ as an expert

    def prefetch(self, states: list[State], n: int) -> None:
        """Begins the requests for states that are sampled soon. Returns at once."""
        if not self.offline:
            for state in states:
                self.job(state, n)

    def introduce(self, state: State, n: int) -> None:
        """Asks for the first state and waits until the SDK has given up. UserError if there is no
        answer."""
        job = None if self.offline else self.job(state, n)
        if job is None:
            return
        attempts = 1 + clients.RETRIES
        wait([job], timeout=(1 + attempts) * self.deadline + clients.RETRIES * refusals.LONGEST)
        problem = self.problem(job)
        if problem and not self.cache.get(request_id(self.content(state)), 1):
            raise UserError(f"{self.identity} does not answer: {problem}")

    def sample(self, states: list[State], n: int, seed: int = 0) -> list[list[Sample]]:
        """Up to n samples for each state, after the deadline at the latest.

        UserError if offline and the cache lacks an answer; if the cache cannot be written; and if
        the API's first reply is that it will never answer (a wrong key, an unknown model).
        """
        replies = self.cached(states, n) if self.offline else self.fetched(states, n)
        samples = []
        for answers in replies:
            self.notice_cuts(answers)
            usable = [self.usable(answer) for answer in answers]
            samples.append([sample for sample in usable if sample])
        return samples

    def cached(self, states: list[State], n: int) -> list[list[Answer]]:
        """The answers in the cache. UserError if it lacks one."""
        replies = [self.cache.get(request_id(self.content(state)), n) for state in states]
        for state, answers in zip(states, replies, strict=True):
            if len(answers) < n:
                raise UserError(
                    f"--offline: {self.cache.path} has no answer {len(answers)} of {self.identity} "
                    f"to state {state.id}: collect it first"
                )
        self.count(cache_hits=n * len(states))
        return replies

    def fetched(self, states: list[State], n: int) -> list[list[Answer]]:
        """The answers that are there by the deadline, asked for where the cache lacks them."""
        jobs = [self.job(state, n) for state in states]
        wait([job for job in jobs if job is not None], timeout=self.deadline)
        problems = [self.problem(job) for job in jobs]
        replies, without = [], []
        for state, job, problem in zip(states, jobs, problems, strict=True):
            request = request_id(self.content(state))
            self.jobs.pop(request, None)
            answers = self.cache.get(request, n)
            replies.append(answers)
            self.count(cache_hits=n if job is None else 0)
            if problem and len(answers) < n:
                without.append(problem)
        if any(replies):
            self.answered = True
        if without:
            self.count(states_without=len(without))
            several = f"{len(without)} of {len(states)} states"
            LOG.warning(f"{self.name}: {several} go on without its actions: {without[0]}")
        return replies

    def logp(self, state: State, action: Action) -> float | None:
        """What the API says of its own sample. Other actions count as ones that it never says: the
        approximation of A.5 for unknown densities."""
        return action.expert_logp if action.source == self.name else -math.inf

    def usable(self, answer: Answer) -> Sample | None:
        """The answer as an action's text, unchanged; None if it was blocked or cut to nothing."""
        cut = answer.finish in CUT
        if answer.text is None or answer.finish in BLOCKED or spent(answer):
            self.count(blocked=1)
            return None
        if self.densities and answer.logp is None:
            self.count(without_density=1)
            if self.dense:
                self.dense = False
                LOG.warning(
                    f"{self.name}: answers whose density is unknown are left out, as the estimator "
                    "needs it"
                )
            return None
        return Sample(answer.text, answer.logp, cut)

    def notice_cuts(self, answers: list[Answer]) -> None:
        """Warns when a model thinks until its limit: at the first state, later after as many states
        in a row as failures switch it off."""
        if any(not spent(answer) for answer in answers):
            self.spoken, self.cut_in_a_row = True, 0
        elif answers:
            self.cut_in_a_row += 1
            if self.cut_in_a_row == (self.patience if self.spoken else 1):
                limit = f"the limit of {self.max_tokens} tokens; raise --expert-tokens"
                LOG.warning(
                    f"{self.name}: all {len(answers)} answers to a state were cut before they "
                    f"began: it thinks until {limit}"
                )

    def meet(self, model: str) -> None:
        """Warns, once, of a model that is not the one asked for, or not the one so far."""
        with self.lock:
            if model in self.models or model == self.model:
                return
            self.models.add(model)
            several = len(self.models) > 1
        where = f"{self.cache.path} keeps which answer is whose"
        if not apis.same_model(self.model, model):
            LOG.warning(f"{self.name}: {model} answers, which is not the model asked for; {where}")
        elif several:
            models = ", ".join(sorted(self.models))
            LOG.warning(f"{self.name}: its answers are of several models: {models}; {where}")

    def metrics(self) -> dict[str, float]:
        """Counts since the last time: requests, answers, cache_hits, failures, states_without,
        blocked, seconds of the requests, and cost in USD where the price is known."""
        with self.lock:
            counts, self.counts = self.counts, {}
        return counts if self.price is None else {"cost": 0.0, **counts}

    # ------------------------------------------------------------------ asking

    def content(self, state: State) -> dict:
        return apis.request_content(self.identity, state, self.max_tokens)

    def job(self, state: State, n: int) -> Future | None:
        """The request for the answers that the cache lacks, begun if it is not; None if it lacks
        none of n."""
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

    def forget(self, state: State) -> None:
        """Drops a job that is done, so that the state can be asked again."""
        self.jobs.pop(request_id(self.content(state)), None)

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
                    self.count(requests=1, answers=len(reply.answers), seconds=reply.seconds)
                    self.pay(apis.dollars(self.price, reply.input_tokens, reply.output_tokens))
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

    def ask(self, state: State, n: int) -> Reply:
        """Up to n answers from one request. ApiError if there is none."""
        return self.api.ask(state, n)

    def problem(self, job: Future | None) -> str | None:
        """Why a job brought nothing; None if it did. A job that is not done is given up."""
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
        failures = f"{self.in_a_row} failures in a row, the last: {reason}"
        LOG.warning(f"{self.name}: switched off for {PAUSE:g} s after {failures}")

    def pay(self, cost: float | None) -> None:
        """Counts the cost of a reply, or, where tokens have a price, that it is unknown."""
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
