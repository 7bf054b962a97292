"""Compile every kernel ahead of time for every chip, without a GPU: `python -m pygen.triton_kernels.aot [--json FILE]`.

The launchers run on meta tensors while `_common.recorder` notes what they would launch, so that exactly the kernels,
constants and warps of real calls are compiled. The report says, for each, the registers, what spilled out of them, and
the shared memory against the chip's limit; the exit code is 1 if anything spills or does not fit.

A new op adds its cases to `KERNELS`.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pygen.reference import SCALE_MAPS
from pygen.reference.rational_quadratic_spline import derivative_count
from pygen.triton_kernels import _common
from pygen.triton_kernels.affine_coupling import (
    affine_coupling,
    affine_coupling_backward,
    affine_coupling_halves,
    affine_coupling_halves_backward,
)
from pygen.triton_kernels.codebook_statistics import codebook_statistics
from pygen.triton_kernels.cumax import cumax, cumax_backward
from pygen.triton_kernels.nearest_codebook import nearest_codebook
from pygen.triton_kernels.on_lstm import on_lstm, on_lstm_backward
from pygen.triton_kernels.power_iteration import power_iteration, power_iteration_backward
from pygen.triton_kernels.rational_quadratic_spline import rational_quadratic_spline, rational_quadratic_spline_backward

KIB = 1024

# Chip -> what to compile for, and the shared memory that one program may have (NVIDIA keeps 1 KiB for itself).
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}

TRITON_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "i1",
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Case = tuple[str, Callable[[], Any]]


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _cumax_cases() -> Iterator[Case]:
    """A row in part of a tile, in a whole tile, in many tiles, and columns; each dtype and direction in each."""
    layouts = {
        "rows": ((4096, 512), 1),
        "tile": ((512, 4096), 1),
        "long": ((64, 2**17), 1),
        "columns": ((64, 256, 96), 1),
    }
    for i, (layout, (shape, dim)) in enumerate(layouts.items()):
        for j, dtype in enumerate(DTYPES):
            # float16 differs from bfloat16 in its loads and stores only; columns from rows in their addresses only.
            if dtype == torch.float16 and layout != "rows" or layout == "columns" and dtype != torch.float32:
                continue
            x = _meta(*shape, dtype=dtype)
            for complement in (False, True) if layout == "long" and dtype == torch.float32 else ((i + j) % 2 == 1,):
                label = f"{layout} {TRITON_TYPES[dtype]}{' complement' if complement else ''}"
                yield f"forward {label}", partial(cumax, x, dim, complement)
                yield f"backward {label}", partial(cumax_backward, x, x, dim, complement)


def _affine_case(label: str, dtype: torch.dtype, scale_map: str, inverse: bool, **layout: Any) -> Iterator[Case]:
    """The forward and backward pass of one map; `layout` says what differs from chunked halves and all gradients."""
    x, both = _meta(64, 24, 32, 32, dtype=dtype), _meta(64, 48, 32, 32, dtype=dtype)
    scale, shift = (both[:, 0::2], both[:, 1::2]) if layout.get("interleaved") else both.chunk(2, 1)
    log_det = _meta(64, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    options = (scale_map, layout.get("shift_first", False), 2.0, inverse)
    label = f"{scale_map}{' inverse' if inverse else ''} {TRITON_TYPES[dtype]}{label}"
    wanted = layout.get("grads", "y, log_det")
    if wanted == "y, log_det":
        yield f"forward {label}", partial(affine_coupling, x, scale, shift, *options)
    grads = (x if "y" in wanted else None, log_det if "log_det" in wanted else None)
    yield f"backward {label}", partial(affine_coupling_backward, *grads, x, scale, shift, *options)


def _affine_coupling_cases() -> Iterator[Case]:
    """Every scale map forward in float32 and inverse in another type, float64 for those with the longest formulas."""
    double, bf16, fp16 = torch.float64, torch.bfloat16, torch.float16
    inverse_dtypes = {"exp": bf16, "tanh": double, "sigmoid": fp16, "nflows": bf16, "softplus": double, "atan": double}
    for scale_map in SCALE_MAPS:
        yield from _affine_case("", torch.float32, scale_map, False)
        yield from _affine_case("", inverse_dtypes[scale_map], scale_map, True)
    glow = {"shift_first": True, "interleaved": True}
    yield from _affine_case(" interleaved, shift first", torch.float32, "sigmoid", False, **glow)
    yield from _affine_case(" interleaved, shift first", torch.float32, "sigmoid", True, **glow)
    # Offsets inside one sample that need 64 bits.
    huge = _meta(2, 2**31 + 64, dtype=bf16)
    yield "forward huge sample", partial(affine_coupling, huge, huge, huge, "exp", False, 2.0, False)
    yield from _affine_case(" of y alone", torch.float32, "tanh", False, grads="y")
    yield from _affine_case(" of log_det alone", torch.float32, "tanh", False, grads="log_det")


def _affine_coupling_halves_cases() -> Iterator[Case]:
    """The same kernels with results strided by sample, and the shift's gradient of either kind, or zero."""
    for scale_map, dtype, shift_first, inverse in (
        ("tanh", torch.float32, False, False),
        ("sigmoid", torch.float32, True, False),
        ("atan", torch.float64, False, True),
        ("nflows", torch.bfloat16, True, True),
    ):
        x = _meta(64, 24, 32, 32, dtype=dtype)
        log_det = _meta(64, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        options = (x, x, 1, False, scale_map, shift_first, 2.0, inverse)
        label = f"{scale_map}{' shift first' * shift_first}{' inverse' * inverse} {TRITON_TYPES[dtype]}"
        yield f"forward {label}", partial(affine_coupling_halves, *options)
        yield f"backward {label}", partial(affine_coupling_halves_backward, x, log_det, *options)
    yield "backward log_det alone", partial(affine_coupling_halves_backward, None, log_det, *options)


def _spline_case(
    bins: int,
    dtype: torch.dtype,
    inverse: bool = False,
    tails: str = "linear",
    image: bool = False,
    grads: str = "both",
) -> Iterator[Case]:
    """The forward and backward pass on views of a conditioner's output: packed rows, or channels of an image."""
    counts = (bins, bins, derivative_count(bins, tails))
    shape = (16, 12, 32, 32) if image else (1024, 64)
    x, log_det = _meta(*shape, dtype=dtype), _meta(*shape, dtype=dtype if dtype == torch.float64 else torch.float32)
    if image:
        packed = _meta(16, 12 * sum(counts), 32, 32, dtype=dtype).unflatten(1, (12, sum(counts))).movedim(2, -1)
    else:
        packed = _meta(*shape, sum(counts), dtype=dtype)
    options = (*packed.split(counts, -1), inverse, tails, 3.0, 1e-3, 1e-3, 1e-3)
    label = f"{tails} {bins} {TRITON_TYPES[dtype]}{' inverse' if inverse else ''}{' image' if image else ''}"
    if grads == "both":
        yield f"forward {label}", partial(rational_quadratic_spline, x, *options)
    given = (None if grads == "log_det" else x, None if grads == "y" else log_det)
    of = "" if grads == "both" else f" of {grads} alone"
    yield f"backward {label}{of}", partial(rational_quadratic_spline_backward, *given, x, *options)


def _spline_cases() -> Iterator[Case]:
    """Each dtype and direction with few and many bins, each kind of tails, each layout, one gradient alone."""
    single, double, bf16, fp16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    for bins in (8, 16):
        for inverse in (False, True):
            yield from _spline_case(bins, single, inverse)
            yield from _spline_case(bins, double, inverse)
    yield from _spline_case(8, bf16)
    yield from _spline_case(8, fp16, inverse=True)
    for image_bins, inverse in ((8, False), (16, True)):
        yield from _spline_case(image_bins, single, inverse, image=True)
    yield from _spline_case(5, single, tails="circular")
    yield from _spline_case(10, single, inverse=True, tails="none")
    yield from _spline_case(1, single, tails="circular")
    # More bins than a thread holds: half a warp, or a warp, or several, share an element.
    for bins, dtype in ((32, single), (32, double), (100, single), (100, double), (1000, single)):
        yield from _spline_case(bins, dtype)
    for grads in ("y", "log_det"):
        yield from _spline_case(8, single, grads=grads)
    # More elements than 32 bits count.
    huge = (_meta(2**31 + 64, *more, dtype=bf16) for more in ((), (8,), (8,), (7,)))
    yield "forward huge", partial(rational_quadratic_spline, *huge, False, "linear", 3.0, 1e-3, 1e-3, 1e-3)


def _nearest_codebook_cases() -> Iterator[Case]:
    """The shapes of usual codebooks: a row in one product or in many steps, a tile of codes in a group or many, each
    metric; the float64 of every dtype."""
    single, double, bf16, fp16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    for k, d, x_dtype, dtype, metric in (
        (512, 64, bf16, bf16, "euclidean"),
        (8192, 256, single, single, "euclidean"),
        (1024, 8, single, single, "cosine"),
        (65536, 32, bf16, single, "dot"),
        (1000, 1000, double, fp16, "cosine"),
    ):
        x, codebook = _meta(1, 300, d, dtype=x_dtype), _meta(1, k, d, dtype=dtype)
        mask = _meta(1, 300, dtype=torch.bool) if d == 1000 else None
        label = f"{metric} K={k} D={d} {TRITON_TYPES[x_dtype]} in {TRITON_TYPES[dtype]}"
        yield label, partial(nearest_codebook, x, codebook, metric, mask, True, True)


def _codebook_statistics_cases() -> Iterator[Case]:
    for dtype, d in ((torch.float32, 256), (torch.bfloat16, 64), (torch.float64, 8)):
        x, indices = _meta(4096, d, dtype=dtype), _meta(4096, dtype=torch.int64)
        yield f"K=512 D={d} {TRITON_TYPES[dtype]}", partial(codebook_statistics, x, indices, 512, None)


def _power_iteration_cases() -> Iterator[Case]:
    """Both orders, each dtype, rows in front or elsewhere. All phases in one launch, on AMD as well: launched one by
    one, the kernel is the same without its barrier."""
    plain, others = (((512, 4608), (128, 64, 4, 4)), (0, 0)), (((64, 27), (64, 128, 4, 4)), (0, 1))
    for dtype, (shapes, dims), u_first in (
        (torch.float32, plain, True),
        (torch.bfloat16, plain, False),
        (torch.float64, others, False),
        (torch.float16, others, True),
    ):
        weights = [_meta(*shape, dtype=dtype) for shape in shapes]
        us = [_meta(w.size(d), dtype=dtype) for w, d in zip(weights, dims, strict=True)]
        vs = [_meta(w.numel() // w.size(d), dtype=dtype) for w, d in zip(weights, dims, strict=True)]
        sigma = _meta(2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        label = f"{TRITON_TYPES[dtype]} {'u' if u_first else 'v'} first, dims {dims}"
        options = (dims, 1, 1e-12, u_first, dtype != torch.float16)
        yield f"forward {label}", partial(power_iteration, weights, us, vs, *options)
        # float16 differs from float32 in its loads and stores only: the gradient of sigma alone.
        grads = [] if dtype == torch.float16 else weights
        if dtype != torch.bfloat16:
            options = (sigma, grads, weights, sigma, us, vs, dims, 1e-12)
            yield f"backward {label}", partial(power_iteration_backward, *options)
    # Columns that 32 bits do not count.
    weight, u, v = (_meta(*shape, dtype=torch.float32) for shape in ((2, 2**31), (2,), (2**31,)))
    yield "forward huge", partial(power_iteration, [weight], [u], [v], [0], 1, 1e-12, True, True)


def _on_lstm_case(
    label: str, batch_sizes: list[int], n: int, chunk_size: int, dtype: torch.dtype, **layout: bool
) -> Iterator[Case]:
    """The forward and backward pass of a layer, or of the cell alone; `layout` says whether it has zoneout and whether
    it has a weight."""
    rows, batch, size = sum(batch_sizes), batch_sizes[0], n * chunk_size
    width = 2 * n + 4 * size
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gates, output, hidden = (_meta(*shape, dtype=dtype) for shape in ((rows, width), (rows, size), (batch, size)))
    cell, cells, distances = (_meta(*shape, dtype=wide) for shape in ((batch, size), (rows, size), (2, rows)))
    weight = _meta(width, size, dtype=dtype) if layout.get("weight", True) else None
    zoneout = _meta(2, rows, size, dtype=dtype) if layout.get("zoneout") else None
    steps = torch.tensor(batch_sizes)
    label = f"{label} n={n} C={chunk_size} {TRITON_TYPES[dtype]}"
    yield f"forward {label}", partial(on_lstm, gates, weight, None, hidden, cell, zoneout, steps, chunk_size, True)
    grads = (output, hidden if weight is None else None, cell, distances)
    activations = _meta(rows, width, dtype=wide)
    saved = (weight, None, cell, zoneout, output, cells, activations, steps, chunk_size)
    yield f"backward {label}", partial(on_lstm_backward, *grads, *saved)


def _on_lstm_cases() -> Iterator[Case]:
    """The cell of short rows, of the published language model, of the longest row in one tile, and of longer ones;
    whole sequences in each type that has them."""
    single, double, bf16, fp16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    yield from _on_lstm_case("step", [20], 115, 10, single)
    yield from _on_lstm_case("step, zoneout", [20], 16, 8, bf16, zoneout=True)
    yield from _on_lstm_case("cell", [512], 256, 8, fp16, weight=False)
    yield from _on_lstm_case("cell, zoneout", [4], 4096, 1, single, zoneout=True, weight=False)
    yield from _on_lstm_case("step, zoneout", [4], 128, 8, double, zoneout=True)
    yield from _on_lstm_case("cell", [4], 2048, 1, double, weight=False)
    yield from _on_lstm_case("cell, zoneout", [4], 3, 5000, single, zoneout=True, weight=False)
    yield from _on_lstm_case("cell, zoneout", [4], 5000, 3, double, zoneout=True, weight=False)
    yield from _on_lstm_case("sequence", [64] * 2, 16, 8, single)
    yield from _on_lstm_case("sequence, zoneout", [20] * 2, 25, 5, single, zoneout=True)
    yield from _on_lstm_case("sequence, zoneout", [32] * 2, 16, 16, bf16, zoneout=True)
    yield from _on_lstm_case("sequence", [20] * 2, 3, 3, fp16)


# Op -> its cases: (name, a call of its launcher on meta tensors).
KERNELS: dict[str, Callable[[], Iterator[Case]]] = {
    "cumax": _cumax_cases,
    "affine_coupling": _affine_coupling_cases,
    "affine_coupling_halves": _affine_coupling_halves_cases,
    "rational_quadratic_spline": _spline_cases,
    "nearest_codebook": _nearest_codebook_cases,
    "codebook_statistics": _codebook_statistics_cases,
    "power_iteration": _power_iteration_cases,
    "on_lstm": _on_lstm_cases,
}


@dataclass(frozen=True)
class Usage:
    """What one kernel needs on one chip; bytes. `spilled` counts everything that is kept in a stack frame."""

    op: str
    case: str
    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    shared_limit: int

    @property
    def fits(self) -> bool:
        return self.spilled == 0 and self.shared <= self.shared_limit


def recorded(call: Callable[[], Any]) -> list[_common.Launch]:
    """The launches that `call` would make."""
    launches: list[_common.Launch] = []
    _common.recorder = launches
    try:
        call()
    finally:
        _common.recorder = None
    return launches


def _specialise(value: Any, path: tuple[int, ...], constants: dict, attributes: dict) -> Any:
    """The signature entry of one kernel argument, as Triton's launcher specialises it: 1 and None become constants,
    multiples of 16 are marked so that loads become wide."""
    if isinstance(value, tuple):
        return tuple(_specialise(v, (*path, i), constants, attributes) for i, v in enumerate(value))
    if isinstance(value, Tensor):
        if value.storage_offset() * value.element_size() % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return f"*{TRITON_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if value is None or value == 1:
        constants[path] = value
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compiled(launch: _common.Launch, target: GPUTarget) -> Any:
    """Triton's CompiledKernel of one launch."""
    names = launch.kernel.arg_names
    constants: dict = {}
    attributes: dict = {}
    signature = {
        name: _specialise(value, (i,), constants, attributes)
        for i, (name, value) in enumerate(zip(names, launch.args, strict=False))
    }
    for name, value in launch.constants.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = value
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


def _nvidia_usage(kernel: Any) -> tuple[int, int]:
    """(registers, bytes of stack), from the binary: no driver is asked."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def _amd_usage(kernel: Any) -> tuple[int, int]:
    """The same from the assembly's notes; a spilled register counts as the 4 bytes that one lane of it holds."""
    notes = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", kernel.asm["amdgcn"], re.MULTILINE)}
    spilled = notes["private_segment_fixed_size"] + 4 * (notes["vgpr_spill_count"] + notes["sgpr_spill_count"])
    return notes["vgpr_count"], spilled


def measure(op: str, case: str, target: str) -> list[Usage]:
    """Compile one case for one chip."""
    gpu, limit = TARGETS[target]
    _common.warp_size, _common.shared_limit = gpu.warp_size, limit
    call = dict(KERNELS[op]())[case]
    result = []
    for launch in recorded(call):
        kernel = compiled(launch, gpu)
        registers, spilled = (_nvidia_usage if gpu.backend == "cuda" else _amd_usage)(kernel)
        shared = kernel.metadata.shared
        result.append(Usage(op, case, launch.kernel.__name__, target, registers, spilled, shared, limit))
    return result


def measure_all(targets: list[str], ops: list[str], workers: int = 2) -> list[Usage]:
    """Every case of `ops` for every chip of `targets`, on `workers` processes."""
    jobs = [(op, name, target) for target in targets for op in ops for name, _ in KERNELS[op]()]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        usages = pool.map(measure, *zip(*jobs, strict=True), chunksize=4)
        return [usage for found in usages for usage in found]


def _print(usages: list[Usage]) -> None:
    print(f"{'op':<16} {'case':<52} {'chip':<7} {'registers':>9} {'spilled':>8} {'shared':>7} {'limit':>7}")
    for u in usages:
        flag = "" if u.fits else "  DOES NOT FIT"
        numbers = f"{u.registers:>9} {u.spilled:>8} {u.shared:>7} {u.shared_limit:>7}"
        print(f"{u.op:<16} {u.case:<52} {u.target:<7} {numbers}{flag}")
    failed = sum(not u.fits for u in usages)
    worst = max(usages, key=lambda u: u.registers)
    print(
        f"{len(usages)} kernels compiled, {failed} that spill or do not fit; "
        f"most registers: {worst.registers} ({worst.op}, {worst.case}, {worst.target})"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pygen.triton_kernels.aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the report there as well")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this chip; may be repeated")
    parser.add_argument("--op", action="append", choices=KERNELS, help="only this op; may be repeated")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    options = parser.parse_args(arguments)
    if _common.interpreted:
        print("aot: TRITON_INTERPRET is set, so there are no kernels to compile; unset it", file=sys.stderr)
        return 2
    usages = measure_all(options.target or list(TARGETS), options.op or list(KERNELS), options.workers)
    _print(usages)
    if options.json:
        temporary = f"{options.json}.tmp"
        with open(temporary, "w") as file:
            json.dump([{**asdict(u), "fits": u.fits} for u in usages], file, indent=1)
        os.replace(temporary, options.json)
    return int(not all(u.fits for u in usages))


if __name__ == "__main__":
    sys.exit(main())
