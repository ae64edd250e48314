"""The processes of a run: which shard of the work is this one's, and how results come together.

    ddp     every process holds the whole model, its gradients and its optimizer; gradients are
            averaged in the last backward pass of a batch
    fsdp    every process holds a shard of each (FSDP2); a layer's parameters are gathered while it
            computes, and freed again

Both give the gradient of one process with the whole batch. With fsdp all processes take part in
every forward and backward pass, so they must make equally many. Weights, gradients and optimizer
are float32 in both.
"""

import os
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from training.console import UserError


@dataclass
class World:
    """This process among all: alone, or under torchrun one per GPU (nccl) or on CPUs (gloo)."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> "World":
        rank = int(os.environ.get("RANK", 0))
        size = int(os.environ.get("WORLD_SIZE", 1))
        gpu = int(os.environ.get("LOCAL_RANK", 0))
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if cuda and gpu >= torch.cuda.device_count():
            raise UserError(
                f"process {gpu + 1} of this machine finds {torch.cuda.device_count()} GPUs: "
                "lower --nproc_per_node"
            )
        if cuda:
            torch.cuda.set_device(gpu)
            # cuDNN's attention is tried first on an H100, and plans anew for each shape; ours
            # change with every micro-batch.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if size > 1:  # the timeout: no process waits forever for one that died
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
        return cls(rank, size, torch.device("cuda", gpu) if cuda else torch.device("cpu"))

    def place(
        self, policy: torch.nn.Module, parallel: str = "ddp", bf16: bool = False
    ) -> torch.nn.Module:
        """The policy on this process's device: all of it, or with "fsdp" a shard of each parameter.

        Returns the same object. FSDP gathers at a time a layer of the language model, a block of
        the vision tower, or all the rest (embeddings, LM head), which `Policy.forward` needs as a
        whole. bf16: on a GPU parameters are gathered in bfloat16, and gradients summed in float32.
        Inputs of layers are not cast: the vision tower's rotary angles must not be rounded.
        """
        if parallel == "ddp" or self.size == 1:
            return policy.to(self.device)
        half = {}
        if bf16 and self.device.type == "cuda":
            half = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        how = dict(
            mesh=init_device_mesh(self.device.type, (self.size,)),
            mp_policy=MixedPrecisionPolicy(**half, cast_forward_inputs=False),
            # Else parameters gathered in a pass without gradients are stale after the next step.
            reshard_after_forward=True,
        )
        for block in [*policy.model.model.language_model.layers, *policy.model.model.visual.blocks]:
            fully_shard(block, **how)  # moves it to the device: never more than one whole block
        fully_shard(policy, **how)
        # Now, or the first layer that `generate` calls would take itself for the root.
        fully_shard.state(policy)._lazy_init()
        return policy

    def data_parallel(self, policy: torch.nn.Module) -> torch.nn.Module:
        """A placed policy as it is trained: its gradients are the mean over the processes."""
        if self.size == 1 or isinstance(policy, FSDPModule):
            return policy
        for parameter in policy.parameters():
            if parameter.requires_grad:  # DDP copies it into its buckets; this 0 has no memory
                parameter.grad = parameter.new_zeros(()).expand_as(parameter)
        with warnings.catch_warnings():
            # PyTorch 2.13 renames broadcast_buffers; 2.11 does not know the new name.
            warnings.simplefilter("ignore", FutureWarning)
            # gradient_as_bucket_view: no second copy of the gradients.
            return DistributedDataParallel(
                policy, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def shard(self, items: list) -> list:
        """This process's shard of a list; shards differ in length by one at most."""
        return items[self.rank :: self.size]

    def gather(self, items: list) -> list:
        """The list of which `items` is this process's shard, in all processes."""
        if self.size == 1:
            return items
        shards = [None] * self.size
        dist.all_gather_object(shards, items)
        gathered = [None] * sum(map(len, shards))
        for rank, shard in enumerate(shards):
            gathered[rank :: self.size] = shard
        return gathered

    def broadcast(self, value):
        """The first process's value."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def first(self, action):
        """Calls action() in the first process only, and returns its result in all.

        All processes raise the UserError that it raises there.
        """
        result, problem = None, None
        if self.rank == 0:
            try:
                result = action()
            except UserError as error:
                problem = str(error)
        result, problem = self.broadcast((result, problem))
        if problem:
            raise UserError(problem)
        return result

    def leave(self) -> None:
        """Ends what `join` began."""
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------- gradients


def accumulating(learner: torch.nn.Module, last: bool):
    """The context of one of a batch's forward and backward passes.

    DDP averages gradients only in the last. FSDP does in each: to wait it would have to keep whole
    gradients, and they are what it saves.
    """
    if isinstance(learner, DistributedDataParallel) and not last:
        return learner.no_sync()
    return nullcontext()


def keeps_gradients(policy: torch.nn.Module) -> bool:
    """Whether gradients stay in memory between updates: with DDP, whose buckets hold them."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return several and not isinstance(policy, FSDPModule)


def clear_gradients(learner: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Frees the gradients, or with DDP sets them to 0 in place.

    If DDP's were freed, a backward pass that does not average yet would make new ones outside of
    its buckets: 4 bytes a parameter more.
    """
    optimizer.zero_grad(set_to_none=not isinstance(learner, DistributedDataParallel))


def clip_gradients(policy: torch.nn.Module, limit: float) -> float:
    """Scales the gradient to this norm at most. Returns the norm of the full gradient before."""
    return float(full(torch.nn.utils.clip_grad_norm_(policy.parameters(), limit)))


# ----------------------------------------------------------------------------- shards of a policy


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered in all processes; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a tensor; one that is not sharded as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unshard(policy: torch.nn.Module) -> None:
    """Gathers all parameters until `reshard`, so that each process can call the model on its own.

    Until then the parameters are copies in the dtype of the computation, not those that the
    optimizer updates. Does nothing without FSDP.
    """
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()


def reshard(policy: torch.nn.Module) -> None:
    """Frees the gathered parameters; each process keeps its shard."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def must_be_sharded(policy: torch.nn.Module) -> None:
    """RuntimeError while parameters are gathered: those are copies, on a GPU rounded ones."""
    sharded = all(isinstance(parameter, DTensor) for parameter in policy.parameters())
    if isinstance(policy, FSDPModule) and not sharded:
        raise RuntimeError("the policy is gathered for rollouts: reshard it first")


def full_state(state, rank: int):
    """A state dict with full tensors on the first process's CPU, gathered one by one.

    None in the place of tensors in the other processes. Without FSDP the state as it is.
    """
    if isinstance(state, dict):
        return {name: full_state(value, rank) for name, value in state.items()}
    if not isinstance(state, DTensor):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if rank == 0 else None


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


def sharded_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimizer's full state dict, with the local shard of what belongs to a sharded parameter.

    What stays in the machine's memory is copied: a view would keep the mapped file on the disk
    after a newer checkpoint has replaced it.
    """
    parameters = parameters_of(optimizer)
    for i, values in state["state"].items():
        parameter = parameters[i]
        for name, value in values.items():
            if isinstance(parameter, DTensor) and value.shape == parameter.shape:  # a moment
                values[name] = distribute_tensor(
                    value, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            elif value.dim() == 0 or parameter.device.type == "cpu":  # Adam's step counter
                values[name] = value.clone()
    return state


# ------------------------------------------------------------------------------------- numerics


def autocast(device: torch.device, bf16: bool):
    """bfloat16 on a GPU, if wanted, with float32 weights. Rollouts and scores must use the same."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type == "cuda")


def deterministic(world: World) -> None:
    """On CPUs sums are made in a fixed order, however many threads share them."""
    if world.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
