"""What a benchmark case is, and the list of all of them. Cases live in cases/, the runner in runner.py."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pygen.benchmarks.measure import peak_bytes

OURS = "pygen"
EAGER = "eager"
COMPILED = "compiled"
BEST = "the best peer"  # of a target: whoever turns out to be the fastest

# Largest error allowed, relative to the largest value of that output in float64: some units in the last place of the
# type, grown by the sums that the ops contain.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

Outputs = Tensor | tuple[Tensor, ...]
# A case with its own `error` may return and expect what it likes.
Call = Callable[[], Any]


class Unavailable(Exception):
    """Raised by `Case.make`: the case cannot run here, for want of data or of a device; the message says which."""


@dataclass(frozen=True)
class Inputs:
    """What every implementation of a case gets.

    With `grads`, one per output of the op, the case is forward + backward: `tensors` then require gradients.
    """

    tensors: tuple[Tensor, ...]
    grads: tuple[Tensor, ...] = ()

    def __post_init__(self):
        for tensor in self.tensors:
            tensor.requires_grad_(bool(self.grads) and tensor.is_floating_point())

    def double(self) -> Inputs:
        """The same values in float64, for the reference."""
        return Inputs(tuple(map(_double, self.tensors)), tuple(map(_double, self.grads)))


def _double(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.double() if tensor.is_floating_point() else tensor


Factory = Callable[[Inputs], Call]


def call(function: Callable[..., Outputs]) -> Factory:
    """The factory for `function(*inputs.tensors)`; with incoming gradients, for it and all its input gradients."""

    def factory(inputs: Inputs) -> Call:
        forward = partial(function, *inputs.tensors)
        if not inputs.grads:
            return forward
        wanted = tuple(tensor for tensor in inputs.tensors if tensor.requires_grad)

        def forward_backward():
            outputs = as_tuple(forward())
            return *outputs, *torch.autograd.grad(outputs, wanted, inputs.grads)

        return forward_backward

    return factory


def compiled(function: Callable[..., Outputs]) -> Factory:
    """As `call`, through `torch.compile` with static shapes: the strongest baseline that costs no work."""

    def factory(inputs: Inputs) -> Call:
        return call(torch.compile(function, dynamic=False))(inputs)

    return factory


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def max_error(outputs: Outputs, expected: Outputs) -> float:
    """Largest difference, relative to the largest expected magnitude of that output; inf for a wrong shape or a NaN."""
    outputs, expected = as_tuple(outputs), as_tuple(expected)
    if [o.shape for o in outputs] != [e.shape for e in expected]:
        return float("inf")
    errors = [0.0]
    for output, wanted in zip(outputs, expected, strict=True):
        if wanted.numel() == 0:
            continue
        output, wanted = output.detach().double(), wanted.detach().double()
        # Equal infinities differ by NaN, and are right.
        difference = torch.where(output == wanted, 0.0, (output - wanted).abs())
        finite = wanted[wanted.isfinite()].abs()
        size = finite.max().item() if finite.numel() else 0.0
        errors.append(difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item() / (size or 1.0))
    return max(errors)


@dataclass(frozen=True)
class Floor:
    """The work that no implementation can avoid. Its time is that of a copy, or a matrix product, of this size.

    With `any_precision` the product is one of bfloat16 where the device has a unit for that.
    """

    bytes: int = 0
    flops: int = 0
    any_precision: bool = False


@dataclass(frozen=True)
class Target:
    """What a case must reach: `at_least` times as fast as `peer`, or at most `at_most` times its time (or memory).

    Without a peer the bound is a number of its own: at most so many seconds or bytes, at least so many events a second.
    """

    peer: str | None
    at_least: float | None = None
    at_most: float | None = None
    of: str = "time"  # or "memory": the peak that one call allocates; or "events": those of a second
    # Where it holds: levels of the CPU kernels, kinds of devices (see machine.place); everywhere when empty.
    on: tuple[str, ...] = ()

    def __post_init__(self):
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"Target: give either at_least or at_most for {self.peer}")
        if self.of == "events":
            if self.peer is not None or self.at_least is None:
                raise ValueError(f"Target: events a second are at_least a number, without a peer, got {self}")
        elif self.of not in ("time", "memory") or (self.at_most is None and (self.of == "memory" or self.peer is None)):
            raise ValueError(f"Target: at_most of time or memory, or at_least of time, got {self.of!r} of {self.peer}")

    def sentence(self) -> str:
        return self._bound() + (f" ({', '.join(self.on)})" if self.on else "")

    def _bound(self) -> str:
        if self.of == "events":
            return f">= {(self.at_least or 0) / 1e6:g} M events/s"
        if self.peer is None:
            size = self.at_most or 0
            return f"<= {size * 1e3:g} ms" if self.of == "time" else f"<= {size / 1e6:g} MB"
        if self.at_least is not None:
            return f">= {self.at_least:g}x as fast as {self.peer}"
        return f"<= {self.at_most:g}x the {self.of} of {self.peer}"

    def met(self, ours: float, peer: float | None = None) -> bool:
        """`ours` and `peer` in seconds or bytes, or `ours` in events a second."""
        if self.of == "events":
            return self.at_least is not None and ours >= self.at_least
        peer = 1.0 if self.peer is None or peer is None else peer
        if self.at_least is not None:
            return peer / ours >= self.at_least
        return self.at_most is not None and ours / peer <= self.at_most


@dataclass(frozen=True)
class Case:
    """One measurement: an op on inputs of one shape, by everyone who can compute it.

    Args:
        op, name: `pygen bench OP` selects by op; `name` says shape and direction.
        shape, dtype: of the first input, for the record.
        make: the inputs, from a device and a seeded generator of that device.
        implementations: "pygen", "eager", "compiled" and domain peers; see `call` and `compiled`. A factory whose peer
            is not installed raises ImportError.
        yardsticks: what is timed beside them although it computes something else (a clone, a softmax): not checked.
        reference: run on the inputs in float64; every implementation is checked against it.
        floor: bytes and flops that the op cannot avoid; None where a call's own cost is all there is.
        overhead: the case measures what a call costs its caller, not how long the device works.
        error: how far outputs are from the expected ones; at most `tolerance` passes.
        unit, units: where a call does a thing several times (trajectories of a simulation): its name, and how many of
            them one call of each implementation does. All times are then those of one unit, not of a call.
        events: of our outputs, how many events one unit contains; the results then say events a second as well.
        baseline: whose time the bars of the picture are measured against.
        long: a call takes a good part of a second or more: checking it has warmed it up, and three rounds do.
        weigh: measures the peak memory of a call; None where that is of no interest.
        figures: of the inputs, by name, what else there is to know of our implementation.
    """

    op: str
    name: str
    shape: tuple[int, ...]
    make: Callable[[torch.device, torch.Generator], Inputs]
    implementations: Mapping[str, Factory]
    reference: Factory
    dtype: torch.dtype = torch.float32
    yardsticks: Mapping[str, Factory] = field(default_factory=dict)
    floor: Floor | None = None
    targets: tuple[Target, ...] = ()
    tolerance: float | None = None
    overhead: bool = False
    error: Callable[[Any, Any], float] = max_error
    unit: str = "call"
    units: Mapping[str, int] = field(default_factory=dict)
    events: Callable[[Any], float] | None = None
    baseline: str = EAGER
    long: bool = False
    weigh: Callable[[Call, torch.device], int] | None = peak_bytes
    figures: Callable[[Inputs], Mapping[str, float]] | None = None

    def __post_init__(self):
        if OURS not in self.implementations:
            raise ValueError(f'{self.label}: implementations must have "{OURS}", got {", ".join(self.implementations)}')
        for target in self.targets:
            if target.peer not in {None, BEST, *self.implementations, *self.yardsticks}:
                raise ValueError(f"{self.label}: a target names {target.peer}, which the case does not measure")

    @property
    def label(self) -> str:
        return f"{self.op} {self.name}"

    @property
    def allowed_error(self) -> float:
        return TOLERANCE[self.dtype] if self.tolerance is None else self.tolerance


_cases: dict[str, Case] = {}


def register(*cases: Case) -> None:
    """Add cases; called by each file of cases/ when it is imported."""
    for case in cases:
        if case.label in _cases:
            raise ValueError(f"two benchmark cases are called {case.label!r}")
        _cases[case.label] = case


def cases() -> list[Case]:
    """Every case of every file in cases/, ordered by file name and, within a file, as registered."""
    from pygen.benchmarks import cases as package

    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"{package.__name__}.{module}")
    return list(_cases.values())
