"""--parallel fsdp: each process has its share of the model, and everything comes out as with the
whole model in one process."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import in_two_processes
from test_ekipl import (
    CPU,
    ROOT,
    SMALL,
    assert_same_gradient,
    fixed_groups,
    states_of_two_sizes,
    stopped_in_the_step_after,
    timeless,
    update_config,
    weights,
)
from torch.distributed.tensor import DTensor

import ekipl
import sft
from policy import Policy
from rollouts.transformers_sampler import TransformersSampler
from training import storage
from training.checkpointing import last_checkpoint, restore
from training.console import UserError
from training.distributed import World, clear_gradients, full, local

SHARED = dict(SMALL, states=8, batch_size=4, save_every=1, eval_every=2, parallel="fsdp")


def updated(model_dir, world: World, config, checkpointing: bool = False):
    """Gradient and weights after one update on this process's share of `fixed_groups`, in whole,
    and the gradient's norm."""
    policy, reference = (
        Policy.load(model_dir, gradient_checkpointing=checkpointing),
        Policy.load(model_dir).requires_grad_(False),
    )
    with torch.no_grad():  # a reference that differs, so that the KL term has a gradient
        for parameter in reference.parameters():
            parameter.mul_(1.02)
    policy, reference = (
        world.place(policy, config.parallel),
        world.place(reference, config.parallel),
    )
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-3
    )  # no step of lr where the gradient is near nothing
    learner = world.data_parallel(policy)
    groups = world.shard(fixed_groups(policy, config.batch_size))
    norm = ekipl.update(config, learner, reference, optimizer, groups, world, lr=1e-3)["grad_norm"]
    gradient = {name: full(parameter.grad) for name, parameter in policy.named_parameters()}
    return (
        gradient,
        {name: full(parameter.detach()) for name, parameter in policy.named_parameters()},
        norm,
    )


def updated_here(model_dir, config, checkpointing: bool):
    """In one of two processes; arrays, since tensors would be handed over in shared memory."""
    gradient, after, norm = updated(model_dir, World.join("cpu"), config, checkpointing)
    return (
        {name: g.numpy() for name, g in gradient.items()},
        {name: w.numpy() for name, w in after.items()},
        norm,
    )


WAYS = [  # micro_batch, gradient checkpointing, limit of the gradient's norm, updates
    (3, False, 1e9, 1),
    (1, False, 1e9, 1),
    (2, True, 1.0, 2),
]


@pytest.fixture(scope="module")
def alone(random_model_dir):
    """By limit and number of updates, what one process with the whole batch comes to."""
    return {
        way: updated(
            random_model_dir, CPU, update_config(max_grad_norm=way[0], updates_per_batch=way[1])
        )
        for way in {way[2:] for way in WAYS}
    }


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("micro_batch, checkpointing, limit, updates", WAYS)
def test_two_processes_take_the_step_of_one_with_the_whole_batch(
    random_model_dir, alone, parallel, micro_batch, checkpointing, limit, updates
):
    config = update_config(
        parallel=parallel, micro_batch=micro_batch, max_grad_norm=limit, updates_per_batch=updates
    )
    gradient, after, norm = alone[limit, updates]
    for own_gradient, own_after, own_norm in in_two_processes(
        updated_here, random_model_dir, config, checkpointing
    ):
        if updates == 1:  # of a second update the gradient is that of slightly other weights
            assert_same_gradient(own_gradient, gradient)
        assert own_norm == pytest.approx(norm, rel=1e-4)
        for name in after:
            torch.testing.assert_close(
                torch.as_tensor(own_after[name]),
                after[name],
                atol=2e-6,
                rtol=1e-5,
                msg=lambda m, name=name: f"{name}: {m}",
            )


def gradients_outside_the_buckets(model_dir) -> list[int]:
    """Of DDP, in each of three updates with three micro-batches: how many gradients were added
    up elsewhere.
    """
    world = World.join("cpu")
    policy = world.place(Policy.load(model_dir), "ddp")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    learner = world.data_parallel(policy)
    groups = world.shard(fixed_groups(policy, 6))
    seen = []
    for parameter in policy.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter: seen.append(parameter.grad.untyped_storage().data_ptr())
        )
    found = []
    for _ in range(3):
        seen.clear()
        config = update_config(batch_size=6, beta=0.0, micro_batch=1)
        ekipl.update(config, learner, None, optimizer, groups, world, lr=1e-3)
        clear_gradients(learner, optimizer)
        buckets = {p.grad.untyped_storage().data_ptr() for p in policy.parameters()}
        assert len(buckets) < len(list(policy.parameters()))
        assert all(not parameter.grad.any() for parameter in policy.parameters())
        found.append(sum(place not in buckets for place in seen))
    return found


def test_gradients_are_added_up_in_the_buckets_of_ddp_from_the_first_micro_batch(random_model_dir):
    assert in_two_processes(gradients_outside_the_buckets, random_model_dir) == [[0, 0, 0]] * 2


def test_without_buckets_the_memory_of_gradients_is_given_back():
    weight = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(weight.parameters())
    weight(torch.ones(1, 2)).sum().backward()
    clear_gradients(weight, optimizer)
    assert all(parameter.grad is None for parameter in weight.parameters())


def shares(model_dir) -> dict:
    """Bytes of this process before and after it has learnt, and what it generates while parameters
    are gathered."""
    world = World.join("cpu")
    policy = world.place(Policy.load(model_dir), "fsdp")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    sampler = TransformersSampler(policy, 12)
    prompts = policy.encode(states_of_two_sizes(3))[
        : 3 - world.rank
    ]  # the second process has fewer: they take other numbers of steps
    found = {
        "said": [
            [action.tokens for action in actions] for actions in sampler.sample(prompts, 4, seed=1)
        ]
    }
    found["greedy"] = [
        action.tokens
        for start in range(len(prompts))
        for action in sampler.greedy(prompts[start : start + 1])
    ]
    assert not any(isinstance(parameter, DTensor) for parameter in policy.parameters())
    sampler.sleep()
    assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())
    ekipl.update(
        update_config(batch_size=4, beta=0.0),
        policy,
        None,
        optimizer,
        world.shard(fixed_groups(policy, 4)),
        world,
        lr=1e-3,
    )
    held = {
        "weights": list(policy.parameters()),
        "gradients": [parameter.grad for parameter in policy.parameters()],
        "optimizer": [
            value for state in optimizer.state.values() for value in state.values() if value.dim()
        ],
    }
    for name, tensors in held.items():  # several may lie in one piece of memory
        storages = [local(tensor).untyped_storage() for tensor in tensors]
        found[name] = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    sampler.sync_weights()
    found["after"] = [
        [action.tokens for action in actions] for actions in sampler.sample(prompts, 4, seed=1)
    ]
    return found


def test_a_process_holds_half_of_everything_and_generates_what_the_whole_model_does(
    random_model_dir,
):
    policy = Policy.load(random_model_dir)
    prompts = policy.encode(states_of_two_sizes(3))
    size = sum(parameter.numel() * 4 for parameter in policy.parameters())
    for rank, found in enumerate(in_two_processes(shares, random_model_dir)):
        own_prompts = prompts[: 3 - rank]
        sampler = TransformersSampler(policy, 12)
        assert found["said"] == [
            [action.tokens for action in actions]
            for actions in sampler.sample(own_prompts, 4, seed=1)
        ]
        assert found["greedy"] == [sampler.greedy([prompt])[0].tokens for prompt in own_prompts]
        assert found["after"] != found["said"]  # the update's weights, not those gathered before
        assert found["weights"] == pytest.approx(size / 2, rel=0.02)
        assert found["gradients"] == pytest.approx(size / 2, rel=0.02)
        assert found["optimizer"] == pytest.approx(size, rel=0.02)


# --------------------------------------------------------------------------------------- whole runs


def config_of(root: Path, **changes):
    return ekipl.Config(**{**SHARED, "runs": str(root), **changes})


def run_stop_and_resume(root: Path) -> None:
    """A run; the same, stopped between two checkpoints and resumed; and one that goes on with the
    whole model in each process."""
    world = World.join("cpu")
    ekipl.train(config_of(root / "whole"), None, world)
    with stopped_in_the_step_after(1):
        ekipl.train(config_of(root / "stopped"), None, world)
    ekipl.train(*ekipl.parse(["--resume", str(root / "stopped" / "run")]), world)
    with stopped_in_the_step_after(1):
        ekipl.train(config_of(root / "ddp"), None, world)
    ekipl.train(config_of(root / "ddp", parallel="ddp"), root / "ddp" / "run", world)


def test_a_run_resumes_to_the_bit_and_leaves_a_checkpoint_for_any_number_of_processes(tmp_path):
    for name in ("whole", "stopped", "ddp"):
        (tmp_path / name).mkdir()
    in_two_processes(run_stop_and_resume, tmp_path)
    finished, stopped, other = (tmp_path / name / "run" for name in ("whole", "stopped", "ddp"))
    assert [record["step"] for record in timeless(finished)] == [0, 1, 2]
    assert timeless(stopped) == timeless(finished)
    left, right, without = weights(stopped), weights(finished), weights(other)
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert all(torch.allclose(without[name], right[name], atol=1e-5) for name in right)
    trainer = torch.load(last_checkpoint(finished) / "trainer.pt", weights_only=True)
    assert trainer["processes"] == 2 and trainer["step"] == 2
    policy = Policy.load(finished / "model")
    optimizer = torch.optim.AdamW(policy.parameters())
    assert restore(optimizer, finished, CPU) == 2  # by one process, in whole
    assert all(
        state["exp_avg"].shape == parameter.shape for parameter, state in optimizer.state.items()
    )
    assert any(
        not torch.equal(weight, start)
        for weight, start in zip(
            right.values(), Policy.load(ROOT / "blocks" / "tiny").state_dict().values(), strict=True
        )
    )


def fine_tuned(root: Path) -> None:
    """On an expert's right samples: some states have none, and every process passes as often."""
    config = {
        name: SHARED[name]
        for name in (
            "states",
            "batch_size",
            "micro_batch",
            "eval_every",
            "eval_states",
            "save_every",
            "name",
            "rollout",
        )
    }
    config |= dict(method="rft", experts="quick", num_samples=1, micro_batch=1)
    sft.train(sft.Config(**config, runs=str(root), parallel=root.name), None, World.join("cpu"))


def test_fine_tuning_comes_to_the_same_weights_as_with_ddp(tmp_path):
    found = {}
    for parallel in ("ddp", "fsdp"):
        (tmp_path / parallel).mkdir()
        in_two_processes(fine_tuned, tmp_path / parallel)
        found[parallel] = weights(tmp_path / parallel / "run")
    assert all(
        torch.allclose(found["fsdp"][name], value, atol=1e-5)
        for name, value in found["ddp"].items()
    )
    records = storage.read(tmp_path / "fsdp" / "run" / "metrics.jsonl")
    trained = [record["trained"] for record in records if "trained" in record]
    assert 0 < sum(trained) < SHARED["batch_size"] * len(trained)


def test_a_batch_that_processes_cannot_share_evenly_is_refused():
    config = ekipl.Config(batch_size=5, parallel="fsdp")
    with pytest.raises(
        UserError, match="--parallel fsdp needs a --batch-size that 2 processes share evenly, not 5"
    ):
        ekipl.check(config, 2, False)
    ekipl.check(dataclasses.replace(config, parallel="ddp"), 2, False)
