"""What every Triton launcher shares: how strides become kernel arguments, and how a kernel is launched.

Each op's file has the kernels and a launcher with the operator's own signature; numerics are in `_math.py`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

SIXTEEN_BIT = (torch.bfloat16, torch.float16)

interpreted = bool(triton.knobs.runtime.interpret)

# Enough programs to occupy every multiprocessor of a large GPU more than once: tiles shrink until there are so many.
# The interpreter runs them one after the other.
ENOUGH_PROGRAMS = 4 if interpreted else 512

MAX_THREADS = 512
# Threads of a warp; `aot` sets it to that of the chip it compiles for.
warp_size = 64 if torch.version.hip else 32
# Bytes of shared memory that one program may have where the device does not say; `aot` sets it likewise.
shared_limit = 64 * 1024


class Launch(NamedTuple):
    """One kernel launch: what `aot` compiles instead of running."""

    kernel: Any
    args: tuple
    constants: dict[str, Any]
    options: dict[str, Any]


# `aot` puts a list here; launches are then recorded, on meta tensors, and nothing runs.
recorder: list[Launch] | None = None


def shared_memory(like: Tensor) -> int:
    """Bytes of shared memory that one program may have on the device of `like`."""
    if not like.is_cuda:
        return shared_limit
    properties = torch.cuda.get_device_properties(like.device)
    return getattr(properties, "shared_memory_per_block_optin", shared_limit)


def launch(
    kernel: Any,
    programs: int,
    like: Tensor,
    args: tuple,
    constants: dict[str, Any],
    num_warps: int,
    **more: Any,
) -> None:
    """Run `kernel` on `programs` programs, on the device of `like` and on that device's current stream.

    `more`: compiler options other than the usual ones.
    """
    # Contracting a * b + c rounds once instead of twice and is twice as fast. Stated here because Triton's default
    # changes with 3.10. The two-sums in `_math.py` have no product that it could touch.
    options = {"num_warps": num_warps, "enable_fp_fusion": True, **more}
    if recorder is not None:
        recorder.append(Launch(kernel, args, constants, options))
        return
    with torch.cuda.device_of(like) if like.is_cuda else nullcontext():
        kernel[(programs,)](*args, **constants, **options)


def warps_for(elements: int, per_thread: int) -> int:
    """The warps with which each thread holds `per_thread` of a tile's `elements`."""
    return max(1, min(MAX_THREADS, elements // per_thread) // warp_size)


def shrink_until_enough(tile: int, count: int, others: int = 1) -> int:
    """Halve a tile of `tile` out of `count` things until enough programs share the work, `others` for each tile."""
    while tile > 1 and triton.cdiv(count, tile) * others < ENOUGH_PROGRAMS:
        tile //= 2
    return tile


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def collapse(shape: Sequence[int], *strides: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """Merge neighbouring dimensions that every tensor walks in one step; drop those of size 1.

    (shape, one stride list per tensor) -> the same elements in the same order, in as few dimensions as they allow.
    """
    sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(m[-1] == s[dim] * size for m, s in zip(merged, strides, strict=True)):
            sizes[-1] *= size
            for m, s in zip(merged, strides, strict=True):
                m[-1] = s[dim]
        else:
            sizes.append(size)
            for m, s in zip(merged, strides, strict=True):
                m.append(s[dim])
    return sizes, merged


def pad_front(values: Sequence[int], length: int, fill: int) -> tuple[int, ...]:
    """`values` with `fill` in front, `length` long."""
    return (fill,) * (length - len(values)) + tuple(values)
