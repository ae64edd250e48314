"""ekipl.update against a loop of its own: eager attention, one prompt and one action at a time,
each equation written out.

Nothing here but the fixed groups comes from the code under test: advantages (Eq 1), ratio, clip and
KL (Eq 2, 3), the weights of A.5, the estimators of A.7, the clipping of gradients and AdamW stand
below as the paper and PyTorch's manual give them, in plain Python numbers where no gradient is
needed.
"""

import math
import random

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import ekipl
from data.state import State
from ekipl import Config
from policy import Policy
from sampling import Action, Group, add_expert_logps, select
from training.distributed import World

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = World(0, 1, torch.device("cpu"))
TEMPERATURE, CLIP, G = 1.4, 0.2, 4
BETAS, ADAM_EPS, DECAY = (
    (0.9, 0.999),
    1e-3,
    0.1,
)  # a large eps: noise in a gradient near 0 stays noise
RATES = (5e-4, 4e-4)  # of two batches, one after the other; neither is the optimizer's own


# ------------------------------------------------------------------------------------- fixed groups


def states() -> list[State]:
    """One picture, two, none, one."""
    picture = Image.linear_gradient("L")
    one, two = ((64, 32),), ((32, 32), (48, 64))
    images = [
        [picture.rotate(40 * i + j).resize(size).convert("RGB") for j, size in enumerate(sizes)]
        for i, sizes in enumerate((one, two, (), one))
    ]
    questions = "how many red cubes ?", "first or second image ?", "how many ?", "are there two ?"
    return [
        State(str(i), tuple(pictures), question, "1", "discrete")
        for i, (pictures, question) in enumerate(zip(images, questions, strict=True))
    ]


SOURCES = [  # of each state's actions; the experts do not always answer
    ["policy"] * 3 + ["careful"] * 3 + ["quick"] * 3,
    ["policy"] * 3 + ["quick"] * 3,
    ["policy"] * 3,
    ["policy"] * 3 + ["careful"] * 2 + ["quick"] * 3,
]


def made_groups(policy: Policy, batch: int) -> list[Group]:
    """Seeded actions of 1 to 7 tokens, some cut off before EOS, some said twice; rewards with
    ties."""
    rng = random.Random(batch)
    words = allowed(policy.tokenizer)
    groups = []
    for state, prompt, sources in zip(states(), policy.encode(states()), SOURCES, strict=True):
        actions = []
        for source in sources:
            tokens = [rng.choice(words) for _ in range(rng.randint(1, 7))]
            truncated = rng.random() < 0.3
            ended = tokens if truncated else [*tokens, policy.eos_id]
            actions.append(Action(ended, "", source, truncated))
        actions[-1].tokens = list(actions[0].tokens)  # an expert says what the policy says
        actions[1].tokens = list(actions[0].tokens)
        group = Group(state, prompt, actions)
        group.format = [rng.choice([0.0, 1.0]) for _ in actions]
        group.accuracy = [rng.choice([0.0, 0.5, 1.0]) for _ in actions]
        group.accuracy[0] = 1.5 - group.format[0]  # never all equal
        groups.append(group)
    return groups


class Densities(dict):
    """An expert that tells the density of every action: about that of a model, or 0."""

    def __init__(self, name: str, seed: int, model: "Plain"):
        self.name, self.rng, self.model = name, random.Random(seed), model

    def logp(self, state: State, action: Action) -> float:
        key = (state.id, tuple(action.tokens))
        if key not in self:
            never = self.rng.random() < 0.2 and action.source != self.name
            with torch.no_grad():
                near = self.model.logp(state, action.tokens).sum().item()
            self[key] = -math.inf if never else near + self.rng.uniform(-2, 2)
        return self[key]


# ----------------------------------------------------------------------------------------- the loop


def allowed(tokenizer) -> list[int]:
    """What a response may hold besides EOS: known words, no special token."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [token for token in range(len(tokenizer)) if token not in special]


class Plain:
    """transformers' own model with eager attention, one sequence at a time."""

    def __init__(self, path):
        self.model = AutoModelForImageTextToText.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float64
        )
        self.processor = AutoProcessor.from_pretrained(path)

    def logp(self, state: State, tokens: list[int]) -> torch.Tensor:
        """log pi of each token, (T,)."""
        text = self.processor.apply_chat_template(
            state.messages(), tokenize=False, add_generation_prompt=True
        )
        inputs = self.processor(text=[text], images=list(state.images) or None, return_tensors="pt")
        start = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(
            inputs["mm_token_type_ids"], (0, len(tokens))
        )
        logits = self.model(**inputs, use_cache=False).logits[0, start - 1 : -1]  # (T, V)
        words = [*allowed(self.processor.tokenizer), self.processor.tokenizer.eos_token_id]
        logp = (logits[:, words] / TEMPERATURE).log_softmax(-1)
        return torch.stack([logp[t, words.index(token)] for t, token in enumerate(tokens)])


def top(rewards: list[float], g: int) -> list[int]:
    """The g best, the first of equals first."""
    left, kept = list(range(len(rewards))), []
    while left and len(kept) < g:
        best = max(left, key=lambda i: (rewards[i], -i))
        kept.append(best)
        left.remove(best)
    return kept


def advantages(rewards: list[float], kept: list[int], baseline: str) -> list[float]:
    """Eq 1."""
    compared = rewards if baseline == "candidates" else [rewards[i] for i in kept]
    mean = sum(compared) / len(compared)
    std = math.sqrt(sum((r - mean) ** 2 for r in compared) / (len(compared) - 1))
    if min(compared) == max(compared):
        return [0.0] * len(kept)
    return [(rewards[i] - mean) / (std + 1e-4) for i in kept]


def weight(group: Group, i: int, old: float, experts: list, selection: str) -> float:
    """A.5: w_S = pi_old / q times q(S), from probabilities as they are."""
    sources = [action.source for action in group.actions]
    q = sources.count("policy") / len(sources) * math.exp(old)
    for expert in experts:
        share = sources.count(expert.name) / len(sources)
        q += share * math.exp(expert.logp(group.state, group.actions[i])) if share else 0.0
    if selection == "random":
        return math.exp(old) / q
    threshold = sorted(group.rewards, reverse=True)[: len(group.kept)][-1]
    return math.exp(old) / q * sum(r >= threshold for r in group.rewards) / len(sources)


def objective(
    logp, old, ref, advantage: float, beta: float, method: str, length: float
) -> tuple[torch.Tensor, float, float]:
    """Eq 2 and 3 of one action: f_i, with its KL and the share of its tokens that are clipped.

    method: whose objective its tokens have; other papers' have no clip and no KL.
    """
    total, kls, clipped = 0.0, 0.0, 0
    for theta, before, frozen in zip(logp, old.tolist(), ref.tolist(), strict=True):
        rho = (theta - before).exp()  # Eq 2
        d = frozen - theta
        kl = d.exp() - d - 1
        if method != "ekipl":
            p, before = theta.exp(), math.exp(before)
            luffy = p / (p + 0.1)
            rl_plus = (1 - p.item()) ** 0.5 * p / (before / 2 + (before + 1) / 4)
            total = total + advantage * (luffy if method == "luffy" else rl_plus)
            kls += kl.item()
            continue
        inside = rho.clamp(1 - CLIP, 1 + CLIP) * advantage
        smaller = rho * advantage if (rho * advantage < inside) else inside
        clipped += (advantage > 0 and rho > 1 + CLIP) or (advantage < 0 and rho < 1 - CLIP)
        total, kls = total + smaller - beta * kl, kls + kl.item()
    return total / length, kls / len(logp), float(clipped) / len(logp)


def length_of(config, group: Group, action, groups: list[Group]) -> float:
    """What an action's sum over tokens is divided by, before the mean over its group."""
    if config.loss_mean == "action":
        return len(action.tokens)
    if config.loss_mean == "constant":
        return config.max_new_tokens
    tokens = [len(kept.tokens) for each in groups for kept in each.kept_actions]
    return sum(tokens) / len(groups) / len(group.kept)


def combined(estimator: str, values: list, weights: list[float]):
    """A.7: (A), (B) or (C) of one group."""
    if estimator == "uncorrected":
        return sum(values) / len(values)
    weighted = sum(w * f for w, f in zip(weights, values, strict=True))
    return weighted / (len(values) if estimator == "is" else sum(weights))


class AdamW:
    """PyTorch's manual, line by line."""

    def __init__(self, parameters):
        self.parameters, self.t = list(parameters), 0
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    def step(self, lr: float, limit: float) -> float:
        """Clips the gradient to `limit` and steps; returns its norm before."""
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in self.parameters))
        self.t += 1
        with torch.no_grad():
            for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
                gradient = p.grad * min(1.0, limit / (norm + 1e-6))
                p *= 1 - lr * DECAY
                m += (1 - BETAS[0]) * (gradient - m)
                v += (1 - BETAS[1]) * (gradient**2 - v)
                m_hat, v_hat = m / (1 - BETAS[0] ** self.t), v / (1 - BETAS[1] ** self.t)
                p -= lr * m_hat / (v_hat.sqrt() + ADAM_EPS)
                p.grad = None
        return norm


def loop(config, plain: Plain, reference, optimizer: AdamW, groups, experts, lr: float) -> dict:
    """What ekipl.update does, as the paper says it."""
    with torch.no_grad():
        old, ref = (
            [[m.logp(g.state, a.tokens) for a in g.kept_actions] for g in groups]
            for m in (plain, reference)
        )
    weights = [
        [weight(g, i, lp.sum().item(), experts, config.selection) for i, lp in zip(g.kept, before)]
        for g, before in zip(groups, old, strict=True)
    ]
    losses, norms = [], []
    for _ in range(config.updates_per_batch):
        loss, rows = 0.0, []
        for g, before, frozen, w in zip(groups, old, ref, weights, strict=True):
            gains, told = advantages(g.rewards, g.kept, config.advantage), []
            for a, b, f, gain in zip(g.kept_actions, before, frozen, gains, strict=True):
                method = "ekipl" if a.source == "policy" else config.expert_loss
                length = length_of(config, g, a, groups)
                logp = plain.logp(g.state, a.tokens)
                told.append(objective(logp, b, f, gain, config.beta, method, length))
            values = [f for f, _, _ in told]
            loss = loss - combined(config.estimator, values, w) / len(groups)
            rows.append(
                {
                    "objective": [f.item() for f in values],
                    "kl": [kl for _, kl, _ in told],
                    "clip_fraction": [c for *_, c in told],
                    "weights": w,
                }
            )
        loss.backward()
        losses.append(loss.item())
        norms.append(optimizer.step(lr, config.max_grad_norm))
    count = config.updates_per_batch
    return {"rows": rows, "loss": sum(losses) / count, "grad_norm": sum(norms) / count}


# ------------------------------------------------------------------------------- both, side by side


CASES = [
    dict(estimator="uncorrected", updates_per_batch=1, micro_batch=3),
    dict(estimator="uncorrected", updates_per_batch=3, micro_batch=2),
    dict(estimator="is", updates_per_batch=1, micro_batch=4),
    dict(estimator="is", updates_per_batch=3, micro_batch=1),
    dict(estimator="snis", updates_per_batch=1, micro_batch=2),
    dict(estimator="snis", updates_per_batch=3, micro_batch=3),
    dict(estimator="is", selection="random", updates_per_batch=3, micro_batch=2),
    dict(estimator="snis", selection="random", advantage="selected", micro_batch=1),
    dict(estimator="uncorrected", advantage="selected", updates_per_batch=3, beta=0.0),
    dict(expert_loss="luffy", loss_mean="constant", max_new_tokens=6, updates_per_batch=3),
    dict(expert_loss="rl-plus", loss_mean="token", updates_per_batch=3, micro_batch=1),
]


def in_double(monkeypatch):
    """transformers' norms, angles and softmax are float32 whatever a model's dtype. Their noise of
    1e-6, another one on every processor, is a thousandth after six updates: float64 instead."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def moved(directory, path):
    """A reference that is not the policy, so that the KL term has a gradient from the start."""
    policy = Policy.load(directory)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.02)
    policy.save(path)
    return path


@pytest.fixture(scope="module")
def other_dir(random_model_dir, tmp_path_factory):
    return moved(random_model_dir, tmp_path_factory.mktemp("reference"))


def test_updates_of_qwen3_vl_are_those_of_plain_passes(random_qwen3_dir, tmp_path, monkeypatch):
    """Deepstack, its positions, its norms of queries and keys."""
    changes = dict(estimator="snis", updates_per_batch=3, micro_batch=3)
    test_updates_are_those_of_plain_passes_one_action_at_a_time(
        random_qwen3_dir, moved(random_qwen3_dir, tmp_path), changes, monkeypatch
    )


@pytest.mark.parametrize(
    "changes", CASES, ids=lambda changes: " ".join(str(v) for v in changes.values())
)
def test_updates_are_those_of_plain_passes_one_action_at_a_time(
    random_model_dir, other_dir, changes, monkeypatch
):
    limits = dict(max_grad_norm=0.5, clip_eps=CLIP, group_size=G, batch_size=4)
    config = Config(**{**limits, "beta": 0.04, "micro_batch": 8, **changes})
    policy = Policy.load(
        random_model_dir, temperature=TEMPERATURE, logit_chunk=5, dtype=torch.float64
    )
    reference = (
        Policy.load(other_dir, temperature=TEMPERATURE, dtype=torch.float64)
        if config.beta
        else None
    )
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=1.0, betas=BETAS, eps=ADAM_EPS, weight_decay=DECAY
    )
    plain, frozen = Plain(random_model_dir), Plain(other_dir)
    assert plain.model.config.text_config.num_key_value_heads >= 2
    theirs = AdamW(plain.model.parameters())
    experts = [Densities("careful", 1, frozen), Densities("quick", 2, frozen)]
    in_double(monkeypatch)
    for batch, lr in enumerate(RATES):
        groups = made_groups(policy, batch)
        rng = random.Random(batch)
        select(groups, G, config.advantage, "policy_first", config.selection, rng)
        add_expert_logps(groups, experts)
        if config.selection == "top":
            assert [g.kept for g in groups] == [top(g.rewards, G) for g in groups]
        found = ekipl.update(config, policy, reference, optimizer, groups, CPU, lr)
        expected = loop(config, plain, frozen, theirs, groups, experts, lr)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert expected["grad_norm"] > 2 * config.max_grad_norm
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for group, row in zip(groups, expected["rows"], strict=True):
            row = row if config.beta else {**row, "kl": [0.0] * len(row["kl"])}
            assert group.measured.keys() == row.keys()
            for name, values in group.measured.items():
                assert values == pytest.approx(row[name], rel=1e-5, abs=1e-6)
        if config.updates_per_batch > 1:
            assert any(sum(row["clip_fraction"]) for row in expected["rows"])
        names = dict(plain.model.named_parameters())
        for name, parameter in policy.model.named_parameters():
            # A step is lr at most: an error in the gradient of a ten-thousandth shows.
            difference = (parameter - names[name]).abs().max().item()
            assert difference < 2e-4 * lr, (batch, name, difference)
