"""refusals.py: what servers say when they give no answer, in all wordings that are known."""

import json
import time
from email.utils import formatdate

import pytest

from experts import refusals
from experts.refusals import (
    cause,
    filtered,
    lasting,
    most_answers,
    one_line,
    parsed,
    pause,
    refused_parameter,
    said,
)

KEY = "sk-proj-Zq81PmXw27LtRb40"
SENT = ["n", "temperature", "logprobs", "max_completion_tokens"]


def wrapped(message: str, **more) -> dict:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, **more}}


@pytest.mark.parametrize(
    "status, body, name",
    [
        # OpenAI: o-series and others
        (
            400,
            wrapped(
                "Unsupported parameter: 'logprobs' is not supported with this model.",
                param="logprobs",
                code="unsupported_parameter",
            ),
            "logprobs",
        ),
        (
            400,
            wrapped("Unsupported value: 'temperature' does not support 1 with this model."),
            "temperature",
        ),
        (
            400,
            wrapped(
                "Unsupported value: 'n' does not support 4 with this model. Only the default "
                "(1) value is supported.",
                param="n",
            ),
            "n",
        ),
        (403, wrapped("You are not allowed to request logprobs from this model"), "logprobs"),
        (
            400,
            wrapped("Unrecognized request argument supplied: max_completion_tokens"),
            "max_completion_tokens",
        ),
        (400, wrapped("This model does not support Log Probabilities: LogProbs"), "logprobs"),
        # llama.cpp, Groq, vLLM, DeepSeek, LiteLLM, xAI, TGI, Ollama
        (400, wrapped("Only one completion choice is allowed"), "n"),
        (
            500,
            {
                "error": {
                    "code": 500,
                    "message": "Only one completion choice is allowed",
                    "type": "server_error",
                }
            },
            "n",
        ),
        (400, wrapped("'n' : number must be at most 1"), "n"),
        (
            400,
            {
                "object": "error",
                "message": "n must be 1 when using greedy sampling.",
                "type": "BadRequestError",
                "code": 400,
            },
            "n",
        ),
        (400, wrapped("Invalid n value (currently only n = 1 is supported)"), "n"),
        (
            400,
            wrapped(
                "Invalid 'n': integer above maximum value. Expected a value <= 4, but got 8 "
                "instead."
            ),
            "n",
        ),
        (
            400,
            wrapped(
                "litellm.UnsupportedParamsError: together_ai does not support parameters: {'n': "
                "2}, for model=x."
            ),
            "n",
        ),
        (
            400,
            {
                "code": "Client specified an invalid argument",
                "error": "Argument not supported on this model: logprobs",
            },
            "logprobs",
        ),
        (
            422,
            {
                "error": "Input validation error: `best_of` != 1 is not supported",
                "error_type": "validation",
            },
            "n",
        ),
        (400, {"error": "logprobs is not supported by the engine"}, "logprobs"),
        (501, {"detail": "n > 1 is not implemented"}, "n"),
        # pydantic: FastAPI, Mistral
        (
            422,
            {
                "detail": [
                    {
                        "type": "extra_forbidden",
                        "loc": ["body", "max_completion_tokens"],
                        "msg": "Extra inputs are not permitted",
                        "input": 64,
                    }
                ]
            },
            "max_completion_tokens",
        ),
        (
            422,
            {
                "object": "error",
                "message": {
                    "detail": [
                        {
                            "type": "less_than_equal",
                            "loc": ["body", "n"],
                            "msg": "Input should be less than or equal to 1",
                            "input": 4,
                        }
                    ]
                },
            },
            "n",
        ),
        (
            422,
            wrapped(
                '[{"type":"extra_forbidden","loc":["body","max_completion_tokens"],"msg":"Extra '
                'inputs are not permitted"}]'
            ),
            "max_completion_tokens",
        ),
        # Google's OpenAI endpoint: a list; OpenRouter: somebody behind it
        (
            [400][0],
            [
                {
                    "error": {
                        "code": 400,
                        "message": "Multiple candidates is not enabled for this model",
                        "status": "INVALID_ARGUMENT",
                    }
                }
            ],
            "n",
        ),
        (
            400,
            {
                "error": {
                    "message": "Provider returned error",
                    "code": 400,
                    "metadata": {"raw": '{"error":{"message":"logprobs are not supported"}}'},
                }
            },
            "logprobs",
        ),
        (400, "Bad Request: unsupported field TEMPERATURE", "temperature"),
        # the server says which, whatever else it mentions
        (400, wrapped("logprobs cannot be used together with n above 1", param="n"), "n"),
    ],
)
def test_a_refused_parameter_is_known_in_many_wordings(status, body, name):
    assert refused_parameter(status, body, SENT) == name


@pytest.mark.parametrize(
    "status, body",
    [
        (401, wrapped("logprobs: wrong key")),
        (404, wrapped("The model 'n' does not exist")),
        (429, wrapped("n requests a minute")),
        (400, wrapped("Invalid image data")),
        (400, wrapped("Line one\\nline two of N/A")),
        (None, ""),
        (500, wrapped("the temperature of GPU 3 rises")),  # no refusal
        (
            403,
            wrapped(
                "You have insufficient permissions for this operation. Missing scopes: "
                "model.request"
            ),
        ),
        # the value of a length limit is the user's to change
        (
            400,
            wrapped(
                "max_tokens is too large: 100000. This model supports at most 16384 completion "
                "tokens.",
                param="max_tokens",
                code="invalid_value",
            ),
        ),
        (
            400,
            wrapped(
                "'max_tokens' or 'max_completion_tokens' is too large: 512. This model's "
                "maximum context length is 1024 tokens"
            ),
        ),
        (
            422,
            {
                "detail": [
                    {
                        "loc": ["body", "messages"],
                        "msg": "Field required",
                        "input": '{"n": 4, "logprobs": true, "temperature": 1}',
                    }
                ]
            },
        ),  # an echo
    ],
)
def test_other_complaints_drop_no_parameter(status, body):
    assert refused_parameter(status, body, SENT) is None


def test_only_what_was_sent_can_be_refused():
    body = wrapped("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'; no logprobs")
    assert refused_parameter(400, body, ["n", "max_tokens", "logprobs"]) == "max_tokens"
    assert refused_parameter(400, body, ["n", "logprobs"]) == "logprobs"
    assert refused_parameter(400, body, ["n"]) is None
    field = {"details": [{"fieldViolations": [{"field": "generation_config.candidate_count"}]}]}
    assert refused_parameter(400, {"error": field}, ["candidate_count", "temperature"]) == (
        "candidate_count"
    )


@pytest.mark.parametrize(
    "message, asked, most",
    [
        ("'n' : number must be at most 1", 8, 1),
        ("candidate_count must be in range [1, 8], not 16", 16, 8),
        ("Expected a value <= 4, but got 8", 8, 4),
        ("n must be between 1 and 5.", 8, 5),
        ("Only one candidate can be specified", 8, 1),
        ("a single completion only", 6, 1),
        ("too many candidates", 8, 4),
        ("too many candidates for gpt-x-1.5", 3, 1),
        ("no more than 128, got 200", 150, 128),
    ],
)
def test_the_bound_of_n_is_the_servers_or_half(message, asked, most):
    assert most_answers({"error": {"message": message, "code": 400}}, asked) == most


@pytest.mark.parametrize(
    "status, body",
    [
        (
            400,
            wrapped(
                "The response was filtered due to the prompt triggering Azure OpenAI's content "
                "management policy.",
                param="prompt",
                code="content_filter",
                innererror={"code": "ResponsibleAIPolicyViolation"},
            ),
        ),
        (
            400,
            {
                "error": {
                    "code": "x",
                    "message": "no",
                    "innererror": {
                        "code": "ResponsibleAIPolicyViolation",
                        "content_filter_result": {"hate": {"filtered": True}},
                    },
                }
            },
        ),
        (
            400,
            wrapped(
                "Invalid prompt: your prompt was flagged as potentially violating our usage "
                "policy.",
                code="invalid_prompt",
            ),
        ),
        (
            400,
            wrapped(
                "Your request was rejected as a result of our safety system.",
                code="content_policy_violation",
            ),
        ),
        (
            400,
            wrapped("Input data may contain inappropriate content.", code="data_inspection_failed"),
        ),
        (400, wrapped("Content Exists Risk")),
        (
            400,
            wrapped(
                "The request was rejected because it was considered high risk",
                type="content_filter",
            ),
        ),
        (
            403,
            {
                "code": "The caller does not have permission to execute the specified operation",
                "error": "Content violates usage guidelines. Team: t, API key ID: k",
            },
        ),
        (
            403,
            {
                "error": {
                    "code": 403,
                    "message": "Your input was flagged",
                    "metadata": {"reasons": ["violence"]},
                }
            },
        ),
        (400, wrapped("litellm.ContentPolicyViolationError: x", type=None, code="400")),
        (400, [{"error": {"message": "blocked: PROHIBITED_CONTENT"}}]),
    ],
)
def test_a_refused_prompt_is_known(status, body):
    assert filtered(status, body)


@pytest.mark.parametrize(
    "status, body",
    [
        (
            401,
            wrapped(
                "Your account was deactivated for violating our usage policies",
                code="account_deactivated",
            ),
        ),
        (403, wrapped("Your account was suspended for violating our usage policies")),
        (400, wrapped("Invalid image data")),
        (403, wrapped("You are not allowed to request logprobs from this model")),
        (500, wrapped("content_filter is down", code="content_filter")),
        (429, wrapped("safety checks are busy")),
        (400, wrapped("API key not valid. Please pass a valid API key.")),
        (None, ""),
    ],
)
def test_other_errors_are_no_refused_prompt(status, body):
    assert not filtered(status, body)


def test_what_lasts_is_told_from_what_passes():
    last = [300, 302, 400, 401, 402, 403, 404, 405, 410, 413, 422]
    assert all(lasting(status, {}) for status in last) and lasting(
        429, wrapped("x", code="insufficient_quota")
    )
    assert not any(lasting(status, {}) for status in (None, 408, 409, 425, 429, 500, 502, 503, 504))


@pytest.mark.parametrize(
    "headers, body, seconds",
    [
        ({}, {}, None),
        ({"Retry-After": "2"}, {}, 2),
        ({"Retry-After": "1.5"}, "", 1.5),
        ({"Retry-After": "soon"}, {}, None),
        ({"Retry-After": "-3"}, {}, None),
        (
            {},
            {
                "error": {
                    "details": [
                        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "8.5s"}
                    ]
                }
            },
            8.5,
        ),
        ({"Retry-After": "2"}, [{"error": {"details": [{"retryDelay": "30s"}]}}], 30),
        ({}, {"error": {"details": [{"retryDelay": {"seconds": 7, "nanos": 500000000}}]}}, 7),
        ({"Retry-After": formatdate(time.time() - 99, usegmt=True)}, {}, None),
        ({}, {"retryDelay": "inf"}, None),
        ({}, {"retryDelay": ["x", None]}, None),
    ],
)
def test_how_long_a_server_asks_to_wait(headers, body, seconds):
    assert pause(headers, body) == seconds


def test_a_date_to_wait_for_is_understood():
    assert 55 < pause({"Retry-After": formatdate(time.time() + 60, usegmt=True)}, {}) <= 60


# ------------------------------------------------------------------ for people


@pytest.mark.parametrize(
    "status, body, text",
    [
        (400, wrapped("no such field"), "error 400: no such field"),
        (400, {"error": "in words"}, "error 400: in words"),
        (400, {"error": True, "message": "why"}, "error 400: why"),
        (
            422,
            {"detail": [{"loc": ["body", "n"], "msg": "too many"}]},
            "error 422: body.n: too many",
        ),
        (400, [{"error": {"message": "in a list"}}], "error 400: in a list"),
        (
            502,
            "<html><head><title>502 Bad Gateway</title></head><body>nginx",
            "error 502: 502 Bad Gateway",
        ),
        (503, "", "error 503: Service Unavailable"),
        (
            400,
            {
                "error": {
                    "message": "Provider returned error",
                    "metadata": {"raw": '{"error": {"message": "inner"}}'},
                }
            },
            "error 400: inner",
        ),
        (418, {"x": [1]}, "error 418: I'm a Teapot"),
        (799, None, "error 799: no reason given"),
    ],
)
def test_the_sentence_for_people_is_found(status, body, text):
    assert said(status, body) == text


@pytest.mark.parametrize(
    "echo",
    [
        f"Incorrect API key provided: {KEY}.",
        "Incorrect API key provided: sk-proj-****************Rb40. You can find it",
        "key sk-p...Rb40 is wrong",
        "key sk-proj-Zq81PmXw… is wrong",
        "Authorization: Bearer sk-proj-Zq81PmXw27LtRb40",
        "GET https://h/v1?key=sk%2Dproj%2DZq81PmXw27LtRb40",
        json.dumps({"headers": {"x-goog-api-key": KEY}}),
        f"in the middle of x{KEY}y",
        "proxy http://me:secret99@p:1",
        "a stranger's sk-abcdefghij0123",
    ],
)
def test_no_part_of_a_key_is_in_a_message(monkeypatch, echo):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    told = one_line(echo)
    for part in (KEY, "Zq81", "Rb40", "27Lt", "secret99", "abcdefghij"):
        assert part not in told, told


@pytest.mark.parametrize(
    "echo", ["gsk_...L9xQ", "gsk_********L9xQ", "gsk_aB3…", "xxxxxxxxL9xQ", "B3dE5fG7h"]
)
def test_no_part_of_a_key_of_another_form_is_in_a_message(echo):
    told = one_line(f"the key {echo} is wrong", "gsk_aB3dE5fG7hL9xQ")
    assert told == "the key [key] is wrong"


def test_messages_that_hold_no_key_stay_as_they_are(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("EXPERT_API_KEY", "x")  # one that hides nothing
    text = "error 400: skip it... the model 'sk' says x, extra ****"
    assert one_line(text) == text


def test_a_message_is_one_printable_line_of_bounded_length():
    told = one_line("a\x1b[31mred\x07\r\nb\u202ec\ud83d " + "y" * 900)
    assert told.isprintable() and len(told) == 200 and told.startswith("a [31mred b c")
    assert told.endswith("y...")


def test_the_innermost_cause_is_told_once():
    try:
        try:
            try:
                raise ConnectionRefusedError(111, "Connection refused")
            except OSError as error:
                raise RuntimeError("pool failed: [Errno 111] Connection refused") from error
        except RuntimeError as error:
            raise ValueError("Connection error.") from error
    except ValueError as error:
        assert cause(error, "http://127.0.0.1:1/v1", 3.0) == "connection refused"


def test_hostile_bodies_are_read_without_an_error():
    deep = parsed("[" * 100_000 + "]" * 100_000)
    nested = value = []
    for _ in range(50_000):
        value.append([])
        value = value[0]
    for body in (
        deep,
        nested,
        None,
        3,
        float("nan"),
        {"error": {"error": {"error": []}}},
        "{" * 99,
    ):
        for status in (None, 200, 400, 429, 500):
            assert isinstance(said(status, body), str) and not filtered(status, body)
            assert refused_parameter(status, body, SENT) is None and lasting(status, body) in (0, 1)
            assert pause({}, body) is None
    assert refusals.leaves(nested) == []
