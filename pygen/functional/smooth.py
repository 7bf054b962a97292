"""Smooth relatives of hard functions: maximum, arg max, one-hot, accuracy, F1, top-k. Each has a temperature, is the
hard function as that goes to 0, and says by how much it differs from it before.

Plain PyTorch with derivatives of any order. `pygen.ops.cumax`, of the same family, is the smooth step: with x over its
temperature it tends to the indicator of all positions from the arg max on.
"""

import math

import torch
from torch import Tensor

from pygen.functional._smooth_rows import check_floating, check_row, length, probabilities, scaled
from pygen.functional._smooth_top_k import soft_top_k
from pygen.reference._dtypes import widen

__all__ = [
    "smooth_max",
    "smooth_min",
    "soft_accuracy",
    "soft_argmax",
    "soft_f1",
    "soft_one_hot",
    "soft_one_hot_of_index",
    "soft_top_k",
]

_AVERAGES = ("binary", "micro", "macro", "none")


# ---- maximum, arg max, one-hot


def smooth_max(
    x: Tensor, dim: int = -1, *, temperature: float = 1.0, mean: bool = False, keepdim: bool = False
) -> Tensor:
    r"""The largest element along a dimension, smoothed: a scaled log-sum-exp.

    .. math::
        S = T \log \sum_i e^{x_i / T} \qquad \text{or, with mean=True,} \qquad
        S = T \log \frac{1}{n} \sum_i e^{x_i / T}

    Its gradient is `soft_one_hot`. Both are convex, shift with x, and scale with x and T together.

    Error: :math:`\max x \le S \le \max x + T \log n`, with equality on the right where all n are equal; there the
    variant with the mean is exact, and :math:`\max x - T \log n \le S \le \max x`. That one tends to the mean of x
    at high temperatures, where the first grows without bound. At any x the first is above the maximum by at most
    :math:`T (n - 1) e^{-g / T}`, with g the gap between the largest element and the next.

    Args:
        x: any shape, floating point.
        dim: the dimension of the n elements.
        temperature: T; the maximum as it goes to 0.
        mean: divide the sum by n.
        keepdim: keep `dim`, with size 1.

    Returns:
        x's shape without `dim`, in x's dtype, computed in float32 for 16-bit x. Elements of -inf add nothing (but count
        in n); of nothing else it is -inf, with gradient 0.

    Raises:
        ValueError: no elements, a temperature that is not positive and finite. TypeError: x is not floating point.
        IndexError: dim out of range.

    Example:
        >>> import torch
        >>> from pygen.functional import smooth
        >>> smooth.smooth_max(torch.tensor([1.0, 3.0, 2.0]), temperature=0.1)
        tensor(3.0000)
        >>> smooth.smooth_max(torch.tensor([1.0, 1.0]), mean=True)
        tensor(1.)

    Source: Boyd, Vandenberghe, "Convex Optimization", 2004, section 3.1.5.
    """
    check_row("smooth_max", x, dim, temperature)
    z, largest = scaled(x, dim, temperature)
    nothing = (z.detach() == -math.inf).all(dim, keepdim=True)  # where logsumexp has a gradient of NaN
    log_sum = z.masked_fill(nothing, 0.0).logsumexp(dim, keepdim=True).masked_fill(nothing, -math.inf)
    if mean:
        log_sum = log_sum - math.log(length(x, dim))
    result = (largest + temperature * log_sum).to(x.dtype)
    return result if keepdim or not x.dim() else result.squeeze(dim)


def smooth_min(
    x: Tensor, dim: int = -1, *, temperature: float = 1.0, mean: bool = False, keepdim: bool = False
) -> Tensor:
    r"""The smallest element along a dimension, smoothed: -smooth_max(-x).

    Error: :math:`\min x - T \log n \le S \le \min x`; with mean=True :math:`\min x \le S \le \min x + T \log n`.

    Args, Returns, Raises: as `smooth_max`; here it is elements of +inf that add nothing.

    Example:
        >>> import torch
        >>> from pygen.functional import smooth
        >>> smooth.smooth_min(torch.tensor([1.0, 3.0, 2.0]), temperature=0.1)
        tensor(1.0000)

    Source: Boyd, Vandenberghe, "Convex Optimization", 2004, section 3.1.5.
    """
    check_row("smooth_min", x, dim, temperature)
    return -smooth_max(-x, dim, temperature=temperature, mean=mean, keepdim=keepdim)


def soft_argmax(x: Tensor, dim: int = -1, *, temperature: float = 1.0, keepdim: bool = False) -> Tensor:
    r"""The index of the largest element, smoothed: the expected index :math:`\sum_i i\, p_i`, p = softmax(x / T).

    The same number as ``ops.cumax(x / T, complement=True).sum(dim)``: an index is how many positions lie before it.

    Error: with g the gap between the largest element and the next, at most :math:`\frac{n (n - 1)}{2} e^{-g / T}` from
    the arg max. Where several are largest it tends to the mean of their indices.

    Args:
        x: any shape, floating point.
        dim: the dimension of the n elements.
        temperature: T; the arg max as it goes to 0.
        keepdim: keep `dim`, with size 1.

    Returns:
        x's shape without `dim`, float32 for 16-bit x, whose integers end at 256 or 2048, and x's dtype otherwise. NaN
        for a row that softmax cannot normalise.

    Raises:
        ValueError: no elements, a temperature that is not positive and finite. TypeError: x is not floating point.
        IndexError: dim out of range.

    Example:
        >>> import torch
        >>> from pygen.functional import smooth
        >>> smooth.soft_argmax(torch.tensor([0.0, 0.0, 5.0, 0.0]), temperature=0.5)
        tensor(1.9999)

    Source: Kendall et al., "End-to-end learning of geometry and context for deep stereo regression", ICCV 2017, section
    3.4 (as the soft arg min).
    """
    check_row("soft_argmax", x, dim, temperature)
    p = probabilities(x, dim, temperature)
    if not p.dim():
        return p * 0
    index = torch.arange(p.size(dim), dtype=p.dtype, device=p.device)
    expected = (p.movedim(dim, -1) * index).sum(-1)
    return expected.unsqueeze(dim) if keepdim else expected


def soft_one_hot(x: Tensor, dim: int = -1, *, temperature: float = 1.0) -> Tensor:
    r"""The one-hot vector of the largest element, smoothed: softmax(x / T), also where x / T would overflow.

    Error: with g the gap between the largest element and the next, the sum of the absolute differences to the one-hot
    vector is at most :math:`2 (n - 1) e^{-g / T}`, and that of a single element at most half of it.

    Args:
        x: any shape, floating point.
        dim: the dimension of the n elements.
        temperature: T; the one-hot vector as it goes to 0, or equal shares where several are largest.

    Returns:
        A tensor of x's shape and dtype, computed in float32 for 16-bit x. NaN for a row that softmax cannot normalise.

    Raises:
        ValueError: no elements, a temperature that is not positive and finite. TypeError: x is not floating point.
        IndexError: dim out of range.

    Example:
        >>> import torch
        >>> from pygen.functional import smooth
        >>> smooth.soft_one_hot(torch.tensor([1.0, 3.0, 2.0]), temperature=0.5)
        tensor([0.0159, 0.8668, 0.1173])

    Source: Bridle, "Training stochastic model recognition algorithms as networks can lead to maximum mutual information
    estimation of parameters", NIPS 1989.
    """
    check_row("soft_one_hot", x, dim, temperature)
    return probabilities(x, dim, temperature).to(x.dtype)


def soft_one_hot_of_index(index: Tensor, n: int, *, temperature: float = 1.0) -> Tensor:
    r"""The one-hot vector of an index that is a real number, smoothed and differentiable in the index.

    .. math::
        p_i \propto e^{-(i - \mathrm{index})^2 / T}, \qquad i = 0, \dots, n - 1

    Undoes `soft_argmax`, up to both errors.

    Error: with d the distance between the index and the nearest integer, the sum of the absolute differences to that
    one's one-hot vector is at most :math:`4 / (e^{(1 - 2 d) / T} - 1)`. Half-way between two it tends to half each.

    Args:
        index: any shape, floating point, from 0 to n - 1 (beyond, the nearest end is meant).
        n: the number of classes.
        temperature: T; the one-hot vector of the nearest integer as it goes to 0.

    Returns:
        index's shape with n elements behind it, in its dtype, computed in float32 for 16-bit indices.

    Raises:
        ValueError: n below 1, a temperature that is not positive and finite. TypeError: index is not floating point.

    Example:
        >>> import torch
        >>> from pygen.functional import smooth
        >>> smooth.soft_one_hot_of_index(torch.tensor([1.0, 0.5]), 3, temperature=0.5)
        tensor([[0.1065, 0.7870, 0.1065],
                [0.4955, 0.4955, 0.0091]])
    """
    check_floating("soft_one_hot_of_index", "index", index, temperature)
    if n < 1:
        raise ValueError(f"soft_one_hot_of_index: n must be at least 1, got {n}")
    wide = widen(index).unsqueeze(-1)
    classes = torch.arange(n, dtype=wide.dtype, device=wide.device)
    # The square of the difference to the nearest class is common to all and taken out: it could overflow over T.
    nearest = wide.detach().round().clamp(0, n - 1)
    halves = (classes - nearest) * ((classes + nearest) / 2 - wide)
    return probabilities(-2 * halves, -1, temperature).to(index.dtype)


# ---- accuracy, F1


def _check_labels(name: str, labels: Tensor, shape: torch.Size, kind: str) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.shape != shape:
        raise ValueError(f"{name}: labels must have the shape {tuple(shape)} of {kind}, got {tuple(labels.shape)}")


def _check_classes(name: str, logits: Tensor, labels: Tensor, dim: int, temperature: float) -> None:
    check_row(name, logits, dim, temperature)
    if not logits.dim():
        raise ValueError(f"{name}: logits must have a dimension of classes, got a scalar")
    _check_labels(name, labels, logits.movedim(dim, -1).shape[:-1], "the logits without their classes")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name}: labels must be integers, the numbers of classes, got {labels.dtype}")


def soft_accuracy(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    dim: int = -1,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""The share of samples whose largest logit is that of their label, smoothed: the mean chance of the label.

    .. math::
        \frac{1}{N} \sum_i \mathrm{softmax}(z_i / T)_{y_i}

    for logits z and labels y. It is the expected accuracy of a classifier that draws its answers from softmax(z / T).

    Error: with :math:`m_i` the margin, the label's logit less the largest of the others, at most the mean of
    :math:`(C - 1) e^{-|m_i| / T}` from the accuracy.

    Args:
        logits: (..., C), floating point; or with the classes at `dim`.
        labels: integers, the logits' shape without their classes.
        temperature: T; the accuracy as it goes to 0.
        dim: the dimension of the classes; 1 for (N, C, H, W).
        reduction: "mean", "sum", or "none" for one value per sample.
        ignore_index: samples with this label do not count; as in `torch.nn.functional.cross_entropy`.

    Returns:
        scalar, or labels' shape for "none"; float32 for 16-bit logits and their dtype otherwise. The mean of no samples
        is NaN. Maximise it: 1 - accuracy is the loss.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction, a temperature that is not positive and finite.
        TypeError: logits that are not floating point, labels that are no integers. IndexError: dim out of range.

    Example:
        >>> import torch
        >>> from pygen.functional import smooth
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
        >>> smooth.soft_accuracy(logits, torch.tensor([0, 1, 1]), temperature=0.1)
        tensor(0.6667)

    Source: Goldberger et al., "Neighbourhood components analysis", NIPS 2004, whose objective is such an expectation.
    """
    _check_classes("soft_accuracy", logits, labels, dim, temperature)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"soft_accuracy: reduction must be one of mean, sum, none, got {reduction!r}")
    p = probabilities(logits, dim, temperature).movedim(dim, -1)
    counts = labels != ignore_index
    right = p.gather(-1, torch.where(counts, labels, 0).long().unsqueeze(-1)).squeeze(-1)
    right = torch.where(counts, right, 0.0)
    if reduction == "none":
        return right
    return right.sum() / counts.sum() if reduction == "mean" else right.sum()


def soft_f1(
    logits: Tensor,
    labels: Tensor,
    *,
    average: str = "macro",
    temperature: float = 1.0,
    dim: int = -1,
    ignore_index: int = -100,
) -> Tensor:
    r"""The F1 score with probabilities counted in place of decisions.

    .. math::
        F_1 = \frac{2\, TP}{2\, TP + FP + FN}, \qquad
        TP = \sum_i p_i y_i, \quad FP = \sum_i p_i (1 - y_i), \quad FN = \sum_i (1 - p_i) y_i

    For labels that are numbers of classes, p = softmax(logits / T) and y their one-hot vectors, a score for each class.
    For labels of the logits' shape, zeros and ones, every logit is a decision of its own: p = sigmoid(logits / T).

    Error, against the score of the decisions (the largest logit; logits above 0): where no p differs from its decision
    by more than :math:`\varepsilon_i`, at most :math:`\frac{1}{P} \sum_i (1 + y_i)\, \varepsilon_i`, with P the
    positives of the class; for logits z of decisions of their own :math:`\varepsilon_i = e^{-|z_i| / T}`, for classes
    :math:`\varepsilon_i = (C - 1) e^{-g_i / T}` with :math:`g_i` the gap between a sample's largest logit and the next.
    The macro average has the mean of its classes' bounds (0 for a class without positives: both scores are 0), and the
    micro average, all counts added up first, that of all entries as one class.

    Args:
        logits: (..., C), floating point; or with the classes at `dim`; of any shape for "binary".
        labels: integers, the logits' shape without their classes; or of the logits' shape, 0 and 1 in any dtype.
        average: "macro", the mean over classes; "micro", from counts added up over classes (for numbers of classes the
            `soft_accuracy`); "none", one score per class; "binary", for labels of the logits' shape, all one class.
        temperature: T; the F1 score as it goes to 0.
        dim: the dimension of the classes.
        ignore_index: samples (of labels in the logits' shape: entries) with this label do not count.

    Returns:
        scalar, or (C,) for "none"; float32 for 16-bit logits and their dtype otherwise. A class with neither positives
        nor predictions has a score of 0. Maximise it: 1 - F1 is the loss. For probabilities q in place of logits pass
        their logarithms, or ``q.logit()`` for decisions of their own.

    Raises:
        ValueError: shapes that do not fit, an unknown average, a temperature that is not positive and finite.
        TypeError: logits that are not floating point, labels that are no integers. IndexError: dim out of range.

    Example:
        >>> import torch
        >>> from pygen.functional import smooth
        >>> logits = torch.tensor([3.0, -2.0, 1.0, -1.0])
        >>> smooth.soft_f1(logits, torch.tensor([1, 0, 0, 1]), average="binary", temperature=0.1)
        tensor(0.5000)

    Source: Pastor-Pellicer et al., "F-measure as the error function to train neural networks", IWANN 2013.
    """
    if average not in _AVERAGES:
        raise ValueError(f"soft_f1: average must be one of {', '.join(_AVERAGES)}, got {average!r}")
    if average == "binary" or (isinstance(labels, Tensor) and labels.shape == getattr(logits, "shape", None)):
        p, y = _decisions(logits, labels, temperature, ignore_index)
        if average == "binary":
            p, y = p.reshape(-1, 1), y.reshape(-1, 1)
        else:
            check_row("soft_f1", logits, dim, temperature)
            p, y = (t.movedim(dim, -1) if t.dim() else t.reshape(1) for t in (p, y))
    else:
        _check_classes("soft_f1", logits, labels, dim, temperature)
        p, y = _chances(logits, labels, dim, temperature, ignore_index)
    samples = tuple(range(p.dim() - 1))
    true_positives, either = (p * y, p + y) if not samples else ((p * y).sum(samples), (p + y).sum(samples))
    if average == "micro":
        true_positives, either = true_positives.sum(), either.sum()
    score = 2 * true_positives / torch.where(either == 0, 1.0, either)
    return score if average == "none" else score.mean()


def _decisions(logits: Tensor, labels: Tensor, temperature: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Chances and labels in the logits' shape, both 0 where the label does not count."""
    check_floating("soft_f1", "logits", logits, temperature)
    _check_labels("soft_f1", labels, logits.shape, "the logits")
    counts = labels != ignore_index
    p = torch.sigmoid(widen(logits) / temperature)
    return torch.where(counts, p, 0.0), torch.where(counts, labels, 0).to(p.dtype)


def _chances(logits: Tensor, labels: Tensor, dim: int, temperature: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(..., C) softmax and one-hot labels, both 0 for samples that do not count."""
    counts = (labels != ignore_index).unsqueeze(-1)
    p = probabilities(logits, dim, temperature).movedim(dim, -1)
    classes = torch.arange(p.size(-1), device=p.device)
    return torch.where(counts, p, 0.0), (counts & (labels.unsqueeze(-1) == classes)).to(p.dtype)
