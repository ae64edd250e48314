"""The client of Google's models: google-generativeai 0.8.6 over REST, whose support has ended.

The SDK builds and sends the request. The answer is read from the JSON, since newer models answer
what the SDK cannot hold. It gives no log-probs of its samples.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
import warnings

from experts import refusals
from experts.apis import TEMPERATURE, parts_of
from experts.cache import Answer
from experts.clients import RETRIES, Api, ApiError, Tokens
from experts.replies import finish_of, gemini_answer, gemini_usage, text_of

UNSENT = "NewConnection|NameResolution|ConnectTimeout|SSLError|ProxyError"  # no request went out


class Gemini(Api):
    """One of Google's models. last.response: of the latest attempt of this thread."""

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
        self.last = threading.local()
        self.retry, passing = retry.Retry, requests.exceptions
        self.passing = (passing.ConnectionError, passing.ChunkedEncodingError, passing.Timeout)

    def watch(self, response, **kwargs) -> None:
        """Sees a response before its body is read."""
        until = time.monotonic() - response.elapsed.total_seconds() + self.timeout
        if response.is_redirect:
            self.stay(response.url, response.headers["location"])
        response.raw = LimitedBody(response.raw, until, self.late)
        self.last.response = response

    def begin(self) -> None:
        """An attempt begins, which may be billed whatever comes back."""
        self.here.lost, self.last.response = self.here.lost + 1, None

    def end(self, error: Exception) -> None:
        """That attempt failed: in most cases nothing is billed."""
        response = self.last.response
        if response is not None and response.status_code != 200:
            body = refusals.parsed(response.text)
            usage = body.get("usageMetadata") if isinstance(body, dict) else None
            self.failed(gemini_usage(usage))
        elif response is None and re.search(UNSENT, f"{type(error).__name__} {error}"):
            self.here.lost -= 1

    def parameters(self, n, without):
        wanted = {"candidate_count": n, "temperature": TEMPERATURE}
        wanted["max_output_tokens"] = self.max_tokens
        return {name: value for name, value in wanted.items() if name not in without}

    def call(self, state, parameters):
        contents = []
        for part in parts_of(state):
            image = {"mime_type": "image/png", "data": part}
            contents.append(part if isinstance(part, str) else image)
        options = {"timeout": self.timeout, "retry": self.retries()}
        self.begin()
        try:
            self.generative.generate_content(
                contents, generation_config=parameters, request_options=options
            )
        except Exception as error:
            answered = self.last.response is not None and self.last.response.status_code == 200
            if not answered or isinstance(error, (ApiError, *self.passing)):
                raise  # else it is an answer that the SDK cannot hold, read below
        body = self.parsed(self.last.response.text)
        return self.read(body, parameters.get("candidate_count", 1))

    def retries(self):
        """When the SDK tries again, and after how long. (It bounds time itself, not attempts.)"""
        attempts = itertools.count() if self.here.retry else itertools.repeat(RETRIES)

        def again(error: Exception) -> bool:
            self.end(error)
            status, body = self.reply(error)
            passing = status in (408, 429, 500, 502, 503, 504) or isinstance(error, self.passing)
            return passing and self.pause(body) <= refusals.LONGEST and next(attempts) < RETRIES

        def pause(error: Exception) -> None:  # the SDK's own pause comes on top
            time.sleep(self.pause(self.reply(error)[1]))
            self.begin()

        return self.retry(predicate=again, initial=0.5, maximum=8.0, timeout=None, on_error=pause)

    def read(self, body: dict, n: int) -> tuple[list[Answer], str | None, Tokens]:
        """The result of `call`, from a reply of status 200."""
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

    def pause(self, body: object) -> float:
        """The seconds that the last reply asks to wait."""
        headers = self.last.response.headers if self.last.response is not None else {}
        return refusals.pause(headers, body) or 0.0

    def reply(self, error):
        response = self.last.response
        if response is None or response.status_code == 200:
            return None, ""
        return response.status_code, refusals.parsed(response.text)


class LimitedBody:
    """A response's body (urllib3's) whose reading ends with the error of late(until) once that time
    has come."""

    def __init__(self, raw, until: float, late):
        self.raw, self.until, self.late = raw, until, late

    def __getattr__(self, name: str):
        return getattr(self.raw, name)

    def stream(self, size: int, decode_content: bool):
        """What has arrived, piece by piece; urllib3's `stream` would wait for `size` bytes."""
        try:
            while chunk := self.raw.read1(size, decode_content=decode_content):
                self.late(self.until)
                yield chunk
        except BaseException:
            self.raw.close()
            raise
