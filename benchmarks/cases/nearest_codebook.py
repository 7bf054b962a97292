"""Nearest codes and their statistics against products with argmin, FAISS and vector-quantize-pytorch.

A search takes long in float64, so results are checked on rows at even distances: ours must be the very index that the
reference finds, a peer may take a code that is farther by no more than float32 rounds.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pygen import ops, reference
from pygen.benchmarks.registry import (
    BEST,
    COMPILED,
    EAGER,
    OURS,
    Call,
    Case,
    Factory,
    Floor,
    Inputs,
    Target,
    Unavailable,
    call,
    compiled,
    register,
)

FAISS, VQ_PYTORCH = "faiss", "vector-quantize-pytorch"
# Where a target holds. "default" is of processors that no target was set for.
AMX, WITHOUT_AMX, GPU = ("amx",), ("avx2", "avx512", "avx512_vnni"), ("cuda",)

CHECKED_ELEMENTS = 1 << 27  # of rows x codes x dimensions: a second or two of float64 brute force
MATRIX_ELEMENTS = 1 << 28  # of the rows x codes that a peer holds at once: a gibibyte of float32


def _gaussian(n: int, k: int, d: int):
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        return Inputs(tuple(torch.randn(count, d, device=device, generator=generator) for count in (n, k)))

    return make


def blocks(x: Tensor, codes: int) -> Iterator[Tensor]:
    """Rows whose distances to all codes fit into memory at once."""
    return iter(x.split(max(1, MATRIX_ELEMENTS // codes)))


# ---- the search ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """Indices that claim to be those of float64, every one."""

    indices: Tensor


@dataclass(frozen=True)
class Nearest:
    """Some rows, which they are, the codebook and the nearest code of each: float64."""

    x: Tensor
    rows: Tensor
    codebook: Tensor
    indices: Tensor

    def squares(self, indices: Tensor) -> Tensor:
        return (self.x - self.codebook[indices]).square().sum(1)


def nearest(inputs: Inputs) -> Call:
    x, codebook = inputs.tensors[:2]

    def find() -> Nearest:
        count = min(len(x), max(32, CHECKED_ELEMENTS // codebook.numel()))
        rows = torch.arange(count, device=x.device) * (len(x) // count)
        _, indices, _ = reference.nearest_codebook(x[None, rows], codebook[None], "euclidean", None, False, False)
        return Nearest(x[rows], rows, codebook, indices[0])

    return find


def farther(outputs: Exact | Tensor, nearest: Nearest) -> float:
    """By how much the chosen codes are farther than the nearest, of squares, at most. Exact ones may not differ."""
    indices = outputs.indices if isinstance(outputs, Exact) else outputs
    if indices.dim() != 1 or indices.min() < 0 or indices.max() >= len(nearest.codebook):
        return math.inf
    if len(indices) <= int(nearest.rows[-1]):
        return math.inf
    chosen = indices[nearest.rows]
    if isinstance(outputs, Exact):
        return 0.0 if torch.equal(chosen, nearest.indices) else math.inf
    least = nearest.squares(nearest.indices)
    return ((nearest.squares(chosen) - least) / least.clamp_min(1e-30)).max().item()


def _ours(inputs: Inputs) -> Call:
    x, codebook = inputs.tensors
    return lambda: Exact(ops.nearest_codebook(x, codebook))


def addmm_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    """|c|^2 / 2 - x.c, without the term that all codes share."""
    half = codebook.square().sum(1) / 2
    return torch.cat([torch.addmm(half, rows, codebook.T, alpha=-1).argmin(1) for rows in blocks(x, len(codebook))])


def cdist_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cat([torch.cdist(rows, codebook).argmin(1) for rows in blocks(x, len(codebook))])


def _faiss(inputs: Inputs) -> Call:
    """The flat index, already filled."""
    x, codebook = inputs.tensors
    if x.device.type != "cpu":
        raise ImportError("faiss for this device")
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(x.size(1))
    index.add(codebook.numpy())
    return lambda: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])


def with_codebook(kind: type, codebook: Tensor, **options: Any) -> torch.nn.Module:
    """A VectorQuantize, pygen's or the original, with this codebook."""
    module = kind(codebook.size(1), len(codebook), **options).to(codebook.device)
    state = {name: codebook.detach()[None].clone() for name in ("_codebook.embed", "_codebook.embed_avg")}
    module.load_state_dict(state, strict=False)
    return module


def _vq_pytorch(inputs: Inputs) -> Call:
    from vector_quantize_pytorch import VectorQuantize

    x, codebook = inputs.tensors
    module = with_codebook(VectorQuantize, codebook).eval()

    @torch.no_grad()
    def indices() -> Tensor:
        return torch.cat([module(rows[None])[1][0] for rows in blocks(x, len(codebook))])

    return indices


def _gemm(dtype: torch.dtype) -> Factory:
    """The product alone, into memory that is there: what a search would cost if nothing were searched."""

    def factory(inputs: Inputs) -> Call:
        x, codebook = (tensor.to(dtype) for tensor in inputs.tensors)
        parts = list(blocks(x, len(codebook)))
        out = torch.empty(len(parts[0]), len(codebook), dtype=dtype, device=x.device)

        def product() -> Tensor:
            for rows in parts:
                torch.mm(rows, codebook.T, out=out[: len(rows)])
            return out

        return product

    return factory


def _doubts(inputs: Inputs) -> dict[str, float]:
    """How many codes the bound left to float64, and of how many rows more than one."""
    _, candidates = ops.nearest_codebook(*inputs.tensors, return_candidates=True)
    return {"candidates a row": candidates.double().mean().item(), "rechecked": (candidates > 1).double().mean().item()}


def _search(n: int, k: int, d: int, with_amx: float) -> Case:
    on_gpu = [Target(COMPILED, 3, on=GPU)]
    on_gpu += [Target("bf16 GEMM", at_most=1 / 0.6, on=GPU)] if d >= 128 else []
    return Case(
        op="nearest_codebook",
        name=f"{n}x{k}x{d}",
        shape=(n, d),
        make=_gaussian(n, k, d),
        implementations={
            OURS: _ours,
            EAGER: call(addmm_argmin),
            COMPILED: compiled(addmm_argmin),
            "cdist": call(cdist_argmin),
            FAISS: _faiss,
            VQ_PYTORCH: _vq_pytorch,
        },
        yardsticks={"SGEMM": _gemm(torch.float32), "bf16 GEMM": _gemm(torch.bfloat16)},
        reference=nearest,
        error=farther,
        tolerance=1e-4,
        floor=Floor(bytes=4 * d * (n + k) + 8 * n, flops=2 * n * k * d, any_precision=True),
        targets=(Target(BEST, with_amx, on=AMX), Target(BEST, 1.5, on=WITHOUT_AMX), *on_gpu),
        long=n * k * d > 1 << 33,
        figures=_doubts,
    )


# ---- memory ----------------------------------------------------------------------------------------------------------


def _peak_of_a_process(n: int, k: int, d: int) -> Callable[[Call, torch.device], int]:
    def weigh(search: Call, device: torch.device) -> int:
        command = [sys.executable, "-m", "pygen.benchmarks.codebook_memory", *map(str, (n, k, d))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-500:]}")
        return json.loads(done.stdout)["peak"]

    return weigh


def _memory(n: int, k: int, d: int) -> Case:
    """All that a process needs: torch, the rows, the codes and the search."""
    gaussian = _gaussian(n, k, d)

    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        if device.type != "cpu" or not Path("/proc/self/status").exists():
            raise Unavailable("the memory of a process is read where Linux tells it: --device cpu")
        if not torch._C._dispatch_has_kernel_for_dispatch_key("pygen::nearest_codebook", "CPU"):
            raise Unavailable("the plain reference takes hours: the compiled kernels are missing (see pygen doctor)")
        return gaussian(device, generator)

    return Case(
        op="nearest_codebook",
        name=f"{n}x{k}x{d} memory",
        shape=(n, d),
        make=make,
        implementations={OURS: _ours},
        reference=nearest,
        error=farther,
        tolerance=1e-4,
        floor=Floor(flops=2 * n * k * d, any_precision=True),
        targets=(Target(None, at_most=1.5e9, of="memory"),),
        baseline=OURS,
        long=True,
        weigh=_peak_of_a_process(n, k, d),
    )


# ---- statistics ------------------------------------------------------------------------------------------------------


def index_add(x: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(k, dtype=torch.int64, device=x.device).index_add_(0, indices, torch.ones_like(indices))
    return counts, torch.zeros(k, x.size(1), dtype=x.dtype, device=x.device).index_add_(0, indices, x)


def _one_hot(x: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    chosen = F.one_hot(indices, k)
    return chosen.sum(0), chosen.to(x.dtype).T @ x


def _statistics(n: int, k: int, d: int) -> Case:
    def make(device: torch.device, generator: torch.Generator) -> Inputs:
        x = torch.randn(n, d, device=device, generator=generator)
        return Inputs((x, torch.randint(k, (n,), device=device, generator=generator)))

    return Case(
        op="codebook_statistics",
        name=f"{n}x{k}x{d}",
        shape=(n, d),
        make=make,
        implementations={
            OURS: call(lambda x, indices: ops.codebook_statistics(x, indices, k)),
            EAGER: call(partial(index_add, k=k)),
            COMPILED: compiled(partial(index_add, k=k)),
            "one-hot": call(partial(_one_hot, k=k)),
        },
        reference=call(partial(index_add, k=k)),
        floor=Floor(bytes=4 * d * (n + k) + 8 * (n + k)),
    )


register(
    _search(65536, 512, 64, with_amx=5),
    _search(16384, 8192, 256, with_amx=10),
    _search(65536, 1024, 8, with_amx=1.5),
    _search(16384, 65536, 32, with_amx=4),
    _memory(1 << 20, 1 << 14, 64),
    _statistics(65536, 512, 64),
    _statistics(16384, 8192, 256),
)
