"""What collecting would cost: requests, tokens, dollars and hours, by what the cache has so far."""

from __future__ import annotations

from dataclasses import dataclass

from experts import apis
from experts.apis import parse_price
from experts.cache import Cache, request_id
from experts.settings import CollectSettings

# Assumed where the cache has no calls of this expert to learn from.
ANSWER_TOKENS = 200  # of a thought and its answer
CALL_SECONDS = 3.0  # the upper end of the paper's "1-3 seconds per query"


@dataclass
class Estimate:
    """What one expert's answers would cost. Dollars are None if no price is known.

    most: dollars if every answer were as long as the limit. singly: dollars if each answer were
    asked for alone. learnt: whether tokens and seconds are those of calls in the cache.
    """

    requests: int
    answers: int
    input_tokens: int
    tokens_per_answer: float
    seconds_per_request: float
    learnt: bool
    dollars: float | None
    most: float | None
    singly: float | None

    @property
    def output_tokens(self) -> float:
        return self.answers * self.tokens_per_answer

    def hours(self, at_a_time: int) -> float:
        return self.requests * self.seconds_per_request / at_a_time / 3600


def estimate(
    spec: str, states: list, n: int, config: CollectSettings, cache: Cache | None
) -> Estimate:
    """For n answers of one expert to each state, less those in the cache."""
    vendor, model, url = apis.split_name(spec)
    identity = f"{vendor}:{model}@{url}"
    calls = [call for call in cache.calls() if call["expert"] == identity] if cache else []
    bought = sum(entry["expert"] == identity for entry in cache.entries()) if cache else 0
    known = [call["output_tokens"] for call in calls if call["output_tokens"] is not None]
    per_answer = sum(known) / bought if known and bought else ANSWER_TOKENS
    seconds = sum(call["seconds"] for call in calls) / len(calls) if calls else CALL_SECONDS

    requests = answers = inputs = singly = 0
    for state in states:
        request = request_id(apis.request_content(identity, state, config.expert_tokens))
        if missing := n - (len(cache.get(request, n)) if cache else 0):
            tokens = apis.prompt_tokens(vendor, state)
            requests += 1
            answers += missing
            inputs += tokens
            singly += missing * tokens

    price = apis.price_of(model, parse_price(config.price))
    return Estimate(
        requests=requests,
        answers=answers,
        input_tokens=inputs,
        tokens_per_answer=per_answer,
        seconds_per_request=seconds,
        learnt=bool(calls),
        dollars=apis.dollars(price, inputs, answers * per_answer),
        most=apis.dollars(price, inputs, answers * config.expert_tokens),
        singly=apis.dollars(price, singly, answers * per_answer),
    )


def show(spec: str, states: list, config: CollectSettings, cache: Cache | None) -> None:
    """Prints the estimate of one expert."""
    e = estimate(spec, states, config.num_samples, config, cache)
    source = "as in the cache" if e.learnt else "assumed"
    asked = f"{e.requests} requests for {e.answers} answers"
    print(f"{spec}: {len(states)} states, {len(states) - e.requests} of them in the cache: {asked}")
    tokens_in, tokens_out = e.input_tokens / 1e6, e.output_tokens / 1e6
    length = f"{e.tokens_per_answer:.0f} an answer, {source}"
    print(f"  tokens   {tokens_in:.3f} million in, {tokens_out:.3f} million out ({length})")
    if e.dollars is None:
        print(
            "  dollars  unknown: no price of this model in the table; give one with --price in,out"
        )
    else:
        of = "--price" if config.price else f"prices of {apis.PRICES_OF}"
        longest = f"{e.most:.2f} if every answer were {config.expert_tokens} tokens long"
        alone = f"{e.singly:.2f} asking for each answer alone"
        print(f"  dollars  {e.dollars:.2f} ({of}); {longest}; {alone}")
    at_a_time = config.expert_requests
    speed = f"{at_a_time} requests at a time, {e.seconds_per_request:.1f} s each, {source}"
    print(f"  hours    {e.hours(at_a_time):.2f} with {speed}")
