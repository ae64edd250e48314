"""What a server says when it gives no answer, for people and for the program.

For people: one line of printable characters, without a key, that names the innermost cause.
For the program: which parameter is refused, whether the prompt is, how long to wait. Servers word
all this differently, so names are looked for wherever a reply may hold them.
"""

from __future__ import annotations

import email.utils
import http.client
import itertools
import json
import math
import os
import re
import socket
import ssl
import time
import urllib.request
from urllib.parse import quote, urlsplit

from experts import apis

REFUSING = {400, 403, 422, 500, 501}  # statuses that servers give a parameter they do not take
PASSING = {408, 409, 425, 429}  # of 4xx: asking again may help
LONGEST = 120.0  # seconds: no retry after a longer pause, as in OpenAI's SDK
SENTENCES = ("error", "message", "detail", "msg", "errors", "error_description")
ECHOES = {"input", "request", "messages", "body", "url"}  # under these servers repeat a request

# How servers name what they refuse. n stands alone: not in "\n", "N/A", "in".
COUNT = (
    r"(?<![\w\\/])n(?![\w/])|candidate|\bchoices?\b|\b(one|single|multiple) (chat )?"
    r"(completion|response|output|generation|sequence|sample)|best_of|num_return|num_(choices|gen)"
)
LENGTH = r"max_?(completion_?|output_?|new_?)?tokens"
WORDINGS = {
    "n": COUNT,
    "candidate_count": COUNT,
    "logprobs": r"log[_ -]?prob",
    "temperature": r"\btemperature\b",
    "max_completion_tokens": LENGTH,
    "max_tokens": LENGTH,
    "max_output_tokens": LENGTH,
}
UNKNOWN = r"un(supported|known|recogni[sz]ed|expected)|not (supported|permitted|allowed)|extra"
VALUE = r"too (large|long|high|big|small|low)|exceed|maximum|minimum|at (most|least)|[<>]|context"
REFUSAL = rf"{UNKNOWN}|support|allow|permit|must|only|implement|at most|too many|\binvalid\b"

# How servers refuse a prompt for its content, as a code and in words.
FILTER_CODES = (
    r"content_?filter|content_?policy|invalid_prompt|responsible_?ai|moderation|prohibited_content"
    r"|data_?inspection|safety|sensitive|guardrail"
)
FILTER_WORDS = (
    r"content[ _-]?filter|content[ _-]?(management )?polic|responsibleai|usage (polic|guideline)"
    r"|flagged|moderation|inappropriate content|content exists risk|high risk|safety"
    r"|prohibited[ _]content|guardrail|policy violation"
)
ACCOUNT = r"\baccount|deactivated|suspended|terminated|organi[sz]ation|quota|billing"


# ------------------------------------------------------------------ reading a reply


def parsed(text: str) -> object:
    """A reply's body as JSON, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def leaves(body: object, *names: str) -> list[str]:
    """The texts and numbers in a reply, in order: under any key of `names`; without names, all that
    the server says of its own."""
    found, waiting = [], [(body, not names)]
    while waiting:
        value, wanted = waiting.pop()
        if isinstance(value, dict):
            own = {key: item for key, item in value.items() if key not in ECHOES}
            waiting += [(item, wanted or key in names) for key, item in reversed(own.items())]
        elif isinstance(value, list):
            waiting += [(item, wanted) for item in reversed(value)]
        elif wanted and isinstance(value, (str, int, float)):
            found.append(str(value))
    return found


def said(status: int | None, body: object) -> str:
    """The sentence of a reply that people are to read."""
    place = ""
    for _ in range(9):
        if isinstance(body, list):
            body = body[0] if body else ""
        elif isinstance(body, dict):
            if isinstance(body.get("loc"), list):
                place = ".".join(map(str, body["loc"])) + ": "
            within = body["metadata"] if isinstance(body.get("metadata"), dict) else {}
            texts = [within.get("raw"), *(body.get(key) for key in SENTENCES)]
            texts = [text for text in texts if text and isinstance(text, (str, list, dict))]
            body = texts[0] if texts else ""
        elif isinstance(body, str) and body[:1] in ("{", "[") and parsed(body) != body:
            body = parsed(body)  # the server passes on another server's reply
    text = body if isinstance(body, str) else ""
    title = re.search(r"<title>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
    text = title[1] if title else re.sub(r"<[a-z/!][^>]*>", " ", text, flags=re.IGNORECASE)
    text = (place + text).strip() or http.client.responses.get(status, "no reason given")
    return f"error {status}: {text}" if status else text


def refused_parameter(status: int | None, body: object, sent: list[str]) -> str | None:
    """Which of the parameters that were sent the server does not take; None if it complains of
    something else, or of the value of a length limit, which is the user's to change."""
    text = " ".join(leaves(body))
    if status not in REFUSING or (status >= 500 and not re.search(REFUSAL, text, re.IGNORECASE)):
        return None
    places = leaves(body, "param", "loc", "field")
    for where in (" ".join(f"{place} " for place in places), text):
        hits = {name: re.search(WORDINGS[name], where, re.IGNORECASE) for name in sent}
        named = [name for name in sent if hits[name]]
        if named:
            first = min(named, key=lambda name: hits[name].start())
            value = re.search(VALUE, text, re.IGNORECASE)
            if WORDINGS[first] == LENGTH and value and not re.search(UNKNOWN, text, re.IGNORECASE):
                return None
            return first
    return None


def most_answers(body: object, asked: int) -> int:
    """How many answers to ask for after `asked` were too many: the server's number, else half."""
    text = " ".join(leaves(body))
    numbers = [int(digits) for digits in re.findall(r"(?<![\w.])\d{1,4}(?!\.?\w)", text)]
    if re.search(r"\b(one|single)\b", text, re.IGNORECASE):
        numbers.append(1)
    return max([number for number in numbers if 1 <= number < asked], default=asked // 2)


def filtered(status: int | None, body: object) -> bool:
    """Whether the prompt itself is refused for its content, however often one asks."""
    if status not in (400, 403, 422, 451):
        return False
    codes = " ".join(leaves(body, "code", "type", "reason", "reasons", "blockReason"))
    text = " ".join(leaves(body))
    if re.search(FILTER_CODES, codes, re.IGNORECASE):
        return True
    words = re.search(FILTER_WORDS, text, re.IGNORECASE)
    return words is not None and not re.search(ACCOUNT, text, re.IGNORECASE)


def lasting(status: int | None, body: object) -> bool:
    """Whether asking again will not help: a wrong key, an unknown model, an empty account."""
    if status is None:
        return False
    empty = "insufficient_quota" in leaves(body, "code", "type")
    return empty or (300 <= status < 500 and status not in PASSING)


def pause(headers, body: object) -> float | None:
    """The seconds that a server asks to wait: Retry-After, as a number or a date, and the RetryInfo
    of Google's replies ("8.5s"); the longer of both. None if it does not say."""
    pauses = []
    after = str(headers.get("Retry-After", "")).strip()
    if re.fullmatch(r"\d+(\.\d+)?", after):
        pauses.append(float(after))
    elif after:
        try:
            pauses.append(email.utils.parsedate_to_datetime(after).timestamp() - time.time())
        except (ValueError, OverflowError, OSError):
            pass
    for delay in leaves(body, "retryDelay"):
        if number := re.fullmatch(r"(\d{1,5}(\.\d+)?)s?", delay):  # nanoseconds are longer
            pauses.append(float(number[1]))
    pauses = [seconds for seconds in pauses if 0 < seconds < math.inf]
    return max(pauses, default=None)


# ------------------------------------------------------------------ for people


def one_line(text: str, key: str = "") -> str:
    """Printable characters only, on one line, at most 200 of them, and no key."""
    text = redacted(str(text), key)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 200 else text[:197] + "..."


def redacted(text: str, key: str = "") -> str:
    """Without keys: the given one and the environment's, whole, encoded, or as the parts that
    servers show of them ("sk-...abcd"); and without anything else that looks like one."""
    names = [*itertools.chain(*apis.KEYS.values()), apis.OTHERS_KEY]
    keys = {key, *(os.environ.get(name, "").strip() for name in names)} - {apis.NO_KEY}
    for secret in sorted(keys, key=len, reverse=True):
        if len(secret) < 6:
            break
        for form in (secret, quote(secret, safe=""), quote(secret)):
            text = re.sub(re.escape(form), "[key]", text, flags=re.IGNORECASE)
        text = re.sub(r"[^\s'\"`<>()\[\]{},;=]+", lambda word: masked(word[0], secret), text)
    text = re.sub(r"\b(sk-|AIza)[\w*.…-]{6,}", "[key]", text)
    return re.sub(r"(?<=//)[^/\s@]+@", "[user]@", text)  # of a proxy, say


def masked(word: str, secret: str) -> str:
    """ "[key]" for a word that holds a part of the key, else the word."""
    pieces = {secret[i : i + 8] for i in range(len(secret) - 7)}
    if any(piece in word for piece in pieces):
        return "[key]"
    head, *rest = re.split(r"[*•]{2,}|\.{2,}|…|[xX]{4,}", word)
    if not rest:
        return word
    tail = rest[-1].rstrip(".:!?")
    begins = len(head) >= 2 and secret.startswith(head)
    ends = len(tail) >= 2 and secret.endswith(tail)
    return "[key]" if begins or ends else word


def cause(error: BaseException, url: str, seconds: float) -> str:
    """Why no reply came: the innermost cause. url: the server's. seconds: an attempt's limit."""
    chain = [error]
    while len(chain) < 20 and (inner := chain[-1].__cause__ or chain[-1].__context__):
        chain.append(inner)
    names = " ".join(type(link).__name__ for link in chain)
    via = " by way of the proxy in the environment" if proxied(url) else ""
    host = urlsplit(url).hostname
    if "SOCKS" in (text := " ".join(map(str, chain))) or "proxy URL" in text:
        why = str(chain[-1])
        if re.search("socksio|dependencies", why):
            why = "a SOCKS proxy needs the package socksio (openai) or pysocks (gemini)"
        return f"the proxy in the environment (ALL_PROXY and the like) cannot be used: {why}"
    for link in reversed(chain):
        if isinstance(link, ConnectionRefusedError):
            return f"connection refused{via}"
        if isinstance(link, socket.gaierror):
            return f"unknown host {host}{via}"
        if isinstance(link, ssl.SSLError):
            why = getattr(link, "verify_message", "") or link.reason or str(link)
            plain = " (it may speak http only)" if "WRONG_VERSION" in why else ""
            return f"TLS: {why}{plain}{via}"
    if "Timeout" in names:
        return f"no answer within {seconds:g} s{via}"
    if re.search("Protocol|IncompleteRead|Reset|Aborted|BrokenPipe|Disconnected|Chunked", names):
        return f"the connection broke off{via}"
    last = next((link for link in reversed(chain) if str(link)), error)
    return f"{type(last).__name__}: {last}{via}"


def proxied(url: str) -> bool:
    """Whether the environment names a proxy for this address."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    return bool(proxies.get(parts.scheme) or proxies.get("all")) and not (
        urllib.request.proxy_bypass(parts.hostname or "")
    )
