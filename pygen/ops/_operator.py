"""What all ops share: registration with torch, and the choice of the road a call takes.

A call goes through `torch.ops.pygen.<op>`, whose rules (fake, autograd, autocast, vmap) are registered here. Those rules
are Python, and torch asks them on every call: measured on a 4 x 4 tensor, 14 us against 3 us for the bare kernel. So an
eager call that needs none of them takes a short cut below the autograd key, with the same kernel and the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pygen import _native

AUTOCAST_DEVICES = ("cpu", "cuda")

_below_autograd = torch._C._AutoDispatchBelowAutograd
_is_compiling = torch.compiler.is_compiling
_autocast_enabled = torch._C._is_any_autocast_enabled
_functorch_active = torch._C._are_functorch_transforms_active
_grad_enabled = torch.is_grad_enabled

# Keeps the registrations alive, and is the one handle through which Python adds kernels.
library = torch.library.Library("pygen", "IMPL") if _native.C is not None else None


@dataclass(frozen=True)
class Rules:
    """How one operator behaves under torch's transformations; each field as in `torch.library`."""

    reference: Callable[..., Any]
    fake: Callable[..., Any]
    setup_context: Callable[..., None]
    backward: Callable[..., Any]
    vmap: Callable[..., Any] | None = None


def _register(name: str, rules: Rules) -> None:
    qualified = f"pygen::{name}"
    # Any device without a kernel of its own (MPS, XPU, ...) computes the reference.
    library.impl(name, rules.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, rules.fake, lib=library)
    torch.library.register_autograd(qualified, rules.backward, setup_context=rules.setup_context, lib=library)
    if rules.vmap is not None:
        torch.library.register_vmap(qualified, rules.vmap, lib=library)
    for device in AUTOCAST_DEVICES:
        # As softmax, cumsum and log-densities do under autocast: compute in float32.
        torch.library.register_autocast(qualified, device, torch.float32, lib=library)


def _function(name: str, op: Callable[..., Any], rules: Rules) -> type[torch.autograd.Function]:
    """The same derivative as registered, without the registered road's overhead (29 us become 15)."""

    def forward(*args):
        with _below_autograd():
            return op(*args)

    return type(
        f"{name}_function",
        (torch.autograd.Function,),
        {
            "forward": staticmethod(forward),
            "setup_context": staticmethod(rules.setup_context),
            "backward": staticmethod(rules.backward),
        },
    )


def operator(name: str, rules: Rules) -> Callable[..., Any]:
    """Register `pygen::<name>` and return the function to call it with (positional arguments, as in the schema)."""
    if library is None:
        return rules.reference
    _register(name, rules)
    op = getattr(torch.ops.pygen, name).default
    function = _function(name, op, rules)

    def call(*args):
        if _is_compiling() or _autocast_enabled() or _functorch_active():
            return op(*args)
        if _grad_enabled():
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    return function.apply(*args)
        with _below_autograd():
            return op(*args)

    call.__name__ = name
    return call


def derivative_through_reference(
    reference: Callable[..., Any],
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """(setup_context, backward) that differentiate an op by differentiating its plain-PyTorch reference.

    For derivatives that no kernel computes: the second derivative is the first derivative of the backward op.
    """

    def setup_context(ctx, inputs, output):
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.others = [value for value in inputs if not isinstance(value, Tensor)]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))

    def backward(ctx, *grads):
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        inputs = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # A view per input, so that the graph of the caller is entered once and only through the inputs.
            inputs = [value.view_as(value) if isinstance(value, Tensor) else value for value in inputs]
            wanted = [i for i, value in enumerate(inputs) if isinstance(value, Tensor) and ctx.needs_input_grad[i]]
            if not create_graph:
                for i in wanted:
                    inputs[i] = inputs[i].detach().requires_grad_()
            outputs = reference(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            if not pairs:
                return (None,) * len(inputs)
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [inputs[i] for i in wanted],
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        result: list[Tensor | None] = [None] * len(inputs)
        for i, gradient in zip(wanted, found, strict=True):
            result[i] = gradient
        return tuple(result)

    return setup_context, backward
