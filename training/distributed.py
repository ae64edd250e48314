"""This process among all of a run's: which share of the work is its own, and how the shares come together (torchrun, DDP, FSDP2).

    ddp     every process has the whole model, its gradients and its optimizer; gradients are averaged in the last backward pass of a batch
    fsdp    every process has its share of each: a parameter is gathered where a layer computes with it, and given up again

Both give the gradient of one process with the whole batch. With fsdp every forward and backward pass is one of all processes together:
they have to make equally many. Weights, gradients and optimizer are float32 in both.
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
    """This process among all of them: one without torchrun, else one per GPU (nccl), or on CPUs (gloo)."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> "World":
        rank, size, local = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if cuda and local >= torch.cuda.device_count():
            raise UserError(
                f"process {local + 1} of this machine finds {torch.cuda.device_count()} GPUs: lower --nproc_per_node"
            )
        if cuda:
            torch.cuda.set_device(local)
            # cuDNN's attention is tried first on an H100, and plans anew for each shape; ours
            # change with every micro-batch.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if size > 1:  # no process waits for ever for one that died
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
        return cls(rank, size, torch.device("cuda", local) if cuda else torch.device("cpu"))

    def place(
        self, policy: torch.nn.Module, parallel: str = "ddp", bf16: bool = False
    ) -> torch.nn.Module:
        """The policy on this process's device: the whole of it, or with "fsdp" this process's share of every parameter (the same object).

        What is gathered at a time: a layer of the language model, a block of the vision tower, or all the rest (embeddings, LM head), which
        `Policy.forward` needs as a whole. bf16: on a GPU parameters are gathered in bfloat16, and gradients summed in float32. Inputs of layers
        are left as they are: the vision tower's rotary angles must not be rounded. A single process has nothing to share.
        """
        if parallel == "ddp" or self.size == 1:
            return policy.to(self.device)
        mesh = init_device_mesh(self.device.type, (self.size,))
        half = (
            dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            if bf16 and self.device.type == "cuda"
            else {}
        )
        # Nothing stays gathered after a forward pass without gradients: the next optimizer step would make it stale.
        how = dict(
            mesh=mesh,
            mp_policy=MixedPrecisionPolicy(**half, cast_forward_inputs=False),
            reshard_after_forward=True,
        )
        for block in [*policy.model.model.language_model.layers, *policy.model.model.visual.blocks]:
            fully_shard(
                block, **how
            )  # moves it to the device: there is never more than a block there in whole
        fully_shard(policy, **how)
        fully_shard.state(
            policy
        )._lazy_init()  # or the first layer that `generate` calls would take itself for the root
        return policy

    def data_parallel(self, policy: torch.nn.Module) -> torch.nn.Module:
        """A placed policy as this process trains it: its gradients are the mean over the processes."""
        if self.size == 1 or isinstance(policy, FSDPModule):
            return policy
        for parameter in policy.parameters():
            if (
                parameter.requires_grad
            ):  # DDP takes what is there into its buckets; this 0 has no memory
                parameter.grad = parameter.new_zeros(()).expand_as(parameter)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # PyTorch 2.13 has another name for broadcast_buffers, 2.11 does not know it
            return DistributedDataParallel(
                policy, broadcast_buffers=False, gradient_as_bucket_view=True
            )  # no second copy of the gradients

    def mine(self, items: list) -> list:
        """This process's share of a list; shares differ by one at most."""
        return items[self.rank :: self.size]

    def gather(self, items: list) -> list:
        """Every process's share, back in the order of the whole list."""
        if self.size == 1:
            return items
        shares = [None] * self.size
        dist.all_gather_object(shares, items)
        whole = [None] * sum(map(len, shares))
        for rank, share in enumerate(shares):
            whole[rank :: self.size] = share
        return whole

    def agree(self, value):
        """The first process's value."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def first(self, action):
        """What action() returns in the first process, which alone calls it; all raise the UserError that it raises there."""
        result, problem = None, None
        if self.rank == 0:
            try:
                result = action()
            except UserError as error:
                problem = str(error)
        result, problem = self.agree((result, problem))
        if problem:
            raise UserError(problem)
        return result

    def leave(self) -> None:
        """Ends what `join` began."""
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- what DDP and FSDP do differently


def accumulating(learner: torch.nn.Module, last: bool):
    """The context of a forward and backward pass, of which a batch has several.

    DDP waits with averaging for the last. FSDP does not: what it would keep until then are whole gradients, all that it saves.
    """
    return (
        learner.no_sync()
        if isinstance(learner, DistributedDataParallel) and not last
        else nullcontext()
    )


def keeps_gradients(policy: torch.nn.Module) -> bool:
    """Whether gradients stay in memory between updates: with DDP, whose buckets hold them."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return several and not isinstance(policy, FSDPModule)


def clear_gradients(learner: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gives their memory back, or with DDP sets them to 0 where they are.

    Had DDP none, a backward pass that does not average yet would make new ones outside of its
    buckets: 4 bytes a parameter more.
    """
    optimizer.zero_grad(set_to_none=not isinstance(learner, DistributedDataParallel))


def clip_gradients(policy: torch.nn.Module, limit: float) -> float:
    """Scales the gradient to this norm at most; returns the norm before, of the whole gradient."""
    return float(whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), limit)))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process has a share, in all of them; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unshard(policy: torch.nn.Module) -> None:
    """Gathers all parameters until `reshard`, so that each process may call the model as often as it likes. Does nothing without FSDP.

    Meanwhile they are copies in the dtype of the computation, not those that the optimizer knows.
    """
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()


def reshard(policy: torch.nn.Module) -> None:
    """Back to this process's share of every parameter."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def weights_of(policy: torch.nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """The model's parameters by name, tied ones once, `collected`. RuntimeError while they are gathered: those are copies, on a GPU rounded ones."""
    parameters = {name: parameter.detach() for name, parameter in policy.model.named_parameters()}
    if isinstance(policy, FSDPModule) and not all(
        isinstance(parameter, DTensor) for parameter in parameters.values()
    ):
        raise RuntimeError("the policy is gathered for rollouts: reshard it first")
    return collected(parameters, rank)


def collected(state, rank: int):
    """A state dict with whole tensors in the memory of the first process's machine, gathered one at a time; without FSDP as it is."""
    if isinstance(state, dict):
        return {name: collected(value, rank) for name, value in state.items()}
    if not isinstance(state, DTensor):
        return state
    full = state.full_tensor()
    return full.cpu() if rank == 0 else None


def shared_out(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """The state dict of an optimizer as `restore` reads it, with this process's share of what
    belongs to a parameter that is shared out.

    What stays in the machine's memory is copied: a view would keep the mapped file on the disk when
    a newer checkpoint has replaced it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
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


def autocast(device: torch.device, bf16: bool):
    """bfloat16 on a GPU, if asked for, with weights that stay float32: for rollouts and scores alike, or they disagree."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type == "cuda")


def deterministic(world: World) -> None:
    """On CPUs: else threads add up the gradients of one tensor in whatever order they come."""
    if world.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
