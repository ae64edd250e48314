"""Properties of grpo.py: every estimator against exact enumeration, every gradient against its
definition.

The spaces are small enough to sum over, so "exact" below is a sum, not a formula of ours. Sampled
checks allow four standard errors. Runs in seconds on one CPU core.
"""

import itertools
import math

import pytest
import torch

import grpo
from training import metrics

EPS, BETA = 0.2, 0.04


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_logp(size, seed, scale=1.0):
    """Log-probs of a random distribution over `size` actions, float64."""
    return (scale * torch.randn(size, generator=generator(seed), dtype=torch.float64)).log_softmax(
        -1
    )


def random_batch(seed, b=3, g=4, t=5, dtype=torch.float64):
    """A batch with ragged actions: inputs of ekipl_loss by name. The last group lacks one
    action."""
    rng = generator(seed)
    old_logp = -3 * torch.rand(b, g, t, generator=rng, dtype=dtype) - 0.1
    lengths = torch.randint(1, t + 1, (b, g), generator=rng)
    lengths[0, 0], lengths[-1, -1] = t, 0
    return {
        "logp": old_logp + 0.3 * torch.randn(b, g, t, generator=rng, dtype=dtype),
        "old_logp": old_logp,
        "ref_logp": old_logp + 0.3 * torch.randn(b, g, t, generator=rng, dtype=dtype),
        "mask": torch.arange(t) < lengths.unsqueeze(-1),
        "advantages": torch.randn(b, g, generator=rng, dtype=dtype),
        "log_weights": torch.randn(b, g, generator=rng, dtype=dtype),
    }


def gradient(batch, **options):
    """d loss / d logp of ekipl_loss."""
    logp = batch["logp"].clone().requires_grad_()
    loss, _ = grpo.ekipl_loss(**{**batch, "logp": logp}, **options)
    loss.backward()
    return logp.grad


def within_standard_errors(samples, exact):
    """|mean - exact| within 4 standard errors, which must be small enough to mean something."""
    error = samples.std() / math.sqrt(len(samples))
    return error < 0.05 and abs(samples.mean() - exact) < 4 * error


# --------------------------------------------------------------------------------- Eq 1, advantages


def test_advantages_of_a_worked_example():
    # mean 1, squared deviations 1 + 1 + 0 + 0, over 4 - 1: std = sqrt(2/3) = 0.816497
    advantages = grpo.group_advantages(torch.tensor([2.0, 0.0, 1.0, 1.0]))
    expected = 1 / (math.sqrt(2 / 3) + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([expected, -expected, 0.0, 0.0]))


def test_advantages_against_a_baseline_use_its_mean_and_std():
    # All kept actions are perfect; among the candidates (mean 1, std 2/sqrt(3)) they are better
    # than average.
    advantages = grpo.group_advantages(torch.tensor([2.0, 2.0]), torch.tensor([2.0, 2.0, 0.0, 0.0]))
    torch.testing.assert_close(advantages, torch.full((2,), 1 / (2 / math.sqrt(3) + 1e-4)))


def test_advantages_without_the_std_are_differences_from_the_mean():
    rewards = torch.tensor([[2.0, 0.0, 1.0, 2.0], [0.1, 0.1, 0.1, 0.1]])
    found = grpo.group_advantages(rewards, scale=False)
    torch.testing.assert_close(found[0], torch.tensor([0.75, -1.25, -0.25, 0.75]))
    assert found[1].tolist() == [0.0] * 4
    kept = grpo.group_advantages(rewards[0, ::3], rewards[0], scale=False)
    torch.testing.assert_close(kept, torch.tensor([0.75, 0.75]))


def test_advantages_of_many_groups_are_those_of_each_group():
    rewards = torch.randint(0, 3, (2, 3, 5), generator=generator(0)).float()
    baseline = torch.randint(0, 3, (2, 3, 9), generator=generator(1)).float()
    together = grpo.group_advantages(rewards, baseline)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(
            together[i, j], grpo.group_advantages(rewards[i, j], baseline[i, j])
        )


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 2.0, 1e8, -7.3])
@pytest.mark.parametrize("size", [1, 3, 7, 8, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(reward, size, dtype):
    rewards = torch.full(
        (2, size), reward, dtype=dtype
    )  # the mean of 3 times 0.1 is not 0.1 in float64
    assert (grpo.group_advantages(rewards) == 0).all()
    assert (grpo.group_advantages(rewards, eps=0.0) == 0).all()
    assert (grpo.group_advantages(rewards[:, :1], rewards) == 0).all()


def test_a_dead_group_leaves_the_others_alone():
    advantages = grpo.group_advantages(
        torch.tensor([[0.1, 0.1, 0.1], [0.0, 1.0, 2.0]], dtype=torch.float64)
    )
    assert (advantages[0] == 0).all()
    torch.testing.assert_close(
        advantages[1], torch.tensor([-1.0, 0.0, 1.0]) / (1 + 1e-4), check_dtype=False
    )


def test_advantages_refuse_non_finite_rewards():
    with pytest.raises(ValueError, match="rewards"):
        grpo.group_advantages(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="baseline_rewards"):
        grpo.group_advantages(torch.tensor([1.0]), torch.tensor([1.0, math.inf]))


# ----------------------------------------------------------------------- Eq 2 and 3, ratio and clip


def test_ratio_is_that_of_the_probabilities():
    p, old = torch.tensor([0.5, 0.1, 0.3]), torch.tensor([0.25, 0.2, 0.3])
    torch.testing.assert_close(grpo.policy_ratio(p.log(), old.log()), p / old)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0])
def test_clip_sign_table(advantage, ratio):
    """The clip stops the gradient where A > 0 and rho > 1 + eps, or A < 0 and rho < 1 - eps, and
    nowhere else."""
    rho = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    value = grpo.clipped_objective(rho, torch.tensor(advantage, dtype=torch.float64), EPS)
    value.backward()
    if advantage > 0 and ratio > 1.2:
        expected_value, expected_gradient = 1.2 * advantage, 0.0
    elif advantage < 0 and ratio < 0.8:
        expected_value, expected_gradient = 0.8 * advantage, 0.0
    else:
        expected_value, expected_gradient = ratio * advantage, advantage
    assert value.item() == pytest.approx(expected_value, rel=1e-6)
    assert rho.grad.item() == pytest.approx(expected_gradient)


# ------------------------------------------------------------------------------------- Eq 3, the KL


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_k3_has_the_exact_kl_as_its_expectation(seed, scale):
    logp, ref_logp = random_logp(6, seed, scale), random_logp(6, seed + 100, scale)
    exact = (logp.exp() * (logp - ref_logp)).sum()
    k3 = grpo.kl_to_reference(logp, ref_logp)
    assert (k3 >= 0).all()
    torch.testing.assert_close((logp.exp() * k3).sum(), exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_sampled_k3_is_within_four_standard_errors_of_the_exact_kl(seed):
    logp, ref_logp = random_logp(6, seed), random_logp(6, seed + 100)
    exact = (logp.exp() * (logp - ref_logp)).sum()
    actions = torch.multinomial(logp.exp(), 20_000, replacement=True, generator=generator(seed))
    assert within_standard_errors(grpo.kl_to_reference(logp[actions], ref_logp[actions]), exact)


def test_k3_keeps_its_precision_near_zero():
    d = torch.tensor(
        [1e-3, -1e-3, 1e-4]
    )  # exp(d) - d - 1 in float32 would be wrong by up to 100 % here
    torch.testing.assert_close(grpo.kl_to_reference(torch.zeros(3), d), d**2 / 2, rtol=1e-2, atol=0)


def test_kl_still_pulls_back_a_policy_far_above_the_reference():
    logp = torch.tensor([-0.1], requires_grad=True)
    grpo.kl_to_reference(logp, torch.tensor([-50.0])).sum().backward()
    assert logp.grad.item() == pytest.approx(1.0)


# ----------------------------------------------------------------------- A.5: mixture and selection


def test_mixture_is_the_weighted_sum_of_densities():
    densities = torch.tensor([[0.5, 0.1, 0.0], [0.2, 0.2, 0.7]], dtype=torch.float64)
    mixture = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = grpo.mixture_logp(densities.log(), mixture).exp()
    torch.testing.assert_close(q, torch.tensor([0.28, 0.30], dtype=torch.float64))


def test_mixture_is_as_exact_as_its_densities():
    logps = random_logp(4, seed=3).repeat(3, 1).T  # (4, 3), the same under all three
    torch.testing.assert_close(
        grpo.mixture_logp(logps, [1 / 3] * 3), logps[:, 0], rtol=0, atol=1e-14
    )


def test_exponents_stop_at_their_bounds():
    far = torch.tensor([-1e5, 1e5], dtype=torch.float64)
    bounds = [math.exp(-20), math.exp(20)]
    assert grpo.policy_ratio(far, torch.zeros(2)).tolist() == pytest.approx(bounds)
    # d is log pi_ref - log pi_theta, in [-1e4, 20].
    kl = grpo.kl_to_reference(-far, torch.zeros(2))
    assert kl.tolist() == pytest.approx([1e4 - 1, math.exp(20) - 21])
    assert grpo.importance_weights(far, torch.zeros(2)).tolist() == [0, pytest.approx(math.exp(60))]


def test_defaults_of_the_loss_are_those_of_the_paper():
    batch = random_batch(15)
    told = grpo.ekipl_loss(**batch, clip_eps=0.2, beta=0.04, estimator="uncorrected")
    assert grpo.ekipl_loss(**batch)[0] == told[0]
    assert torch.equal(grpo.ekipl_loss(**batch)[1]["clip_fraction"], told[1]["clip_fraction"])


def test_mixture_does_not_underflow():
    log_q = grpo.mixture_logp(torch.tensor([[-2000.0, -3000.0]]), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(log_q, torch.tensor([-2000.0 + math.log(0.5)]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_mixture_refuses_unknown_densities(bad):
    with pytest.raises(ValueError, match="NaN or \\+inf"):
        grpo.mixture_logp(torch.tensor([[-1.0, bad]]), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("shares", [[0.5, 0.5], [1.0, 0.0]])
def test_mixture_refuses_an_action_that_cannot_have_been_drawn(shares):
    component_logps = torch.tensor([[-1.0, -1.0], [-math.inf, -math.inf if shares[1] else -1.0]])
    with pytest.raises(ValueError, match="cannot have been drawn"):
        grpo.mixture_logp(component_logps, torch.tensor(shares))


@pytest.mark.parametrize("shares", [[0.5, 0.4], [1.5, -0.5], [1.0], [math.nan, 1.0]])
def test_mixture_refuses_what_is_no_share(shares):
    with pytest.raises(ValueError, match="mixture"):
        grpo.mixture_logp(torch.tensor([[-1.0, -1.0]]), torch.tensor(shares))


@pytest.mark.parametrize("m", [1, 2, 4])
def test_mixture_weights_lie_between_0_and_m_plus_1(m):
    logps = 30 * torch.randn(1000, m + 1, generator=generator(m))
    logps[::7, 1:] = -math.inf  # only the policy says these
    w = grpo.importance_weights(
        logps[:, 0], grpo.mixture_logp(logps, torch.full((m + 1,), 1 / (m + 1)))
    )
    assert (w >= 0).all() and (w <= (m + 1) * (1 + 1e-5)).all()
    assert w.max() > m + 0.9 and w.min() < 1e-3  # both ends are reached


def test_selection_probability_is_the_share_that_reaches_the_gth_reward():
    rewards = torch.tensor(
        [[2.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]
    )
    torch.testing.assert_close(grpo.selection_probability(rewards, 2), torch.tensor([4 / 8, 2 / 8]))
    torch.testing.assert_close(grpo.selection_probability(rewards, 8), torch.tensor([1.0, 1.0]))
    for g in (0, 9):
        with pytest.raises(ValueError, match="g must be"):
            grpo.selection_probability(rewards, g)


def test_weights_of_the_selected_proposal_are_exact_on_its_support():
    """sum_a q_S(a) w_S(a) f(a) = E_{pi_old}[f 1_S], and w_S = w q(S)."""
    logps = torch.stack([random_logp(7, seed) for seed in range(3)], dim=-1)  # (actions, m + 1)
    f, rewards = random_logp(7, 9), torch.tensor([2.0, 0.0, 1.0, 2.0, 0.0, 1.0, 0.0])
    log_q = grpo.mixture_logp(logps, torch.full((3,), 1 / 3))
    kept = rewards >= 1
    q_s = log_q[kept].exp().sum()
    log_selected = grpo.selected_proposal_logp(log_q, q_s)
    torch.testing.assert_close(
        log_selected[kept].exp().sum(), torch.ones_like(q_s)
    )  # a distribution on S
    w_s = grpo.importance_weights(logps[:, 0], log_selected)
    torch.testing.assert_close(w_s, grpo.importance_weights(logps[:, 0], log_q) * q_s)
    estimate = (log_selected.exp() * w_s * f)[kept].sum()
    torch.testing.assert_close(estimate, (logps[:, 0].exp() * f)[kept].sum())


def test_estimate_over_the_selected_is_the_estimate_of_f_on_s_over_all_candidates():
    rewards = torch.tensor([2.0, 0.0, 1.0, 2.0, 0.0, 1.0, 0.0, 0.0])
    logps, f = torch.stack([random_logp(8, 0), random_logp(8, 1)], dim=-1), random_logp(8, 2)
    log_q = grpo.mixture_logp(logps, torch.tensor([0.5, 0.5]))
    kept = rewards >= 1  # the 4 best of 8, no tie at the threshold with those left out
    log_selected = grpo.selected_proposal_logp(log_q, grpo.selection_probability(rewards, 4))
    selected = grpo.is_estimate(f[kept], grpo.importance_weights(logps[:, 0], log_selected)[kept])
    everything = grpo.is_estimate(f * kept, grpo.importance_weights(logps[:, 0], log_q))
    torch.testing.assert_close(selected, everything)


# ----------------------------------------------------------------- A.1 - A.4, estimators and bounds


def old_policy_and_mixture(seed, size=6):
    """(log pi_old, log q) with q a mixture of pi_old and one expert."""
    old_logp, expert_logp = random_logp(size, seed), random_logp(size, seed + 50)
    return old_logp, grpo.mixture_logp(
        torch.stack([old_logp, expert_logp], -1), torch.tensor([0.5, 0.5])
    )


@pytest.mark.parametrize("seed", range(5))
def test_is_is_unbiased_by_enumeration(seed):
    """The mean of the estimator over every sample of size 2 is E_{pi_old}[f]."""
    old_logp, log_q = old_policy_and_mixture(seed)
    f = torch.randn(6, generator=generator(seed), dtype=torch.float64)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))  # (36, 2)
    estimates = grpo.is_estimate(
        f[pairs], grpo.importance_weights(old_logp[pairs], log_q[pairs])
    )  # (36,)
    mean = (log_q[pairs].sum(-1).exp() * estimates).sum()
    torch.testing.assert_close(mean, (old_logp.exp() * f).sum())


@pytest.mark.parametrize("seed", range(5))
def test_sampled_is_is_within_four_standard_errors(seed):
    old_logp, log_q = old_policy_and_mixture(seed)
    f = torch.randn(6, generator=generator(seed), dtype=torch.float64)
    actions = torch.multinomial(
        log_q.exp(), 40_000, replacement=True, generator=generator(seed)
    ).view(-1, 8)
    estimates = grpo.is_estimate(
        f[actions], grpo.importance_weights(old_logp[actions], log_q[actions])
    )
    assert within_standard_errors(estimates, (old_logp.exp() * f).sum())


def test_snis_bias_vanishes_as_n_grows():
    """Exact biases, by enumerating every sample of size n: they shrink, in the end like 1/n."""
    old_logp, log_q = (
        torch.tensor(p, dtype=torch.float64).log() for p in ([0.5, 0.3, 0.2], [0.3, 0.3, 0.4])
    )
    f = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    w, exact = grpo.importance_weights(old_logp, log_q), (old_logp.exp() * f).sum()
    biases = []
    for n in (1, 2, 4, 8):
        samples = torch.cartesian_prod(*[torch.arange(3)] * n).view(-1, n)  # (3^n, n)
        mean = (log_q[samples].sum(-1).exp() * grpo.snis_estimate(f[samples], w[samples])).sum()
        biases.append(abs(mean - exact).item())
    assert biases[0] > 0.1  # the bias is there
    assert all(later < 0.7 * earlier for earlier, later in itertools.pairwise(biases))
    assert biases[3] / biases[2] == pytest.approx(0.5, abs=0.05)
    actions = torch.multinomial(log_q.exp(), 100_000, replacement=True, generator=generator(0))
    assert abs(grpo.snis_estimate(f[actions], w[actions]) - exact) < 0.01


def test_snis_is_a_weighted_mean_without_scale():
    values, w = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 0.0, 1.0])
    torch.testing.assert_close(grpo.snis_estimate(values, w), torch.tensor(7 / 4))
    for scale in (1e-30, 1e30, 1e38):
        torch.testing.assert_close(grpo.snis_estimate(values, scale * w), torch.tensor(7 / 4))


def test_weights_that_are_all_zero_give_zero():
    zeros, values = torch.zeros(2, 3), torch.ones(2, 3)
    for result in (grpo.snis_estimate(values, zeros), grpo.is_estimate(values, zeros)):
        assert (result == 0).all()
    assert (grpo.effective_sample_size(zeros) == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5])
def test_weights_that_are_none_are_refused(bad):
    weights, values = torch.tensor([1.0, bad]), torch.ones(2)
    for use in (
        lambda: grpo.is_estimate(values, weights),
        lambda: grpo.snis_estimate(values, weights),
        lambda: grpo.effective_sample_size(weights),
        lambda: grpo.total_variation(weights),
    ):
        with pytest.raises(ValueError, match="weights"):
            use()


def test_importance_weights_refuse_unknown_densities():
    unknown = (
        (math.nan, -1.0, "old_logp"),
        (-1.0, math.nan, "proposal_logp"),
        (-1.0, -math.inf, "proposal_logp"),
    )
    for old, q, name in unknown:
        with pytest.raises(ValueError, match=name):
            grpo.importance_weights(torch.tensor([old]), torch.tensor([q]))
    assert grpo.importance_weights(torch.tensor([-math.inf]), torch.tensor([-1.0])).item() == 0


def test_importance_weights_carry_no_gradient():
    old_logp, log_q = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    assert not grpo.importance_weights(old_logp, log_q).requires_grad
    assert not grpo.log_importance_weights(old_logp, log_q).requires_grad


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 40.0])
def test_ess_lies_between_1_and_n(scale):
    w = (scale * torch.randn(500, 8, generator=generator(0))).exp()
    ess = grpo.effective_sample_size(w.clamp(max=3e38))
    assert (ess >= 1 - 1e-5).all() and (ess <= 8 + 1e-5).all()


def test_ess_of_known_weights():
    w = torch.tensor(
        [[1.0, 1.0, 1.0, 1.0], [0.0, 5.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]]
    )
    torch.testing.assert_close(grpo.effective_sample_size(w), torch.tensor([4.0, 1.0, 2.0, 1.6]))


def test_bias_is_within_its_bound_and_reaches_it():
    """Eq 10 on 1,000 random pairs of distributions, with the exact total variation."""
    rng = generator(0)
    p = (2 * torch.randn(1000, 7, generator=rng, dtype=torch.float64)).softmax(-1)
    q = (2 * torch.randn(1000, 7, generator=rng, dtype=torch.float64)).softmax(-1)
    tv = 0.5 * (q - p).abs().sum(-1)
    for f, tight in (
        (torch.randn(1000, 7, generator=rng, dtype=torch.float64), False),
        (3 * (q - p).sign(), True),
    ):
        bias = ((q - p) * f).sum(-1).abs()
        bound = grpo.bias_bound(f.abs().amax(-1), tv)
        assert (bias <= bound + 1e-12).all()
        if tight:  # f that follows the sign of q - p is as wrong as it can be
            torch.testing.assert_close(bias, bound)


def test_total_variation_is_exact_in_expectation():
    counts = torch.tensor(
        [1, 4, 2, 3]
    )  # a sample in which every action has exactly its share under q
    q, p = counts / 10, torch.tensor([0.4, 0.3, 0.2, 0.1])
    w = grpo.importance_weights(p.log(), q.log()).repeat_interleave(counts)
    torch.testing.assert_close(grpo.total_variation(w), torch.tensor(0.5 * (0.3 + 0.1 + 0.0 + 0.2)))


# ----------------------------------------------------------------------------------------- the loss


def loop_loss(batch, estimator):
    """ekipl_loss by the words of its definition: one token at a time, Python floats only."""
    total = 0.0
    for b in range(batch["mask"].shape[0]):
        values, weights = [], []
        for g in range(batch["mask"].shape[1]):
            tokens = []
            for t in range(batch["mask"].shape[2]):
                if batch["mask"][b, g, t]:
                    logp, old, ref = (
                        batch[name][b, g, t].item() for name in ("logp", "old_logp", "ref_logp")
                    )
                    rho, d, a = math.exp(logp - old), ref - logp, batch["advantages"][b, g].item()
                    clipped = min(max(rho, 1 - EPS), 1 + EPS)
                    tokens.append(min(rho * a, clipped * a) - BETA * (math.exp(d) - d - 1))
            if tokens:
                values.append(sum(tokens) / len(tokens))
                weights.append(
                    math.exp(batch["log_weights"][b, g].item())
                    if estimator != "uncorrected"
                    else 1.0
                )
        over = sum(weights) if estimator == "snis" else len(weights)
        total += sum(w * f for w, f in zip(weights, values)) / over
    return -total


@pytest.mark.parametrize("estimator", grpo.ESTIMATORS)
@pytest.mark.parametrize("seed", range(3))
def test_loss_is_its_definition_token_by_token(estimator, seed):
    batch = random_batch(seed)
    loss, _ = grpo.ekipl_loss(**batch, estimator=estimator, clip_eps=EPS, beta=BETA)
    assert loss.item() == pytest.approx(loop_loss(batch, estimator), rel=1e-10)


@pytest.mark.parametrize("estimator", grpo.ESTIMATORS)
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_finite_differences(estimator, seed):
    batch, step = random_batch(seed, b=2, g=3, t=4), 1e-5
    exact = gradient(batch, estimator=estimator)
    assert exact.abs().max() > 0.01
    for index in itertools.product(range(2), range(3), range(4)):
        losses = []
        for sign in (1, -1):
            moved = batch["logp"].clone()
            moved[index] += sign * step
            losses.append(
                grpo.ekipl_loss(**{**batch, "logp": moved}, estimator=estimator)[0].item()
            )
        assert exact[index].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), abs=1e-7)


def test_estimators_agree_with_the_functions_of_the_appendix():
    batch = random_batch(0)
    batch["mask"][-1, -1, :2] = True  # no absent action here, so that plain means are right
    for estimator, estimate in (("is", grpo.is_estimate), ("snis", grpo.snis_estimate)):
        loss, stats = grpo.ekipl_loss(**batch, estimator=estimator)
        torch.testing.assert_close(
            loss, -estimate(stats["objective"], batch["log_weights"].exp()).sum()
        )


@pytest.mark.parametrize("estimator", ["is", "snis"])
def test_weights_of_1_change_nothing(estimator):
    batch = {**random_batch(1), "log_weights": torch.zeros(3, 4)}
    plain = grpo.ekipl_loss(**{**batch, "log_weights": None})[0]
    torch.testing.assert_close(grpo.ekipl_loss(**batch, estimator=estimator)[0], plain)
    torch.testing.assert_close(gradient(batch, estimator=estimator), gradient(batch))


@pytest.mark.parametrize("estimator", ["is", "snis"])
def test_no_gradient_reaches_anything_but_logp(estimator):
    batch = random_batch(2)
    for name in ("logp", "old_logp", "ref_logp", "advantages", "log_weights"):
        batch[name].requires_grad_()
    grpo.ekipl_loss(**batch, estimator=estimator)[0].backward()
    assert batch["logp"].grad.abs().max() > 0
    assert all(
        batch[name].grad is None for name in ("old_logp", "ref_logp", "advantages", "log_weights")
    )


def test_gradient_at_ratio_1_is_the_policy_gradient():
    """With rho = 1 and no KL, d loss / d logp = -A / (tokens of the action) / (actions of the
    group)."""
    batch = random_batch(3)
    batch["old_logp"] = batch["logp"].clone()
    tokens, actions = (
        batch["mask"].sum(-1, keepdim=True).clamp(min=1),
        batch["mask"].any(-1).sum(-1),
    )
    expected = -batch["advantages"].unsqueeze(-1) * batch["mask"] / tokens / actions[:, None, None]
    torch.testing.assert_close(gradient(batch, beta=0.0), expected)


def test_loss_falls_when_a_good_action_becomes_likelier_and_rises_for_a_bad_one():
    old_logp, mask = torch.full((1, 2, 3), -1.0), torch.ones(1, 2, 3, dtype=torch.bool)
    advantages = torch.tensor([[1.0, -1.0]])
    for action, direction in ((0, -1), (1, 1)):
        logp = old_logp.clone()
        logp[0, action] += 0.05
        before, after = (
            grpo.ekipl_loss(x, old_logp, None, mask, advantages, beta=0.0)[0]
            for x in (old_logp, logp)
        )
        assert (after - before).sign() == direction


def test_kl_term_pulls_towards_the_reference():
    logp, mask = torch.full((1, 1, 1), -1.0), torch.ones(1, 1, 1, dtype=torch.bool)
    for ref, sign in (
        (-2.0, 1),
        (-0.5, -1),
    ):  # above the reference: less of it lowers the loss, and the reverse
        batch = {
            "logp": logp,
            "old_logp": logp,
            "ref_logp": torch.full((1, 1, 1), ref),
            "mask": mask,
        }
        assert gradient({**batch, "advantages": torch.zeros(1, 1)}).sign().item() == sign


def test_without_beta_the_reference_is_not_needed():
    batch = random_batch(4)
    with_reference = grpo.ekipl_loss(**batch, beta=0.0)[0]
    loss, stats = grpo.ekipl_loss(**{**batch, "ref_logp": None}, beta=0.0)
    torch.testing.assert_close(loss, with_reference)
    assert (stats["kl"] == 0).all()


def test_eos_receives_gradient():
    batch = random_batch(5)
    batch["old_logp"] = batch["logp"].clone()  # nothing is clipped
    grad = gradient(batch)
    last = batch["mask"].sum(-1) - 1  # (B, G)
    for b, g in batch["mask"].any(-1).nonzero().tolist():
        assert grad[b, g, last[b, g]] != 0


def test_where_all_kept_actions_are_right_the_update_is_weighted_cloning():
    """One update a batch, no KL: the gradient of each group is that of the mean log-likelihood of
    its kept actions, times sqrt((M - 1) / M (1 - p) / p), p the share of right candidates."""
    batch = random_batch(4)
    logp = batch["logp"].clone().requires_grad_()
    shares, m = torch.tensor([0.5, 0.75, 0.375]), 24
    rewards = torch.ones(3, m)  # format
    for row, share in enumerate(shares):
        rewards[row, : int(share * m)] = 2.0  # and accuracy
    present = batch["mask"].any(-1)  # (B, G)
    advantages = grpo.group_advantages(torch.full(present.shape, 2.0), rewards)  # (B, G)
    loss, _ = grpo.ekipl_loss(logp, logp.detach(), None, batch["mask"], advantages, beta=0)
    (gradient,) = torch.autograd.grad(loss, logp)
    weights = ((m - 1) / m * (1 - shares) / shares).sqrt()
    cloning = 0.0
    for row in range(3):
        means = [logp[row, i][batch["mask"][row, i]].mean() for i in range(4) if present[row, i]]
        cloning = cloning - weights[row] * sum(means) / len(means)
    (expected,) = torch.autograd.grad(cloning, logp)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=0)  # eps of Eq 1


def test_every_action_counts_the_same_whatever_its_length():
    """Tokens are averaged inside an action first: a long action must not drown a short one."""
    logp, mask = torch.full((1, 2, 10), -1.0), torch.ones(1, 2, 10, dtype=torch.bool)
    mask[0, 1, 1:] = False
    batch = {
        "logp": logp,
        "old_logp": logp,
        "ref_logp": logp,
        "mask": mask,
        "advantages": torch.tensor([[1.0, -1.0]]),
    }
    torch.testing.assert_close(gradient(batch).sum(-1), torch.tensor([[-0.5, 0.5]]))


@pytest.mark.parametrize("estimator", grpo.ESTIMATORS)
def test_micro_batches_sum_to_the_full_batch(estimator):
    batch = random_batch(6, b=6)
    full_loss, full_grad = (
        grpo.ekipl_loss(**batch, estimator=estimator)[0],
        gradient(batch, estimator=estimator),
    )
    for size in (1, 2, 4):
        parts = [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, 6, size)]
        losses = sum(grpo.ekipl_loss(**part, estimator=estimator)[0] for part in parts)
        torch.testing.assert_close(losses, full_loss)
        torch.testing.assert_close(
            torch.cat([gradient(part, estimator=estimator) for part in parts]), full_grad
        )


@pytest.mark.parametrize("estimator", grpo.ESTIMATORS)
def test_padding_changes_nothing(estimator):
    """More padded tokens, more absent actions and a group without any leave loss and gradient as
    they are."""
    batch = random_batch(7)
    padded = {
        k: torch.nn.functional.pad(v, (0, 2, 0, 1, 0, 1)) for k, v in batch.items() if v.dim() == 3
    }
    padded |= {
        k: torch.nn.functional.pad(v, (0, 1, 0, 1)) for k, v in batch.items() if v.dim() == 2
    }
    loss, stats = grpo.ekipl_loss(**padded, estimator=estimator)
    torch.testing.assert_close(loss, grpo.ekipl_loss(**batch, estimator=estimator)[0])
    torch.testing.assert_close(
        gradient(padded, estimator=estimator)[:3, :4, :5], gradient(batch, estimator=estimator)
    )
    absent = ~padded["mask"].any(-1)
    assert absent.sum() > 1 and all((value[absent] == 0).all() for value in stats.values())


@pytest.mark.parametrize("estimator", grpo.ESTIMATORS)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_values_are_ignored_whatever_they_are(estimator, junk):
    batch = random_batch(8)
    dirty = {k: v.clone() for k, v in batch.items()}
    for name in ("logp", "old_logp", "ref_logp"):
        dirty[name][~batch["mask"]] = junk
    for name in ("advantages", "log_weights"):
        dirty[name][~batch["mask"].any(-1)] = junk
    (loss, stats), (clean_loss, clean_stats) = (
        grpo.ekipl_loss(**x, estimator=estimator) for x in (dirty, batch)
    )
    assert loss == clean_loss
    assert all(torch.equal(stats[name], clean_stats[name]) for name in stats)
    grad = gradient(dirty, estimator=estimator)
    assert torch.equal(grad, gradient(batch, estimator=estimator))
    assert (grad[~batch["mask"]] == 0).all()


@pytest.mark.parametrize("name", ["logp", "old_logp", "ref_logp", "advantages", "log_weights"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_that_count_are_refused_by_name(name, bad):
    batch = random_batch(9)
    batch[name][(0,) * batch[name].dim()] = bad
    with pytest.raises(ValueError, match=f"^{name} "):
        grpo.ekipl_loss(**batch, estimator="snis")


def test_missing_or_unknown_inputs_are_refused():
    batch = random_batch(10)
    with pytest.raises(ValueError, match="estimator must be one of"):
        grpo.ekipl_loss(**batch, estimator="exact")
    for estimator in ("is", "snis"):
        with pytest.raises(ValueError, match="needs log_weights"):
            grpo.ekipl_loss(**{**batch, "log_weights": None}, estimator=estimator)
    with pytest.raises(ValueError, match="ref_logp is needed"):
        grpo.ekipl_loss(**{**batch, "ref_logp": None})
    for name in ("logp", "old_logp", "ref_logp", "advantages", "log_weights"):
        with pytest.raises(
            ValueError, match=f"^{name} has shape"
        ):  # (B, 1) would broadcast in silence
            grpo.ekipl_loss(**{**batch, name: batch[name][:, :1]}, estimator="is")


@pytest.mark.parametrize("estimator", grpo.ESTIMATORS)
def test_inputs_are_not_modified(estimator):
    batch = random_batch(11)
    copies = {name: value.clone() for name, value in batch.items()}
    gradient(batch, estimator=estimator)
    grpo.group_advantages(batch["advantages"])
    grpo.mixture_logp(batch["logp"], torch.full((5,), 0.2))
    grpo.selection_probability(batch["advantages"], 2)
    for function in (grpo.is_estimate, grpo.snis_estimate):
        function(batch["advantages"], batch["log_weights"].abs())
    assert all(torch.equal(batch[name], copies[name]) for name in batch)


def test_clip_fraction_is_the_share_of_tokens_without_gradient():
    batch = random_batch(12, t=20)
    _, stats = grpo.ekipl_loss(**batch, clip_eps=EPS)
    stopped = (gradient(batch, clip_eps=EPS, beta=0.0) == 0) & batch["mask"]
    share = stopped.sum(-1).double() / batch["mask"].sum(-1).clamp(min=1)
    torch.testing.assert_close(stats["clip_fraction"], share)
    assert 0 < stats["clip_fraction"].max() < 1


def test_stats_are_means_over_the_tokens_of_each_action_without_gradient():
    batch = random_batch(14)
    batch["logp"].requires_grad_()
    _, stats = grpo.ekipl_loss(**batch, beta=BETA)
    assert not any(value.requires_grad for value in stats.values())
    for b, g in batch["mask"].any(-1).nonzero().tolist():
        logp, old_logp, ref_logp = (
            batch[k][b, g, batch["mask"][b, g]] for k in ("logp", "old_logp", "ref_logp")
        )
        kl = grpo.kl_to_reference(logp, ref_logp).mean()
        clipped = grpo.clipped_objective(
            grpo.policy_ratio(logp, old_logp), batch["advantages"][b, g], EPS
        ).mean()
        torch.testing.assert_close(stats["kl"][b, g], kl.detach())
        torch.testing.assert_close(stats["objective"][b, g], (clipped - BETA * kl).detach())


@pytest.mark.parametrize("estimator", grpo.ESTIMATORS)
@pytest.mark.parametrize("logp", [0.0, -1e6, -1e30, -3e38])
@pytest.mark.parametrize("other", [0.0, -1e6, -1e30, -3e38])
@pytest.mark.parametrize("log_weight", [0.0, -1000.0, 1000.0, -1e30, 1e30])
def test_extreme_inputs_give_finite_results(estimator, logp, other, log_weight):
    batch = {
        "logp": torch.full((1, 3, 4), logp),
        "old_logp": torch.full((1, 3, 4), other),
        "ref_logp": torch.full((1, 3, 4), other),
        "mask": torch.ones(1, 3, 4, dtype=torch.bool),
        "advantages": torch.tensor([[5.0, -5.0, 0.0]]),
        "log_weights": torch.tensor([[log_weight, log_weight, 0.0]]),
    }
    loss, stats = grpo.ekipl_loss(**batch, estimator=estimator)
    assert all(
        value.isfinite().all()
        for value in (loss, gradient(batch, estimator=estimator), *stats.values())
    )
    q = torch.full((4,), other)
    w = grpo.importance_weights(torch.tensor([logp, 0.0, -5.0, -1e4]), q)
    results = [
        w,
        grpo.snis_estimate(q.sign(), w),
        grpo.effective_sample_size(w),
        grpo.total_variation(w),
    ]
    assert all(value.isfinite().all() for value in results)


@pytest.mark.parametrize("estimator", grpo.ESTIMATORS)
def test_bf16_inputs_are_computed_in_float32(estimator):
    batch = random_batch(13, dtype=torch.bfloat16)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    loss, stats = grpo.ekipl_loss(**batch, estimator=estimator)
    assert loss.dtype == torch.float32 and all(
        value.dtype == torch.float32 for value in stats.values()
    )
    torch.testing.assert_close(
        loss.double(), grpo.ekipl_loss(**exact, estimator=estimator)[0], rtol=1e-5, atol=1e-6
    )
    rewards = torch.tensor([1.0, 2.0, 0.0], dtype=torch.bfloat16)
    assert grpo.group_advantages(rewards).dtype == torch.float32
    for function in (
        grpo.policy_ratio,
        grpo.kl_to_reference,
        grpo.importance_weights,
        grpo.is_estimate,
    ):
        assert function(rewards, rewards).dtype == torch.float32


# -------------------------------------------------------------------------------------- diagnostics


def test_diagnostics_of_a_worked_example():
    report = metrics.diagnostics(
        objective=torch.tensor([1.0, -3.0, 2.0, 0.0]),
        kl=torch.tensor([0.1, 0.3, 0.2, 0.4]),
        clip_fraction=torch.tensor([0.0, 0.5, 0.0, 1.0]),
        weights=torch.tensor([2.0, 2.0, 0.0, 0.0]),
        sources=["policy", "policy", "policy", "careful"],
    )
    expected = {
        "clip_fraction": 0.375,
        "clip_fraction/policy": 0.5 / 3,
        "clip_fraction/careful": 1.0,
        "kl": 0.25,
        "kl/policy": 0.2,
        "kl/careful": 0.4,
        "ess": 2.0,
        "ess/policy": 2.0,
        "ess/careful": 0.0,
        "ess_share": 0.5,
        "ess_share/policy": 2 / 3,
        "ess_share/careful": 0.0,
        "weight_var": 1.0,
        "weight_var/policy": 8 / 9,
        "weight_var/careful": 0.0,
        "weight_q95": 2.0,
        "weight_q95/policy": 2.0,
        "weight_q95/careful": 0.0,
        "tv": 0.5,
        "bias_bound": 2 * 3.0 * 0.5,
    }
    assert report == pytest.approx(expected, rel=1e-6)
    assert all(type(value) is float for value in report.values())


def test_ess_is_of_one_state_and_its_mean_over_the_states():
    """Two states of equal weights each are as good as can be, whatever the two weights are."""
    zeros, names = torch.zeros(7), ["policy", "policy", "careful", "careful", "policy", "policy"]
    report = metrics.diagnostics(
        *[zeros[:6]] * 3, torch.tensor([2.0, 2, 2, 2, 0.1, 0.1]), names, [7, 7, 7, 7, 3, 3]
    )
    assert report["ess"] == pytest.approx((4 + 2) / 2) and report["ess_share"] == pytest.approx(1)
    assert report["ess/policy"] == pytest.approx(2) and report["ess_share/policy"] == 1
    assert report["ess/careful"] == pytest.approx(2)  # of the one state that keeps any of it
    assert report["weight_var"] == pytest.approx(0.81 * 1.9**2 / 0.81 * 2 / 9)
    # Weights 3, 1, 0 and 1, 1, 1, 1 of two states that take turns: 16 / 10 of 3 and 4 of 4.
    report = metrics.diagnostics(
        *[zeros] * 3, torch.tensor([3.0, 1, 1, 1, 0, 1, 1]), ["policy"] * 7, list("abababb")
    )
    assert report["ess"] == pytest.approx((1.6 + 4) / 2)
    assert report["ess_share"] == pytest.approx((1.6 / 3 + 1) / 2)
    with pytest.raises(ValueError, match="7 sources for 2 states"):
        metrics.diagnostics(*[zeros] * 3, None, ["policy"] * 7, [1, 2])


def test_diagnostics_relate_ess_to_the_variance_of_the_weights():
    w, zeros = (2 * torch.randn(50, generator=generator(0))).exp(), torch.zeros(50)
    report = metrics.diagnostics(zeros, zeros, zeros, w, ["policy"] * 50)
    assert 1 / report["ess_share"] == pytest.approx(
        1 + report["weight_var"] / w.mean().item() ** 2, rel=1e-5
    )
    assert report["weight_q95"] == pytest.approx(w.quantile(0.95).item())


def test_diagnostics_of_extreme_weights_are_finite():
    values, weights = (
        torch.ones(3),
        grpo.importance_weights(torch.tensor([0.0, -1.0, -2e3]), torch.tensor([-1e3] * 3)),
    )
    report = metrics.diagnostics(values, values, values, weights, ["policy", "policy", "careful"])
    assert all(math.isfinite(value) for value in report.values())


def test_diagnostics_without_densities_say_nothing_about_weights():
    report = metrics.diagnostics(
        *torch.rand(3, 2, generator=generator(0)), None, ["policy", "hasty"]
    )
    assert set(report) == {
        name + suffix for name in ("clip_fraction", "kl") for suffix in ("", "/policy", "/hasty")
    }


def test_diagnostics_refuse_what_does_not_fit():
    values = torch.zeros(2)
    with pytest.raises(ValueError, match="weights"):
        metrics.diagnostics(
            values, values, values, torch.tensor([1.0, math.nan]), ["policy", "policy"]
        )
    with pytest.raises(ValueError, match="sources"):
        metrics.diagnostics(values, values, values, None, ["policy"])
    with pytest.raises(ValueError, match="sources"):
        metrics.diagnostics(values[:0], values[:0], values[:0], None, [])
