"""Rollouts by vLLM, with the real engine: it samples from what the policy scores, before and after
updates, or says that it does not."""

import math
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SPECIAL, agrees, random_model, random_processor, random_tokenizer
from test_sampling import STATES, allowed_tokens, picture
from transformers import Qwen2VLForConditionalGeneration

from data.state import State
from ekipl import Config
from policy import Policy, pack
from rollouts.choice import why_no_engine
from rollouts.transformers_sampler import TransformersSampler
from sampling import Group
from training.console import UserError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if reason := why_no_engine(DEVICE):
    pytest.skip(f"no engine can run here: {reason}", allow_module_level=True)

from rollouts import parity as parity_check
from rollouts import vllm_engine
from rollouts.vllm_sampler import VLLMSampler
from training import lora, storage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def sampler(random_model_dir):
    """One engine for all tests, in float32, beside its policy, whose weights are not those of the
    engine's directory."""
    policy = Policy.load(random_model_dir).to(DEVICE)
    with (
        torch.no_grad()
    ):  # logits of a usual size: float32 is no better than 1e-4 where they are in the hundreds
        for parameter in policy.model.parameters():
            parameter.mul_(0.5)
    return VLLMSampler(policy, str(random_model_dir), 12)


@pytest.fixture(autouse=True)
def same_policy(sampler):
    """Each test finds the same weights in policy and engine, and the same settings."""
    weights = {name: value.clone() for name, value in sampler.policy.model.state_dict().items()}
    yield
    sampler.policy.temperature, sampler.max_new_tokens = 1.0, 12
    if any(
        not torch.equal(value, weights[name])
        for name, value in sampler.policy.model.state_dict().items()
    ):
        sampler.policy.model.load_state_dict(weights)
        sampler.sync_weights()


def sampled(sampler: VLLMSampler, states: list[State], n: int = 4, seed: int = 0) -> list[Group]:
    prompts = sampler.policy.encode(states)
    return [
        Group(*parts)
        for parts in zip(states, prompts, sampler.sample(prompts, n, seed), strict=True)
    ]


def gap(sampler: VLLMSampler, groups: list[Group]) -> float:
    """The largest difference between vLLM's log-probability of a sampled token and the policy's."""
    batch = pack(
        [group.prompt for group in groups],
        [[action.tokens for action in group.actions] for group in groups],
    ).to(DEVICE)
    with torch.no_grad():
        ours = sampler.policy(batch)[batch.action_mask].cpu()
    theirs = torch.tensor(
        [logp for group in groups for action in group.actions for logp in action.token_logps]
    )
    return float((ours - theirs).abs().max())


def nearly_uniform(sampler: VLLMSampler) -> None:
    with torch.no_grad():
        sampler.policy.model.get_output_embeddings().weight.mul_(0.02)
    sampler.sync_weights()


def train_a_step(policy: Policy, learner=None, lr: float = 3e-3) -> None:
    """Every parameter moves."""
    before = {name: value.clone() for name, value in policy.model.named_parameters()}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
    prompts = policy.encode(STATES)
    words = allowed_tokens(policy)
    batch = pack(prompts, [[[*words[i : i + 4], policy.eos_id]] for i in range(len(prompts))]).to(
        DEVICE
    )
    (-(learner or policy)(batch).sum()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    still = [
        name for name, value in policy.model.named_parameters() if torch.equal(value, before[name])
    ]
    assert not still, still


# ------------------------------------------------------------------ what it samples


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_policys_before_and_after_an_update(sampler, temperature):
    sampler.policy.temperature = temperature
    assert gap(sampler, sampled(sampler, STATES)) < 1e-4
    train_a_step(sampler.policy)
    assert (
        gap(sampler, sampled(sampler, STATES)) > 0.1
    )  # the update is no small one: without a sync it shows
    sampler.sync_weights()
    assert gap(sampler, sampled(sampler, STATES)) < 1e-4


def test_the_engine_gets_the_merged_weights_of_a_policy_with_an_adapter(sampler, random_model_dir):
    pytest.importorskip("peft", reason="peft is installed for --lora-rank alone")
    own, policy = sampler.policy, Policy.load(random_model_dir)
    policy.model.load_state_dict(own.model.state_dict())
    lora.add_adapter(policy.to(DEVICE).model, Config(lora_rank=4))
    try:
        sampler.policy = policy
        sampler.sync_weights()
        assert gap(sampler, sampled(sampler, STATES)) < 1e-4
        for seed, value in enumerate(lora.adapter(policy.model).values()):
            torch.manual_seed(seed)
            torch.nn.init.normal_(value, std=0.05)
        assert gap(sampler, sampled(sampler, STATES)) > 0.1
        sampler.sync_weights()
        assert gap(sampler, sampled(sampler, STATES)) < 1e-4
    finally:
        sampler.policy = own
        sampler.sync_weights()


def test_it_samples_a_ddp_wrapped_policy_without_a_copy_of_it(sampler):
    policy = sampler.policy
    learner = torch.nn.parallel.DistributedDataParallel(
        policy
    )  # the engine has joined a group of one
    train_a_step(policy, learner)
    sampler.sync_weights()
    assert gap(sampler, sampled(sampler, STATES)) < 1e-4
    handed = dict(sampler._weights())
    own = dict(learner.module.model.named_parameters())
    assert {name: value.data_ptr() for name, value in handed.items()} == {
        name: value.data_ptr() for name, value in own.items()
    }


def test_the_most_probable_tokens_are_those_of_transformers(sampler):
    with torch.no_grad():
        for parameter in (
            sampler.policy.model.parameters()
        ):  # or one token would be the most probable everywhere
            parameter.mul_(2)
    sampler.sync_weights()
    prompts = sampler.policy.encode(STATES)  # one image, two of different sizes, none
    expected = TransformersSampler(sampler.policy, 12).greedy(prompts)
    assert [action.tokens for action in sampler.greedy(prompts)] == [
        action.tokens for action in expected
    ]
    assert len({tuple(action.tokens) for action in expected}) > 1


def test_evaluation_may_draw_from_the_likeliest_tokens_alone(sampler, monkeypatch):
    prompts = sampler.policy.encode(STATES)
    likeliest = [action.tokens for action in sampler.greedy(prompts)]
    for name, value in (("top_k", 1), ("top_p", 1e-6)):
        with monkeypatch.context() as patch:
            patch.setattr(sampler, name, value)
            assert [a.tokens for (a,) in sampler.sample(prompts, 1, 0)] == likeliest
    assert [a.tokens for (a,) in sampler.sample(prompts, 1, 0)] != likeliest


def test_the_order_of_two_images_matters_as_it_does_to_the_policy(sampler):
    two = STATES[1]
    swapped = State("swapped", two.images[::-1], two.question, two.answer, two.kind)
    groups = sampled(sampler, [two, swapped], n=32)
    assert gap(sampler, groups) < 1e-4
    first = [
        {action.tokens[0]: action.token_logps[0] for action in group.actions} for group in groups
    ]
    shared = first[0].keys() & first[1].keys()
    assert shared and any(abs(first[0][token] - first[1][token]) > 1e-3 for token in shared)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("state", [STATES[2], STATES[3]], ids=["image", "text"])
def test_first_tokens_follow_the_distribution_that_the_policy_scores(sampler, temperature, state):
    policy = sampler.policy
    policy.temperature, sampler.max_new_tokens = temperature, 1
    (group,) = sampled(sampler, [state], n=2048)
    tokens = allowed_tokens(policy)
    with torch.no_grad():
        logp = policy(pack([group.prompt], [[[token] for token in tokens]]).to(DEVICE))[
            0, :, 0
        ].cpu()
    density = dict(zip(tokens, logp.exp().tolist(), strict=True))
    counts = Counter(action.tokens[0] for action in group.actions)
    assert agrees(counts, density)
    assert not agrees(
        counts, dict(zip(tokens, (logp * 0.6).softmax(0).tolist(), strict=True))
    )  # it would tell another temperature


def test_what_a_response_cannot_hold_is_never_in_10000_samples(sampler):
    policy = sampler.policy
    sampler.max_new_tokens = 1
    nearly_uniform(sampler)  # every token that may come does come
    groups = sampled(sampler, STATES[:4], n=2500)
    seen = {action.tokens[0] for group in groups for action in group.actions}
    assert sum(len(group.actions) for group in groups) == 10_000 and seen == set(
        allowed_tokens(policy)
    )
    special = {policy.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    assert special & seen == {policy.eos_id} and max(seen) < len(policy.tokenizer)


def test_the_same_seed_gives_the_same_actions_whatever_is_sampled_beside(sampler):
    def tokens(states, seed):
        return {
            group.state.id: [action.tokens for action in group.actions]
            for group in sampled(sampler, states, seed=seed)
        }

    first = tokens(STATES, 1)
    assert tokens(STATES, 1) == first == tokens(STATES[::-1], 1)
    assert tokens(STATES[:2], 1) == {state.id: first[state.id] for state in STATES[:2]}
    assert tokens(STATES, 2) != first
    assert len({tuple(actions) for actions in first["one"]}) > 1  # n actions, not one n times


def test_actions_end_with_eos_or_are_marked_truncated(sampler):
    policy = sampler.policy
    nearly_uniform(sampler)
    actions = [action for group in sampled(sampler, STATES, n=40) for action in group.actions]
    assert {action.truncated for action in actions} == {True, False}
    for action in actions:
        assert action.source == "policy" and len(action.token_logps) == len(action.tokens)
        if action.truncated:
            assert len(action.tokens) == 12 and policy.eos_id not in action.tokens
        else:
            assert action.tokens.index(policy.eos_id) == len(action.tokens) - 1  # kept, once, last
        words = policy.tokenizer.convert_ids_to_tokens(
            [token for token in action.tokens if token != policy.eos_id]
        )
        assert action.text == " ".join(words)


# ------------------------------------------------------------------ in step with the policy


def perturb(policy: Policy, part: str) -> None:
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if part in name:
                parameter.add_(
                    0.03
                    * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(
                        DEVICE
                    )
                )


@pytest.mark.parametrize("part", ["visual", "embed_tokens", "layers.1."])
def test_other_weights_change_what_it_says_of_the_same_prompt(sampler, part):
    (before,) = sampled(sampler, [STATES[0]], n=32)
    perturb(sampler.policy, part)
    sampler.sync_weights()
    (after,) = sampled(sampler, [STATES[0]], n=32)
    assert gap(sampler, [after]) < 1e-4
    old, new = (
        {action.tokens[0]: action.token_logps[0] for action in group.actions}
        for group in (before, after)
    )
    assert old.keys() & new.keys() and all(
        abs(old[token] - new[token]) > 1e-5 for token in old.keys() & new.keys()
    )


def parity(sampler: VLLMSampler, first: bool = True) -> dict[str, float]:
    """first: as in the first check of a run."""
    sampler._checked = not first
    return sampler.check_parity(sampled(sampler, STATES[:4]))


def test_parity_holds_after_a_sync_and_not_after_an_update_without(sampler):
    assert 0 <= parity(sampler)["parity"] < 1e-5
    train_a_step(sampler.policy, lr=1e-3)
    with pytest.raises(
        UserError,
        match=r"differ by .* a token .*largest .*allowed in float32: 0.0001.*weights that were "
        r"not synced",
    ) as error:
        parity(sampler)
    assert "\n" not in str(error.value)
    sampler.sync_weights()
    assert parity(sampler)["parity"] < 1e-5


def test_a_breach_after_the_first_check_is_told_in_one_line_and_the_run_goes_on(sampler, capsys):
    parity(sampler, first=False)
    assert capsys.readouterr().err == ""
    train_a_step(sampler.policy, lr=1e-3)
    for _ in range(2):
        assert parity(sampler, first=False)["parity"] > 1e-4
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("warning: parity: log-probabilities")
    with torch.no_grad():  # numbers that are none are no matter of tolerance
        sampler.policy.model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(UserError, match="differ by nan"):
        parity(sampler, first=False)


def test_the_tolerance_of_bfloat16_leaves_healthy_engines_alone():
    assert parity_check.PARITY_TOLERANCE == {torch.float32: 1e-4, torch.bfloat16: 0.1}


def gaps_of_a_sync(path: Path, rank: int) -> list[float]:
    """Of the model of a directory, in an engine of its own: the largest difference before an
    update, after it, and after the sync. rank: of an adapter, which is then all that changes."""
    policy = Policy.load(path).to(DEVICE)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(0.5)
    if rank:
        lora.add_adapter(policy.model, Config(lora_rank=rank))
    sampler = VLLMSampler(policy, str(path), 12)
    found = [gap(sampler, sampled(sampler, STATES))]
    if not rank:
        train_a_step(policy)
    for value in lora.adapter(policy.model).values():
        torch.nn.init.normal_(value, std=0.2)
    found.append(gap(sampler, sampled(sampler, STATES)))
    sampler.sync_weights()
    found.append(gap(sampler, sampled(sampler, STATES)))
    sampler.close()
    return found


def gaps_elsewhere(path: Path, rank: int = 0) -> list[float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # one engine a process
        return pool.submit(gaps_of_a_sync, path, rank).result(timeout=300)


def test_head_and_embedding_of_an_untied_model_arrive_each_for_itself(tmp_path):
    tokenizer = random_tokenizer()
    config = random_model(tokenizer).config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    random_processor(tokenizer).save_pretrained(tmp_path)
    before, without, after = gaps_elsewhere(tmp_path)
    assert before < 1e-4 and without > 0.1 and after < 1e-4


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "adapter"])
def test_every_weight_of_qwen3_vl_arrives(random_qwen3_dir, rank):
    if rank:
        pytest.importorskip("peft", reason="peft is installed for --lora-rank alone")
    before, without, after = gaps_elsewhere(random_qwen3_dir, rank)
    assert before < 1e-4 and without > 0.1 and after < 1e-4


@pytest.mark.parametrize(
    "layer",
    [
        "model.visual.blocks.0.",
        "model.visual.merger.",
        "model.language_model.layers.1.mlp.",
        "model.language_model.embed_tokens.",
    ],
)
def test_parity_catches_a_sync_that_skips_a_layer(sampler, layer, monkeypatch):
    parity(sampler)
    before = {
        name: value.detach().clone() for name, value in sampler.policy.model.named_parameters()
    }
    train_a_step(sampler.policy, lr=1e-3)
    stale = [
        (name, before[name] if name.startswith(layer) else value)
        for name, value in sampler._weights()
    ]
    assert any(name.startswith(layer) for name, _ in stale)
    monkeypatch.setattr(sampler, "_weights", lambda: iter(stale))
    sampler.sync_weights()
    with pytest.raises(UserError, match="parity: log-probabilities"):
        parity(sampler)


def test_parity_catches_caches_that_were_kept(sampler, monkeypatch):
    parity(sampler)
    train_a_step(sampler.policy, lr=1e-3)
    monkeypatch.setattr(sampler, "_drop_caches", lambda: None)
    sampler.sync_weights()
    with pytest.raises(UserError, match="parity: log-probabilities"):
        parity(sampler)
    monkeypatch.undo()
    sampler.sync_weights()
    assert parity(sampler)["parity"] < 1e-5


def test_keys_and_values_that_the_engine_does_not_give_up_stop_the_sync(sampler, monkeypatch):
    monkeypatch.setattr(sampler.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(UserError, match="kept keys and values of older weights"):
        sampler.sync_weights()


def test_an_engine_that_sleeps_is_woken_before_it_ends(monkeypatch):
    done = []
    engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: done.append("end")))
    sampler = VLLMSampler.__new__(VLLMSampler)
    sampler.llm = SimpleNamespace(wake_up=lambda: done.append("wake"), llm_engine=engine)
    sampler._asleep = True
    sampler.close()
    assert done == ["wake", "end"]

    def no_room():
        raise torch.OutOfMemoryError("CUDA out of memory")

    sampler.llm.wake_up, sampler._asleep = no_room, True
    sampler.close()  # after another error: it is not to hide that one
    assert done == ["wake", "end", "end"]


def test_a_weight_that_does_not_arrive_or_is_not_known_stops_the_sync(sampler, monkeypatch):
    weights = list(sampler._weights())
    monkeypatch.setattr(
        sampler,
        "_weights",
        lambda: (item for item in weights if "layers.1.mlp.down_proj" not in item[0]),
    )
    with pytest.raises(UserError, match="left 1 of vLLM's parameters.*layers.1.mlp.down_proj"):
        sampler.sync_weights()
    monkeypatch.setattr(
        sampler,
        "_weights",
        lambda: iter([*weights, ("model.language_model.more.weight", weights[0][1])]),
    )
    with pytest.raises(UserError, match="does not know a weight.*more"):
        sampler.sync_weights()
    monkeypatch.undo()
    sampler.sync_weights()
    assert parity(sampler)["parity"] < 1e-5


def test_parity_catches_other_pixel_limits_and_other_prompts(sampler, monkeypatch):
    assert sampler.pixel_limits() == {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    groups = sampled(sampler, STATES[:1])
    smaller = dict(sampler.policy.processor.image_processor.size, longest_edge=32 * 32)
    monkeypatch.setattr(sampler.policy.processor.image_processor, "size", smaller)
    with pytest.raises(UserError, match=r"resized to .*4096.* by vLLM, to .*1024.* by the policy"):
        sampler.check_parity(groups)
    with pytest.raises(
        UserError,
        match=r"state one has another prompt in vLLM \(\d+ tokens, 16 of images\).*4\).*pixel "
        r"limits",
    ):
        sampled(sampler, STATES[:1])


# ------------------------------------------------------------------ limits and mistakes


def test_a_prompt_longer_than_max_model_len_gives_a_clear_error(sampler):
    assert sampler.max_model_len == 2 * 16 + 1024 + 12
    long = State("long", (picture(64, 64, 1),), "how many " * 600, "1", "math")
    for act in (lambda prompts: sampler.sample(prompts, 2, 0), sampler.greedy):
        with pytest.raises(
            UserError,
            match=r"state long: its prompt of 12\d\d tokens and an action of 12 do not fit "
            r"--max-model-len 1068: raise it",
        ):
            act(sampler.policy.encode([STATES[0], long]))
    assert parity(sampler)["parity"] < 1e-5  # and the engine is whole


def test_more_images_than_it_was_made_for_give_a_clear_error(sampler):
    three = State("three", tuple(picture(32, 32, i) for i in range(3)), "how many ?", "1", "math")
    with pytest.raises(UserError, match="vLLM refuses a prompt.*2"):
        sampled(sampler, [three])
    assert parity(sampler)["parity"] < 1e-5


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_a_temperature_that_vllm_would_change_is_refused(sampler, random_model_dir, temperature):
    with pytest.raises(UserError, match="from 0.01 to 2"):
        VLLMSampler(
            Policy.load(random_model_dir, temperature=temperature), str(random_model_dir), 12
        )


def test_an_engine_that_cannot_start_gives_one_line(sampler, random_model_dir):
    with pytest.raises(
        UserError, match=r"vLLM cannot start \(.*\); --rollout transformers does without"
    ) as error:
        VLLMSampler(sampler.policy, str(random_model_dir), 12, max_model_len=10**6)
    assert "\n" not in str(error.value)


def test_max_model_len_holds_images_words_and_action_within_what_the_model_knows(sampler):
    assert vllm_engine.derived_max_model_len(sampler.policy, 2, 80) == 2 * 16 + 1024 + 80
    assert vllm_engine.derived_max_model_len(sampler.policy, 2, 4000) == 2048


def test_the_engine_gets_what_training_leaves_of_a_gpu(monkeypatch):
    parameters = [
        torch.empty(2 * 2**30, device="meta"),
        torch.empty(2**30, device="meta").requires_grad_(False),
    ]
    parameters[0].requires_grad_()
    policy = SimpleNamespace(
        suppressed_ids=SimpleNamespace(device=torch.device("cuda")),
        parameters=lambda: iter(parameters),
    )
    free, keeps = [64], [True]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0] * 2**30, 80 * 2**30))
    monkeypatch.setattr(vllm_engine, "keeps_gradients", lambda policy: keeps[0])

    def share():
        return vllm_engine.derived_gpu_memory_utilization(policy)

    assert share() == pytest.approx((64 - 24) / 80 - 0.05)  # 12 bytes for each trained one
    keeps[0] = False  # gradients are gone when the engine wakes
    assert share() == pytest.approx((64 - 16) / 80 - 0.05)
    free[0] = 20
    with pytest.raises(UserError, match="20 GiB free and training needs 16"):
        share()
    parameters[0].requires_grad_(False)  # evaluation: all of it, but for a margin
    free[0] = 79
    assert share() == 0.9


# ------------------------------------------------------------------ whole runs


def run(tmp_path, *command: str) -> subprocess.CompletedProcess:
    """As a user would: nothing of this process's environment that vLLM could need."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("VLLM_")
    } | {"OMP_NUM_THREADS": "1"}
    flags = (
        "--states 8 --batch-size 4 --num-samples 2 --group-size 3 --eval-states 4 --eval-every 2"
    )
    flags = f"{flags} --parity-every 1 --rollout vllm --name run".split()
    done = subprocess.run(
        [sys.executable, *command, *flags, "--runs", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return storage.read(tmp_path / "run" / "metrics.jsonl")


TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "ekipl.py"]


SHARDS = [*TWO, "--parallel", "fsdp"]
ADAPTER = [*SHARDS, "--lora-rank", "4"]
WAYS = [["ekipl.py"], TWO, SHARDS, ADAPTER]


@pytest.mark.parametrize("command", WAYS, ids=["one", "two", "shards", "shards of an adapter"])
def test_a_run_trains_with_vllm_in_one_process_and_in_two(tmp_path, command):
    if "--lora-rank" in command:
        pytest.importorskip("peft", reason="peft is installed for --lora-rank alone")
    records = run(tmp_path, *command)
    assert [record["step"] for record in records] == [0, 1, 2]
    assert all(0 <= record["parity"] < 1e-5 for record in records[1:])
    assert all(
        math.isfinite(record["grad_norm"]) and record["seconds/sync"] > 0 for record in records[1:]
    )
    assert all("eval/counting-id" in records[i] for i in (0, 2))


def test_the_check_for_a_gpu_runs_here_with_the_tiny_model(tmp_path):
    command = [sys.executable, "-m", "experiments.benchmarks.gpu_check"]
    command += ["--model", "tiny", "--states", "2"]
    sizes = ["--group-size", "3", "--action-tokens", "6", "--out", str(tmp_path / "check")]
    done = subprocess.run(
        [*command, *sizes], cwd=ROOT, capture_output=True, text=True, timeout=1000, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "check.md").read_text()
    assert text.count("| holds |") == 4 and "fails" not in text
    assert (tmp_path / "check.json").exists()
