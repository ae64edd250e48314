"""The experts of a run: made by name, tried out, and, if they are APIs, asked ahead of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from blocks.scripted import ACCURACY, ScriptedExpert, is_scripted
from data.state import State
from experts import apis
from experts.api_expert import LOG, VENDORS, ApiExpert
from experts.apis import parse_price
from experts.cache import Cache
from sampling import Expert, Group
from training import settings
from training.console import UserError
from training.distributed import World
from training.metrics import POLICY

AHEAD = 2  # steps that requests to APIs run ahead of the training
# Always in the metrics.
COUNTS = ("requests", "cache_hits", "failures", "states_without", "blocked")


def expert_specs(names: str, offline: bool = False) -> list[str]:
    """The experts of a comma-separated list, such as "careful,openai:gpt-4o"; none of "none".

    Loads nothing. ValueError on an unknown or repeated name and, unless offline, on a model that
    its vendor no longer serves and on a missing key.
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
        elif is_scripted(spec):
            ScriptedExpert(spec)  # ValueError
            sources.append(spec.partition(":")[0])
        else:
            known = f"{', '.join(ACCURACY)}, openai:MODEL, gemini:MODEL, or none"
            raise ValueError(f"no expert '{spec}'; there are {known}")
    if len(set(sources)) < len(sources):
        raise ValueError(f"an expert is named twice in '{names}'")
    return specs


def check(config, estimator: str = "uncorrected") -> list[str]:
    """The experts that the settings name (`ExpertSettings`). UserError for what cannot work."""
    try:
        specs = expert_specs(config.experts, config.offline)
        parse_price(config.price)
    except ValueError as error:
        raise UserError(str(error)) from None
    silent = [name for name in specs if name.startswith("gemini:")]
    if estimator != "uncorrected" and silent:
        raise UserError(
            f"--estimator {estimator} needs every expert's density, and {silent[0]} reports none: "
            "use --estimator uncorrected"
        )
    counts = ("num_samples", "expert_tokens", "expert_requests", "expert_failures")
    settings.must(config, 1, *counts)
    settings.above_zero(config, "expert_deadline")
    if config.data != "blocks" and (scripted := [name for name in specs if is_scripted(name)]):
        raise UserError(
            f"the scripted expert '{scripted[0]}' knows the blocks world only: "
            f"with --data {config.data} choose other --experts"
        )
    return specs


def make_experts(names: str, settings=None, densities: bool = False) -> list[Expert]:
    """The experts of such a list.

    settings: the run's (`ExpertSettings`), for APIs. densities: see `ApiExpert`.
    """
    specs = expert_specs(names, getattr(settings, "offline", False))
    cache = None
    if any(not is_scripted(spec) for spec in specs):
        cache = Cache(settings.cache, read_only=settings.offline)
    experts = []
    for spec in specs:
        scripted = is_scripted(spec)
        experts.append(
            ScriptedExpert(spec) if scripted else ApiExpert(spec, cache, settings, densities)
        )
    return experts


def try_out(experts: list[Expert], state: Callable[[], State], n: int) -> None:
    """Asks each API about a state that training needs anyway, before anything is loaded.

    UserError for what only the user can repair: an API that does not answer or, if densities are
    needed, reports none.
    """
    for expert in experts:
        if not isinstance(expert, ApiExpert):
            continue
        first = state()
        expert.introduce(first, n)
        needed, expert.densities = expert.densities, False
        (samples,) = expert.sample([first], n)
        expert.densities = needed
        for name in ("cache_hits", "states_without"):  # the first step will count this state
            expert.counts.pop(name, None)
        if needed and samples and all(sample.logp is None for sample in samples):
            raise UserError(
                f"--estimator is and snis need every expert's density, and {expert.name} "
                "reports no log-probs: use --estimator uncorrected"
            )
        if needed:
            LOG.warning(
                "%s: only the density of its own samples is known; q(a) is taken as "
                "alpha_0 pi_old(a) + alpha_j pi_j(a) for its own, and without its term for other "
                "actions",
                expert.name,
            )


def drop_where_solved(groups: list[Group]) -> None:
    """Drops the experts' actions of each rewarded group in which the policy has a right one.

    Right: an accuracy of 1. Such a group has the policy's N candidates alone, in the advantages
    too. ReLIFT (arXiv 2506.07527) and HPT (arXiv 2509.04419) so choose the questions on which they
    imitate; their loss there is SFT's.
    """
    for group in groups:
        own = sum(action.source == POLICY for action in group.actions)  # the policy's come first
        if max(group.accuracy[:own]) == 1:
            del group.actions[own:], group.format[own:], group.accuracy[own:]


class Experts:
    """The experts of a training run; iterate over it for the single ones.

    states_of(step): this process's states of a step. An API is asked for those of the next AHEAD
    steps while the policy works on the current one. joining: the number of first steps in which
    they take part; 0: all.
    """

    def __init__(
        self, settings, densities: bool, states_of: Callable[[int], list[State]], joining: int = 0
    ):
        """Tries each API out, on the first state of the run. UserError as `try_out`."""
        self.n, self.states_of, self.joining = settings.num_samples, states_of, joining
        self.members = make_experts(settings.experts, settings, densities)
        self.apis = [expert for expert in self.members if isinstance(expert, ApiExpert)]
        self.next = 0  # the first step that no API was asked for
        try_out(self.members, lambda: states_of(0)[0], self.n)

    def __iter__(self) -> Iterator[Expert]:
        return iter(self.members)

    def at(self, step: int) -> list[Expert]:
        """Those that take part in a step: all, or none after the `joining` ones."""
        return [] if 0 < self.joining <= step else self.members

    def prefetch(self, step: int, steps: int) -> None:
        """Starts the requests of this step and the AHEAD next ones, of `steps` in all."""
        if not self.apis:
            return
        last = min(step + AHEAD + 1, steps, self.joining or steps)
        for coming in range(max(step, self.next), last):
            states = self.states_of(coming)
            for expert in self.apis:
                expert.prefetch(states, self.n)
            self.next = coming + 1

    def metrics(self, world: World) -> dict[str, float]:
        """What the APIs did since the last call, in all processes. Nothing without APIs.

        api/latency: mean seconds of a request. api/cost: USD, where prices are known.
        """
        if not self.apis:
            return {}
        counts = world.gather([expert.metrics() for expert in self.apis])
        total = {}
        for name in sorted(set(COUNTS).union(*counts)):
            total[name] = sum(count.get(name, 0) for count in counts)
        latency = total.pop("seconds", 0.0) / max(1, total["requests"])
        return {f"api/{name}": value for name, value in total.items()} | {"api/latency": latency}
