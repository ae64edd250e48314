"""--parallel fsdp: each process has its share of the model, and everything comes out as with the whole model in one process."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

import ekipl
import runs
import sft
from conftest import in_two_processes
from distributed import World, own, reshard, unshard, whole
from policy import Policy
from runs import UserError
from sampling import TransformersSampler
from test_ekipl import CPU, SMALL, assert_same_gradient, fixed_groups, states_of_two_sizes, stopped_in_the_step_after, timeless, update_config, weights

SHARED = dict(SMALL, states=16, batch_size=4, parallel="fsdp")


def updated(model_dir, world: World, config, checkpointing: bool = False):
    """Gradient and weights after one update on this process's share of `fixed_groups`, in whole, and the gradient's norm."""
    policy, reference = Policy.load(model_dir, gradient_checkpointing=checkpointing), Policy.load(model_dir).requires_grad_(False)
    with torch.no_grad():  # a reference that differs, so that the KL term has a gradient
        for parameter in reference.parameters():
            parameter.mul_(1.02)
    policy, reference = world.place(policy, config.parallel), world.place(reference, config.parallel)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-3)  # no step of lr where the gradient is near nothing
    learner = world.data_parallel(policy)
    groups = world.mine(fixed_groups(policy, config.batch_size))
    norm = ekipl.update(config, learner, reference, optimizer, groups, world, lr=1e-3)["grad_norm"]
    gradient = {name: whole(parameter.grad) for name, parameter in policy.named_parameters()}
    return gradient, {name: whole(parameter.detach()) for name, parameter in policy.named_parameters()}, norm


def updated_here(model_dir, config, checkpointing: bool):
    """In one of two processes; arrays, since tensors would be handed over in shared memory."""
    gradient, after, norm = updated(model_dir, World.join("cpu"), config, checkpointing)
    return {name: g.numpy() for name, g in gradient.items()}, {name: w.numpy() for name, w in after.items()}, norm


WAYS = [  # micro_batch, gradient checkpointing, limit of the gradient's norm, updates
    (3, False, 1e9, 1), (1, False, 1e9, 1), (2, True, 1.0, 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def alone(random_model_dir):
    """By limit and number of updates, what one process with the whole batch comes to."""
    return {way: updated(random_model_dir, CPU, update_config(max_grad_norm=way[0], updates_per_batch=way[1])) for way in {way[2:] for way in WAYS}}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("micro_batch, checkpointing, limit, updates", WAYS)
def test_two_processes_take_the_step_of_one_with_the_whole_batch(random_model_dir, alone, parallel, micro_batch, checkpointing, limit, updates):
    config = update_config(parallel=parallel, micro_batch=micro_batch, max_grad_norm=limit, updates_per_batch=updates)
    gradient, after, norm = alone[limit, updates]
    for own_gradient, own_after, own_norm in in_two_processes(updated_here, random_model_dir, config, checkpointing):
        if updates == 1:  # of a second update the gradient is that of slightly other weights
            assert_same_gradient(own_gradient, gradient)
        assert own_norm == pytest.approx(norm, rel=1e-4)
        for name in after:
            torch.testing.assert_close(torch.as_tensor(own_after[name]), after[name], atol=2e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
