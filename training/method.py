"""Settings of the method: the total group, the selection and the objective.

Imports no torch, so that a command line is read at once (`console.early`).
"""

from dataclasses import dataclass

from training import settings
from training.console import UserError
from training.settings import option


@dataclass
class MethodSettings:
    """Vision-EKIPL's own settings, as flags of ekipl.py; `num_samples`, N, is with the experts'."""

    # the total group (Eq 4-6) and the selection
    experts_when: str = option(
        "always",
        "whose groups the experts' actions join: all, or those where none of the policy's N is "
        "right (as in ReLIFT and HPT). Experts are asked all the same, so it saves no cost",
        ("always", "unsolved"),
    )
    group_size: int = option(8, "G: actions kept per state; at most N x (experts + 1)")
    selection: str = option("top", "the G to keep: the best, or any (a control)", ("top", "random"))
    ties: str = option(
        "auto",
        "which of equal rewards to keep first: the policy's (Fig. 4), then the experts' in the "
        "order of their names; the policy's, then any expert's; or any. auto: policy_first, but "
        "random with is and snis, whose weights need a fair sample of the best",
        ("auto", "policy_first", "any_expert", "random"),
    )
    temperature: float = option(1.0, "of sampling and of scoring: softmax(logits / temperature)")
    # the objective (Eq 1-3, A.2)
    advantage: str = option(
        "candidates",
        "whose mean and std Eq 1 takes: of all M candidates, or of the G selected (then a group of "
        "perfect actions teaches nothing)",
        ("candidates", "selected"),
    )
    advantage_std: bool = option(True, "divide by the std in Eq 1; Dr. GRPO does not")
    estimator: str = option(
        "uncorrected",
        "A.7: uncorrected (A) is the paper's; is (B) weights each action by pi_old/q, which takes "
        "away most of what experts teach; snis (C) normalises the weights, with a bias where few "
        "kept actions are the policy's",
        ("uncorrected", "is", "snis"),
    )
    expert_loss: str = option(
        "ekipl",
        "what an expert's token gives: ekipl, clip and KL as any other (Eq 3); or without both "
        "luffy, A p / (p + 0.1); rl-plus, A (1 - p)^0.5 2 p / (p_old + (p_old + 1) / 2)",
        ("ekipl", "luffy", "rl-plus"),
    )
    loss_mean: str = option(
        "action",
        "what tokens are averaged over: their action, then actions (the paper's); all tokens of "
        "the batch (DAPO); or their sum over --max-new-tokens, then actions (Dr. GRPO)",
        ("action", "token", "constant"),
    )
    clip_eps: float = option(0.2, "epsilon of Eq 3: how far the ratio may move")
    beta: float = option(0.01, "weight of the KL term of Eq 3 (paper: 0.04); 0 loads no reference")
    updates_per_batch: int = option(1, "gradient steps on each batch; with 1 nothing is clipped")

    @property
    def corrected(self) -> bool:
        """Whether actions are weighted, so that every expert's density is needed."""
        return self.estimator != "uncorrected"

    @property
    def tie_rule(self) -> str:
        """`ties`, with "auto" resolved."""
        if self.ties != "auto":
            return self.ties
        return "random" if self.corrected else "policy_first"


def check(config, experts: int) -> None:
    """UserError for settings of the method that cannot work. experts: how many are named."""
    settings.must(config, 1, "group_size", "updates_per_batch")
    settings.must(config, 0, "beta", "clip_eps")
    settings.above_zero(config, "temperature")
    candidates = config.num_samples * (experts + 1)
    if config.group_size > candidates:
        raise UserError(
            f"--group-size {config.group_size} is more than the {candidates} candidates of a state "
            f"(--num-samples {config.num_samples} x {experts + 1} sources)"
        )
    for name, usual in dict(expert_loss="ekipl", experts_when="always").items():
        if not experts and (value := getattr(config, name)) != usual:
            raise UserError(f"{settings.flag(name)} {value} is about experts: name --experts")
    for name, usual in dict(expert_loss="ekipl", loss_mean="action", experts_when="always").items():
        if config.corrected and (value := getattr(config, name)) != usual:
            raise UserError(
                f"--estimator {config.estimator} has no weights for {settings.flag(name)} {value}: "
                f"use {settings.flag(name)} {usual}, or --estimator uncorrected"
            )
