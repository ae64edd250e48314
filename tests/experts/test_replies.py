"""experts/replies.py: replies of status 200, whose fields may be missing or of any type."""

import copy
import json
import math
import random

import pytest
from fake_api import chat, content

from experts.cache import Answer
from experts.replies import (
    density,
    gemini_answer,
    gemini_usage,
    joined,
    number_of,
    openai_answer,
    usage_of,
)

TEXT = "<think> two é </think> <answer> 3 </answer>"


def choice(
    text: object = TEXT, finish: object = "stop", logprobs: object = None, **message
) -> dict:
    told = {"role": "assistant", "content": text, "refusal": None, **message}
    return {"index": 0, "finish_reason": finish, "message": told, "logprobs": logprobs}


def tokens(*pieces: str, logprob: object = -0.5, **more) -> dict:
    return {"content": [{"token": piece, "logprob": logprob, **more} for piece in pieces]}


def said(*arguments, thought: bool = False, **settings) -> Answer:
    return openai_answer(choice(*arguments, **settings), thought)


@pytest.mark.parametrize(
    "parts, text, thoughts",
    [
        (TEXT, TEXT, False),
        (None, None, False),
        ([], None, False),
        ({"type": "text", "text": "a"}, "a", False),
        (7, None, False),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": " b"}], "a b", False),
        (["a", {"type": "output_text", "text": "b"}], "ab", False),
        (
            [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                {"type": "text", "text": "a"},
            ],
            "a",
            True,
        ),
        (
            [{"type": "image_url", "image_url": {}}, None, 3, {"type": "text", "text": None}],
            None,
            False,
        ),
        ([{"text": "t", "thought": True}, {"text": "a"}], "a", True),
        ("\ud83d a \ude00", "\ufffd a \ufffd", False),
        (json.loads('"\\ud83d\\ude00"'), "\U0001f600", False),
    ],
)
def test_an_answers_text_from_any_form(parts, text, thoughts):
    assert joined(parts) == (text, thoughts)


def test_no_text_is_an_empty_answer_only_if_the_model_stopped_by_itself():
    assert said(None).text == "" == said("").text
    for answer in (
        said(None, "length"),
        said(None, "content_filter"),
        said(None, refusal="I won't"),
    ):
        assert answer.text is None
    for finish in (None, 3, [], {}):
        assert said("a", finish) == Answer("a", "unknown")
    assert said("a", "STOP\n").finish == "stop"


def test_a_choice_without_a_message_or_with_an_error_is_no_answer():
    for wrong in (None, 3, "x", [], {}, {"message": None}, {"message": "a"}, {"message": []}):
        assert openai_answer(wrong, False) is None
    assert said("half of", "error") is None
    assert openai_answer({**choice(), "error": {"code": 502}}, False) is None


# ------------------------------------------------------------------ densities


SPELT = tokens("<think>", " two", " é", " </think>", " <answer>", " 3", " </answer>")


def test_the_density_is_the_sum_over_the_tokens_of_the_text():
    assert said(logprobs=SPELT).logp == pytest.approx(-3.5)
    ended = {"content": [*SPELT["content"], {"token": "<|im_end|>", "logprob": -1.0}]}
    assert said(logprobs=ended).logp == pytest.approx(-4.5)  # an end token belongs to the action
    words = tokens(*TEXT.split())  # some servers' tokens have no spaces
    assert said(logprobs=words).logp == pytest.approx(-3.5)


def test_letters_that_tokens_share_are_put_together_by_their_bytes():
    first, second = "é".encode()[:1], "é".encode()[1:]
    shared = [
        {"token": "\\xc3", "logprob": -1.0, "bytes": list(first)},
        {"token": "\\xa9", "logprob": -2.0, "bytes": list(second)},
    ]
    assert density({"content": shared}, "é") == -3.0
    without = tokens("a", "\ufffd", "\ufffd", "b")
    assert density(without, "aéb") == -2.0 and density(without, "aéc") is None


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        [],
        {},
        {"content": None},
        {"content": []},
        {"content": "x"},
        {"content": [None]},
        {"content": [3]},
        {"tokens": ["a"], "token_logprobs": [-1]},
        tokens(TEXT, logprob=None),
        tokens(TEXT, logprob="-1"),
        tokens(TEXT, logprob=True),
        tokens(TEXT, logprob=math.nan),
        tokens(TEXT, logprob=-math.inf),
        tokens(TEXT, logprob=2.0),
        tokens(TEXT, logprob=-9999.0),
        tokens("a", "b"),
        tokens(TEXT, " and more"),
        tokens("<think> I see </think>", TEXT),
        {
            "content": [
                *SPELT["content"][:3],
                {**SPELT["content"][3], "logprob": None},
                *SPELT["content"][4:],
            ]
        },
        {"content": SPELT["content"][:-1]},
        {"content": [{"token": None, "logprob": -1.0}]},
        {"content": [{"token": TEXT, "logprob": -1.0, "bytes": [1, 2]}]},
        tokens(TEXT, "</answer>", "<|im_end|>"),
    ],
)
def test_log_probs_that_are_not_those_of_the_text_are_no_density(logprobs):
    assert said(logprobs=logprobs) == Answer(TEXT, "stop", None)


@pytest.mark.parametrize(
    "apart",
    [
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"reasoning_details": [{"text": "hm"}]},
        {"thinking": "hm"},
    ],
)
def test_an_answer_whose_thoughts_are_kept_apart_has_no_density(apart):
    assert said(logprobs=SPELT, **apart).logp is None
    assert said(logprobs=SPELT, **dict.fromkeys(apart)).logp == pytest.approx(-3.5)
    assert said(logprobs=SPELT, thought=True).logp is None
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": TEXT}]
    assert said(parts, logprobs=SPELT) == Answer(TEXT, "stop", None)


# ------------------------------------------------------------------ tokens


@pytest.mark.parametrize(
    "value, number",
    [
        (3, 3),
        (0, 0),
        (3.0, 3),
        (3.5, None),
        (-1, None),
        (10**30, None),
        (1e30, None),
        (math.nan, None),
        (math.inf, None),
        ("3", None),
        (None, None),
        (True, None),
        ([3], None),
    ],
)
def test_a_number_of_tokens_is_a_number_or_unknown(value, number):
    assert number_of(value) == number


@pytest.mark.parametrize(
    "usage, told",
    [
        ({"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}, (9, 4)),
        ({"prompt_tokens": 9, "completion_tokens": 4}, (9, 4)),
        (
            {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 50},
            (9, 41),
        ),  # thoughts in the total only
        ({"prompt_tokens": 9, "total_tokens": 13}, (9, 4)),
        ({"prompt_tokens": 9, "completion_tokens": "4"}, (9, None)),
        ({"prompt_tokens": -1, "completion_tokens": 4}, (None, 4)),
        ("13 tokens", (None, None)),
        (None, (None, None)),
        ([], (None, None)),
        ({}, (None, None)),
        ({"prompt_tokens": 10**30, "completion_tokens": 10**30}, (None, None)),
    ],
)
def test_usage_of_any_form(usage, told):
    assert usage_of(usage) == (told, False)


def test_thoughts_in_the_usage_are_noticed_and_geminis_are_paid_for():
    assert usage_of({"completion_tokens_details": {"reasoning_tokens": 7}}) == ((None, None), True)
    assert usage_of({"completion_tokens_details": {"reasoning_tokens": 0}})[1] is False
    assert usage_of({"completion_tokens_details": "x"})[1] is False
    assert gemini_usage({"promptTokenCount": 9, "totalTokenCount": 30}) == (9, 21)
    for odd in (
        None,
        "x",
        {},
        {"promptTokenCount": 9},
        {"promptTokenCount": 9, "totalTokenCount": 4},
    ):
        assert gemini_usage(odd) == (None, None)
    assert gemini_usage({"promptTokenCount": "9", "totalTokenCount": 10**30}) == (None, None)


def test_geminis_candidates_of_any_form():
    parts = {"parts": [{"text": "hm", "thought": True}, {"text": "a"}, {"text": " b"}]}
    assert gemini_answer({"content": parts, "finishReason": "STOP"}) == Answer("a b", "stop")
    assert gemini_answer({"finishReason": "STOP"}) == Answer("", "stop")
    assert gemini_answer({"content": {}, "finishReason": "IMAGE_SAFETY"}) == Answer(
        None, "image_safety"
    )
    assert gemini_answer({"content": "x", "finishReason": 3}) == Answer(None, "unknown")


JUNK = [
    None,
    3,
    -1.5,
    True,
    "x",
    "\ud83d",
    "",
    [],
    {},
    [None],
    {"text": 3},
    10**30,
    math.nan,
    [[["x"]]],
]


def mutated(body: dict, rng: random.Random) -> dict:
    """With one to three of its values, anywhere, replaced or removed."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        node = body
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = rng.choice(keys) if keys else None
            if key is None or not isinstance(node[key], (dict, list)) or rng.random() < 0.3:
                break
            node = node[key]
        if key is None:
            continue
        if isinstance(node, dict) and rng.random() < 0.2:
            del node[key]
        else:
            node[key] = rng.choice(JUNK)
    return body


def test_no_reply_raises_and_every_answer_can_be_stored():
    rng, good = random.Random(0), chat([TEXT, TEXT])
    for _ in range(3000):
        body = mutated(good, rng)
        choices = body.get("choices") if isinstance(body.get("choices"), list) else []
        used, thought = usage_of(body.get("usage"))
        candidates = mutated(content([TEXT]), rng).get("candidates")
        candidates = candidates if isinstance(candidates, list) else []
        made = [openai_answer(one, thought) for one in choices]
        made += [gemini_answer(one) for one in candidates if isinstance(one, dict)]
        for answer in filter(None, made):
            assert answer.text is None or answer.text.encode() is not None
            assert answer.finish.encode() and (answer.logp is None or math.isfinite(answer.logp))
        assert all(count is None or 0 <= count <= 10**9 for count in used)
