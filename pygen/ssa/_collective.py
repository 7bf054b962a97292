"""What ranks exchange when an ensemble is spread over processes: sums and maxima of integers, nothing else.

`group` is None for one process alone.
"""

from typing import Any

import torch
from torch import Tensor, distributed


def find_group(group: Any) -> Any:
    """The given process group; without one, the default group where torch.distributed was initialised, else None."""
    if group is None and distributed.is_available() and distributed.is_initialized():
        return distributed.group.WORLD
    return group


def rank_and_size(group: Any) -> tuple[int, int]:
    """This process's rank in the group, and how many ranks there are."""
    if group is None:
        return 0, 1
    rank = distributed.get_rank(group)
    if rank < 0:
        raise ValueError("group: this process is not one of its ranks")
    return rank, distributed.get_world_size(group)


def _exchange(tensor: Tensor, group: Any, operation: Any) -> Tensor:
    if group is None:
        return tensor
    # NCCL alone moves CUDA tensors only; gloo moves those of the CPU.
    backends = str(distributed.get_backend_config(group))
    device = torch.device("cpu") if "gloo" in backends else torch.device("cuda", torch.cuda.current_device())
    moved = tensor.to(device, copy=True).contiguous()
    distributed.all_reduce(moved, operation, group=group)
    return moved.to(tensor.device)


def sum_over_ranks(tensor: Tensor, group: Any) -> Tensor:
    """int64 in, int64 out: on every rank the sum over all of them."""
    return _exchange(tensor, group, distributed.ReduceOp.SUM) if group is not None else tensor


def max_over_ranks(tensor: Tensor, group: Any) -> Tensor:
    """int64 in, int64 out: on every rank the maximum over all of them."""
    return _exchange(tensor, group, distributed.ReduceOp.MAX) if group is not None else tensor
