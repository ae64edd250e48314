"""Details of the core that no larger test depends on: precision, arguments, rows at a time."""

import logging
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model, random_processor, random_tokenizer
from PIL import Image
from tokenizers import decoders, processors

import attention
import grpo
import rewards
from attention import SharedPrefix
from data import State
from policy import Policy, pack
from rollouts.choice import make_sampler
from rollouts.transformers_sampler import TransformersSampler, prefilled
from sampling import Action, Group, group_log_weights
from training import metrics

pytestmark = pytest.mark.usefixtures("one_thread")
PICTURE = Image.new("RGB", (64, 64), "red")
STATES = [
    State("short", (PICTURE,), "how many ?", "1", "discrete"),
    State("long", (PICTURE, PICTURE), "how many red cubes are there ?", "1", "discrete"),
]


@pytest.fixture(scope="module")
def policy(random_model_dir):
    policy = Policy.load(random_model_dir)
    assert policy.temperature == 1.0  # what is sampled and scored, unless a setting says otherwise
    return policy


# ------------------------------------------------------------------------------------------ grpo.py


def test_equations_take_lists_and_count_in_float32_at_least():
    assert grpo.kl_to_reference([0.0, -1.0], [0.0, -1.0]).tolist() == [0.0, 0.0]
    assert grpo.log_importance_weights([-1.0], [-3.0]).tolist() == [2.0]
    assert grpo.selected_proposal_logp([-1.0], 1.0).tolist() == [-1.0]
    assert grpo.policy_ratio([-1.0], [-1.0]).tolist() == [1.0]
    assert grpo.mixture_logp([[0.0, 0.0]], [0.5, 0.5]).tolist() == [0.0]
    assert grpo.snis_estimate([1.0, 3.0], [1.0, 1.0]).tolist() == 2.0
    half = torch.tensor([-1.0, -300.5]).bfloat16()
    assert grpo.kl_to_reference(half, half).dtype == torch.float32
    assert grpo.log_importance_weights(half, half).dtype == torch.float32


def test_one_density_that_is_no_number_is_an_error():
    for old_logp in ([-1.0, math.nan], [-1.0, math.inf]):
        with pytest.raises(ValueError, match="old_logp"):
            grpo.log_importance_weights(old_logp, [-1.0, -1.0])


def test_diagnostics_are_means_in_double_precision():
    values = torch.tensor([1e8, 1.0, -1e8])  # in float32 their sum is 0
    zeros = torch.zeros(3)
    found = metrics.diagnostics(zeros, values, zeros, None, ["policy"] * 3)
    assert found["kl"] == pytest.approx(1 / 3)


def test_one_unknown_density_makes_the_weights_unknown():
    known, unknown = (
        Group(None, None, [None], kept=[0], expert_logps=logps) for logps in ([[]], None)
    )
    logp = torch.zeros(2, 1, 1)
    assert group_log_weights([known, unknown], logp, 1) is None
    assert group_log_weights([unknown, known], logp, 1) is None


# ------------------------------------------------------------------------------------- attention.py


def shared(policy: Policy) -> SharedPrefix:
    """Two states with two actions each."""
    return pack(policy.encode(STATES), [[[5, 6, 7], [8]], [[9], [5, 6]]]).layout


def test_the_mask_of_actions_has_the_dtype_of_the_scores(policy):
    prefix = shared(policy)
    single, half = prefix.action_mask(torch.float32), prefix.action_mask(torch.bfloat16)
    assert (single.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(single, half.float())
    assert prefix.action_mask(torch.bfloat16) is half  # made once for all layers


def test_a_token_is_a_prompts_or_an_actions(policy):
    prompts = policy.encode(STATES)
    prefix = pack(prompts, [[[5, 6, 7], [8]], [[9], [5, 6]]]).layout
    assert int(prefix.in_prompt.sum()) == sum(len(prompt.input_ids) for prompt in prompts)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_scale_and_further_arguments_reach_the_scores(tokens):
    query, key, value = (torch.randn(2, 4, n, 8) for n in (tokens, 3, 3))
    module = SimpleNamespace(num_key_value_groups=1, is_causal=False)
    for scale in (None, 0.9):
        found, _ = attention.attend(module, query, key, value, None, scaling=scale)
        scores = query @ key.transpose(-1, -2) * (scale or 8**-0.5)
        assert torch.allclose(found, (scores.softmax(-1) @ value).transpose(1, 2), atol=1e-6)
    if tokens > 1:
        found, _ = attention.attend(module, query, key, value, None, is_causal=True)
        assert torch.allclose(found[:, 0], value[:, :, 0], atol=1e-6)  # the first sees itself alone


# ---------------------------------------------------------------------------------------- policy.py


def test_one_weight_that_is_no_number_is_told_at_load(tmp_path):
    tokenizer = random_tokenizer()
    model = random_model(tokenizer)
    next(model.parameters()).data.view(-1)[3] = math.nan
    model.save_pretrained(tmp_path), random_processor(tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="some of its weights are no finite numbers"):
        Policy.load(tmp_path)


def test_one_log_prob_that_is_no_number_is_told_at_load(random_model_dir):
    class Broken(Policy):
        def forward(self, packed):
            return super().forward(packed).index_fill(-1, torch.tensor([0]), math.nan)

    with pytest.raises(ValueError, match="log-probabilities are no numbers"):
        Broken.load(random_model_dir)


def test_a_tokenizer_may_put_a_token_before_every_text(tmp_path):
    tokenizer = random_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.pad_token_id)]
    )
    random_model(tokenizer).save_pretrained(tmp_path)
    random_processor(tokenizer).save_pretrained(tmp_path)
    policy = Policy.load(tmp_path)
    assert policy.tokenizer("red").input_ids[0] == tokenizer.pad_token_id


def test_a_policy_samples_at_temperature_1_and_freezes_its_vision_tower(random_model_dir):
    loaded = Policy.load(random_model_dir)
    assert Policy(loaded.model, loaded.processor).temperature == 1.0
    loaded.freeze_vision()
    for name, parameter in loaded.named_parameters():
        assert parameter.requires_grad == (".visual." not in name)


def test_a_tokenizer_may_decode_a_blank_before_a_word(tmp_path):
    tokenizer = random_tokenizer()
    tokenizer._tokenizer.decoder = decoders.Replace("<", " <")
    random_model(tokenizer).save_pretrained(tmp_path)
    random_processor(tokenizer).save_pretrained(tmp_path)
    policy = Policy.load(tmp_path)
    assert policy.tokenizer.decode(policy.tokenizer("<think>").input_ids) == " <think>"


def test_a_text_becomes_the_tokens_that_the_policy_would_write(tmp_path):
    tokenizer = random_tokenizer()
    red, blue, user, end = tokenizer.convert_tokens_to_ids(["red", "blue", "user", "<|im_end|>"])
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="user $A",
        special_tokens=[("user", user)],  # an ordinary token before every text
    )
    random_model(tokenizer).save_pretrained(tmp_path)
    random_processor(tokenizer).save_pretrained(tmp_path)
    tokens_of = Policy.load(tmp_path).tokens_of
    assert tokens_of("red blue", 3) == ([red, blue, end], False)
    assert tokens_of("red blue", 2) == ([red, blue], True)
    assert tokens_of("red", 8, ended=False) == ([red], True)
    assert tokens_of("", 8, ended=False) == ([end], False)
    assert tokens_of(" " * 20_000 + "red", 8) == ([red, end], False)
    assert tokens_of("red " * 20_000, 4) == ([red] * 4, True)
    # Cut after 1,040 letters it would hold one token and half a word.
    assert tokens_of("red" + " " * 1036 + "blue", 1) == ([red], True)
    assert tokens_of("red" + " " * 1070 + "blue", 3) == ([red, blue, end], False)


# -------------------------------------------------------------------------------------- sampling.py


def test_as_many_responses_are_generated_at_a_time_as_rows_say(policy, monkeypatch):
    rows, generate = [], policy.model.generate
    monkeypatch.setattr(
        policy.model, "generate", lambda **kw: rows.append(len(kw["input_ids"])) or generate(**kw)
    )
    prompts = policy.encode(STATES * 4)

    def largest(call) -> int:
        rows.clear()
        call()
        return max(rows)

    assert largest(lambda: TransformersSampler(policy, 1, rows=6).sample(prompts, 2, 0)) == 6
    assert largest(lambda: TransformersSampler(policy, 1, rows=1).sample(prompts, 2, 0)) == 2
    assert largest(lambda: TransformersSampler(policy, 1, rows=99).greedy(prompts)) == 8


def test_generation_starts_behind_each_prompt_in_plain_order(policy):
    inputs = prefilled(policy.encode(STATES), 1, policy)
    mask, order = inputs["attention_mask"], inputs["position_ids"][0]
    assert set(mask.unique().tolist()) == {0, 1}
    for row in range(2):
        seen = order[row][mask[row].bool()]
        assert seen.tolist() == list(range(len(seen)))


def test_the_engine_gets_what_the_sampler_is_asked_for(policy, monkeypatch):
    made = []
    fake = SimpleNamespace(VLLMSampler=lambda *args, **kw: made.append((args, kw)))
    monkeypatch.setitem(sys.modules, "rollouts.vllm_sampler", fake)
    monkeypatch.setattr("rollouts.choice.why_no_engine", lambda device: "")
    make_sampler("vllm", policy, "a model", 7, bf16=True, max_model_len=99)
    assert made == [((policy, "a model", 7), {"bf16": True, "max_model_len": 99})]


def test_a_transcript_has_the_parts_of_each_reward_who_was_kept_and_the_advantages():
    actions = [Action([5], text, "policy") for text in "abc"]
    group = Group(STATES[0], None, actions, [1.0, 1.0, 0.0], [0.0, 1.0, 0.5])
    group.kept, group.advantages = [1, 0], [0.5, -0.5]
    found = [(action["kept"], action["advantage"]) for action in group.transcript(3)["actions"]]
    assert found == [(True, -0.5), (True, 0.5), (False, None)]
    parts = [(a["format"], a["accuracy"], a["reward"]) for a in group.transcript(3)["actions"]]
    assert parts == [(1.0, 0.0, 1.0), (1.0, 1.0, 2.0), (0.0, 0.5, 0.5)]


# --------------------------------------------------------------------------------------- rewards.py


def test_an_error_of_math_verify_is_a_wrong_answer_and_nothing_is_logged(monkeypatch, caplog):
    math_verify = pytest.importorskip("math_verify", reason="installed for --legacy alone")
    monkeypatch.setattr(math_verify, "verify", lambda *_: 1 / 0)
    assert rewards.accuracy_score("<answer>3.25</answer>", "13/4", "math", legacy=True) == 0.0
    assert not logging.getLogger("math_verify").isEnabledFor(logging.ERROR)


@pytest.mark.parametrize(
    "truth, near, far", [("1", "1.0000009", "1.0000015"), ("0", "9e-7", "1.5e-6")]
)
def test_equal_quantities_differ_by_a_millionth_at_most(truth, near, far):
    near, far = (f"<answer>{value}</answer>" for value in (near, far))
    assert rewards.accuracy_score(near, truth, "math") == 1.0
    assert rewards.accuracy_score(far, truth, "math") == 0.0
