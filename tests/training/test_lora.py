"""--lora-rank: an adapter computes what full weights would, learns by their gradients, and leaves
all else as it was."""

import dataclasses
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import in_two_processes
from safetensors.torch import load_file, save_file
from test_ekipl import (
    CPU,
    ROOT,
    SMALL,
    fixed_groups,
    stopped_in_the_step_after,
    timeless,
    update_config,
    weights,
)
from test_plan import full_batch, groups_of, kept, of_layers, peak, states
from transformers import AutoModelForImageTextToText

import ekipl
import sft
from policy import Policy, pack
from rollouts.transformers_sampler import TransformersSampler
from training import activations, console, lora, plan, storage
from training.checkpointing import full_weights, last_checkpoint, model_of
from training.console import UserError
from training.distributed import World, clear_gradients, full
from training.metrics import mean
from training.settings import PEFT

peft = pytest.importorskip("peft", reason="peft is installed for --lora-rank alone")

RUN = {**SMALL, "states": 16, "eval_every": 2, "lora_rank": 4, "lr": 1e-2}  # 4 steps


def adapted(model_dir, dtype=torch.float32, **changes) -> Policy:
    """With a random B, as after training."""
    policy = Policy.load(model_dir, dtype=dtype)
    lora.add_adapter(policy.model, update_config(**{"lora_rank": 4, **changes}))
    torch.manual_seed(1)
    for name, value in lora.adapter(policy.model).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(value, std=0.02)
    return policy


def with_weights(model_dir, values: dict, dtype=torch.float32) -> Policy:
    """Without an adapter, with these weights."""
    policy = Policy.load(model_dir, dtype=dtype)
    own = dict(policy.model.named_parameters())
    assert own.keys() == values.keys()
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(values[name])
    return policy


def copies(values: dict) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


def batch_of(policy: Policy):
    groups = fixed_groups(policy, 3)
    return pack([g.prompt for g in groups], [g.kept_tokens for g in groups])


# ------------------------------------------------------------------------------- what it computes


def test_before_training_the_log_probs_are_the_models_own(random_model_dir):
    base = Policy.load(random_model_dir)
    policy = Policy.load(random_model_dir)
    lora.add_adapter(policy.model, update_config(lora_rank=4))
    assert torch.equal(policy(batch_of(base)), base(batch_of(base)))


def test_every_linear_layer_of_the_language_model_has_an_adapter_and_nothing_else(random_model_dir):
    base, policy = Policy.load(random_model_dir), adapted(random_model_dir)
    linear = torch.nn.Linear
    names = {n for n, m in base.model.named_modules() if isinstance(m, linear)}
    expected = {n for n in names if "language_model" in n}
    assert lora.adapted(policy.model).keys() == expected and len(expected) == 2 * 7
    learnt = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert learnt == lora.adapter(policy.model).keys() and len(learnt) == 2 * len(expected)


def test_gradients_follow_from_those_of_full_weights_by_the_chain_rule(random_model_dir):
    policy = adapted(random_model_dir, torch.float64)
    whole = with_weights(random_model_dir, dict(lora.merged(policy.model)), torch.float64)
    batch = batch_of(policy)
    factors = torch.randn(batch.action_mask.shape, generator=torch.Generator().manual_seed(2))
    for each in (policy, whole):
        (each(batch) * factors).sum().backward()
    gradients = {name: value.grad for name, value in whole.model.named_parameters()}
    for name, layer in lora.adapted(policy.model).items():
        of_w, s = gradients[f"{name}.weight"], lora.ALPHA / 4
        A, B = layer.lora_A[lora.NAME].weight, layer.lora_B[lora.NAME].weight
        for own, expected in ((B.grad, s * of_w @ A.T), (A.grad, s * B.T @ of_w)):
            error = (own - expected).norm() / expected.norm()
            assert expected.norm() > 0 and error < 1e-5, (name, float(error))


def test_merged_weights_have_the_log_probs_of_weights_and_adapter(random_model_dir):
    policy = adapted(random_model_dir)
    whole, base = with_weights(random_model_dir, dict(lora.merged(policy.model))), None
    batch = batch_of(policy)
    base = Policy.load(random_model_dir)(batch)
    torch.testing.assert_close(whole(batch), policy(batch), atol=2e-4, rtol=1e-4)
    assert (base - policy(batch)).abs().max() > 0.1


def test_rollouts_by_transformers_are_those_of_the_merged_weights(random_model_dir):
    policy = adapted(random_model_dir)
    whole = with_weights(random_model_dir, dict(lora.merged(policy.model)))
    said = []
    for each in (policy, whole, Policy.load(random_model_dir)):
        sampler = TransformersSampler(each, 12)
        said.append([action.tokens for action in sampler.greedy(each.encode(states(3)))])
    assert said[0] == said[1] != said[2]


def test_gradient_checkpointing_does_not_change_the_gradient_though_inputs_are_frozen(
    random_model_dir,
):
    found = []
    for checkpointing in (False, True):
        config = update_config(lora_rank=4, gradient_checkpointing=checkpointing)
        policy = ekipl.load_policy(config, random_model_dir, CPU)
        policy(batch_of(policy)).sum().backward()
        found.append({n: v.grad for n, v in lora.adapter(policy.model).items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_on_a_gpu_what_is_frozen_is_bfloat16_and_no_more_than_that_is_rounded(monkeypatch):
    """By autocast on a CPU."""
    config = ekipl.Config(lora_rank=4)
    assert lora.frozen_dtype(config, torch.device("cuda")) == torch.bfloat16
    for other in (dict(bf16=False), dict(lora_rank=0)):
        changed = dataclasses.replace(config, **other)
        assert lora.frozen_dtype(changed, torch.device("cuda")) == torch.float32
    exact = ekipl.load_policy(config, config.start, CPU)
    monkeypatch.setattr(lora, "frozen_dtype", lambda *_: torch.bfloat16)
    policy, batch = ekipl.load_policy(config, config.start, CPU), batch_of(exact)
    for (name, value), own in zip(policy.model.named_parameters(), exact.model.parameters()):
        assert value.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name
        assert ".lora_A." in name or torch.equal(value, own.to(value.dtype)), name
    floating = [buffer for buffer in policy.model.buffers() if buffer.is_floating_point()]
    assert floating and all(buffer.dtype == torch.float32 for buffer in floating)
    with torch.autocast("cpu", torch.bfloat16):
        logp = policy(batch)
    logp.sum().backward()
    gap = (logp - exact(batch)).abs()[batch.action_mask]
    assert 0 < gap.mean() < 0.1
    assert all(value.grad.dtype == torch.float32 for value in lora.adapter(policy.model).values())


def test_what_bfloat16_cannot_hold_of_the_adapter_is_in_the_merged_weights(random_model_dir):
    policy = adapted(random_model_dir, torch.bfloat16)
    for name, value in lora.adapter(policy.model).items():
        if ".lora_B." in name:
            value.data.mul_(1e-3)  # as after few steps: most of it is less than W's last place
    layers, unchanged = lora.adapted(policy.model), []
    for name, value in lora.merged(policy.model):
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None or name.endswith("bias"):
            continue
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        W = layer.base_layer.weight.float()
        assert value.dtype == torch.float32 and not torch.equal(value, W)
        torch.testing.assert_close(value - W, 32 / 4 * B @ A, atol=1e-7, rtol=1e-2)
        unchanged.append((value.bfloat16() == W.bfloat16()).float().mean().item())
    assert mean(unchanged) > 0.3
    saved = full_weights(policy, rank=0)
    assert {value.dtype for value in saved.values()} == {torch.float32}


# --------------------------------------------------------------------------------- what is learnt


def updated(model_dir, world: World, config, steps: int = 3):
    """A policy after some updates; its reference, and what that said before them; all its weights
    before them."""
    policy = ekipl.load_policy(config, model_dir, world)
    reference, before = lora.without_adapter(policy), copies(dict(policy.named_parameters()))
    learner = world.data_parallel(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-3)
    groups = world.shard(fixed_groups(policy, config.batch_size))
    with torch.no_grad():
        said = reference(batch_of(policy)) if world.size == 1 else None
    for _ in range(steps):
        ekipl.update(config, learner, reference, optimizer, groups, world, lr=1e-2)
        clear_gradients(learner, optimizer)
    return policy, reference, said, before


@pytest.fixture(scope="module")
def alone(random_model_dir):
    return updated(random_model_dir, CPU, update_config(lora_rank=4))


def test_only_the_adapter_changes(alone):
    policy, _, _, before = alone
    for name, value in policy.named_parameters():
        assert torch.equal(value, before[name]) != (".lora_" in name), name


def test_the_reference_is_the_model_of_the_start_and_stays_it(alone, random_model_dir):
    policy, reference, said, _ = alone
    batch = batch_of(policy)
    with torch.no_grad():
        assert torch.equal(reference(batch), said)
        assert torch.equal(Policy.load(random_model_dir)(batch), said)
        assert (policy(batch) - said).abs().max() > 0.01  # and the adapter is on again


def adapter_here(model_dir, parallel: str) -> dict:
    world = World.join("cpu")
    policy = updated(model_dir, world, update_config(lora_rank=4, parallel=parallel))[0]
    return {n: full(v.detach()).numpy() for n, v in lora.adapter(policy.model).items()}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_come_to_the_adapter_of_one_with_the_whole_batch(
    random_model_dir, alone, parallel
):
    expected = lora.adapter(alone[0].model)
    for found in in_two_processes(adapter_here, random_model_dir, parallel):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            own = torch.as_tensor(found[name])
            torch.testing.assert_close(own, value.detach(), atol=2e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------- whole runs


def config_of(root: Path, program=ekipl, **changes):
    known = {field.name for field in dataclasses.fields(program.Config)}
    chosen = {name: value for name, value in RUN.items() if name in known}
    return program.Config(**{**chosen, "runs": str(root), **changes})


@pytest.fixture(scope="module", params=[ekipl, sft], ids=["ekipl", "sft"])
def finished(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    return request.param, request.param.train(config_of(root, request.param), None, CPU)


def test_a_run_leaves_a_merged_model_and_its_adapter_in_pefts_format(finished):
    path = finished[1]
    load = partial(AutoModelForImageTextToText.from_pretrained, dtype=torch.float32)
    start, model = load(ROOT / "blocks" / "tiny"), load(path / "model")
    assert type(model) is type(start)
    own = dict(model.named_parameters())
    for name, value in start.named_parameters():
        assert torch.equal(value, own[name]) != name.endswith("_proj.weight"), name
    theirs = peft.PeftModel.from_pretrained(start, path / "model" / "adapter").merge_and_unload()
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(value, own[name], atol=1e-6, rtol=1e-5)


def test_the_last_checkpoint_takes_what_plan_and_disk_check_say(finished):
    program, path = finished
    config = config_of(path.parent, program)
    model = Policy.load(config.start).model
    count = plan.sizes(model.config)
    planned = 4 * count.total + 12 * plan.trained(config, count)
    files = [*(path / "model").rglob("*.safetensors"), path / "model" / "trainer.pt"]
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) == pytest.approx(planned, rel=0.05)


def test_the_plan_tells_the_disk_of_a_2b_model_with_its_adapter():
    config = update_config(lora_rank=16)
    count = plan.sizes(plan.described("Qwen/Qwen2-VL-2B-Instruct")[0])
    wanted = 4 * count.total + 12 * plan.trained(config, count)  # 8.8 GB, and 0.2 of the adapter's
    line = plan.other_memory(config, count, 1)[-1]
    assert line.startswith(f"on the disk: {wanted / 1e9:.1f} GB")


def test_a_resumed_run_equals_one_never_stopped_to_the_bit(finished, tmp_path):
    program, whole = finished
    with stopped_in_the_step_after(2):
        program.train(config_of(tmp_path, program), None, CPU)
    path = tmp_path / "run"
    names = {file.name for file in last_checkpoint(path).iterdir()}
    assert names == {"adapter", "trainer.pt"}  # and no second copy of the model
    with pytest.raises(ValueError, match="--lora-rank has not ended"):
        Policy.load(path / "model")
    torch.rand(7)  # the random state of the process that resumes is another one
    program.train(*program.parse(["--resume", str(path)]), CPU)
    assert timeless(path) == timeless(whole)
    left, right = weights(path), weights(whole)
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert (path / "model" / lora.FILE).read_bytes() == (whole / "model" / lora.FILE).read_bytes()


def run_in_shards(root: Path) -> None:
    """A run of two processes, and the same, stopped between two checkpoints and resumed."""
    world, changes = World.join("cpu"), dict(parallel="fsdp", save_every=1)
    ekipl.train(config_of(root / "whole", **changes), None, world)
    with stopped_in_the_step_after(2):
        ekipl.train(config_of(root / "stopped", **changes), None, world)
    ekipl.train(*ekipl.parse(["--resume", str(root / "stopped" / "run")]), world)


def test_a_run_in_shards_resumes_to_the_bit_and_leaves_a_whole_merged_model(tmp_path):
    in_two_processes(run_in_shards, tmp_path)
    left, right = weights(tmp_path / "whole" / "run"), weights(tmp_path / "stopped" / "run")
    start = Policy.load(ROOT / "blocks" / "tiny").state_dict()
    for name, value in start.items():
        assert left[name].shape == value.shape and torch.equal(left[name], right[name])
        assert torch.equal(left[name], value) != name.endswith("_proj.weight"), name


def test_the_default_run_learns(tmp_path):
    """A fifth of it: the adapter alone takes the policy from its own short answers to thoughts."""
    config = ekipl.Config(states=10 * 64, eval_every=0, lora_rank=16, lr=2e-3, runs=str(tmp_path))
    config.rollout = "transformers"
    records = storage.read(ekipl.train(config, None, CPU) / "metrics.jsonl")
    early, late = records[:5], records[5:]

    def rise(key: str) -> float:
        return mean(record[key] for record in late) - mean(record[key] for record in early)

    print({key: round(rise(key), 2) for key in ("reward", "expert_share", "tokens")})
    assert records[0]["tokens"] < 10 and rise("tokens") > 4
    assert rise("reward") > 0.02 and rise("expert_share") < -0.04


def test_fine_tuning_learns(tmp_path):
    """The default run's questions, a few of them: the adapter alone takes the policy from its own
    short answers to true thoughts."""
    config = dict(states=24 * 16, batch_size=16, lora_rank=16, lr=8e-3)
    config = config_of(tmp_path, sft, **config, eval_every=0, save_every=0)
    losses = [r["loss"] for r in storage.read(sft.train(config, None, CPU) / "metrics.jsonl")]
    print([round(loss, 2) for loss in losses])
    assert losses[0] > 0.8 and sum(losses[-8:]) / 8 < 0.2


# --------------------------------------------------------------------------------------- the plan


def test_the_plan_counts_the_adapter(random_model_dir):
    policy = adapted(random_model_dir)
    config, count = update_config(lora_rank=4), plan.sizes(policy.model.config)
    assert plan.trained(config, count) == sum(
        v.numel() for v in lora.adapter(policy.model).values()
    )
    known, _ = plan.described("Qwen/Qwen2-VL-2B-Instruct")
    assert plan.sizes(known).adapter == 28 * (
        2 * (1536 + 1536) + 2 * (1536 + 256) + 3 * (1536 + 8960)
    )


def test_in_bfloat16_autograd_keeps_of_a_layer_what_the_plan_says(random_model_dir):
    def size(layers: int):
        policy = of_layers(random_model_dir, layers, 1).to(torch.bfloat16)
        lora.add_adapter(policy.model, update_config(lora_rank=4))
        assert {v.dtype for v in lora.adapter(policy.model).values()} == {torch.float32}
        return kept(policy, True)

    one, batch = size(1)
    planned = [
        activations.activations(
            of_layers(random_model_dir, n, 1).model.config, batch, True, True, False, True, 4
        )[0]
        for n in (1, 2)
    ]
    print(f"a layer: planned {planned[1] - planned[0]}, measured {size(2)[0] - one}")
    assert 0.85 * (planned[1] - planned[0]) < size(2)[0] - one < 1.02 * (planned[1] - planned[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_measured_peak_of_an_update_is_the_planned_one_or_little_less(checkpointing):
    config = ekipl.Config(
        batch_size=8, micro_batch=8, group_size=4, max_new_tokens=48, beta=0.04, lora_rank=16
    )
    config.gradient_checkpointing = checkpointing
    policy = ekipl.load_policy(config, config.start, CPU)
    reference, groups = lora.without_adapter(policy), groups_of(policy, 8)
    optimizer = torch.optim.AdamW(policy.parameters())
    ekipl.update(config, policy, reference, optimizer, groups, CPU, 1e-4)
    optimizer.zero_grad(set_to_none=True)
    measured = peak(lambda: ekipl.update(config, policy, reference, optimizer, groups, CPU, 1e-4))
    batch = full_batch(policy, 8)[1]
    rows = plan.memory(config, policy.model.config, batch, 1, False)
    there = ("policy, frozen, float32", "adapter, float32", "AdamW, two moments, float32")
    assert set(there) < {row.name for row in rows}
    planned = sum(row.learning for row in rows if row.name not in there)
    print(f"planned {planned / 1e6:.1f} MB, measured {measured / 1e6:.1f}")
    assert 0.6 * planned < measured < 1.05 * planned


README = (Path(plan.__file__).parent / "README.md").read_text()
ROWS = re.findall(
    r"^\| (\d+) GB \| (2B|7B) \| (?:`(.*?)`|all weights) \| ([\d.]+) \|$", README, re.M
)


@pytest.mark.parametrize("gigabytes, size, flags, left", ROWS)
def test_the_table_of_gpus_says_what_the_plan_says(gigabytes, size, flags, left):
    command = f"--preset counting-{size.lower()} {flags} --plan {gigabytes}"
    assert f"fits: {left} GB of {gigabytes} GB less 5%" in ekipl.run(command.split())


def test_the_table_of_gpus_is_whole_and_what_it_leaves_out_does_not_fit():
    named = [(size, int(gigabytes)) for gigabytes, size, *_ in ROWS]
    of_2b, of_7b = ([g for size, g in named if size == each] for each in ("2B", "7B"))
    assert of_2b == [16, 24, 48, 80] and of_7b == [24, 48, 80]
    smallest = "--lora-rank 1 --rollout transformers --batch-size 1 --micro-batch 1 --plan 16"
    said = ekipl.run(f"--preset counting-7b {smallest}".split())
    assert "does not fit" in said and "it fits with" not in said
    assert "it fits with --lora-rank 16" in ekipl.run("--preset counting-2b --plan 24".split())


# --------------------------------------------------------------------------------------- mistakes


def test_without_lora_peft_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # an import raises
    path = ekipl.train(config_of(tmp_path, states=4, eval_every=0, lora_rank=0), None, CPU)
    assert (path / "model" / "model.safetensors").exists()
    assert not (path / "model" / "adapter").exists()


@pytest.mark.parametrize("program", [ekipl, sft])
@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--lora-rank", "-1"], "--lora-rank must be 0 or above, not -1"),
        (
            ["--lora-rank", "4"],
            f"--lora-rank needs peft, which is not installed: pip install {PEFT}",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, program, arguments, says):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError) as error:
        program.run([*arguments, "--runs", str(tmp_path)])
    assert str(error.value) == says


def test_a_run_without_a_checkpoint_cannot_go_on(tmp_path):
    with pytest.raises(UserError, match="before its first checkpoint"):
        model_of(config_of(tmp_path), tmp_path)


def test_a_run_goes_on_with_its_own_adapter_only(finished, tmp_path):
    program, whole = finished
    path = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    with pytest.raises(UserError, match="leave out --lora-rank"):
        program.parse(["--resume", str(path), "--lora-rank", "8"])
    stored, _ = program.parse(["--resume", str(path)])
    file = last_checkpoint(path) / lora.FILE
    tensors = load_file(file)

    def refused(says: str, **changes) -> None:
        with pytest.raises(console.UserError, match=says) as error:
            program.train(dataclasses.replace(stored, **changes), path, CPU)
        assert str(file) in str(error.value) and "\n" not in str(error.value)

    refused("another rank", lora_rank=8)
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    refused("no finite number")
    file.write_bytes(b"damaged")
    refused("cannot be read")
    file.unlink()
    refused("cannot be read")


def test_peft_is_pinned_in_one_version():
    for file in ("requirements.txt", "README.md", ".ci/run"):
        assert PEFT in (ROOT / file).read_text(), file
