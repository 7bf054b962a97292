"""Runs a packed program over a block of trajectories: the compiled engine, or the plain Python reference without it.

Above stands simulate.py, which cuts an ensemble into blocks; below, the op `torch.ops.pygen.ssa_run` (csrc/ssa.cpp).
"""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pygen import _native
from pygen.ssa.network import Formula, Network
from pygen.ssa.program import Program

STATUS_NAMES = (
    "completed",
    "absorbed",
    "stopped",
    "max_events",
    "invalid_count",
    "overflow",
    "invalid_propensity",
    "event_loop",
    "unfinished",
)
FINISHED = 3  # the codes below it are trajectories that have a value at every time
UNFINISHED = STATUS_NAMES.index("unfinished")
MISSING = -1  # a count that a trajectory never reached
STOP, PROGRESS = 0, 1  # the two elements of the op's `control`

_warned_of_the_reference = False


@dataclass(frozen=True)
class Inputs:
    """What a block of trajectories is computed from: the arguments of the op that do not depend on the block.

    initial: float64 [1 or n, S]; parameters: float64 [1 or n, P]; times: float64 [T]; recorded: int32 [K].
    """

    initial: Tensor
    parameters: Tensor
    times: Tensor
    recorded: Tensor
    t0: float
    seed: int
    stream: int
    method: str
    tau_epsilon: float
    max_events: int  # -1: no limit
    threads: int

    def rows(self, begin: int, end: int) -> "Inputs":
        """The inputs of trajectories begin..end - 1 alone."""
        initial, parameters = (
            x if x.size(0) == 1 else x[begin:end].contiguous() for x in (self.initial, self.parameters)
        )
        return replace(self, initial=initial, parameters=parameters)

    def to(self, device: torch.device) -> "Inputs":
        names = ("initial", "parameters", "times")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True)
class Block:
    """What comes out, a row per trajectory.

    counts: int64 [n, T, K]; status: int8 [n]; n_events: int64 [n]; stop_time: float64 [n], inf where not stopped;
    log_time: float64 [L]; log_reaction: int32 [L].
    """

    counts: Tensor
    status: Tensor
    n_events: Tensor
    stop_time: Tensor
    log_time: Tensor
    log_reaction: Tensor

    def first_rows(self, n: int) -> "Block":
        """The same memory, of the first n trajectories only."""
        rows = {name: getattr(self, name)[:n] for name in ("counts", "status", "n_events", "stop_time")}
        return replace(self, **rows)


def allocate(n: int, n_times: int, n_recorded: int, device: torch.device, log_length: int = 0) -> Block:
    """Memory for the results of n trajectories; `run_block` fills it."""
    return Block(
        torch.empty(n, n_times, n_recorded, dtype=torch.int64, device=device),
        torch.empty(n, dtype=torch.int8, device=device),
        torch.empty(n, dtype=torch.int64, device=device),
        torch.empty(n, dtype=torch.float64, device=device),
        torch.empty(log_length, dtype=torch.float64, device=device),
        torch.empty(log_length, dtype=torch.int32, device=device),
    )


def new_control() -> Tensor:
    """int64 [2] on the CPU: [0] asks the engine to stop, [1] counts the trajectories that are finished."""
    return torch.zeros(2, dtype=torch.int64)


def is_compiled() -> bool:
    """Whether this build of pygen has the compiled engine."""
    return _native.C is not None and hasattr(torch.ops.pygen, "ssa_run")


def check_device(device: torch.device) -> None:
    """Refuse a device that the engine cannot run on here.

    Raises:
        ValueError: neither the CPU nor a CUDA device. RuntimeError: a CUDA device that torch, or this build, lacks.
    """
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise ValueError(f"device must be cpu or cuda, got {device}")
    if not torch.cuda.is_available():
        raise RuntimeError(f"device {device}: torch sees no CUDA device here")
    if not (is_compiled() and torch._C._dispatch_has_kernel_for_dispatch_key("pygen::ssa_run", "CUDA")):
        raise RuntimeError(
            f"device {device}: this build of pygen has no CUDA engine; set CUDA_HOME and {_native.REBUILD}"
        )


def run_block(net: Network, stop: Formula | None, inputs: Inputs, *, first: int, out: Block, control: Tensor) -> None:
    """Simulate trajectories first, first + 1, ... into the rows of `out`.

    Trajectories that `control` kept from finishing are left with the status "unfinished" and rows of -1.

    Args:
        net: the network.
        stop: a condition that ends a trajectory, or None.
        inputs: on the device of `out`, with one row or as many as `out`.
        first: the index of the trajectory in row 0 of `out`.
        out: from `allocate`.
        control: from `new_control`.
    """
    out.status.fill_(UNFINISHED)
    out.log_reaction.fill_(-1)
    if is_compiled():
        _run_compiled(net.program(stop), inputs, first, out, control)
    else:
        _run_reference(net, stop, inputs, first, out, control)
    if control[STOP]:
        unfinished = out.status == UNFINISHED
        out.counts[unfinished] = MISSING
        out.stop_time[unfinished] = torch.inf
        out.n_events[unfinished] = 0


def _run_compiled(program: Program, inputs: Inputs, first: int, out: Block, control: Tensor) -> None:
    torch.ops.pygen.ssa_run(
        program.code,
        program.literals,
        inputs.initial,
        inputs.parameters,
        inputs.times,
        inputs.recorded,
        inputs.t0,
        first,
        inputs.seed,
        inputs.stream,
        inputs.method,
        inputs.tau_epsilon,
        inputs.max_events,
        inputs.threads,
        control,
        out.counts,
        out.status,
        out.n_events,
        out.stop_time,
        out.log_time,
        out.log_reaction,
    )


def _run_reference(net: Network, stop: Formula | None, inputs: Inputs, first: int, out: Block, control: Tensor) -> None:
    from pygen.ssa.reference import simulate_one

    if inputs.method == "tau":
        raise RuntimeError(f"method tau needs the compiled engine: {_native.missing_because}; {_native.REBUILD}")
    _warn_once()
    for i in range(len(out.status)):
        if control[STOP]:
            return
        one = simulate_one(
            net,
            inputs.times.tolist(),
            seed=inputs.seed,
            trajectory=first + i,
            stream=inputs.stream,
            t0=inputs.t0,
            initial=inputs.initial[min(i, len(inputs.initial) - 1)].tolist(),
            parameters=inputs.parameters[min(i, len(inputs.parameters) - 1)].tolist(),
            max_events=None if inputs.max_events < 0 else inputs.max_events,
            stop=stop,
            record_path=len(out.log_time) > 0,
        )
        out.counts[i] = torch.from_numpy(one.counts)[:, inputs.recorded.long()]
        out.status[i] = STATUS_NAMES.index(one.status)
        out.n_events[i] = one.n_events
        out.stop_time[i] = one.stop_time
        for k, (instant, reaction) in enumerate(one.path[: len(out.log_time)]):
            out.log_time[k], out.log_reaction[k] = instant, reaction
        control[PROGRESS] += 1


def _warn_once() -> None:
    global _warned_of_the_reference
    if not _warned_of_the_reference:
        warnings.warn(
            "pygen.ssa simulates in plain Python, hundreds of times slower: the compiled engine is missing "
            f"({_native.missing_because}); {_native.REBUILD}",
            RuntimeWarning,
            stacklevel=2,
        )
        _warned_of_the_reference = True
