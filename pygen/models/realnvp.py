"""RealNVP on vectors and small images: affine couplings over alternating or checkerboard halves. Layers: pygen.nn."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pygen.models.flow import Flow
from pygen.nn import MLP, AffineCoupling, Permutation, Reshape, Sequential, alternating_mask, checkerboard_mask


def halves_order(shape: Sequence[int]) -> Tensor:
    """int64 (D,): the order that puts the passive half of a flattened sample first.

    Even positions of a vector, the white squares of an image's checkerboard (section 3.4 of the paper). A permutation
    once instead of a mask in every layer: each coupling then reads and computes its half only.
    """
    if len(shape) == 1:
        mask = alternating_mask(shape[0])
    else:
        mask = checkerboard_mask(shape[-2], shape[-1], math.prod(shape[:-2])).flatten()
    return torch.cat(((~mask).nonzero(), mask.nonzero())).squeeze(1)


class RealNVP(Flow):
    r"""RealNVP with fully connected conditioners: `depth` affine couplings that transform the two halves in turn.

    .. math::
        z_a = x_a \odot e^{\tanh a(x_p)} + t(x_p), \qquad \log\det = \sum \tanh a(x_p)

    Args:
        shape: of one sample: (D,) for vectors, (H, W) or (C, H, W) for images.
        levels, alpha: integers 0 .. levels - 1 instead of real data, as in `Flow`.
        depth: number of couplings.
        hidden: widths of each conditioner's hidden layers.
        dropout: inside the conditioners.
        activation: of the conditioners, as in `nn.MLP`.
        scale_map: as in `pygen.ops.affine_coupling`; "tanh" is the paper's, bounded and hence stable.
        context_features: F of the context (B, F) for a conditional density; 0 for none.

    Raises:
        ValueError: fewer than two dimensions, or a bad option.

    Example:
        >>> import torch
        >>> from pygen import models
        >>> model = models.RealNVP((1, 8, 8), levels=17).eval()
        >>> x = torch.randint(0, 17, (5, 1, 8, 8))
        >>> z, log_det = model(x)
        >>> torch.equal(model.inverse(z)[0].floor().long(), x), model.log_prob(x).shape, model.sample(3).shape
        (True, torch.Size([5]), torch.Size([3, 1, 8, 8]))

    Source: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", ICLR 2017.
    """

    name = "realnvp"

    def __init__(
        self,
        shape: Sequence[int],
        *,
        levels: int | None = None,
        alpha: float = 0.05,
        depth: int = 8,
        hidden: Sequence[int] = (128, 128),
        dropout: float = 0.0,
        activation: str = "relu",
        scale_map: str = "tanh",
        context_features: int = 0,
    ) -> None:
        shape, hidden = tuple(shape), tuple(hidden)
        size = math.prod(shape)
        if size < 2 or depth < 1:
            raise ValueError(f"RealNVP: needs at least 2 dimensions and depth 1, got shape {shape} and depth {depth}")

        def coupling(swap: bool) -> AffineCoupling:
            active = size - size // 2 if swap else size // 2
            conditioner = MLP(
                size - active,
                2 * active,
                hidden,
                context_features=context_features,
                dropout=dropout,
                activation=activation,
            )
            return AffineCoupling(conditioner, swap=swap, scale_map=scale_map)

        super().__init__(
            Sequential(
                Reshape(shape, (size,)),
                Permutation(halves_order(shape)),
                *(coupling(swap=i % 2 == 1) for i in range(depth)),
            ),
            shape,
            levels=levels,
            alpha=alpha,
            latent_shape=(size,),
            config={
                "shape": list(shape),
                "levels": levels,
                "alpha": alpha,
                "depth": depth,
                "hidden": list(hidden),
                "dropout": dropout,
                "activation": activation,
                "scale_map": scale_map,
                "context_features": context_features,
            },
        )
