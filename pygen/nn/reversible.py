"""`ReversibleSequential`: a chain of transforms whose training takes the memory of one. Its engine is in _replay.py.

The forward keeps its first input and its output. The backward walks from the output to the input: it inverts a step,
runs that step alone with a graph, pulls the gradients through and drops the graph. docs/reversible.md tells the whole.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pygen.nn._replay import Replay, has_inverse
from pygen.nn.transform import Retraced, Sequential, Transform

STORE = ("auto", "never", "always")

# Steps are stored from this part of the tolerance on, so that the next batch, which drifts a little more, passes.
STORE_FROM = 0.5


class _FirstOrder(torch.autograd.Function):
    """Passes gradients on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx, anchor, *grads):
        return grads

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "ReversibleSequential: second derivatives are not supported, use nn.Sequential (the state_dict is the same)"
        )


class _Reversed(torch.autograd.Function):
    """(x, context, *parameters) -> (z, log_det) of a `Replay`."""

    @staticmethod
    def forward(ctx, replay, x, context, *parameters):
        flow = replay.flow
        keep = range(len(replay.steps)) if flow.store == "always" else flow._stored
        z, log_det, kept = replay.run(x, context, keep, flow.check and not x.is_meta)
        ctx.replay, ctx.kept = replay, tuple(kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, z, context, *kept.values())
        # A copy for the caller, who may change it in place.
        return z.clone(), log_det

    @staticmethod
    @torch.compiler.disable
    def backward(ctx, grad_z, grad_log_det):
        replay, flow = ctx.replay, ctx.replay.flow
        x, z, context, *stored = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        with torch.no_grad(), replay.repeating():
            kept = dict(zip(ctx.kept, stored, strict=True))
            grads, error = replay.pull_back(z, context, kept, grad_z, grad_log_det, wanted)
            if not error <= replay.tolerance:
                inputs = flow._inputs_instead(replay, x, z, context, error)
                grads, _ = replay.pull_back(z, context, inputs, grad_z, grad_log_det, wanted)
        if torch.is_grad_enabled():
            grads = _FirstOrder.apply(torch.zeros((), requires_grad=True), *grads)
        return None, *grads


class ReversibleSequential(Sequential):
    r"""`Sequential` whose backward finds every layer's input again from its output, instead of keeping it.

    .. math::
        x_{k} = f_k^{-1}(x_{k+1}), \qquad
        \bar x_k = \Bigl(\frac{\partial f_k}{\partial x_k}\Bigr)^{\!T} \bar x_{k+1}
        + \sum_b \bar\ell_b\, \frac{\partial \log\det_b}{\partial x_k}

    for any loss of z and log_det with gradients :math:`\bar x_n` and :math:`\bar\ell`. Training then takes the
    activations of one layer, whatever the depth, and the time of one more forward. Results, gradients (up to rounding)
    and state_dict are those of `Sequential`; a Sequential inside, such as `GlowStep`, counts as its layers.

    Inverting rounds. The backward compares every input that it finds with a projection of the one that was, one number
    per sample. Where the error exceeds the tolerance, the gradient is computed again from stored inputs, and from
    then on the inputs of the layers that lose too much are kept.

    Args:
        transforms: the layers in the density direction.
        tolerance: largest root mean square error of a sample, relative to the batch's root mean square. By default
            1e-10 in float64, 1e-4 in float32 and 2e-2 in 16 bit and under autocast.
        store: "auto", as above; "never": exceeding the tolerance is an error; "always": keep every layer's input, and
            run only the layers again.
        check: False compares nothing. The comparison costs a reduction per layer and direction and, on a GPU, one
            synchronisation per backward.

    Shape:
        x, z: (B, ...). context: (B, F) or None. log_det: (B,).

    Raises:
        ValueError: an unknown `store` or a tolerance that is not positive. TypeError: a context that is not a tensor,
        or x that is not floating point.
        RuntimeError, in the backward: a parameter has changed since the forward, a layer does not repeat itself, a
        layer uses a tensor that requires a gradient and is neither x, context nor a parameter, or the error exceeds
        the tolerance under "never". NotImplementedError: second derivatives.

    Example:
        >>> import torch
        >>> from pygen import nn
        >>> flow = nn.ReversibleSequential(*(nn.AffineCoupling(nn.MLP(2, 4), swap=i % 2 == 1) for i in range(8)))
        >>> z, log_det = flow(torch.randn(5, 4))
        >>> (z.square().sum() / 2 - log_det.sum()).backward()
        >>> all(parameter.grad is not None for parameter in flow.parameters())
        True

    Source: Gomez, Ren, Urtasun, Grosse, "The Reversible Residual Network: Backpropagation Without Storing
    Activations", NeurIPS 2017.
    """

    def __init__(
        self, *transforms: Transform, tolerance: float | None = None, store: str = "auto", check: bool = True
    ) -> None:
        super().__init__(*transforms)
        if store not in STORE:
            raise ValueError(f"ReversibleSequential: store must be one of {', '.join(STORE)}, got {store!r}")
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"ReversibleSequential: tolerance must be positive, got {tolerance}")
        self.tolerance, self.store, self.check = tolerance, store, check
        self._stored = {k for k, step in enumerate(self.steps) if not has_inverse(step)}
        self._warned = False
        self._closed: set[int] = set()  # steps that are known to use no foreign tensors

    @property
    def steps(self) -> tuple[Transform, ...]:
        """The layers that are inverted one by one."""
        return tuple(_flattened(self))

    @property
    def stored(self) -> tuple[int, ...]:
        """Indices into `steps` of the layers whose input is kept."""
        return tuple(range(len(self.steps))) if self.store == "always" else tuple(sorted(self._stored))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._reversible(x, context) if torch.is_grad_enabled() else super().forward(x, context)

    @torch.compiler.disable
    def _reversible(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if context is not None and not isinstance(context, Tensor):
            raise TypeError(f"ReversibleSequential: context must be a tensor or None, got {type(context).__name__}")
        # torch.func and forward mode differentiate the layers themselves; replicas of DataParallel have no parameters.
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        replay = None if transformed or getattr(self, "_is_replica", False) else Replay(self, x)
        if replay is None or not replay.steps:
            return super().forward(x, context)
        if not (replay.parameters or x.requires_grad or (context is not None and context.requires_grad)):
            return super().forward(x, context)
        return _Reversed.apply(replay, x, context, *replay.parameters)

    @torch.no_grad()
    def drift(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """float64 (steps,): the relative error with which each layer's input is found again from z, storing nothing.

        Measured as the tolerance is; inf for a layer without an inverse. x, context: as in `forward`.
        """
        return torch.tensor(self._measure(x, context, math.inf)[0], dtype=torch.float64)

    @torch.no_grad()
    def calibrate(self, x: Tensor, context: Tensor | None = None) -> tuple[int, ...]:
        """Choose by this batch which layers' inputs are kept, and return `stored`. The backward does it if need be."""
        errors, bound = self._measure(x, context, None)
        self._stored = {k for k, error in enumerate(errors) if not error <= bound}
        return self.stored

    def _measure(self, x: Tensor, context: Tensor | None, bound: float | None) -> tuple[list[float], float]:
        replay = Replay(self, x)
        bound = STORE_FROM * replay.tolerance if bound is None else bound
        z, _, inputs = replay.run(x, context, range(len(replay.steps)), check=False)
        with replay.repeating():
            return replay.drift(inputs, z, context, bound), bound

    def _inputs_instead(
        self, replay: Replay, x: Tensor, z: Tensor, context: Tensor | None, error: float
    ) -> dict[int, Tensor]:
        """All inputs of a forward whose inputs were not found again; decides what is stored from now on."""
        problem = (
            f"ReversibleSequential: inverting its {len(replay.steps)} steps finds their inputs again with a relative "
            f"error of {error:.1e}; the tolerance is {replay.tolerance:.0e}"
        )
        if self.store == "never":
            raise RuntimeError(problem + '. store="auto" keeps the inputs that are lost')
        inputs = replay.inputs_again(x, z, context)
        bound = STORE_FROM * replay.tolerance
        errors = replay.drift(inputs, z, context, bound)
        lost = {k for k, error in enumerate(errors) if not error <= bound} - self._stored
        if not lost and math.isfinite(error):
            lost = {max(range(len(errors)), key=errors.__getitem__)}
        self._stored |= lost
        if lost and not self._warned:
            self._warned = True
            warnings.warn(
                f"{problem}. This gradient was computed from stored inputs; from now on those of steps "
                f"{', '.join(map(str, self.stored))} are kept",
                stacklevel=2,
            )
        return inputs

    def _refuse_foreign_tensors(self, k: int, step: Retraced, known: set[Any]) -> None:
        """Gradients of tensors that a layer took from elsewhere would be lost without a word. Looks once per layer."""
        if k in self._closed:
            return
        nodes = [output.grad_fn for output in (step.z, step.log_det) if output.grad_fn is not None]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            variable = getattr(node, "variable", None)
            if variable is not None and all(variable is not tensor for tensor in known):
                raise RuntimeError(
                    f"ReversibleSequential: step {k} ({type(self.steps[k]).__name__}) uses a tensor of shape "
                    f"{tuple(variable.shape)} that requires a gradient and is neither x, context nor a parameter; "
                    "pass it as context, make it a parameter, or use nn.Sequential"
                )
            following = {function for function, _ in node.next_functions if function is not None} - seen
            seen |= following
            nodes.extend(following)
        self._closed.add(k)


def _flattened(flow: Sequential) -> Iterator[Transform]:
    """The layers of nested Sequentials, where these do nothing but call their layers."""
    for step in flow.transforms:
        if isinstance(step, Sequential) and _only_calls_its_layers(step):
            yield from _flattened(step)
        else:
            yield step  # type: ignore[misc]


def _only_calls_its_layers(flow: Sequential) -> bool:
    directions = (type(flow).forward, type(flow).inverse)
    return (
        directions[0] in (Sequential.forward, ReversibleSequential.forward)
        and directions[1] is Sequential.inverse
        and not (flow._forward_hooks or flow._forward_pre_hooks)
    )
