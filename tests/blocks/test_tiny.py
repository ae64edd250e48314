"""tiny/ is a checkpoint like any other, sees well, and reasons poorly."""

import copy
import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from blocks.dataset import BlocksSet, vocabulary
from data.predictions import with_parts
from data.state import SETS
from evaluate import predictions_of, score_predictions
from policy import Policy
from rollouts.answering import answer_greedily
from rollouts.transformers_sampler import TransformersSampler

TINY = Path(__file__).resolve().parents[2] / "blocks" / "tiny"


@pytest.fixture(scope="session")
def policy() -> Policy:
    return Policy.load(TINY)


def test_it_loads_like_any_other_and_is_small():
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(TINY),
        AutoProcessor.from_pretrained(TINY),
    )
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2VLProcessor" and processor.video_processor is not None
    assert sum(p.numel() for p in model.parameters()) < 1.5e6
    assert sum(file.stat().st_size for file in TINY.glob("*.safetensors")) < 4e6
    assert "<|image_pad|>" in processor.apply_chat_template(
        BlocksSet("counting-id", 1)[0].messages(), tokenize=False
    )


def test_every_word_of_the_world_is_one_token_and_comes_back(policy):
    text = " ".join(vocabulary())
    ids = policy.tokenizer(text).input_ids
    assert len(ids) == len(vocabulary()) and policy.tokenizer.unk_token_id not in ids
    assert policy.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_its_losses_are_on_record():
    rows = list(csv.DictReader(open(TINY / "losses.csv")))
    assert {row["phase"] for row in rows} == {"name", "see", "glance"}
    see = [float(row["loss"]) for row in rows if row["phase"] == "see"]
    assert see[-1] < 0.2 * see[0]


def answers(policy: Policy, ask: str) -> dict[str, dict[str, float]]:
    """Scores of the greedy answers to a request, by set and part."""
    sampler, said = TransformersSampler(policy, max_new_tokens=96), {}
    for names in SETS.values():
        for name in names:
            states = [dataclasses.replace(state, ask=ask) for state in BlocksSet(name, 100)]
            said[name] = predictions_of(states, answer_greedily(sampler, states))
    return {name: score_predictions(ps) for name, ps in with_parts(said).items()}


@pytest.fixture(scope="session")
def glances(policy):
    return answers(policy, "")


@pytest.fixture(scope="session")
def checks(policy):
    return answers(policy, "check .")


def test_it_answers_some_questions_of_rl_but_not_most(glances):
    for names in SETS.values():
        assert 0.10 <= glances[names[0]]["accuracy"] <= 0.60, glances


def test_it_knows_the_format_and_its_thoughts_are_terse(glances):
    for name, figures in glances.items():
        assert figures["format"] > 0.75 and figures["tokens"] < 40, (name, figures)


def test_asked_to_check_it_can_do_what_takes_one_step_and_not_what_takes_two(checks):
    assert checks["counting-id/one-step"]["accuracy"] > 0.75
    assert checks["counting-id/two-step"]["accuracy"] < 0.30
    assert checks["transformation-id"]["accuracy"] > 0.6 < checks["structure-id"]["accuracy"]


def test_asked_to_check_it_is_worse_out_of_distribution(checks):
    for id_set, *ood_sets in SETS.values():
        for name in ood_sets:
            assert checks[name]["accuracy"] < checks[id_set]["accuracy"] - 0.1, checks


def test_of_structure_ood_it_can_do_shifted_pictures_and_not_choices_by_letter(checks):
    parts = {name: checks[f"structure-ood/{name}"]["accuracy"] for name in ("aside", "letters")}
    assert parts["letters"] < 0.1 < 0.2 < parts["aside"], parts


class Described:
    """A scene with the question that the second phase of training asked of it."""

    def __init__(self, state):
        self.images, self.said = state.images, state.problem.describe()

    def messages(self):
        return [
            {
                "role": "user",
                "content": [
                    *({"type": "image"} for _ in self.images),
                    {"type": "text", "text": "describe ."},
                ],
            }
        ]


def described(policy: Policy, count: int) -> float:
    """The share of so many scenes that it describes without a mistake."""
    states = [Described(BlocksSet("counting-id", count)[i]) for i in range(count)]
    actions = TransformersSampler(policy, max_new_tokens=60).greedy(policy.encode(states))
    return (
        sum(action.text == state.said for action, state in zip(actions, states, strict=True))
        / count
    )


def test_asked_to_describe_a_scene_it_does(policy):
    assert described(policy, 64) > 0.95


@pytest.mark.parametrize(
    "part",
    [
        "visual.blocks.1.",
        "visual.merger.",
        "language_model.layers.1.",
        "language_model.layers.3.self_attn.",
    ],
)
def test_a_description_needs_every_part(policy, part):
    """So the test before notices damage; accuracy does not: it is the same without any vision."""
    damaged = copy.deepcopy(policy)
    weights = [weight for name, weight in damaged.named_parameters() if part in name]
    assert weights
    for weight in weights:
        weight.data.zero_()
    assert described(damaged, 16) < 0.5


def test_its_weights_are_stored_in_bfloat16():
    assert AutoModelForImageTextToText.from_pretrained(TINY).dtype == torch.bfloat16
