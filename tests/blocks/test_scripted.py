"""The scripted experts score what Table 1 says, and their samples follow their density."""

import itertools
import math
from collections import Counter

import pytest
from conftest import agrees
from PIL import Image

from blocks.dataset import BlocksSet
from blocks.scripted import ScriptedExpert
from data.state import SETS, State
from experts.roster import make_experts
from rewards import accuracy_reward, accuracy_score, format_reward
from sampling import Action, Sample, expert_action

TABLE_1 = {  # in percent, as printed: the rows of GPT-4o and of Gemini-1.5-Pro
    "careful": dict(zip((*SETS["counting"], *SETS["structure"], *SETS["transformation"]),
                        (68.10, 34.31, 50.18, 43.49, 42.55, 28.67, 29.76), strict=True)),
    "quick": dict(zip((*SETS["counting"], *SETS["structure"], *SETS["transformation"]),
                      (61.80, 37.50, 50.12, 48.38, 26.22, 18.76, 19.88), strict=True)),
}  # fmt: skip
TEST_SETS = [name for names in SETS.values() for name in names]
TRAIN_SETS = [f"{task}-{split}" for task in SETS for split in ("train", "val")]

EXPERTS = make_experts("careful,quick")
each_expert = pytest.mark.parametrize("expert", EXPERTS, ids=lambda expert: expert.name)


def some(name: str, count: int = 60) -> list:
    return [BlocksSet(name, count)[i] for i in range(count)]


@each_expert
@pytest.mark.parametrize("name", [*TRAIN_SETS, *TEST_SETS])
def test_the_expected_score_of_every_question_is_table_1s(expert, name):
    for state in some(name, 150 if "structure" in name else 50):
        density = expert.density(state)
        assert math.fsum(density.values()) == pytest.approx(1.0, abs=1e-12)
        assert all(0 < probability < 1 for probability in density.values()) and len(density) > 1
        scores = []
        for text, probability in density.items():
            scores.append(probability * accuracy_score(text, state.answer, state.kind))
        # Questions of training and validation are like those of the test set in distribution.
        task, split = name.split("-")
        like = f"{task}-id" if split in ("train", "val") else name
        printed = TABLE_1[expert.name][like] / 100
        assert math.fsum(scores) == pytest.approx(printed, abs=1e-12), state


@pytest.mark.parametrize("name", ["counting-train", "counting-ood", "transformation-id"])
def test_an_expert_of_a_given_accuracy_has_it_on_every_set(name):
    (expert,) = make_experts("quick:0.05")
    for state in some(name):
        scores = []
        for text, probability in expert.density(state).items():
            scores.append(probability * accuracy_score(text, state.answer, state.kind))
        assert math.fsum(scores) == pytest.approx(0.05, abs=1e-12)
        (table1,) = make_experts("quick")
        assert set(expert.density(state)) == set(table1.density(state))  # the same words


@pytest.mark.parametrize("spec, says", [
    ("careful:0", "right in 30 %"), ("careful:1", "right in 30 %"), ("quick:", "right in 30 %"),
    ("quick:nan", "right in 30 %"), ("careful:0.3,careful", "named twice"),
    ("slow:0.3", "no expert"),
])  # fmt: skip
def test_a_wrong_accuracy_is_refused(spec, says):
    with pytest.raises(ValueError, match=says):
        make_experts(spec)


@each_expert
@pytest.mark.parametrize("name", [*TRAIN_SETS, *TEST_SETS])
def test_every_answer_has_the_format(expert, name):
    for state in some(name, 20):
        assert all(format_reward(text) == 1.0 for text in expert.density(state))


@each_expert
@pytest.mark.parametrize("name", ["counting-train", "structure-ood", "transformation-left"])
def test_samples_follow_the_density(expert, name):
    state = some(name, 1)[0]
    (samples,) = expert.sample([state], 3000, seed=0)
    assert agrees(Counter(sample.text for sample in samples), expert.density(state))


@each_expert
@pytest.mark.parametrize("name", [*TRAIN_SETS, *TEST_SETS])
def test_the_density_of_a_sampled_action_survives_its_tokens(expert, name, blocks_policy):
    for state in some(name, 4):
        (samples,) = expert.sample([state], 6, seed=1)
        for sample in samples:
            action = expert_action(blocks_policy, sample, expert.name, 500)
            assert (
                expert.logp(state, action)
                == math.log(expert.density(state)[sample.text])
                == sample.logp
                == action.expert_logp
            )
            assert format_reward(action.text) == 1.0


@each_expert
def test_a_cut_action_has_the_density_of_all_texts_that_begin_with_it(expert, blocks_policy):
    state = some("counting-id", 1)[0]
    density = expert.density(state)
    for text, limit in itertools.product(density, (1, 4, 12, 30)):
        action = expert_action(blocks_policy, Sample(text), expert.name, limit)
        if action.truncated:
            same = [
                p for other, p in density.items() if other.split()[:limit] == text.split()[:limit]
            ]
            assert expert.logp(state, action) == pytest.approx(math.log(sum(same)))
    never = Action(action.tokens, "<think> 3", expert.name, truncated=True)
    assert expert.logp(state, never) == -math.inf


@each_expert
def test_what_it_never_says_has_density_zero(expert, blocks_policy):
    state = some("counting-id", 1)[0]
    text = next(iter(expert.density(state)))
    for other in ("", "<think> </think> <answer> 3 </answer>", text + " 3"):
        action = expert_action(blocks_policy, Sample(other), expert.name, 500)
        assert expert.logp(state, action) == -math.inf


@each_expert
@pytest.mark.parametrize("name", TEST_SETS)
def test_each_expert_thinks_in_its_own_way(expert, name):
    for state in some(name, 10):
        thought, share = state.problem.think(expert.name), TABLE_1[expert.name][name] / 100
        right = f"<think> {thought} </think> <answer> {state.answer} </answer>"
        if state.kind == "function":  # each change is noticed by itself
            share **= len(state.problem.functions())
        assert expert.density(state)[right] == pytest.approx(share, abs=1e-12)


def test_the_words_of_quick_do_not_tell_its_right_counts_from_its_wrong_ones():
    quick = EXPERTS[1]
    for state in some("counting-id", 20):
        thoughts = {text.partition("<answer>")[0] for text in quick.density(state)}
        assert len(quick.density(state)) > 1 and len(thoughts) == 1


@each_expert
def test_a_sample_follows_from_seed_and_state_alone(expert):
    states = some("transformation-train", 5)
    together = expert.sample(states, 8, seed=3)
    assert [len(texts) for texts in together] == [8] * 5
    for state, texts in zip(states, together, strict=True):
        assert expert.sample([state], 8, seed=3) == [texts]
    assert expert.sample(states[::-1], 8, seed=3) == together[::-1]
    assert expert.sample(states, 8, seed=4) != together
    assert len(set(together[0])) > 1  # n draws, not one repeated


def test_two_experts_do_not_err_together():
    # A shared seed must not make both right on the same draws.
    states = some("counting-train", 40)
    drawn = [expert.sample(states, 10, seed=0) for expert in EXPERTS]
    both = 0
    for state, *samples in zip(states, *drawn, strict=True):
        for pair in zip(*samples, strict=True):
            both += (
                all(
                    accuracy_reward(sample.text, state.answer, state.kind) == 1.0 for sample in pair
                )
                / 400
            )
    assert both == pytest.approx(
        0.6810 * 0.6180, abs=0.1
    )  # four standard deviations; together it would be near 0.62


def test_an_expert_can_be_asked_about_the_blocks_world_only():
    foreign = State("photo-17", (Image.new("RGB", (8, 8)),), "how many ?", "3", "math")
    expert = ScriptedExpert("careful")
    for ask in (
        lambda: expert.sample([foreign], 2, 0),
        lambda: expert.logp(foreign, Action([1], "", "careful")),
    ):
        with pytest.raises(ValueError, match="'careful'.*blocks world.*'photo-17'"):
            ask()


@pytest.mark.parametrize("names, expected", [
    ("none", []), ("careful", ["careful"]), ("quick,careful", ["quick", "careful"]),
    (" careful , quick ", ["careful", "quick"]),
])  # fmt: skip
def test_experts_are_made_in_the_order_named(names, expected):
    assert [expert.name for expert in make_experts(names)] == expected


@pytest.mark.parametrize("names, message", [
    ("gpt", "no expert 'gpt'; there are careful, quick, openai:MODEL, gemini:MODEL, or none"),
    ("", "no expert ''"), ("careful,", "no expert ''"),
    ("careful,none", "no expert 'none'"), ("careful,careful", "twice"),
    ("quick, careful ,quick", "twice"),
])  # fmt: skip
def test_unknown_and_repeated_experts_are_errors(names, message):
    with pytest.raises(ValueError, match=message):
        make_experts(names)
