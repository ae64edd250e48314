"""Asking OpenAI and Gemini through their SDKs: one request in, one `Reply` with up to n answers out; and what it costs.

    openai:MODEL              chat completions, n answers a request; @http://host:port/v1 behind it for any compatible server
                              (vLLM with an open model, newer Gemini models, others)
    gemini:MODEL              google-generativeai, whose support has ended: models it does not know go by openai:MODEL@URL

The prompt is the policy's, nothing more: one user turn, the images first. Answers are sampled at temperature 1, the model's own
distribution, which is the one that its log-probs are of. Keys come from the environment only, and are cut out of every message.
Retries are the SDK's own, one layer, and wait as long as a Retry-After header says.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import textwrap
import time
import warnings
from urllib.parse import urlsplit

from cache import Answer, Reply
from data import State

TEMPERATURE = 1.0
RETRIES = 2  # of the SDK, after a first attempt
KEYS = {"openai": ("OPENAI_API_KEY",), "gemini": ("GEMINI_API_KEY", "GOOGLE_API_KEY")}
ENDPOINTS = {
    "openai": "https://api.openai.com/v1",
    "gemini": "https://generativelanguage.googleapis.com",
}
BLOCKED = {
    "content_filter",
    "safety",
    "recitation",
    "blocklist",
    "prohibited_content",
    "spii",
    "language",
    "image_safety",
}

# US dollars for a million tokens, input and output, of requests that are not batched. These are the vendors' list prices as third
# parties quoted them in June 2026, an assumption that --price replaces. A thinking model's thoughts are billed as output.
PRICES_OF = "June 2026"
PRICES = {
    "gpt-4o": (2.50, 10.00), "gpt-4o-mini": (0.15, 0.60), "gpt-4.1": (2.00, 8.00), "gpt-4.1-mini": (0.40, 1.60),
    "gemini-2.5-pro": (1.25, 10.00), "gemini-2.5-flash": (0.30, 2.50), "gemini-2.5-flash-lite": (0.10, 0.40),
}  # fmt: skip


class ApiError(Exception):
    """A request that brought nothing. final: asking again will not help (a wrong key, an unknown model)."""

    def __init__(self, message: str, final: bool = False):
        super().__init__(message)
        self.final = final


def split_name(spec: str) -> tuple[str, str, str]:
    """ "openai:MODEL@URL" as (vendor, model, URL). ValueError on anything else, and on a URL with a secret in it."""
    vendor, _, rest = spec.partition(":")
    model, _, url = rest.partition("@http")
    url = f"http{url}".rstrip("/") if url else ENDPOINTS[vendor]
    if not model:
        raise ValueError(
            f"'{spec}' names no model: write {vendor}:MODEL or {vendor}:MODEL@http://host:port"
        )
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"'{url}' is no address of a server: write {vendor}:MODEL@http://host:port"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            f"the address of {vendor}:{model} holds more than host, port and path: keys are read from the environment only"
        )
    return vendor, model, url


def key_of(vendor: str, url: str) -> str:
    """The key from the environment. Servers of one's own may do without. ValueError if it is missing."""
    for variable in KEYS[vendor]:
        if key := os.environ.get(variable, "").strip():
            return key
    if url != ENDPOINTS[vendor]:
        return "no-key"
    raise ValueError(
        f"{vendor} experts need a key in the environment: export {' or '.join(KEYS[vendor])}"
    )


def request_content(name: str, state: State, max_tokens: int) -> dict:
    """All that an answer depends on: the cache's key, but for the index. Images by their pixels: files may be packed differently."""
    images = [
        hashlib.sha256(f"{image.size} {image.mode} ".encode() + image.tobytes()).hexdigest()
        for image in state.images
    ]
    return {
        "expert": name,
        "messages": state.messages(),
        "images": images,
        "temperature": TEMPERATURE,
        "max_tokens": max_tokens,
    }


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def parts_of(state: State):
    """The prompt's parts in order: PNG bytes for an image, text for text."""
    images = iter(state.images)
    for message in state.messages():
        for part in message["content"]:
            yield png(next(images)) if part["type"] == "image" else part["text"]


def price_of(model: str, override: tuple[float, float] | None = None) -> tuple[float, float] | None:
    """USD for a million (input, output) tokens: `override`, or the table's for the model or one dated like "gpt-4o-2024-08-06"; or None."""
    known = [name for name in PRICES if model == name or model.startswith(f"{name}-20")]
    return override or (PRICES[known[0]] if known else None)


def dollars(
    price: tuple[float, float] | None, input_tokens: int | None, output_tokens: int | None
) -> float | None:
    """What a call cost, None if the price or its tokens are unknown."""
    if price is None or input_tokens is None or output_tokens is None:
        return None
    return (price[0] * input_tokens + price[1] * output_tokens) / 1e6


def prompt_tokens(vendor: str, state: State) -> int:
    """An estimate: a token is four letters; images by the vendors' rules for gpt-4o (85 and 170 a tile of 512 pixels, the shorter side
    at most 768) and Gemini (258, for each tile of 768 pixels if a side is above 384)."""
    tokens = sum(math.ceil(len(part) / 4) for part in parts_of(state) if isinstance(part, str))
    for image in state.images:
        if vendor == "gemini":
            tiles = (
                1
                if max(image.size) <= 384
                else math.prod(math.ceil(side / 768) for side in image.size)
            )
            tokens += 258 * tiles
        else:
            scale = min(1, 2048 / max(image.size), 768 / min(image.size))
            tokens += 85 + 170 * math.prod(math.ceil(side * scale / 512) for side in image.size)
    return tokens


class Api:
    """One model behind an SDK. timeout: seconds that one attempt may take. Safe to use from several threads."""

    def __init__(self, model: str, url: str, key: str, max_tokens: int, timeout: float):
        self.model, self.url, self.key, self.max_tokens, self.timeout = (
            model,
            url,
            key,
            max_tokens,
            timeout,
        )
        self.most = None  # answers that the model gives for one request, where it has refused more

    def ask(self, state: State, n: int) -> Reply:
        """Up to n answers for one request. ApiError if there is no answer at all."""
        for patience in range(10, -1, -1):
            asked = min(n, self.most or n)
            started = time.monotonic()
            try:
                answers, model, input_tokens, output_tokens = self.call(state, asked)
                return Reply(
                    answers[:n],
                    model or self.model,
                    input_tokens,
                    output_tokens,
                    time.monotonic() - started,
                )
            except ApiError:
                raise
            except (
                Exception
            ) as error:  # whatever an SDK makes of a server's bad day must not end the training
                if not (patience and self.adapt(error, asked)):
                    raise self.explain(error) from None

    def call(self, state: State, n: int) -> tuple[list[Answer], str, int | None, int | None]:
        """One request: answers, the model that gave them, tokens in and out. Raises what the SDK raises."""
        raise NotImplementedError

    def refusal(self, error: Exception) -> str | None:
        """What the server objects to, if it calls the request itself wrong (400)."""
        raise NotImplementedError

    def final(self, error: Exception) -> bool:
        raise NotImplementedError

    def adapt(self, error: Exception, asked: int) -> bool:
        """Whether another request may do better, after asking for less. A refused request costs nothing."""
        complaint = (self.refusal(error) or "").lower()
        if asked > 1 and (
            "candidate" in complaint
            or "'n'" in complaint
            or "`n`" in complaint
            or "n must be" in complaint
        ):
            self.most = asked // 2
            return True
        return False

    def explain(self, error: Exception) -> ApiError:
        """One line, without the key, however the server may have echoed it."""
        text = str(getattr(error, "message", None) or error) or type(error).__name__
        text = f"{type(error).__name__}: {text}".replace(self.key, "[key]")
        return ApiError(textwrap.shorten(text, 200), self.final(error))


class OpenAI(Api):
    """Any server that speaks OpenAI's chat completions."""

    def __init__(self, *args):
        super().__init__(*args)
        import openai

        self.sdk, self.logprobs = openai, True
        self.client = openai.OpenAI(
            api_key=self.key, base_url=self.url, timeout=self.timeout, max_retries=RETRIES
        )

    def call(self, state, n):
        content = [
            {"type": "text", "text": part} if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(part).decode()}}
            for part in parts_of(state)
        ]  # fmt: skip
        asked = {"logprobs": True} if self.logprobs else {}
        completion = self.client.chat.completions.create(
            model=self.model, messages=[{"role": "user", "content": content}], n=n, temperature=TEMPERATURE,
            max_completion_tokens=self.max_tokens, **asked,
        )  # fmt: skip
        if not getattr(completion, "choices", None):
            raise ApiError("the server's answer is no chat completion with choices")
        answers = []
        for choice in completion.choices:
            logprobs = choice.logprobs.content if choice.logprobs else None
            logp = math.fsum(token.logprob for token in logprobs) if logprobs else None
            finish = choice.finish_reason or "unknown"
            empty = (
                "" if finish == "stop" and not choice.message.refusal else None
            )  # said nothing, or was kept from it
            text = empty if choice.message.content is None else choice.message.content
            answers.append(
                Answer(text, finish, logp if logp is not None and math.isfinite(logp) else None)
            )
        usage = completion.usage
        return (
            answers,
            completion.model,
            usage and usage.prompt_tokens,
            usage and usage.completion_tokens,
        )

    def refusal(self, error):
        return str(error) if isinstance(error, self.sdk.BadRequestError) else None

    def final(self, error):
        kinds = (
            self.sdk.AuthenticationError,
            self.sdk.PermissionDeniedError,
            self.sdk.NotFoundError,
            self.sdk.BadRequestError,
        )
        return isinstance(error, kinds) or getattr(error, "code", None) == "insufficient_quota"

    def adapt(self, error, asked):
        if "logprobs" in (self.refusal(error) or ""):  # this model tells none
            self.logprobs = False
            return True
        return super().adapt(error, asked)


class Gemini(Api):
    """Google's models by google-generativeai 0.8.6 over REST. It tells no log-probs of its samples."""

    def __init__(self, *args):
        super().__init__(*args)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its support has ended, we know
            import google.generativeai as genai
        import requests
        from google.api_core import exceptions, retry
        from google.generativeai.client import get_default_generative_client

        self.errors = exceptions
        genai.configure(
            api_key=self.key, transport="rest", client_options={"api_endpoint": self.url}
        )
        self.generative = genai.GenerativeModel(self.model)
        self.generative._client = (
            get_default_generative_client()
        )  # else the endpoint configured last would be everybody's
        # The SDK's own retry, told to do what OpenAI's does by itself.
        passing = (
            exceptions.TooManyRequests, exceptions.InternalServerError, exceptions.BadGateway, exceptions.ServiceUnavailable,
            exceptions.GatewayTimeout,
            requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError, requests.exceptions.Timeout,
        )  # fmt: skip
        self.retry = retry
        self.passing = retry.if_exception_type(*passing)

    def call(self, state, n):
        attempts = iter(range(RETRIES))

        def again(error: Exception) -> bool:  # it bounds time, not attempts
            return self.passing(error) and next(attempts, None) is not None

        response = self.generative.generate_content(
            [
                part if isinstance(part, str) else {"mime_type": "image/png", "data": part}
                for part in parts_of(state)
            ],
            generation_config={
                "candidate_count": n,
                "max_output_tokens": self.max_tokens,
                "temperature": TEMPERATURE,
            },
            request_options={
                "timeout": self.timeout,
                "retry": self.retry.Retry(
                    predicate=again, initial=0.5, maximum=8.0, timeout=None, on_error=wait_as_told
                ),
            },
        )
        usage = response.usage_metadata
        used = (
            (usage.prompt_token_count, usage.total_token_count - usage.prompt_token_count)
            if usage.total_token_count
            else (None, None)
        )
        model = response.model_version
        if not response.candidates:  # the prompt itself is blocked, however often one asks
            reason = response.prompt_feedback.block_reason
            if not reason:
                raise ApiError("the server's answer holds neither candidates nor a reason why")
            return [Answer(None, f"prompt_{reason.name.lower()}")] * n, model, *used
        answers = []
        for candidate in response.candidates:
            texts, finish = (
                [part.text for part in candidate.content.parts if "text" in part],
                candidate.finish_reason.name.lower(),
            )
            answers.append(Answer("".join(texts) if texts or finish == "stop" else None, finish))
        return answers, model, *used

    def refusal(self, error):
        return str(error) if isinstance(error, self.errors.BadRequest) else None

    def final(self, error):
        return isinstance(
            error,
            (
                self.errors.Unauthorized,
                self.errors.Forbidden,
                self.errors.NotFound,
                self.errors.BadRequest,
            ),
        )


def wait_as_told(error: Exception) -> None:
    """Retry-After in seconds, up to two minutes as OpenAI's SDK has it; the SDK's own pause comes on top."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    told = headers.get("Retry-After", "")
    if told.replace(".", "", 1).isdigit() and float(told) <= 120:
        time.sleep(float(told))
