"""From the saved parameters of a Glow in PyTorch, by their keys; see convert.py."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pygen.nn._converted import constant_affine
from pygen.nn.convolution import InvertibleConv1x1
from pygen.nn.glow import GlowStep


def _convolution(weight: Tensor, bias: Tensor, log_scale: Tensor, padding: int) -> nn.Conv2d:
    """x -> (weight * x + bias) e^{log_scale}, folded into one convolution."""
    out, channels, height, width = weight.shape
    scale = log_scale.flatten().exp()
    layer = nn.Conv2d(channels, out, (height, width), padding=padding, device=weight.device, dtype=weight.dtype)
    layer.load_state_dict({"weight": weight * scale[:, None, None, None], "bias": bias.flatten() * scale})
    return layer


def _rosinality(s: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, nn.Sequential]:
    """(shift, scale, W, conditioner) of the keys of rosinality/glow-pytorch."""
    if "invconv.weight" in s:
        weight = s["invconv.weight"].squeeze(3).squeeze(2)
    else:
        lower = s["invconv.w_l"].double().tril(-1) + torch.eye(len(s["invconv.w_l"])).to(s["invconv.w_l"].double())
        upper = s["invconv.w_u"].double().triu(1)
        upper = upper + (s["invconv.s_sign"].double() * s["invconv.w_s"].double().exp()).diag()
        weight = (s["invconv.w_p"].double() @ lower @ upper).to(s["invconv.w_l"].dtype)
    first, second, last = (f"coupling.net.{i}" for i in (0, 2, 4))
    none = torch.zeros_like(s[f"{first}.bias"])
    net = nn.Sequential(
        _convolution(s[f"{first}.weight"], s[f"{first}.bias"], none, 1),
        nn.ReLU(),
        _convolution(s[f"{second}.weight"], s[f"{second}.bias"], none, 0),
        nn.ReLU(),
        nn.ConstantPad2d(1, 1.0),  # so that the last convolution sees the border
        _convolution(s[f"{last}.conv.weight"], s[f"{last}.conv.bias"], 3 * s[f"{last}.scale"], 0),
    )
    return s["actnorm.loc"].flatten(), s["actnorm.scale"].flatten(), weight, net


def _openai(s: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, nn.Sequential]:
    """(shift, scale, W, conditioner) of the keys of chaiyujin/glow-pytorch, which follows openai/glow."""
    if "invconv.weight" not in s:
        raise ValueError(
            "from_glow_state_dict: invconv.weight is missing; of a decomposed or shuffled step the permutation is not "
            "in the file"
        )
    last = _convolution(s["f.4.weight"], s["f.4.bias"], 3 * s["f.4.logs"], 1)
    channels = s["actnorm.bias"].numel()
    if len(last.weight) == channels:
        # Shift and scale alternate: shifts are the even channels.
        order = torch.cat((torch.arange(1, channels, 2), torch.arange(0, channels, 2)))
        last.weight.copy_(last.weight[order])
        last.bias.copy_(last.bias[order])  # type: ignore[union-attr, index]
    net = nn.Sequential(
        _convolution(s["f.0.weight"], s["f.0.actnorm.bias"], s["f.0.actnorm.logs"], 1),
        nn.ReLU(),
        _convolution(s["f.2.weight"], s["f.2.actnorm.bias"], s["f.2.actnorm.logs"], 0),
        nn.ReLU(),
        last,
    )
    return s["actnorm.bias"].flatten(), s["actnorm.logs"].flatten().exp(), s["invconv.weight"], net


@torch.no_grad()
def from_glow_state_dict(state_dict: Mapping[str, Tensor], prefix: str = "") -> GlowStep:
    r"""One step of a Glow from its saved parameters, with the same z and log-determinant.

    Two layouts are known by their keys:

    - rosinality/glow-pytorch (`Flow`): actnorm.loc, actnorm.scale, invconv.weight or its factors invconv.w_p, w_l, w_u,
      w_s, s_sign, and coupling.net.{0,2,4}; scale and shift are halves, the last convolution pads with ones;
    - chaiyujin/glow-pytorch (`FlowStep`), as openai/glow: actnorm.bias, actnorm.logs, invconv.weight and f.{0,2,4};
      shift and scale alternate.

    The conditioner becomes a plain stack of three convolutions: the scales that follow them are folded into their
    weights, alternating channels are sorted, and nothing of the peer is needed any more. A negative ActNorm scale goes
    into W.

    Args:
        state_dict: of a step, or of a model that contains it.
        prefix: what the step's keys begin with, such as "blocks.0.flows.3." or "flow.layers.1.".

    Returns:
        A `GlowStep`, affine or additive as the conditioner's number of channels says, whose 1x1 convolution has the
        decomposition of the peer.

    Raises:
        ValueError: keys of neither layout, or a decomposed convolution whose permutation was not saved.

    Example:
        >>> state = torch.load("glow.pt")  # doctest: +SKIP
        >>> steps = [convert.from_glow_state_dict(state, f"blocks.0.flows.{i}.") for i in range(32)]  # doctest: +SKIP

    Source: Kingma, Dhariwal, "Glow", NeurIPS 2018, in the two packages' own layouts.
    """
    s = {key.removeprefix(prefix): t.detach() for key, t in state_dict.items() if key.startswith(prefix)}
    if "actnorm.loc" in s:
        shift, scale, weight, net = _rosinality(s)
    elif "actnorm.logs" in s:
        shift, scale, weight, net = _openai(s)
    else:
        raise ValueError(
            f"from_glow_state_dict: state_dict must have {prefix}actnorm.loc (rosinality) or {prefix}actnorm.logs "
            f"(chaiyujin), got {sorted(state_dict)[:4]} ..."
        )
    channels = shift.numel()
    coupling = "affine" if net[-1].out_channels == channels else "additive"
    decomposition = "none" if "invconv.weight" in s else "plu"
    step = GlowStep(channels, net, coupling=coupling, decomposition=decomposition).to(shift)
    mixer: Any = step[0]
    mixer.actnorm = constant_affine(scale.abs().log(), shift * scale.abs(), bool(s.get("actnorm.initialized", True)))
    mixer.convolution = InvertibleConv1x1.from_matrix(weight * scale.sign(), decomposition)
    return step
