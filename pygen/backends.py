"""Which kernel serves which op on which device here, and why not a faster one; and how to choose another."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pygen import _native, ops
from pygen.ops import _operator

CAPABILITY_VARIABLE = "PYGEN_CPU_CAPABILITY"
SIMULATION = "ssa.simulate"
# The levels above AVX-512 exist for the search for the nearest code.
SEARCHES, SEARCH_LEVELS = ("nearest_codebook",), ("avx512_vnni", "amx")


@dataclass(frozen=True)
class Service:
    """What computes one op on one device."""

    op: str
    device: str
    kernel: str
    why: str  # what stands in the way of something faster; empty where nothing does


class cpu_capability:
    """The instruction-set level of the CPU kernels: "default", "avx2", "avx512", "avx512_vnni" or "amx".

    The last two differ from "avx512" in `ops.nearest_codebook` alone, which they let search in integers (`avx512_vnni`)
    and bfloat16 tiles (`amx`).

    Without an argument, the current level's name is its string. With one, the level is set; as a context manager, until
    the block ends. The best level of the machine is taken at import unless the environment's PYGEN_CPU_CAPABILITY names
    another. Levels differ in speed, and in results by rounding only (in simulations not even by that).

    Raises:
        ValueError: this machine, or this build, does not have the level.
        RuntimeError: pygen was built without compiled kernels.

    Example:
        >>> from pygen import backends
        >>> with backends.cpu_capability("default"):
        ...     str(backends.cpu_capability())
        'default'
    """

    def __init__(self, level: str | None = None) -> None:
        if _native.C is None:
            raise RuntimeError(f"cpu_capability: {_native.missing_because}; {_native.REBUILD}")
        self.previous = _native.C.cpu_capability()
        if level is not None:
            _native.C.set_cpu_capability(level)

    def __str__(self) -> str:
        return _native.C.cpu_capability()

    def __enter__(self) -> "cpu_capability":
        return self

    def __exit__(self, *exception: object) -> None:
        _native.C.set_cpu_capability(self.previous)


def cpu_capabilities() -> list[str]:
    """The levels to be had on this machine, slowest first; empty in a build without compiled kernels."""
    return [] if _native.C is None else list(_native.C.cpu_capabilities())


@contextlib.contextmanager
def use_kernels(which: str) -> Iterator[None]:
    """Compute every op by other kernels inside the block: to see whether a kernel is to blame, or what it brings.

    Args:
        which: "reference", the plain PyTorch formulas, on CPU and GPU; or "triton", the GPU's Triton kernels, on CPU
            tensors under Triton's interpreter (start Python with TRITON_INTERPRET=1; very slow, for tests).

    Raises:
        ValueError: an unknown name. RuntimeError: "triton" without Triton or without its interpreter.

    Example:
        >>> import torch
        >>> from pygen import backends, ops
        >>> with backends.use_kernels("reference"):
        ...     ops.cumax(torch.zeros(2))
        tensor([0.5000, 1.0000])
    """
    if which not in ("reference", "triton"):
        raise ValueError(f'use_kernels: which must be "reference" or "triton", got "{which}"')
    if which == "triton" and not (_operator.has_triton() and os.environ.get("TRITON_INTERPRET") == "1"):
        raise RuntimeError("use_kernels: triton on the CPU needs Triton installed and TRITON_INTERPRET=1 set at start")
    if _operator.library is None:  # the reference is all there is
        yield
        return
    override = torch.library.Library("pygen", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch remarks that a kernel is being overridden: it is
        for name, rules in _operator.registered.items():
            if which == "triton" and rules.gpu == "triton":
                override.impl(name, _operator.triton_kernel(name, rules), "CPU")
            else:
                override.impl(name, _operator.reference_kernel(rules), "CPU")
                override.impl(name, _operator.reference_kernel(rules), "CUDA")
    with _operator.small_road_closed():
        try:
            yield
        finally:
            override._destroy()


def _gpu_service(op: str) -> Service:
    if not torch.cuda.is_available():
        return Service(op, "cuda", "none", "torch sees no CUDA device here")
    if _operator.registered[op].gpu == "library":
        return Service(op, "cuda", "cuBLAS", "")
    if not _operator.has_triton():
        return Service(op, "cuda", "reference", "Triton is not installed: pip install triton")
    return Service(op, "cuda", "Triton", "")


def _levels_of(op: str) -> list[str]:
    """The levels for which an op has kernels of its own, slowest first."""
    return [level for level in cpu_capabilities() if op in SEARCHES or level not in SEARCH_LEVELS]


def _cpu_service(op: str) -> Service:
    levels = _levels_of(op)
    best, level = levels[-1], str(cpu_capability())
    level = level if level in levels else best
    lowered = f"{best} is available: unset {CAPABILITY_VARIABLE} or call cpu_capability" if level != best else ""
    return Service(op, "cpu", f"C++ {level}", lowered)


def _simulation_services() -> list[Service]:
    """The stochastic simulation engine: C++ on the CPU, CUDA C++ on a GPU, plain Python without either."""
    if _native.C is None:
        return [Service(SIMULATION, "cpu", "reference", f"{_native.missing_because}; {_native.REBUILD}")]
    built = torch._C._dispatch_has_kernel_for_dispatch_key("pygen::ssa_run", "CUDA")
    if not torch.cuda.is_available():
        on_gpu = Service(SIMULATION, "cuda", "none", "torch sees no CUDA device here")
    elif not built:
        without = f"built without CUDA: {_native.C.build_info()['cuda']}; set CUDA_HOME and {_native.REBUILD}"
        on_gpu = Service(SIMULATION, "cuda", "none", without)
    else:
        on_gpu = Service(SIMULATION, "cuda", "CUDA C++", "")
    return [_cpu_service(SIMULATION), on_gpu, Service(SIMULATION, "other", "none", "no kernel for this device yet")]


def services() -> list[Service]:
    """One entry per op and device."""
    if _operator.library is None:
        why = f"{_native.missing_because}; {_native.REBUILD}"
        plain = [Service(op, "any", "reference", why) for op in ops.__all__ if op != "additive_coupling"]
        return plain + _simulation_services()
    # additive_coupling is not listed: torch's own addition is its kernel on every device.
    names = [name for name in _operator.registered if not name.endswith("_backward")]
    here = [service for op in names for service in (_cpu_service(op), _gpu_service(op))]
    other = [Service(op, "other", "reference", "no kernel for this device yet") for op in names]
    return here + other + _simulation_services()


def _build_lines() -> list[str]:
    if _native.C is None:
        return ["build      without compiled kernels"]
    info = _native.C.build_info()
    return [
        f"build      {info['compiler']}, against torch {info['torch']} ({info['torch_abi']} ABI)",
        f"CPU        levels built: {info['cpu_levels']}; here: {', '.join(cpu_capabilities())}; "
        f"in use: {cpu_capability()}",
        f"CUDA C++   {info['cuda']} {info['cuda_archs']}".rstrip(),
    ]


def report() -> str:
    """What `pygen doctor` prints: versions, the build, and for every op and device its kernel and what is in the way.

    Example:
        >>> from pygen import backends
        >>> backends.report().splitlines()[0].split()[0]
        'pygen'
    """
    from pygen import __version__

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    lines = [
        f"pygen      {__version__}",
        f"torch      {torch.__version__}, {torch.get_num_threads()} threads",
        f"GPU        {gpu}",
        *_build_lines(),
        "",
        f"{'op':<27}{'device':<8}{'kernel':<17}why not a faster one",
    ]
    lines += [f"{s.op:<27}{s.device:<8}{s.kernel:<17}{s.why or '-'}" for s in services()]
    return "\n".join(lines)


def _apply_environment() -> None:
    level = os.environ.get(CAPABILITY_VARIABLE)
    if not level or _native.C is None:
        return
    try:
        _native.C.set_cpu_capability(level)
    except ValueError as error:
        raise ValueError(f"{CAPABILITY_VARIABLE}={level}: {error}") from None


_apply_environment()
