"""Settings of the experts: which they are, how many actions each gives, and how an API is asked."""

from dataclasses import dataclass

from training.settings import Settings, option


@dataclass
class ExpertSettings:
    """The experts of a run. Each field is a flag of the command line (training/settings.py)."""

    experts: str = option(
        "careful,quick",
        "experts, comma-separated: careful, quick (scripted; careful:0.3 is right in 30 %); "
        "openai:MODEL, gemini:MODEL, openai:MODEL@http://host:port/v1 (keys from OPENAI_API_KEY "
        "and GEMINI_API_KEY, for other servers EXPERT_API_KEY); 'none' is plain GRPO",
    )
    num_samples: int = option(8, "N: actions drawn per state from the policy and from each expert")
    # experts behind an API
    cache: str = option(
        "experts.sqlite",
        "file that keeps every answer of an API, for all runs; nothing in it is paid for again",
    )
    offline: bool = option(
        False, "answers of APIs come from the cache alone; a missing one ends the run"
    )
    expert_tokens: int = option(512, "length limit of an API's answer, in its own tokens")
    expert_requests: int = option(8, "requests to an API at a time, in each process")
    expert_deadline: float = option(
        60.0,
        "seconds a step waits for an API; a state without answer goes on with the policy's actions "
        "alone",
    )
    expert_failures: int = option(
        5, "failures in a row after which an API is left alone for two minutes"
    )
    price: str = option(
        "",
        "USD for a million tokens of the API experts, input,output; default: the table in "
        "experts/apis.py",
    )


@dataclass
class MixtureSettings(ExpertSettings):
    """The experts of RL, whose actions join the policy's (Eq 6)."""

    expert_steps: int = option(
        0,
        "an extension, not the paper's: experts join in the first so many steps only, then a group "
        "has the policy's actions alone; 0: in all steps",
    )


@dataclass
class CollectSettings(Settings, MixtureSettings):
    """The flags of ekipl.py less those of the objective: they decide which states are asked, and
    which experts."""
