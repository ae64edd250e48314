"""Settings of the method: the total group, the selection and the objective."""

from dataclasses import dataclass

import grpo
from training.settings import option


@dataclass
class MethodSettings:
    """Vision-EKIPL's own settings, as flags of ekipl.py; `num_samples`, N, is with the experts'."""

    # the total group (Eq 4-6) and the selection
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
    estimator: str = option(
        "uncorrected",
        "A.7: uncorrected (A) is the paper's; is (B) weights each action by pi_old/q, which takes "
        "away most of what experts teach; snis (C) normalises the weights, with a bias where few "
        "kept actions are the policy's",
        grpo.ESTIMATORS,
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
