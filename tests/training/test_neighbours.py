"""The methods next door: each term against a worked example, a loop over tokens and finite
differences; each mean over tokens against its definition."""

import itertools
import math
from dataclasses import fields

import pytest
import torch
from test_grpo import BETA, EPS, gradient, random_batch

import grpo
from training.method import MethodSettings
from training.neighbours import EXPERT_TERMS, action_length, luffy_term, rl_plus_term

CHOICES = {setting.name: setting.metadata["choices"] for setting in fields(MethodSettings)}
LOSS_MEANS = CHOICES["loss_mean"]
LIMIT = 7
OTHERS = ["luffy", "rl-plus"]


def mixed_batch(seed: int, **sizes) -> dict[str, torch.Tensor]:
    """A batch whose actions are in part an expert's, of each group at least one and not all."""
    batch = random_batch(seed, **sizes)
    batch["logp"].clamp_(max=-0.01)  # probabilities
    batch["expert"] = torch.zeros(batch["advantages"].shape, dtype=torch.bool)
    batch["expert"][:, 1::2] = True
    return batch


def of_length(loss_mean: str, mask: torch.Tensor):
    """action_length where `mask` is the global batch."""
    return action_length(loss_mean, mask, mask.sum().item() / len(mask), LIMIT)


# -------------------------------------------------------------------------------- an expert's token


def log(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def test_luffys_term_in_a_worked_example():
    # f(0.1) = 0.1 / 0.2, f(0.4) = 0.4 / 0.5, f(0.9) = 0.9 / 1.0
    found = luffy_term(log(0.1, 0.4, 0.9), log(0.5, 0.5, 0.5), torch.tensor([2.0, -1.0, 1.0]))
    assert found.tolist() == pytest.approx([1.0, -0.8, 0.9])


def test_luffys_gradient_is_largest_for_tokens_of_a_tenth():
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    logp = p.log().requires_grad_()
    luffy_term(logp, logp.detach(), torch.tensor(3.0)).sum().backward()
    f = p / (p + 0.1)
    torch.testing.assert_close(logp.grad, 3 * f * (1 - f))
    assert p[logp.grad.argmax()].item() == pytest.approx(0.1)


def test_rl_plus_term_in_a_worked_example():
    # p = 0.5, p_old = 0.2: the expert's density is 0.6, the ratio 1 / 0.8, (1 - 0.5)^0.5 = 0.70711.
    # p = p_old = 0.25: 4 p / (3 p + 1) = 1 / 1.75.
    found = rl_plus_term(log(0.5, 0.25), log(0.2, 0.25), torch.tensor([1.0, -2.0]))
    assert found.tolist() == pytest.approx([1.25 * math.sqrt(0.5), -2 / 1.75 * math.sqrt(0.75)])


def test_a_token_that_the_policy_is_sure_of_has_no_more_to_teach_by_rl_plus():
    logp = torch.zeros(3, requires_grad=True)
    rl_plus_term(logp, torch.zeros(3), torch.ones(3)).sum().backward()
    assert logp.grad.tolist() == [0.0, 0.0, 0.0]
    assert rl_plus_term(torch.tensor(1e-7), torch.tensor(0.0), torch.tensor(1.0)) == 0  # p > 1


def with_term(batch: dict, term) -> dict:
    """The arguments of ekipl_loss for a batch whose experts' tokens have this term."""
    return {**batch, "expert": (batch["expert"], term) if term else None}


def loop_loss(batch: dict, expert_loss: str, loss_mean: str) -> float:
    """The loss by the words of its definition: one token at a time, Python floats only."""
    all_tokens, groups, total = int(batch["mask"].sum()), len(batch["mask"]), 0.0
    for b, group in enumerate(batch["mask"]):
        sums = []
        for g, action in enumerate(group):
            tokens = []
            for t in action.nonzero().flatten().tolist():
                logp, old, ref = (
                    batch[name][b, g, t].item() for name in ("logp", "old_logp", "ref_logp")
                )
                p, p_old, a = math.exp(logp), math.exp(old), batch["advantages"][b, g].item()
                clipped = min(max(p / p_old, 1 - EPS), 1 + EPS)
                value = min(p / p_old * a, clipped * a)
                value -= BETA * (math.exp(ref - logp) - (ref - logp) - 1)
                if batch["expert"][b, g] and expert_loss == "luffy":
                    value = a * p / (p + 0.1)
                elif batch["expert"][b, g] and expert_loss == "rl-plus":
                    value = a * math.sqrt(1 - p) * 2 * p / (p_old + (p_old + 1) / 2)
                tokens.append(value)
            if tokens:
                over = {"action": len(tokens), "constant": LIMIT, "token": 1}[loss_mean]
                sums.append(sum(tokens) / over)
        over = all_tokens / groups if loss_mean == "token" else len(sums)
        total += sum(sums) / over
    return -total


@pytest.mark.parametrize("loss_mean", LOSS_MEANS)
@pytest.mark.parametrize("expert_loss", EXPERT_TERMS)
@pytest.mark.parametrize("seed", range(2))
def test_loss_is_its_definition_token_by_token(expert_loss, loss_mean, seed):
    batch = mixed_batch(seed)
    assert len({int(actions.any(-1).sum()) for actions in batch["mask"]}) > 1  # ragged groups
    loss, _ = grpo.ekipl_loss(
        **with_term(batch, EXPERT_TERMS[expert_loss]),
        clip_eps=EPS,
        beta=BETA,
        length=of_length(loss_mean, batch["mask"]),
    )
    assert loss.item() == pytest.approx(loop_loss(batch, expert_loss, loss_mean), rel=1e-6)


@pytest.mark.parametrize("loss_mean", LOSS_MEANS)
@pytest.mark.parametrize("expert_loss", EXPERT_TERMS)
def test_gradient_is_that_of_finite_differences(expert_loss, loss_mean):
    batch, step = mixed_batch(5, b=2, g=3, t=4), 1e-5
    options = dict(length=of_length(loss_mean, batch["mask"]))
    exact = gradient(with_term(batch, EXPERT_TERMS[expert_loss]), **options)
    assert exact[batch["expert"]].abs().max() > 0.005
    term, unlikely = EXPERT_TERMS[expert_loss], (1 - batch["logp"].exp()).sqrt()
    if expert_loss == "rl-plus":  # its weight has no gradient: differences must leave it as it is

        def term(logp, old_logp, advantage):
            p, old = logp.exp(), old_logp.exp()
            return 2 * p / (1.5 * old + 0.5) * unlikely * advantage

    for index in itertools.product(range(2), range(3), range(4)):
        losses = []
        for sign in (1, -1):
            moved = {**batch, "logp": batch["logp"].clone()}
            moved["logp"][index] += sign * step
            losses.append(grpo.ekipl_loss(**with_term(moved, term), **options)[0].item())
        assert exact[index].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("expert_loss", OTHERS)
def test_an_experts_token_has_neither_clip_nor_kl_and_the_policys_keeps_both(expert_loss):
    batch, term = mixed_batch(3, t=20), EXPERT_TERMS[expert_loss]
    expert = batch["expert"]
    plain, own = gradient(with_term(batch, None)), ~expert
    found = gradient(with_term(batch, term))
    assert torch.equal(found[own], plain[own])
    assert ((found == 0)[expert] == ~batch["mask"][expert]).all()  # each of its tokens teaches
    elsewhere = {**batch, "ref_logp": batch["ref_logp"] - 1}
    assert torch.equal(gradient(with_term(elsewhere, term))[expert], found[expert])
    assert not torch.equal(gradient(with_term(elsewhere, term))[own], found[own])
    usual, stats = (grpo.ekipl_loss(**with_term(batch, t))[1] for t in (None, term))
    assert usual["clip_fraction"][expert].max() > 0 == stats["clip_fraction"][expert].max()
    for name in ("objective", "kl", "clip_fraction"):
        assert torch.equal(stats[name][own], usual[name][own])


@pytest.mark.parametrize("expert_loss", OTHERS)
@pytest.mark.parametrize("logp", [0.0, -1e6, -3e38])
@pytest.mark.parametrize("other", [0.0, -1e6, -3e38])
def test_extreme_inputs_give_finite_results(expert_loss, logp, other):
    batch = {
        "logp": torch.full((1, 2, 4), logp),
        "old_logp": torch.full((1, 2, 4), other),
        "ref_logp": torch.full((1, 2, 4), other),
        "mask": torch.ones(1, 2, 4, dtype=torch.bool),
        "advantages": torch.tensor([[5.0, -5.0]]),
        "expert": torch.tensor([[True, True]]),
    }
    term = EXPERT_TERMS[expert_loss]
    loss, stats = grpo.ekipl_loss(**with_term(batch, term))
    results = (loss, gradient(with_term(batch, term)), *stats.values())
    assert all(value.isfinite().all() for value in results)


def test_who_is_an_expert_must_be_told_of_each_action():
    batch = mixed_batch(1)
    with pytest.raises(ValueError, match="^expert has shape"):
        grpo.ekipl_loss(**{**batch, "expert": (batch["expert"][:, :1], luffy_term)})


# ---------------------------------------------------------------------------------- means of tokens


def test_means_over_tokens_in_a_worked_example():
    # At ratio 1 and beta 0 a token's objective is its action's advantage: 1 for two tokens, and -1
    # for six.
    mask = torch.arange(6) < torch.tensor([[[2], [6]]])
    logp = torch.zeros(1, 2, 6)
    inputs = (logp, logp, None, mask, torch.tensor([[1.0, -1.0]]))
    found = {}
    for mean in LOSS_MEANS:
        length = action_length(mean, mask, tokens=8.0, limit=10)
        found[mean] = grpo.ekipl_loss(*inputs, beta=0.0, length=length)[0].item()
    assert found["action"] == pytest.approx(-(1 - 1) / 2)
    assert found["constant"] == pytest.approx(-(2 - 6) / 10 / 2)
    assert found["token"] == pytest.approx(-(2 - 6) / 8)


@pytest.mark.parametrize("loss_mean", ["token", "constant"])
def test_every_token_counts_the_same_whatever_its_action_and_group(loss_mean):
    batch = random_batch(4)
    batch |= {"logp": batch["old_logp"].clone(), "advantages": torch.ones(3, 4).double()}
    if loss_mean == "constant":  # of any length, in groups of one size: the last has one less
        batch = {name: value[:2] for name, value in batch.items()}
    found = gradient(batch, beta=0.0, length=of_length(loss_mean, batch["mask"]))[batch["mask"]]
    torch.testing.assert_close(found, found[:1].expand_as(found))
    if loss_mean == "token":  # the mean over all tokens, times the number of groups
        assert found[0].item() == pytest.approx(-3 / batch["mask"].sum().item())


@pytest.mark.parametrize("loss_mean", LOSS_MEANS)
def test_micro_batches_sum_to_the_full_batch(loss_mean):
    batch = mixed_batch(6, b=6)
    tokens = batch["mask"].sum().item() / 6
    whole = gradient(with_term(batch, luffy_term), length=of_length(loss_mean, batch["mask"]))
    for size in (1, 2, 4):
        parts = []
        for i in range(0, 6, size):
            part = {name: value[i : i + size] for name, value in batch.items()}
            length = action_length(loss_mean, part["mask"], tokens, LIMIT)
            parts.append(gradient(with_term(part, luffy_term), length=length))
        torch.testing.assert_close(torch.cat(parts), whole)


def test_the_command_line_offers_every_term_and_estimator():
    assert CHOICES["expert_loss"] == tuple(EXPERT_TERMS)
    assert CHOICES["estimator"] == grpo.ESTIMATORS


def test_the_settings_default_to_the_paper():
    settings = MethodSettings()
    assert EXPERT_TERMS[settings.expert_loss] is None
    assert action_length(settings.loss_mean, None, 0, 0) is None
    assert settings.advantage_std and settings.experts_when == "always"
