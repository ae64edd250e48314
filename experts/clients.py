"""Asking OpenAI and Gemini through their SDKs: one request in, one `Reply` with up to n answers out.

    OpenAI    chat completions, of OpenAI or of any other server that speaks them
    Gemini    google-generativeai, whose support has ended: it builds and sends the request here, and
              its answer is read from the JSON, since newer models answer what the SDK cannot hold

A parameter that a server refuses is left out from then on, and told once. Retries are the SDK's own,
one layer, and wait as long as the server says. An attempt ends after `timeout` seconds even if a
body drips in for ever. No redirect to another server is followed: it would take the key along.
"""

from __future__ import annotations

import base64
import itertools
import logging
import math
import re
import threading
import time
import warnings
from dataclasses import replace
from urllib.parse import urljoin, urlsplit

from data.state import State
from experts import apis, refusals
from experts.apis import TEMPERATURE, parts_of
from experts.cache import Answer, Reply
from experts.replies import (
    finish_of,
    gemini_answer,
    gemini_usage,
    has_error,
    openai_answer,
    text_of,
    usage_of,
)

LOG = logging.getLogger("experts")
RETRIES = 2  # of the SDK, after a first attempt
UNSENT = "NewConnection|NameResolution|ConnectTimeout|SSLError|ProxyError"  # no request went out
PATIENCE = 16  # requests that may be refused for a parameter before one is given up
CUT = ("length", "max_tokens")  # finish reasons of an answer that the limit ended


class ApiError(Exception):
    """A request that brought nothing. final: asking again will not help (a wrong key, an unknown
    model). billed: the server did answer, and will want to be paid. reached: a server did answer at
    all. beside: as in `Reply`."""

    def __init__(
        self, message: str, final: bool = False, billed: bool = False, reached: bool = True
    ):
        super().__init__(message)
        self.final, self.billed, self.reached, self.beside = final, billed, reached, (0, 0, 0)


class Refused(Exception):
    """A reply of status 200 that is an error all the same."""

    def __init__(self, status: int, body: object):
        super().__init__("an error in a reply of status 200")
        self.status, self.body = status, body


class Api:
    """One model behind an SDK. timeout: seconds that one attempt may take. Safe to use from several
    threads. `without` are names of parameters that the server has refused."""

    VENDOR, COUNT = "", "n"  # COUNT: the protocol's name of the number of answers

    def __init__(self, model: str, url: str, key: str, max_tokens: int, timeout: float):
        self.model, self.url, self.key = model, url, key
        self.max_tokens, self.timeout = max_tokens, timeout
        self.without: frozenset[str] = frozenset()
        self.most: int | None = None  # answers to a request, where the server has refused more
        self.lock = threading.Lock()
        self.here = threading.local()  # what this thread's request costs, and whether to try again

    def ask(self, state: State, n: int, retry: bool = True) -> Reply:
        """Up to n answers for one request. n blocked ones if the server refuses this prompt for what
        it holds. ApiError if there is no answer at all. retry: try again after a failure that passes."""
        self.here.retry, self.here.lost, self.here.wasted = retry, 0, [0, 0]
        try:
            reply = self.request(state, n)
        except ApiError as error:
            error.beside = self.here.lost, *self.here.wasted
            raise
        return replace(reply, beside=(self.here.lost, *self.here.wasted))

    def settle(self, used: tuple[int | None, int | None], useful: bool) -> None:
        """An attempt's cost is known. An answer to a prompt without a token is taken for untold."""
        if used[0] and used[1] is not None:
            self.here.lost -= 1
            if not useful:
                self.here.wasted = [sum(pair) for pair in zip(self.here.wasted, used, strict=True)]

    def failed(self, used: tuple[int | None, int | None]) -> None:
        """An attempt ended with an error: not billed, unless it tells tokens all the same."""
        self.here.lost -= 1
        if None not in used:
            self.here.wasted = [sum(pair) for pair in zip(self.here.wasted, used, strict=True)]

    def request(self, state: State, n: int) -> Reply:
        """`ask`, without what it costs beside the reply."""
        without, most, started = self.without, self.most, time.monotonic()
        for patience in range(PATIENCE, -1, -1):
            asked = min(n, most or n)
            parameters = self.parameters(asked, without)
            try:
                answers, model, used = self.call(state, parameters)
            except ApiError:
                raise
            except Exception as error:  # whatever an SDK makes of a server's bad day
                status, body = self.reply(error)
                if refusals.filtered(status, body):
                    answers, model, used = [Answer(None, "prompt_content_filter")] * n, None, (0, 0)
                else:
                    refused = refusals.refused_parameter(status, body, list(parameters))
                    if not patience or not refused:
                        raise self.explain(error) from None
                    if refused == self.COUNT and asked > 1:
                        most = refusals.most_answers(body, asked)
                    else:
                        without |= {refused}
                    continue
            self.learn(without, most)
            if "temperature" in without:  # of a distribution that nobody knows
                answers = [Answer(answer.text, answer.finish) for answer in answers]
            return Reply(answers[:n], model or self.model, *used, time.monotonic() - started)
        raise AssertionError("the last refusal is told")

    def parameters(self, n: int, without: frozenset[str]) -> dict:
        """Those of a request for n answers, by the protocol's names, but for the refused."""
        raise NotImplementedError

    def call(self, state: State, parameters: dict) -> tuple[list[Answer], str | None, tuple]:
        """One request: answers, the model that gave them, tokens in and out (None if untold). Raises
        what the SDK raises."""
        raise NotImplementedError

    def reply(self, error: Exception) -> tuple[int | None, object]:
        """Status and body of the reply that an error is about; (None, "") if there was none."""
        raise NotImplementedError

    def learn(self, without: frozenset[str], most: int | None) -> None:
        """Keeps what a request that succeeded had to leave out, and tells it once."""
        with self.lock:
            new = without - self.without
            fewer = most is not None and most < (self.most or math.inf)
            self.without |= without
            self.most = most if fewer else self.most
        lost = {
            "logprobs": "the density of its answers is unknown",
            "temperature": "it samples at a temperature of its own, and the density of its answers is unknown",
            "max_tokens": "nothing limits how long, and how dear, an answer is",
            "max_output_tokens": "nothing limits how long, and how dear, an answer is",
            "max_completion_tokens": "max_tokens takes its place",
        }
        name = f"{self.VENDOR}:{self.model}"
        for parameter in sorted(new):
            LOG.warning(
                "%s: the server refuses %s, which is left out: %s", name, parameter,
                lost.get(parameter, "one answer a request"),
            )  # fmt: skip
        if fewer:
            LOG.warning("%s: the server gives at most %d answers a request", name, most)

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

    def stay(self, here: str, there: str) -> None:
        """ApiError if a redirect leads to another server: another scheme, host or port."""
        target = urljoin(here, there)
        old, new = urlsplit(here), urlsplit(target)
        if (old.scheme, old.netloc.lower()) != (new.scheme, new.netloc.lower()):
            where = refusals.one_line(f"{new.scheme}://{apis.shown(new.netloc)}", self.key)
            raise ApiError(
                f"the server redirects to {where}: write that address if it is right", True
            )

    def late(self, until: float) -> None:
        """ApiError once an attempt has taken too long."""
        if time.monotonic() > until:
            raise ApiError(f"the answer was not complete within {self.timeout:g} s", billed=True)


# ---------------------------------------------------------------------------------------------- OpenAI


class OpenAI(Api):
    """Any server that speaks OpenAI's chat completions."""

    VENDOR = "openai"

    def __init__(self, *args):
        super().__init__(*args)
        import openai

        hooks = {"request": [self.begin], "response": [self.watch]}
        http = openai.DefaultHttpxClient(timeout=self.timeout, event_hooks=hooks, max_redirects=3)
        self.client, self.once = (
            openai.OpenAI(
                api_key=self.key, base_url=self.url, max_retries=retries, timeout=self.timeout,
                http_client=http, default_headers={"Authorization": f"Bearer {self.key}"},
            )
            for retries in (RETRIES, 0)
        )  # fmt: skip
        if not (urlsplit(self.url).hostname or "").endswith("api.openai.com"):
            for client in (self.client, self.once):  # these are of the vendor's customer
                client.organization = client.project = None

    def begin(self, request) -> None:
        request.extensions["until"] = time.monotonic() + self.timeout
        request.extensions["trace"] = self.trace

    def trace(self, event: str, info: dict) -> None:
        """A request that has left this machine may be billed, whatever comes back. A proxy's CONNECT is none."""
        if event.endswith("send_request_headers.started") and info["request"].method == b"POST":
            self.here.lost += 1

    def watch(self, response) -> None:
        """Before the body is read."""
        if response.has_redirect_location:
            self.stay(str(response.url), response.headers["location"])
        response.stream = limited(response.stream, response.request.extensions["until"], self.late)
        if response.status_code >= 300:
            response.read()
            body = refusals.parsed(response.text)
            self.failed(usage_of(body.get("usage"))[0] if isinstance(body, dict) else (None, None))
        if response.status_code in (429, 503):
            response.read()
            told = refusals.pause(response.headers, refusals.parsed(response.text))
            if told:  # the SDK reads the header only
                response.headers["retry-after"] = f"{told:g}"

    def parameters(self, n, without):
        length = "max_tokens" if "max_completion_tokens" in without else "max_completion_tokens"
        wanted = {"n": n, "temperature": TEMPERATURE, "logprobs": True, length: self.max_tokens}
        return {name: value for name, value in wanted.items() if name not in without}

    def call(self, state, parameters):
        content = [
            {"type": "text", "text": part} if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(part).decode()}}
            for part in parts_of(state)
        ]  # fmt: skip
        client = self.client if self.here.retry else self.once
        raw = client.chat.completions.with_raw_response.create(
            model=self.model, messages=[{"role": "user", "content": content}], **parameters
        )
        body = refusals.parsed(raw.http_response.text)
        if isinstance(body, str):
            raise ApiError(
                f"the server's answer is no JSON: {refusals.one_line(body, self.key)[:80]}"
            )
        body = body if isinstance(body, dict) else {}
        choices = body.get("choices") if isinstance(body.get("choices"), list) else []
        used, thought = usage_of(body.get("usage"))
        answers = [answer for choice in choices if (answer := openai_answer(choice, thought))]
        self.settle(used, useful=bool(answers))
        if not answers:
            wrong = body.get("error") or next((c["error"] for c in choices if has_error(c)), None)
            if wrong:
                code = wrong.get("code") if isinstance(wrong, dict) else None
                raise Refused(code if isinstance(code, int) and 400 <= code < 600 else 400, wrong)
            raise ApiError("the server's answer is no chat completion with choices", billed=True)
        return answers, text_of(body.get("model")), used

    def reply(self, error):
        if isinstance(error, Refused):
            return error.status, error.body
        response = getattr(error, "response", None)
        if response is None:
            return None, ""
        return response.status_code, refusals.parsed(response.text)


def limited(stream, until: float, late):
    """A response's body whose reading ends in late(until)'s error once that time has come."""
    import httpx2  # the openai SDK's own

    class Limited(httpx2.SyncByteStream):
        def __iter__(self):
            for chunk in stream:
                late(until)
                yield chunk

        def close(self):
            stream.close()

    return Limited()


# ---------------------------------------------------------------------------------------------- Gemini


class Gemini(Api):
    """Google's models by google-generativeai 0.8.6 over REST. It tells no log-probs of its samples."""

    VENDOR, COUNT = "gemini", "candidate_count"

    def __init__(self, *args):
        super().__init__(*args)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its support has ended, we know
            import google.generativeai as genai
        import requests
        from google.api_core import retry
        from google.generativeai.client import get_default_generative_client

        genai.configure(
            api_key=self.key, transport="rest", client_options={"api_endpoint": self.url}
        )
        self.generative = genai.GenerativeModel(self.model)
        # else the endpoint configured last would be everybody's
        client = self.generative._client = get_default_generative_client()
        client.transport._session.hooks["response"].append(self.watch)
        self.last = threading.local()  # .response: of this thread's attempt
        self.retry, passing = retry.Retry, requests.exceptions
        self.passing = (passing.ConnectionError, passing.ChunkedEncodingError, passing.Timeout)

    def watch(self, response, **kwargs) -> None:
        """Before the body is read."""
        until = time.monotonic() - response.elapsed.total_seconds() + self.timeout
        if response.is_redirect:
            self.stay(response.url, response.headers["location"])
        response.raw = LimitedBody(response.raw, until, self.late)
        self.last.response = response

    def begin(self) -> None:
        """An attempt that may be billed, whatever comes back."""
        self.here.lost, self.last.response = self.here.lost + 1, None

    def end(self, error: Exception) -> None:
        """That attempt failed: in most cases nothing is billed."""
        response, chain = self.last.response, str(error)
        if response is not None and response.status_code != 200:
            body = refusals.parsed(response.text)
            told = body.get("usageMetadata") if isinstance(body, dict) else None
            self.failed(gemini_usage(told))
        elif response is None and re.search(UNSENT, f"{type(error).__name__} {chain}"):
            self.here.lost -= 1

    def parameters(self, n, without):
        wanted = {
            "candidate_count": n,
            "temperature": TEMPERATURE,
            "max_output_tokens": self.max_tokens,
        }
        return {name: value for name, value in wanted.items() if name not in without}

    def call(self, state, parameters):
        attempts = itertools.count() if self.here.retry else itertools.repeat(RETRIES)
        self.begin()

        def again(error: Exception) -> bool:  # the SDK bounds time, not attempts
            self.end(error)
            status, body = self.reply(error)
            passing = status in (408, 429, 500, 502, 503, 504) or isinstance(error, self.passing)
            return passing and self.told(body) <= refusals.LONGEST and next(attempts) < RETRIES

        def pause(error: Exception) -> None:  # the SDK's own pause comes on top
            time.sleep(self.told(self.reply(error)[1]))
            self.begin()

        try:
            self.generative.generate_content(
                [
                    part if isinstance(part, str) else {"mime_type": "image/png", "data": part}
                    for part in parts_of(state)
                ],
                generation_config=parameters,
                request_options={
                    "timeout": self.timeout,
                    "retry": self.retry(
                        predicate=again, initial=0.5, maximum=8.0, timeout=None, on_error=pause
                    ),
                },
            )
        except Exception as error:
            answered = self.last.response is not None and self.last.response.status_code == 200
            if not answered or isinstance(error, (ApiError, *self.passing)):
                raise  # else it is an answer that the SDK cannot hold, read below
        body = refusals.parsed(self.last.response.text)
        if isinstance(body, str):
            raise ApiError(
                f"the server's answer is no JSON: {refusals.one_line(body, self.key)[:80]}"
            )
        return self.read(
            body if isinstance(body, dict) else {}, parameters.get("candidate_count", 1)
        )

    def read(self, body: dict, n: int) -> tuple[list[Answer], str | None, tuple]:
        """`call`'s result from a reply of status 200."""
        model, used = text_of(body.get("modelVersion")), gemini_usage(body.get("usageMetadata"))
        candidates = body["candidates"] if isinstance(body.get("candidates"), list) else []
        answers = [gemini_answer(one) for one in candidates if isinstance(one, dict)]
        if not answers:  # the prompt itself is blocked, however often one asks
            feedback = body.get("promptFeedback")
            reason = feedback.get("blockReason") if isinstance(feedback, dict) else None
            if not reason:
                self.settle(used, useful=False)
                why = "the server's answer holds neither candidates nor a reason why"
                raise ApiError(why, billed=True)
            answers = [Answer(None, f"prompt_{finish_of(reason)}")] * n
        self.settle(used, useful=True)
        return answers, model, used

    def told(self, body: object) -> float:
        """The seconds that the last reply asks to wait."""
        headers = self.last.response.headers if self.last.response is not None else {}
        return refusals.pause(headers, body) or 0.0

    def reply(self, error):
        response = self.last.response
        if response is None or response.status_code == 200:
            return None, ""
        return response.status_code, refusals.parsed(response.text)


class LimitedBody:
    """A response's body (urllib3's) whose reading ends in late(until)'s error once that time has come."""

    def __init__(self, raw, until: float, late):
        self.raw, self.until, self.late = raw, until, late

    def __getattr__(self, name: str):
        return getattr(self.raw, name)

    def stream(self, size: int, decode_content: bool):
        """What has arrived, piece by piece; `stream` itself would wait for `size` bytes."""
        try:
            while chunk := self.raw.read1(size, decode_content=decode_content):
                self.late(self.until)
                yield chunk
        except BaseException:
            self.raw.close()
            raise
