"""TODO experts.roster"""

from __future__ import annotations

from collections.abc import Callable

from blocks.scripted import ACCURACY, ScriptedExpert
from data.state import State
from experts import apis
from experts.api_expert import LOG, VENDORS, ApiExpert
from experts.apis import parse_price
from experts.cache import Cache
from sampling import Expert
from training import settings
from training.console import UserError


def expert_specs(names: str, offline: bool = False) -> list[str]:
    """The experts of a comma-separated list, such as "careful,openai:gpt-4o"; "none" gives none. Loads nothing.

    ValueError on an unknown or repeated name and, unless offline, on a model that its vendor no longer
    serves and on a key that is missing.
    """
    if names == "none":
        return []
    specs, sources = [name.strip() for name in names.split(",")], []
    for spec in specs:
        if spec.partition(":")[0] in VENDORS and ":" in spec:
            vendor, model, url = apis.split_name(spec)
            sources.append(f"{vendor}:{model}")
            if not offline:
                apis.key_of(vendor, url)
                if (ending := apis.retirement(model, url)) and ending[0]:
                    raise ValueError(f"{vendor}:{ending[1]}")
        elif spec in ACCURACY:
            sources.append(spec)
        else:
            raise ValueError(
                f"no expert '{spec}'; there are {', '.join(ACCURACY)}, openai:MODEL, gemini:MODEL, or none"
            )
    if len(set(sources)) < len(sources):
        raise ValueError(f"an expert is named twice in '{names}'")
    return specs


def check(config) -> list[str]:
    """The experts of the settings (`ExpertSettings`, `training.settings.Settings`). UserError for
    what cannot work."""
    try:
        specs = expert_specs(config.experts, config.offline)
        parse_price(config.price)
    except ValueError as error:
        raise UserError(str(error)) from None
    counts = ("num_samples", "expert_tokens", "expert_requests", "expert_failures")
    settings.must(config, 1, *counts)
    settings.above_zero(config, "expert_deadline")
    if config.data != "blocks" and (scripted := [name for name in specs if name in ACCURACY]):
        raise UserError(
            f"the scripted expert '{scripted[0]}' knows the blocks world only: with --data {config.data} choose other --experts, or none"
        )
    return specs


def make_experts(names: str, settings=None, densities: bool = False) -> list[Expert]:
    """The experts of such a list. settings: the run's (`ekipl.Config`), for API experts. densities: see `ApiExpert`."""
    specs = expert_specs(names, getattr(settings, "offline", False))
    cache = (
        Cache(settings.cache, read_only=settings.offline)
        if any(spec not in ACCURACY for spec in specs)
        else None
    )
    return [
        ScriptedExpert(spec) if spec in ACCURACY else ApiExpert(spec, cache, settings, densities)
        for spec in specs
    ]


def try_out(experts: list[Expert], state: Callable[[], State], n: int) -> None:
    """Asks each API for a state that training needs anyway, before anything is loaded. UserError for what only the user can mend:
    an API that does not answer, and, where the estimator needs them, densities that it does not tell."""
    for expert in experts:
        if isinstance(expert, ApiExpert):
            first = state()
            expert.introduce(first, n)
            needed, expert.densities = expert.densities, False
            (samples,) = expert.sample([first], n)
            expert.densities = needed
            for name in ("cache_hits", "states_without"):  # the first step will count this state
                expert.counts.pop(name, None)
            if needed and samples and all(sample.logp is None for sample in samples):
                raise UserError(
                    f"--estimator is and snis need every expert's density, and {expert.name} tells no log-probs: use --estimator uncorrected"
                )
            if needed:
                LOG.warning(
                    "%s: only the density of its own samples is known; q(a) is taken as alpha_0 pi_old(a) + alpha_j pi_j(a) for its own, "
                    "and without its term for other actions", expert.name,
                )  # fmt: skip


def run_ahead(experts: list[Expert], states: Callable[[], list[State]], n: int) -> None:
    """Requests to APIs for the states of a coming step begin, while the policy works on this one."""
    if api := [expert for expert in experts if isinstance(expert, ApiExpert)]:
        coming = states()
        for expert in api:
            expert.prefetch(coming, n)


def api_counts(experts: list[Expert]) -> dict[str, float] | None:
    """What the API experts of this process did since the last time, by `ApiExpert.metrics`' names; None without API experts."""
    if not (counts := [expert.metrics() for expert in experts if isinstance(expert, ApiExpert)]):
        return None
    return {name: sum(one.get(name, 0) for one in counts) for name in sorted(set().union(*counts))}


def api_metrics(shares: list[dict | None]) -> dict[str, float]:
    """A step's metrics from the counts of all processes. api/latency: mean seconds of a request. api/cost: USD, where prices are known."""
    shares = [share for share in shares if share is not None]
    if not shares:
        return {}
    names = {"requests", "cache_hits", "failures", "states_without", "blocked"}.union(*shares)
    total = {name: sum(share.get(name, 0) for share in shares) for name in sorted(names)}
    seconds = total.pop("seconds", 0.0)
    return {f"api/{name}": value for name, value in total.items()} | {
        "api/latency": seconds / max(1, total["requests"])
    }
