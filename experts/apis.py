"""Models behind APIs by name: addresses, keys, prompts, prices, and how long they are served.

    openai:MODEL              OpenAI's chat completions; with @http://host:port/v1 behind it any
                              server that speaks them (vLLM, newer Gemini models, others)
    gemini:MODEL              Google's own protocol

The prompt is the policy's, nothing more: one user turn, the images first. Answers are sampled at
temperature 1, the model's own distribution, to which its log-probs belong. Keys come from the
environment only, and each goes to its vendor only. clients.py asks.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from datetime import date
from urllib.parse import urlsplit

from data.state import State

TEMPERATURE = 1.0
ENDPOINTS = {
    "openai": "https://api.openai.com/v1",
    "gemini": "https://generativelanguage.googleapis.com",
}
KEYS = {  # by the host that a key is for, whatever the protocol
    "api.openai.com": ("OPENAI_API_KEY",),
    "generativelanguage.googleapis.com": ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
}
OTHERS_KEY = "EXPERT_API_KEY"  # for every other server; it may be missing
NO_KEY = "no-key"  # sent where there is none: the SDKs want one
VERSION = r"(-(20\d\d(-?\d\d){0,2}|\d{3,8}|preview|exp|latest)(-\d\d)*)*"  # behind a model's name

# US dollars for a million tokens, input and output, of requests that are not batched: the vendors'
# list prices as third parties quoted them, an assumption that --price replaces. A thinking model's
# thoughts are billed as output.
PRICES_OF = "June and November 2026"
PRICES = {
    "gpt-4o": (2.50, 10.00),
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4.1": (2.00, 8.00),
    "gpt-4.1-mini": (0.40, 1.60),
    "gemini-2.5-pro": (1.25, 10.00),
    "gemini-2.5-flash": (0.30, 2.50),
    "gemini-2.5-flash-lite": (0.10, 0.40),
    "gemini-3.8-flash": (1.50, 7.50),  # half of it until the end of 2026
}

# The day from which a vendor no longer serves a model, and the model that it names in its place
# (the vendors' pages on deprecations, November 2026; the day of gemini-1.5 is from memory). Google
# answers for gemini-2.5 with the other model, without a word.
RETIRED = {
    "gpt-4o": ("2027-01-14", "gpt-6-luna"),
    "gpt-4o-mini": ("2027-01-14", "gpt-6-luna"),
    "gpt-4.1": ("2027-01-14", "gpt-6-luna"),
    "gpt-4.1-mini": ("2027-01-14", "gpt-6-luna"),
    "gpt-5": ("2026-12-11", "gpt-5.6-sol"),
    "o3": ("2026-12-11", "gpt-5.6-sol"),
    "gpt-4": ("2026-10-23", "gpt-5.6-sol"),
    "gpt-4-turbo": ("2026-10-23", "gpt-5.6-sol"),
    "o1": ("2026-10-23", "gpt-5.6-sol"),
    "gpt-4o-2024-05-13": ("2026-10-23", "gpt-5.6-sol"),
    "o4-mini": ("2026-10-23", "gpt-5.6-terra"),
    "gemini-2.5-pro": ("2026-12-01", "gemini-3.8-flash"),
    "gemini-2.5-flash": ("2026-12-01", "gemini-3.5-flash-lite"),
    "gemini-2.0-flash": ("2026-06-01", "gemini-3.5-flash"),
    "gemini-1.5-pro": ("2025-09-29", "gemini-3.8-flash"),
    "gemini-1.5-flash": ("2025-09-29", "gemini-3.5-flash-lite"),
    "gemini-1.5-flash-8b": ("2025-09-29", "gemini-3.5-flash-lite"),
}


# ------------------------------------------------------------------ names


def split_name(spec: str) -> tuple[str, str, str]:
    """ "openai:MODEL@URL" as (vendor, model, URL). ValueError on anything else.

    It must hold no secret, such as a user and password in the URL.
    A model's own name may hold an @, as in "@cf/org/model" and "model@001", but nothing behind it
    that may be meant as an address.
    """
    vendor, _, rest = spec.partition(":")
    found = re.fullmatch(r"(.*?)@([a-z][a-z0-9+.-]*:/.*)", rest, re.IGNORECASE | re.DOTALL)
    model, url = found.groups() if found else (rest, ENDPOINTS[vendor])
    form = f"write {vendor}:MODEL or {vendor}:MODEL@http://host:port"
    if not model:
        raise ValueError(f"'{spec}' names no model: {form}")
    if not found and (at := model.find("@", 1)) > 0 and like_an_address(model[at + 1 :]):
        raise ValueError(f"'{shown(model[at + 1 :])}' is no address of a server: {form}")
    if "@" in url or "?" in url or "#" in url:
        raise ValueError(
            f"the address of {vendor}:{model} holds more than host, port and path: "
            "keys are read from the environment only"
        )
    if not is_address(url):
        raise ValueError(f"'{url}' is no address of a server: {form}")
    return vendor, model, url.rstrip("/")


def like_an_address(text: str) -> bool:
    """Whether a text behind an @ is meant as a server: "h:80", "//h", "127.0.0.1", "a.org"."""
    host = r"localhost|\d+\.\d+\.\d+\.\d+|[\w.-]+\.[a-z]{2,}"
    return not text or ":" in text or "/" in text or bool(re.fullmatch(host, text, re.IGNORECASE))


def is_address(url: str) -> bool:
    """Whether it is http(s)://host, with a port and a path if need be."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number or too large; half a pair of brackets
        return False
    return bool(good) and re.fullmatch(r"[!-~]+", url) is not None


def shown(text: str) -> str:
    """What may be printed of a wrong address: no user, no password, nothing behind ? or #."""
    return re.split(r"[?#]", text.rpartition("@")[2])[0]


def key_of(vendor: str, url: str) -> str:
    """The key for the server at this address, from the environment. Your own servers need none.

    A vendor's key goes to that vendor's host only, and never without TLS. ValueError if it is
    missing or cannot be a key.
    """
    parts = urlsplit(url)
    own = [names for host, names in KEYS.items() if f".{parts.hostname}".endswith(f".{host}")]
    variables = own[0] if own and parts.scheme == "https" else (OTHERS_KEY,)
    for variable in variables:
        if key := os.environ.get(variable, "").strip():
            if re.fullmatch(r"[!-~]+", key):
                return key
            raise ValueError(
                f"{variable} holds a character that no key has, such as a space, a line break or a "
                "letter beyond ASCII"
            )
    if variables == (OTHERS_KEY,):
        return NO_KEY
    names = " or ".join(variables)
    raise ValueError(f"{vendor} experts need a key in the environment: export {names}")


def same_model(asked: str, answered: str) -> bool:
    """Whether a server's name of a model may be that of the model asked for: "gpt-4o-2024-08-06"
    for "gpt-4o", and the other way round. A path or vendor before it ("models/", "openai/") and
    ":free" behind it say nothing."""
    asked, answered = bare(asked), bare(answered)
    return is_version(asked, answered) or answered == re.sub(f"{VERSION}$", "", asked)


def bare(model: str) -> str:
    return model.strip().rstrip("/").lower().rpartition("/")[2].removesuffix(":free")


def is_version(model: str, name: str) -> bool:
    """Whether a name is the model's, or that of one of its versions."""
    return re.fullmatch(re.escape(model) + VERSION, name) is not None


def retirement(model: str, url: str, today: date | None = None) -> tuple[bool, str] | None:
    """Whether the vendor at this address serves the model no longer, and a line that says so or
    when it will be. None for models without a known end, and for other servers."""
    known = [name for name in RETIRED if is_version(name, bare(model))]
    if not known or urlsplit(url).hostname not in KEYS:
        return None
    day, instead = RETIRED[max(known, key=len)]
    gone = (today or date.today()).isoformat() >= day
    when = f"not served since {day}" if gone else f"served until {day}"
    return gone, f"{model} is {when}; its vendor names {instead} in its place"


def request_content(name: str, state: State, max_tokens: int) -> dict:
    """Everything that an answer depends on: the cache's key, without the index. Images by their
    pixels, since files may be packed differently."""
    images = []
    for image in state.images:
        pixels = f"{image.size} {image.mode} ".encode() + image.tobytes()
        images.append(hashlib.sha256(pixels).hexdigest())
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
    """USD for a million (input, output) tokens: `override`, or the table's, also for a dated name
    such as "gpt-4o-2024-08-06"; or None."""
    known = [name for name in PRICES if model == name or model.startswith(f"{name}-20")]
    return override or (PRICES[known[0]] if known else None)


def dollars(
    price: tuple[float, float] | None, input_tokens: int | None, output_tokens: int | None
) -> float | None:
    """The cost of a call, None if the price or its tokens are unknown."""
    if price is None or input_tokens is None or output_tokens is None:
        return None
    return (price[0] * input_tokens + price[1] * output_tokens) / 1e6


def prompt_tokens(vendor: str, state: State) -> int:
    """An estimate: a token is four letters. Images by the vendors' rules for gpt-4o (85, and 170 a
    tile of 512 pixels, the shorter side at most 768) and for Gemini (258, or for each tile of 768
    pixels if a side is above 384)."""
    tokens = sum(math.ceil(len(part) / 4) for part in parts_of(state) if isinstance(part, str))
    for image in state.images:
        if vendor == "gemini":
            tiles = math.prod(math.ceil(side / 768) for side in image.size)
            tokens += 258 * (tiles if max(image.size) > 384 else 1)
        else:
            scale = min(1, 2048 / max(image.size), 768 / min(image.size))
            tokens += 85 + 170 * math.prod(math.ceil(side * scale / 512) for side in image.size)
    return tokens


def parse_price(text: str) -> tuple[float, float] | None:
    """ "in,out" as two numbers, "" as None. ValueError on anything else."""
    try:
        price = tuple(float(part) for part in text.split(",")) if text else None
    except ValueError:
        price = ()
    if price is not None and (len(price) != 2 or not all(0 <= part < math.inf for part in price)):
        form = "USD for a million tokens, input and output, such as 2.5,10"
        raise ValueError(f"--price is {form}; not '{text}'")
    return price
