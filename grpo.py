"""The objective of Vision-EKIPL as pure functions on tensors: Eq 1-3, Eq 8-10 and Appendix A.

    advantage (Eq 1) -> ratio (Eq 2) -> clip and KL (Eq 3) -> one number an action
        -> estimator A, B or C -> loss

`ekipl_loss` at the end puts them together; everything before it is one equation each. pi_theta is
the policy being trained, pi_old its snapshot that sampled the batch, pi_ref the frozen model of the
KL term, pi_1 .. pi_m the experts, q the distribution that the actions came from, w = pi_old / q.
Log-probabilities are in nats. Functions compute in float32, or in float64 if given that, and do not
change their inputs.

Where the paper is silent or allows two readings:
- Eq 1's std has Bessel's correction, as in Open-R1 and TRL, on which the paper builds. Its group is
  the caller's choice: all M candidates or the G kept ones. Equal rewards give an advantage of
  exactly 0.
- Eq 2 and the KL term are per token; tokens are averaged within an action, then actions within the
  group (original GRPO). The weight w belongs to the whole action: it multiplies the action's mean
  and has no gradient.
- Appendix A writes pi_ref for what Eq 2 calls pi_old. Here it is pi_old.
- Selection changes the proposal to q_S = q 1[a in S] / q(S), S the actions whose reward reaches the
  G-th largest. We take S as fixed, though it depends on the sample. If more than G candidates lie
  in S, (B) and (C) take the kept G for a fair sample of S. Random tie-breaking makes them one where
  all of S has the same reward; "policy first" does not: it keeps more of the policy's actions than
  q_S has. Any G kept at random are a sample of q itself: q(S) = 1.
- Exponents are capped so that nothing overflows: the log-ratio and d at 20 per token, log w at 60.
  A mixture's w is at most 1 / alpha_0, far below that.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

ESTIMATORS = ("uncorrected", "is", "snis")  # (A), (B) and (C) of A.7

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far outside every clip range
MAX_LOG_WEIGHT = 60.0  # exp(60 + 20) times an advantage still fits in float32
MIN_KL_LOG_RATIO = -1e4  # k3 is linear down there: bounds sums, and keeps the pull to pi_ref


def _real(values) -> Tensor:
    """As float32, or float64 where that is given: sums of log-probs lose too much in bf16."""
    values = torch.as_tensor(values)
    return values if values.dtype == torch.float64 else values.float()


def finite(name: str, values) -> Tensor:
    """As `_real`; ValueError if a value is not finite."""
    values = _real(values)
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} has non-finite values")
    return values


def _weights(weights) -> Tensor:
    weights = finite("weights", weights)
    if (weights < 0).any():
        raise ValueError("weights has negative values")
    return weights


# -------------------------------------------------------------------------------- main text, Eq 1-3


def group_advantages(rewards, baseline_rewards=None, eps: float = 1e-4, scale=True) -> Tensor:
    """Eq 1: A_i = (r_i - mean(b)) / (std(b) + eps), b the rewards that r_i is compared with.

    rewards: (..., G). baseline_rewards: (..., M), or None for the group itself. Returns (..., G),
    without gradient; exactly 0 where b is all equal. scale: False leaves out the division, as Dr.
    GRPO does (arXiv 2503.20783). ValueError on non-finite rewards.
    """
    rewards = finite("rewards", rewards).detach()  # (..., G)
    baseline = rewards  # (..., M)
    if baseline_rewards is not None:
        baseline = finite("baseline_rewards", baseline_rewards).detach()
    wide = baseline.double()  # (..., M): a handful of numbers, so precision is free
    mean = wide.mean(-1, keepdim=True)  # (..., 1)
    n = max(wide.shape[-1] - 1, 1)  # Bessel
    std = ((wide - mean).square().sum(-1, keepdim=True) / n).sqrt()  # (..., 1)
    advantages = (rewards - mean) / (std + eps if scale else 1.0)  # (..., G)  # Eq 1
    # Compare rewards, not the std with 0: rounding the mean of equal rewards is magnified by eps.
    equal = (baseline == baseline[..., :1]).all(-1, keepdim=True)  # (..., 1)
    return advantages.masked_fill(equal, 0.0).to(rewards.dtype)


def policy_ratio(logp, old_logp) -> Tensor:
    """Eq 2: rho = pi_theta / pi_old, per token. logp, old_logp: (...) log-probs. Returns (...).

    It is in [e^-20, e^20]; at the bounds the gradient is 0.
    """
    return (_real(logp) - _real(old_logp)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()  # Eq 2


def clipped_objective(ratio, advantage, clip_eps: float) -> Tensor:
    """Eq 3, first term: min(rho A, clip(rho, 1 - eps, 1 + eps) A), to be maximised.

    ratio: (...). advantage: broadcastable to it (per token: unsqueeze the action's). Returns (...).
    The gradient is 0 where A > 0 and rho > 1 + eps, or A < 0 and rho < 1 - eps, nowhere else.
    """
    ratio, advantage = _real(ratio), _real(advantage)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return torch.minimum(ratio * advantage, clipped * advantage)  # Eq 3


def kl_to_reference(logp, ref_logp) -> Tensor:
    """Eq 3, second term: k3 = exp(d) - d - 1, d = log pi_ref - log pi_theta, per token.

    logp, ref_logp: (...) log-probs of tokens drawn from pi_theta. Returns (...) in nats, >= 0; its
    mean over pi_theta is KL(pi_theta || pi_ref). Finite for finite inputs: d is in [-1e4, 20].
    """
    d = (_real(ref_logp) - _real(logp)).clamp(MIN_KL_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(d) - d  # exp(d) - 1 - d without the cancellation near 0


# --------------------------------------------------------------- Appendix A: weights and estimators


def mixture_logp(component_logps, mixture) -> Tensor:
    """A.5: log q(a) = log sum_j alpha_j pi_j(a), by logsumexp.

    component_logps: (..., m + 1), log-probs of whole actions under pi_old and the m experts; -inf
    where a component never writes this. mixture: (m + 1,), the shares alpha of the draws. Returns
    (...). ValueError on NaN or +inf, on shares that do not sum to 1, and on an action that no
    component can have drawn.
    """
    logps = _real(component_logps)  # (..., m + 1)
    shares = torch.as_tensor(mixture, dtype=logps.dtype, device=logps.device)  # (m + 1,)
    if shares.shape != logps.shape[-1:]:
        raise ValueError(
            f"mixture has shape {tuple(shares.shape)}, component_logps {tuple(logps.shape)}"
        )
    if not (shares >= 0).all() or abs(shares.sum().item() - 1) > 1e-4:
        raise ValueError(f"mixture must be shares that sum to 1, not {shares.tolist()}")
    if torch.isnan(logps).any() or (logps == math.inf).any():
        raise ValueError("component_logps has NaN or +inf: every density must be known")
    log_q = torch.logsumexp(logps + shares.log(), dim=-1)  # (...)
    if (log_q == -math.inf).any():
        raise ValueError(
            "component_logps: an action has probability 0 under the mixture, "
            "so it cannot have been drawn"
        )
    return log_q


def selection_probability(rewards, g: int) -> Tensor:
    """A.5: q(S), the chance that a draw from q survives selection, S = {reward >= G-th largest}.

    rewards: (..., M), of all candidates. g: how many are kept, 1 .. M. Returns (...): the share of
    the M in S, which is g / M without ties at the threshold and more with them.
    """
    rewards = finite("rewards", rewards)  # (..., M)
    if not 1 <= g <= rewards.shape[-1]:
        raise ValueError(f"g must be between 1 and the {rewards.shape[-1]} candidates, not {g}")
    threshold = rewards.topk(g, dim=-1).values[..., -1:]  # (..., 1)
    return (rewards >= threshold).to(rewards.dtype).mean(-1)


def selected_proposal_logp(proposal_logp, probability) -> Tensor:
    """A.5: log q_S(a) = log q(a) - log q(S), the proposal after selection, for actions in S.

    So w_S = w q(S). proposal_logp: (...). probability: broadcastable, q(S). Returns (...).
    """
    return _real(proposal_logp) - _real(probability).log()


def log_importance_weights(old_logp, proposal_logp) -> Tensor:
    """log w = log pi_old(a) - log q(a), whole actions. Both: (...). Returns (...), detached.

    old_logp may be -inf (the policy never writes this: w = 0). ValueError on NaN, on +inf, on a
    proposal of -inf.
    """
    old_logp = _real(old_logp).detach()
    proposal_logp = finite("proposal_logp", proposal_logp).detach()
    if torch.isnan(old_logp).any() or (old_logp == math.inf).any():
        raise ValueError("old_logp has NaN or +inf")
    return (old_logp - proposal_logp).clamp(max=MAX_LOG_WEIGHT)


def importance_weights(old_logp, proposal_logp) -> Tensor:
    """Eq 8, 9: w(a) = pi_old(a) / q(a), whole actions. Both: (...). Returns (...) >= 0, detached.

    Errors as in `log_importance_weights`. With q from `mixture_logp`, w <= 1 / alpha_0.
    """
    return log_importance_weights(old_logp, proposal_logp).exp()


def _scaled(weights) -> Tensor:
    """Weights divided by their largest, so that no sum and no square overflows; all 0 stay 0."""
    weights = _weights(weights)
    tiny = torch.finfo(weights.dtype).tiny
    return weights / weights.amax(-1, keepdim=True).clamp(min=tiny)


def is_estimate(values, weights) -> Tensor:
    """(B), A.2: 1/n sum w_i f_i, unbiased (Eq 8). values, weights: (..., n). Returns (...)."""
    return (_weights(weights) * _real(values)).mean(-1)


def snis_estimate(values, weights) -> Tensor:
    """(C), A.2: sum w_i f_i / sum w_i; its bias vanishes as n grows. Both: (..., n). Returns (...).

    Weights that are all 0 give 0.
    """
    scaled = _scaled(weights)
    tiny = torch.finfo(scaled.dtype).tiny
    return (scaled * _real(values)).sum(-1) / scaled.sum(-1).clamp(min=tiny)


def effective_sample_size(weights) -> Tensor:
    """A.3: ESS = (sum w)^2 / sum w^2. weights: (..., n). Returns (...).

    It is between 1 and n; 0 if all w are 0.
    """
    scaled = _scaled(weights)  # ESS has no scale
    tiny = torch.finfo(scaled.dtype).tiny
    return scaled.sum(-1).square() / scaled.square().sum(-1).clamp(min=tiny)


def total_variation(weights) -> Tensor:
    """A.4: TV(q, pi_old) = 1/2 sum_a |q - pi_old|, estimated by 1/2 mean |1 - w|.

    weights: (..., n). Returns (...). For draws from a q that covers pi_old, as a mixture does. A
    selected proposal does not: pi_old's mass outside S is never drawn, and half of it is missing
    from the estimate.
    """
    return 0.5 * (1 - _weights(weights)).abs().mean(-1)


def bias_bound(f_max, tv):
    """Eq 10: |E_q f - E_{pi_old} f| <= 2 max|f| TV(q, pi_old), the largest error of (A).

    Numbers or tensors (...). With a TV that `total_variation` estimates after selection it is too
    small to be a bound (experiments/estimators.py measures it).
    """
    return 2 * f_max * tv


# ----------------------------------------------------------------------------------------- the loss


def _known(name: str, values, mask: Tensor) -> Tensor:
    """values where mask is true and 0 elsewhere. ValueError if one that counts is not finite.

    Padding may hold anything. `where` comes before all arithmetic: NaN * 0 is NaN, also in the
    backward pass.
    """
    values = _real(values)
    if values.shape != mask.shape:
        shapes = f"{tuple(values.shape)} where {tuple(mask.shape)} is expected"
        raise ValueError(f"{name} has shape {shapes}")
    return finite(name, torch.where(mask, values, 0.0))


def _token_mean(values: Tensor, mask: Tensor, length=None) -> Tensor:
    """Mean over an action's own tokens, (B, G, T) -> (B, G); 0 for an absent action.

    length: of the action, what the sum is divided by; None: its own number of tokens.
    """
    length = mask.sum(-1).clamp(min=1) if length is None else length  # (B, G)
    return torch.where(mask, values, 0.0).sum(-1) / length


def ekipl_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    mask: Tensor,
    advantages: Tensor,
    *,
    estimator: str = "uncorrected",
    log_weights: Tensor | None = None,
    clip_eps: float = 0.2,
    beta: float = 0.04,
    length: Tensor | float | None = None,
    expert: tuple[Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq 3 for B groups of up to G actions, by estimator (A) "uncorrected", (B) "is" or (C) "snis".

    logp, old_logp, ref_logp: (B, G, T) log-probs of the actions' tokens; ref_logp may be None if
    beta is 0. mask: (B, G, T) bool, true on an action's tokens with EOS; an action without any is
    padding of a smaller group. advantages: (B, G). log_weights: (B, G), log w_S of whole actions,
    for (B) and (C). Not the paper's (training/neighbours.py): length, broadcastable to (B, G), in
    place of an action's number of tokens; expert, which actions are experts', (B, G) bool, and the
    term(logp, old_logp, advantage) that stands for clip and KL in them.

    Returns (loss, stats). The loss is minus the SUM of the B groups' objectives: divide it by the
    number of groups in the global batch. With one update per batch rho = 1, and the loss is close
    to 0 while its gradient is not. stats, detached, (B, G), 0 for absent actions: "objective" f_i,
    "kl" in nats per token, "clip_fraction", the share of its tokens whose gradient the clip stops.
    ValueError on an unknown estimator, a missing or misshapen input, and a non-finite value.
    """
    _check_inputs(estimator, log_weights, ref_logp, beta)
    mask = mask.bool()  # (B, G, T)
    present = mask.any(-1)  # (B, G)
    logp = _known("logp", logp, mask)  # (B, G, T)
    old_logp = _known("old_logp", old_logp, mask).detach()  # (B, G, T)
    ref_logp = logp if ref_logp is None else _known("ref_logp", ref_logp, mask)  # (B, G, T)
    advantage = _known("advantages", advantages, present).detach().unsqueeze(-1)  # (B, G, 1)

    ratio = policy_ratio(logp, old_logp)  # (B, G, T)  # Eq 2
    kl = kl_to_reference(logp, ref_logp.detach())  # (B, G, T)
    objective = clipped_objective(ratio, advantage, clip_eps) - beta * kl  # (B, G, T)  # Eq 3
    if expert:
        theirs = _known("expert", expert[0], present).unsqueeze(-1) > 0  # (B, G, 1)
        objective = torch.where(theirs, expert[1](logp, old_logp, advantage), objective)
        advantage = advantage.masked_fill(theirs, 0.0)  # nothing of theirs is clipped
    objective = _token_mean(objective, mask, length)  # (B, G): f_i
    loss = -(_shares(estimator, log_weights, present, objective.dtype) * objective).sum()
    stopped = _stopped(ratio, advantage, clip_eps).to(ratio.dtype)  # (B, G, T)
    stats = {"kl": _token_mean(kl.detach(), mask), "clip_fraction": _token_mean(stopped, mask)}
    return loss, {"objective": objective.detach(), **stats}


def _stopped(ratio: Tensor, advantage: Tensor, clip_eps: float) -> Tensor:
    """Where the clip of Eq 3 stops the gradient. Both and the result: (B, G, T)."""
    up, down = ratio > 1 + clip_eps, ratio < 1 - clip_eps
    return ((advantage > 0) & up) | ((advantage < 0) & down)


def _check_inputs(estimator: str, log_weights, ref_logp, beta: float) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, not {estimator!r}")
    if estimator != "uncorrected" and log_weights is None:
        raise ValueError(
            f"estimator {estimator!r} needs log_weights, and so every kept action's density under "
            "the policy and the experts; without them only 'uncorrected' can run"
        )
    if ref_logp is None and beta != 0:
        raise ValueError(f"ref_logp is needed for the KL term with beta = {beta}")


def _shares(estimator: str, log_weights: Tensor | None, present: Tensor, dtype) -> Tensor:
    """What each action counts in its group's objective. present: (B, G) bool. Returns (B, G)."""
    n = present.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    if estimator == "uncorrected":  # (A) 1/n sum f_i
        return present.to(dtype) / n
    log_w = _known("log_weights", log_weights, present).detach()  # (B, G)
    if estimator == "is":  # (B) 1/n sum w_i f_i
        return present * log_w.clamp(max=MAX_LOG_WEIGHT).exp() / n
    # (C) sum w_i f_i / sum w_i; the softmax survives weights that all underflow
    return present * log_w.masked_fill(~present, torch.finfo(log_w.dtype).min).softmax(-1)
