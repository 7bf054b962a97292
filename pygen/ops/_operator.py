"""What all ops share: registration with torch, and the choice of the road a call takes.

A call goes through `torch.ops.pygen.<op>`, whose rules (fake, autograd, autocast, vmap) are registered here. Those
rules are Python, and torch asks them on every call, needed or not. Small layers are called by the thousand, so an eager
call takes the shortest road on which nobody who must be asked is passed by. All roads end in the same kernel. For a
4 x 4 tensor, measured where torch.softmax takes 2.6 us:

===========================================  ====  =========================================================
road                                         us    who takes it
===========================================  ====  =========================================================
a C function (csrc/small.h, some ops)        3.6   small plain CPU tensors, nobody watching (mode, profiler)
the operator below the autograd key          8     everything else without a gradient, on any device
the registered operator                      16    torch.compile, autocast
an autograd.Function of the same derivative  23    what needs a gradient (the registered operator: 43)
===========================================  ====  =========================================================

The C functions are those of cumax and, for tensors of any size, of power_iteration and the weights of
`pygen.nn.utils.spectral_norm` (_spectral_weights.py). torch.func has an autograd.Function of its own, which also
refuses forward-mode derivatives.
"""

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pygen import _native
from pygen.ops import _lists

AUTOCAST_DEVICES = ("cpu", "cuda")

_below_autograd = torch._C._AutoDispatchBelowAutograd
# Dynamo reads this as True; eagerly it is the cheapest question to ask.
_is_compiling = torch.compiler.is_dynamo_compiling
_autocast_enabled = torch._C._is_any_autocast_enabled
_functorch_active = torch._C._are_functorch_transforms_active
_grad_enabled = torch.is_grad_enabled

# Keeps the registrations alive, and is the one handle through which Python adds kernels.
library: Any = torch.library.Library("pygen", "IMPL") if _native.C is not None else None


@dataclass(frozen=True)
class Rules:
    """How one operator behaves under torch's transformations; each field as in `torch.library`."""

    file: str  # the op's file, of the same name in reference/, csrc/ and triton_kernels/
    # The operator's first arguments that are tensors (or None) or lists of them; all others are plain values.
    tensors: int
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    setup_context: Callable[..., None]
    backward: Callable[..., Any]
    vmap: Callable[..., Any]
    # "triton", or "library" where the work on a GPU is a matrix product: the reference, which calls the vendor's.
    gpu: str = "triton"


# Every registered operator, for pygen.backends.
registered: dict[str, Rules] = {}


def contiguous_like(x: Tensor) -> Tensor:
    """What a fake returns for a result of x's shape and dtype: results are contiguous whatever x's strides."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def triton_kernel(name: str, rules: Rules) -> Callable[..., Any]:
    """The op's Triton launcher. Importing Triton takes a second, so it waits for the first call."""

    def launch(*args):
        module = importlib.import_module(f"pygen.triton_kernels.{rules.file}")
        return getattr(module, name)(*args)

    return launch


def _gpu_without_triton(name: str, rules: Rules) -> Callable[..., Any]:
    """The reference, and once a word about it: on a GPU it is many launches instead of one."""
    warned: list[bool] = []
    compute = reference_kernel(rules)

    def launch(*args):
        if not warned:
            warned.append(True)
            warnings.warn(
                f"pygen.{name} runs on its plain PyTorch reference on the GPU: Triton is not installed "
                "(pip install triton)",
                stacklevel=2,
            )
        return compute(*args)

    return launch


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _contiguous(results: Any) -> Any:
    if isinstance(results, tuple | list):
        return type(results)(_contiguous(y) for y in results)
    return results.contiguous()


def reference_kernel(rules: Rules) -> Callable[..., Any]:
    """The reference with the contiguous results that every kernel promises (and the fake tells the compiler)."""

    def compute(*args):
        return _contiguous(rules.reference(*args))

    return compute


def _register(name: str, rules: Rules) -> None:
    qualified = f"pygen::{name}"
    registered[name] = rules
    if rules.gpu == "triton":
        library.impl(name, (triton_kernel if has_triton() else _gpu_without_triton)(name, rules), "CUDA")
    # Any device without a kernel of its own (MPS, XPU, ...) computes the reference.
    library.impl(name, reference_kernel(rules), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, rules.fake, lib=library)
    torch.library.register_autograd(qualified, rules.backward, setup_context=rules.setup_context, lib=library)
    torch.library.register_vmap(qualified, rules.vmap, lib=library)
    for device in AUTOCAST_DEVICES:
        # As softmax, cumsum and log-densities do under autocast: compute in float32.
        torch.library.register_autocast(qualified, device, torch.float32, lib=library)


def _functions(name: str, op: Callable[..., Any], rules: Rules) -> tuple[Any, Any]:
    """(eager, transformable): the derivative that is registered, without the registered road's overhead.

    torch.func wants `setup_context` apart from `forward`; then every call also inspects signatures (123 us against 52
    for a 4 x 4 coupling), so plain eager calls have their own.
    """

    def compute(*args):
        with _below_autograd():
            return op(*args)

    def compute_and_save(ctx, *args):
        with _below_autograd():
            output = op(*args)
        rules.setup_context(ctx, args, output)
        return output

    backward = staticmethod(rules.backward)
    eager = {"forward": staticmethod(compute_and_save), "backward": backward}
    transformable = {
        "forward": staticmethod(compute),
        "setup_context": staticmethod(rules.setup_context),
        "backward": backward,
        "vmap": staticmethod(rules.vmap),
    }
    base = (torch.autograd.Function,)
    return type(f"{name}_function", base, eager), type(f"{name}_transformable", base, transformable)


@contextlib.contextmanager
def small_road_closed() -> Iterator[None]:
    """Let every call go through the dispatcher, where kernels can be exchanged."""
    was_open = _native.C.open_small_road(False)
    try:
        yield
    finally:
        _native.C.open_small_road(was_open)


def small_road(name: str) -> Callable[..., Any]:
    """The C function that takes the operator's arguments and returns its result, or None for "another road".

    It asks all that `operator`'s function asks, in a fifth of the time (csrc/small.h). Dynamo must not see it.
    """
    return getattr(_native.C, f"{name}_small") if _native.C is not None else lambda *args: None


def operator(name: str, rules: Rules) -> Callable[..., Any]:
    """Register `pygen::<name>` and return the function to call it with (positional arguments, as in the schema)."""
    if library is None:
        return rules.reference
    _register(name, rules)
    op = getattr(torch.ops.pygen, name).default
    if "[]" in str(op._schema).replace("int[]", ""):
        return _list_operator(name, op, rules)
    function, transformable = _functions(name, op, rules)
    count = rules.tensors

    # One function, everything inline: a Python call more is a tenth of a small kernel's time.
    def call(*args):
        if _is_compiling() or _autocast_enabled():
            return op(*args)
        if _functorch_active() or forward_ad._current_level >= 0:
            return transformable.apply(*args)
        try:
            for x in args[:count]:
                if x is not None and x.requires_grad and _grad_enabled():
                    return function.apply(*args)
        except AttributeError:
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}") from None
        with _below_autograd():
            return op(*args)

    call.__name__ = name
    return call


def _list_operator(name: str, op: Callable[..., Any], rules: Rules) -> Callable[..., Any]:
    """`operator` for lists of tensors: the same roads."""

    def below_autograd(*args):
        with _below_autograd():
            return op(*args)

    function, transformable = map(_lists.applied, _lists.functions(name, below_autograd, rules))
    count = rules.tensors

    def call(*args):
        if _is_compiling() or _autocast_enabled():
            return op(*args)
        if _functorch_active() or forward_ad._current_level >= 0:
            return transformable(*args)
        if _grad_enabled():
            for value in args[:count]:
                for x in value if isinstance(value, list) else (value,):
                    if x is not None and x.requires_grad:
                        return function(*args)
        return below_autograd(*args)

    call.__name__ = name
    return call


def looped_vmap(op: Callable[[], Any], tensors: int) -> Callable[..., Any]:
    """vmap of `op()` one by one, over its first `tensors` arguments: for a batch of weights, of different matrices."""

    def rule(info, in_dims, *args):
        def slices(i: int):
            return [
                a if a is None or dim is None else a.select(dim, i)
                for a, dim in zip(args[:tensors], in_dims, strict=False)
            ]

        outputs = zip(*(op()(*slices(i), *args[tensors:]) for i in range(info.batch_size)), strict=True)
        stacked = tuple(torch.stack(one) for one in outputs)
        return stacked, (0,) * len(stacked)

    return rule


def derivative_through_reference(
    reference: Callable[..., Any],
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """(setup_context, backward) that differentiate an op by differentiating its plain-PyTorch reference.

    For derivatives that no kernel computes: the second derivative is the first derivative of the backward op.
    """

    def setup_context(ctx, inputs, output):
        ctx.layout, flat = _lists.flatten(inputs)
        ctx.is_tensor = [isinstance(value, Tensor) for value in flat]
        ctx.others = [value for value in flat if not isinstance(value, Tensor)]
        ctx.save_for_backward(*(value for value in flat if isinstance(value, Tensor)))

    def backward(ctx, *grads):
        left, right = iter(ctx.saved_tensors), iter(ctx.others)
        values = [next(left) if is_tensor else next(right) for is_tensor in ctx.is_tensor]
        # Indices and masks have no derivative, and torch.func refuses to be asked for one.
        places = [i for i, value in enumerate(values) if isinstance(value, Tensor) and value.is_floating_point()]

        def of_tensors(*given):
            flat = list(values)
            for i, value in zip(places, given, strict=True):
                flat[i] = value
            results = reference(*_lists.unflatten(ctx.layout, flat))
            return (results,) if isinstance(results, Tensor) else tuple(_lists.flatten(results)[1])

        # torch.func, not torch.autograd: it nests in whatever transformation is asking, and its result can again be
        # differentiated.
        _, pull_back = torch.func.vjp(of_tensors, *(values[i] for i in places))
        found = dict(zip(places, pull_back(tuple(_lists.flatten(grads)[1])), strict=True))
        return tuple(_lists.unflatten(ctx.layout, [found.get(i) for i in range(len(values))]))

    return setup_context, backward
