"""The methods next door: what other papers put in the place of a part of Eq 1 and 3.

    luffy_term, rl_plus_term    an expert's token, in place of clip and KL (Eq 3)
    action_length               what an action's sum over tokens is divided by (Eq 3)

p is pi_theta of a token, p_old that of the policy that sampled the batch. Neither method needs the
density of an expert, so any API will do. README.md in this folder compares them.
"""

from torch import Tensor

LUFFY_GAMMA = 0.1
RL_PLUS_GAMMA = 0.5


def luffy_term(logp: Tensor, old_logp: Tensor, advantage: Tensor) -> Tensor:
    """LUFFY: f(p) A with f(x) = x / (x + 0.1), to be maximised. (Yan et al., arXiv 2504.14945)

    Its Eq 6 has f of the ratio p / pi_expert with pi_expert = 1, without a clip (Sections 3.1 and
    3.2); `off_policy_reshape="p_div_p_0.1"` in its mix_core_alg.py is the same. Eq 6 clips the
    policy's own tokens, as here, the authors' train.sh does not: one update a batch clips nothing.
    The gradient in log p is A f(p) (1 - f(p)), largest at p = 0.1. logp: (B, G, T). advantage:
    broadcastable to it. Returns (B, G, T). old_logp is not used.
    """
    p = logp.exp()
    return p / (p + LUFFY_GAMMA) * advantage


def rl_plus_term(logp: Tensor, old_logp: Tensor, advantage: Tensor) -> Tensor:
    """RL-PLUS: 2 p / (p_old + p_expert) (1 - p)^0.5 A, to be maximised. (arXiv 2508.00222)

    The ratio is that of a mixture of both policies (multiple importance sampling); p_expert,
    unknown, is the mean of p_old and a uniform density, which the authors' rlplus_core_alg.py takes
    as 1. (1 - p)^0.5, the exploration-based advantage, has no gradient. There is no clip. At
    p = p_old the ratio is 4 p / (3 p + 1). logp, old_logp: (B, G, T). advantage: broadcastable to
    them. Returns (B, G, T).
    """
    p, old = logp.exp(), old_logp.exp().detach()
    ratio = 2 * p / (old + (old + 1) / 2)
    unlikely = (1 - p.detach()).clamp(min=0) ** RL_PLUS_GAMMA  # rounding can give p > 1
    return ratio * unlikely * advantage


EXPERT_TERMS = {"ekipl": None, "luffy": luffy_term, "rl-plus": rl_plus_term}  # None: as Eq 3


def action_length(loss_mean: str, mask: Tensor, tokens: float, limit: int) -> Tensor | float | None:
    """What ekipl_loss divides an action's sum over tokens by, before the mean over its group.

    "action": None, its own number of tokens, as the paper. "constant": `limit`, the longest
    response (Dr. GRPO, arXiv 2503.20783). "token": what makes each token of the batch count the
    same (DAPO, arXiv 2503.14476): (B, 1), tokens / n for a group of n actions, since then
    1/n sum_i (sum_t / length) is the group's sum over tokens, divided by `tokens`, the mean number
    of tokens of a group in the global batch. DAPO's Eq 8 takes each group's mean for itself; public
    code, and this, the batch's. mask: (B, G, T) bool, true on the actions' tokens.
    """
    if loss_mean == "action":
        return None
    if loss_mean == "constant":
        return float(limit)
    return tokens / mask.any(-1).sum(-1, keepdim=True)
