"""What each regulariser does to the angles between a layer's filters, on real digits of 8 x 8 pixels.

    python examples/self_orthogonality.py
    python examples/self_orthogonality.py --data gaussian
    python examples/self_orthogonality.py --regulariser self --mean-weight 0   # every pair, not only their sum

The filters start nearly parallel and are trained by the penalty alone, of batches of inputs: Self-Orthogonality (angles
as the inputs see them) or the off-diagonal part of W^T W (angles as they are). Printed is how far from 90 degrees the
angle of a pair of filters is on average: between the weights, and as the inputs see it, that is, by how often the signs
of two responses agree. For gaussian inputs both are the same; pixels of digits are correlated. Digits need
scikit-learn.
"""

import argparse
import math

import torch
from torch import Tensor

from pygen.functional.regularizers import orthogonality, self_orthogonality

REGULARISERS = ("self", "orthogonal")


def digits() -> Tensor:
    """(1797, 64) pixels with mean 0."""
    from sklearn.datasets import load_digits

    x = torch.from_numpy(load_digits().data).float() / 16
    return x - x.mean(0)


def nearly_parallel(filters: int) -> Tensor:
    """(64, filters): in every column one direction plus a little of its own, of length 1."""
    weight = torch.randn(64, 1) + 0.5 * torch.randn(64, filters)
    return weight / weight.norm(dim=0)


@torch.no_grad()
def degrees_off(x: Tensor, weight: Tensor) -> tuple[float, float]:
    """How far from a right angle pairs of columns are on average: by their cosines, and by 1 - 2 theta / pi, which is
    the mean product of the signs of their responses to gaussian inputs."""
    unit = weight / weight.norm(dim=0)
    signs = (x @ weight).sign()
    pairs = torch.ones(weight.size(1), weight.size(1)).triu(1).bool()
    angles = (unit.T @ unit)[pairs].clamp(-1, 1).acos()
    seen = (1 - (signs.T @ signs)[pairs] / len(x)) * math.pi / 2
    of_weights, as_seen = ((90 - a * 180 / math.pi).abs().mean().item() for a in (angles, seen))
    return of_weights, as_seen


def train(regulariser: str, x: Tensor, options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    weight = nearly_parallel(options.filters).requires_grad_()
    optimizer = torch.optim.Adam([weight], 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    print(f"{regulariser}: mean degrees from a right angle")
    for step in range(options.steps + 1):
        if step in (0, options.steps) or step % max(1, options.steps // 5) == 0:
            of_weights, as_seen = degrees_off(x, weight)
            print(f"  step {step:5d}  between weights {of_weights:5.1f}  as the inputs see it {as_seen:5.1f}")
        batch = x[torch.randint(len(x), (options.batch,))]
        if regulariser == "self":
            loss = self_orthogonality(batch, weight, mean_weight=options.mean_weight)
        else:
            loss = orthogonality(weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("digits", "gaussian"), default="digits")
    parser.add_argument("--regulariser", choices=(*REGULARISERS, "both"), default="both")
    parser.add_argument("--mean-weight", type=float, default=100.0, help="of Self-Orthogonality's squared sum")
    parser.add_argument("--filters", type=int, default=16)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    x = digits() if options.data == "digits" else torch.randn(2000, 64)
    for regulariser in REGULARISERS if options.regulariser == "both" else (options.regulariser,):
        train(regulariser, x, options)


if __name__ == "__main__":
    main()
