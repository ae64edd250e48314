"""This process among all of a run's: which share of the work is its own, and how the shares come together (torchrun, DDP)."""

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from runs import UserError


@dataclass
class World:
    """This process among all of them: one without torchrun, else one per GPU (nccl), or on CPUs (gloo)."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> "World":
        rank, size, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if cuda and local >= torch.cuda.device_count():
            raise UserError(f"process {local + 1} of this machine finds {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        if cuda:
            torch.cuda.set_device(local)
        if size > 1:  # no process waits for ever for one that died
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
        return cls(rank, size, torch.device("cuda", local) if cuda else torch.device("cpu"))

    def data_parallel(self, policy: torch.nn.Module) -> torch.nn.Module:
        """The policy as this process trains it: its gradients are the mean over the processes."""
        if self.size == 1:
            return policy
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.13 has another name for broadcast_buffers, 2.11 does not know it
            return DistributedDataParallel(policy, broadcast_buffers=False, gradient_as_bucket_view=True)  # no second copy of the gradients

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
