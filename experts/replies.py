"""Answers and token counts from replies whose fields may be missing or of any type.

A reply of status 200 has been paid for, so every usable part of it is used. An answer has a density
only if the log-probs are those of its text, all of it and nothing else.
"""

from __future__ import annotations

import math
import re

from experts import refusals
from experts.cache import Answer

THOUGHTS = ("thinking", "reasoning", "redacted_thinking")  # kinds of parts that are no answer
SENTINEL = -9999.0  # OpenAI's log-prob of a token outside its list, not of this sample
CUT = ("length", "max_tokens")  # finish reasons of an answer that the limit ended
BLOCKED = {  # finish reasons of answers that the API withheld, whole or in part
    *("content_filter", "safety", "recitation", "blocklist", "prohibited_content", "spii"),
    *("language", "image_safety"),
}


# ------------------------------------------------------------------ OpenAI


def has_error(choice: object) -> bool:
    return isinstance(choice, dict) and bool(choice.get("error"))


def openai_answer(choice: object, thought: bool) -> Answer | None:
    """A choice as an answer; None if it is none. thought: the usage counts tokens of reasoning."""
    message = choice.get("message") if isinstance(choice, dict) else None
    finish = finish_of(choice.get("finish_reason")) if isinstance(choice, dict) else "error"
    if not isinstance(message, dict) or has_error(choice) or finish == "error":
        return None
    text, apart = joined(message.get("content"))
    for kind in THOUGHTS:
        apart |= any(message.get(f"{kind}{end}") for end in ("", "_content", "_details"))
    if text is None and finish == "stop" and not message.get("refusal"):
        text = ""  # an empty answer, not a withheld one
    logp = None if text is None or apart or thought else density(choice.get("logprobs"), text)
    return Answer(text, finish, logp)


def joined(content: object) -> tuple[str | None, bool]:
    """A message's text, None if it has none, and whether there are thoughts beside it."""
    if isinstance(content, str):
        return whole(content), False
    parts = content if isinstance(content, list) else [content]
    texts, thoughts = [], False
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict):
            if part.get("type") in THOUGHTS or part.get("thought") is True:
                thoughts = True
            elif isinstance(part.get("text"), str):
                texts.append(part["text"])
    return (whole("".join(texts)) if texts else None), thoughts


def density(logprobs: object, text: str) -> float | None:
    """The sum of the tokens' log-probs, in nats; None unless each token has one and together they
    spell the text, spaces aside (servers differ in them), with or without an end token."""
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(tokens, list) or not tokens:
        return None
    values, pieces = [], []
    for token in tokens:
        if not isinstance(token, dict):
            return None
        value, piece = token.get("logprob"), spelled(token)
        if piece is None or isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        if not SENTINEL < value <= 1e-3:  # NaN is neither; rounding may pass 0 by a little
            return None
        values.append(value)
        pieces.append(piece)
    ended = re.fullmatch(rb"\s*(<[^<>\s]*>|\[[A-Z_/]+\])?\s*", pieces[-1])
    if same_text(b"".join(pieces), text) or (ended and same_text(b"".join(pieces[:-1]), text)):
        return math.fsum(values)
    return None


def spelled(token: dict) -> bytes | None:
    """A token's bytes: the reply's, since tokens may share a letter, or those of its text."""
    data, text = token.get("bytes"), token.get("token")
    if isinstance(data, list) and all(isinstance(b, int) and 0 <= b < 256 for b in data):
        return bytes(data)
    return text.encode("utf-8", "replace") if isinstance(text, str) else None


def same_text(tokens: bytes, text: str) -> bool:
    """Whether tokens spell a text, spaces aside; by its ASCII alone if a letter was cut apart."""
    spelt = "".join(tokens.decode("utf-8", "replace").split())
    text = "".join(text.split())
    if "\ufffd" in spelt:
        spelt, text = re.sub(r"[^!-~]", "", spelt), re.sub(r"[^!-~]", "", text)
    return spelt == text


def usage_of(usage: object) -> tuple[tuple[int | None, int | None], bool]:
    """Tokens in and out, None where unknown or no such number, and whether some were thoughts.

    Some servers count thoughts in the total only; they are paid for as output all the same."""
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("completion_tokens_details")
    thoughts = number_of(details.get("reasoning_tokens")) if isinstance(details, dict) else None
    given, made = number_of(usage.get("prompt_tokens")), number_of(usage.get("completion_tokens"))
    total = number_of(usage.get("total_tokens"))
    if given is not None and total is not None and total >= given:
        made = max(made or 0, total - given)
    return (given, made), bool(thoughts)


# ------------------------------------------------------------------ Gemini


def gemini_answer(candidate: dict) -> Answer:
    """A candidate as an answer."""
    content = candidate.get("content")
    text, _ = joined(content.get("parts") if isinstance(content, dict) else None)
    finish = finish_of(candidate.get("finishReason"))
    return Answer("" if text is None and finish == "stop" else text, finish)


def gemini_usage(usage: object) -> tuple[int | None, int | None]:
    """Tokens in and out; thoughts are part of the total, and paid for as output."""
    usage = usage if isinstance(usage, dict) else {}
    given, total = number_of(usage.get("promptTokenCount")), number_of(usage.get("totalTokenCount"))
    if given is None or total is None or total < given:
        return None, None
    return given, total - given


# ------------------------------------------------------------------ values of any type


def whole(text: str) -> str:
    """Without halves of surrogate pairs, which no file can hold."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def text_of(value: object) -> str | None:
    """A name in a reply."""
    return refusals.one_line(value) if isinstance(value, str) and value.strip() else None


def finish_of(value: object) -> str:
    return (text_of(value) or "unknown").lower()[:40]


def number_of(value: object) -> int | None:
    """A count of tokens; None if it is no such number."""
    whole_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return int(value) if whole_number and 0 <= value <= 10**9 and value == int(value) else None
