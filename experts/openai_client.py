"""The client of OpenAI, and of any other server that speaks its chat completions."""

from __future__ import annotations

import base64
import time
from urllib.parse import urlsplit

from data.state import State
from experts import refusals
from experts.apis import TEMPERATURE, parts_of
from experts.clients import RETRIES, Api, ApiError
from experts.replies import has_error, openai_answer, text_of, usage_of


class Refused(Exception):
    """A reply of status 200 that holds an error."""

    def __init__(self, status: int, body: object):
        super().__init__("an error in a reply of status 200")
        self.status, self.body = status, body


class OpenAI(Api):
    """Chat completions by OpenAI's SDK. `once` is the client that does not retry."""

    VENDOR = "openai"

    def __init__(self, *args):
        super().__init__(*args)
        import openai

        hooks = {"request": [self.begin], "response": [self.watch]}
        http = openai.DefaultHttpxClient(timeout=self.timeout, event_hooks=hooks, max_redirects=3)
        settings = dict(
            api_key=self.key,
            base_url=self.url,
            timeout=self.timeout,
            http_client=http,
            default_headers={"Authorization": f"Bearer {self.key}"},
        )
        self.client = openai.OpenAI(max_retries=RETRIES, **settings)
        self.once = openai.OpenAI(max_retries=0, **settings)
        if not (urlsplit(self.url).hostname or "").endswith("api.openai.com"):
            for client in (self.client, self.once):  # names of an account at OpenAI
                client.organization = client.project = None

    def begin(self, request) -> None:
        request.extensions["until"] = time.monotonic() + self.timeout
        request.extensions["trace"] = self.trace

    def trace(self, event: str, info: dict) -> None:
        """Counts the requests that have left this machine, which may be billed whatever comes back.
        A proxy's CONNECT is none."""
        if event.endswith("send_request_headers.started") and info["request"].method == b"POST":
            self.here.lost += 1

    def watch(self, response) -> None:
        """Sees a response before its body is read."""
        if response.has_redirect_location:
            self.stay(str(response.url), response.headers["location"])
        response.stream = limited(response.stream, response.request.extensions["until"], self.late)
        if response.status_code >= 300:
            response.read()
            body = refusals.parsed(response.text)
            self.failed(usage_of(body.get("usage"))[0] if isinstance(body, dict) else (None, None))
        if response.status_code in (429, 503):
            response.read()
            pause = refusals.pause(response.headers, refusals.parsed(response.text))
            if pause:  # the SDK reads the header only
                response.headers["retry-after"] = f"{pause:g}"

    def parameters(self, n, without):
        length = "max_tokens" if "max_completion_tokens" in without else "max_completion_tokens"
        wanted = {"n": n, "temperature": TEMPERATURE, "logprobs": True, length: self.max_tokens}
        return {name: value for name, value in wanted.items() if name not in without}

    def call(self, state, parameters):
        client = self.client if self.here.retry else self.once
        messages = [{"role": "user", "content": content_of(state)}]
        raw = client.chat.completions.with_raw_response.create(
            model=self.model, messages=messages, **parameters
        )
        body = self.parsed(raw.http_response.text)
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


def content_of(state: State) -> list[dict]:
    """The prompt as the parts of a message."""
    content = []
    for part in parts_of(state):
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            url = "data:image/png;base64," + base64.b64encode(part).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
    return content


def limited(stream, until: float, late):
    """A response's body whose reading ends with late(until)'s error once that time has come."""
    import httpx2  # the openai SDK's own

    class Limited(httpx2.SyncByteStream):
        def __iter__(self):
            for chunk in stream:
                late(until)
                yield chunk

        def close(self):
            stream.close()

    return Limited()
