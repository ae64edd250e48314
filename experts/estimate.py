"""What collecting would cost: requests, tokens, dollars and hours, by what the cache has so far."""

from experts import apis
from experts.cache import Cache, request_id
from experts.settings import CollectSettings

# Assumed where the cache has no calls of this expert to learn from.
ANSWER_TOKENS = 200  # of a thought and its answer
CALL_SECONDS = 3.0  # the upper end of the paper's "1-3 seconds per query"


def show(spec: str, states: list, config: CollectSettings, cache: Cache | None) -> None:
    """Prints the estimate of one expert: for N answers to each state, less those in the cache."""
    vendor, model, url = apis.split_name(spec)
    identity, n, at_a_time = f"{vendor}:{model}@{url}", config.num_samples, config.expert_requests
    requests = answers = inputs = singly = 0
    for state in states:
        request = request_id(apis.request_content(identity, state, config.expert_tokens))
        if missing := n - (len(cache.get(request, n)) if cache else 0):
            tokens = apis.prompt_tokens(vendor, state)
            requests, answers = requests + 1, answers + missing
            inputs, singly = inputs + tokens, singly + missing * tokens
    per_answer, seconds, source = learnt(identity, cache)
    outputs = answers * per_answer

    asked = f"{requests} requests for {answers} answers"
    print(f"{spec}: {len(states)} states, {len(states) - requests} of them in the cache: {asked}")
    tokens = f"{inputs / 1e6:.3f} million in, {outputs / 1e6:.3f} million out"
    print(f"  tokens   {tokens} ({per_answer:.0f} an answer, {source})")
    price = apis.price_of(model, apis.parse_price(config.price))
    if price is None:
        print(
            "  dollars  unknown: no price of this model in the table; give one with --price in,out"
        )
    else:
        of = "--price" if config.price else f"prices of {apis.PRICES_OF}"
        most = apis.dollars(price, inputs, answers * config.expert_tokens)
        longest = f"{most:.2f} if every answer were {config.expert_tokens} tokens long"
        alone = f"{apis.dollars(price, singly, outputs):.2f} asking for each answer alone"
        print(f"  dollars  {apis.dollars(price, inputs, outputs):.2f} ({of}); {longest}; {alone}")
    speed = f"{at_a_time} requests at a time, {seconds:.1f} s each, {source}"
    print(f"  hours    {requests * seconds / at_a_time / 3600:.2f} with {speed}")


def learnt(identity: str, cache: Cache | None) -> tuple[float, float, str]:
    """Tokens of an answer, seconds of a request, and where they are from."""
    calls = [call for call in cache.calls() if call["expert"] == identity] if cache else []
    if not calls:
        return ANSWER_TOKENS, CALL_SECONDS, "assumed"
    bought = sum(entry["expert"] == identity for entry in cache.entries())
    known = [call["output_tokens"] for call in calls if call["output_tokens"] is not None]
    per_answer = sum(known) / bought if known and bought else ANSWER_TOKENS
    return per_answer, sum(call["seconds"] for call in calls) / len(calls), "as in the cache"
