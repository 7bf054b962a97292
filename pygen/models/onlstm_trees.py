"""Trees from the distances of an ON-LSTM, and how well they agree with known ones. The model is models/onlstm.py, the
type `Tree` and bracketed files are data/trees.py."""

import random
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pygen.data.text import EOS
from pygen.data.trees import Constituent, Tree, read_trees, write_trees

__all__ = [
    "Constituent",
    "Tree",
    "UnlabelledF1",
    "balanced",
    "default_layer",
    "distances_to_tree",
    "left_branching",
    "parse_sentence",
    "random_tree",
    "read_trees",
    "right_branching",
    "unlabelled_f1",
    "word_distances",
    "write_trees",
]

RULES = ("paper", "gaps")


def distances_to_tree(
    distances: Tensor | Sequence[float], tokens: Sequence[str] | None = None, *, rule: str = "paper"
) -> Tree:
    """The binary tree that greedy splits at the largest distance make of a sentence.

    d_t is large where a phrase ended before word t. The sentence is split at the word t of the largest distance, and so
    is every part of two words or more, into

    - `rule="paper"`: (words before t, (word t, words after t)), which is how the published results were made. Every
      distance counts; where t is the first word, it stands alone to the left. A right part that begins with a phrase of
      two words or more cannot come out, so that distances without any sense give trees that lean to the right.
    - `rule="gaps"`: (words before t, words from t on), without that lean: every binary tree can come out, and of random
      distances so does a tree and its mirror image equally often. d_0 belongs to no gap and does not count.

    Of equal distances the first is taken. It takes linear time, whatever the depth.

    Args:
        distances: (T,), one for each word, of the step that reads it: 1 - mean of the master forget gate.
        tokens: the words; by default their positions, "0", "1", ...
        rule: "paper" or "gaps".

    Returns:
        A `Tree`; `.nested()`, `.brackets()` and `.drawing()` show it.

    Raises:
        ValueError: no distances, as many words as distances are not there, a NaN, or another rule.

    Example:
        >>> from pygen.models.onlstm_trees import distances_to_tree
        >>> words = "the dog in the house sleeps".split()
        >>> distances_to_tree([0.9, 0.1, 0.6, 0.2, 0.1, 0.8], words, rule="gaps").nested()
        ((('the', 'dog'), ('in', ('the', 'house'))), 'sleeps')
        >>> distances_to_tree([0.3, 0.1, 0.6, 0.2, 0.1, 0.8], words).nested()
        ((('the', 'dog'), ('in', ('the', 'house'))), 'sleeps')

    Source: Shen, Tan, Sordoni, Courville, "Ordered Neurons: Integrating Tree Structures into Recurrent Neural
    Networks", 2019, section 5.2; on the lean to the right: Dyer, Melis, Blunsom, "A Critical Analysis of Biased Parsers
    in Unsupervised Parsing", 2019.
    """
    values = torch.as_tensor(distances, dtype=None if hasattr(distances, "dtype") else torch.float64).detach().cpu()
    if values.dim() != 1 or not len(values):
        raise ValueError(f"distances_to_tree: distances must be (T,) with T >= 1, got {tuple(values.shape)}")
    if values.isnan().any():
        raise ValueError(f"distances_to_tree: distances has a NaN, at position {int(values.isnan().nonzero()[0])}")
    if rule not in RULES:
        raise ValueError(f"distances_to_tree: rule must be one of {', '.join(RULES)}, got {rule!r}")
    words = [str(i) for i in range(len(values))] if tokens is None else list(tokens)
    if len(words) != len(values):
        raise ValueError(f"distances_to_tree: {len(values)} distances for {len(words)} tokens")
    heights = values.tolist()
    if rule == "gaps":
        # The gap before word t + 1 has the distance of that word; a part of gaps has a word more.
        spans = [(start, stop + 1) for start, _, stop in _cartesian_tree(heights[1:])]
    else:
        parts = _cartesian_tree(heights)
        spans = [(start, stop) for start, _, stop in parts] + [(top, stop) for _, top, stop in parts]
    return Tree.from_spans(words, (span for span in spans if span[1] - span[0] > 1))


def _cartesian_tree(heights: Sequence[float]) -> list[tuple[int, int, int]]:
    """(start, top, stop) of every part that splitting at the top, the first of the highest, leads to."""
    n = len(heights)
    starts, stops = [0] * n, [n] * n
    descent: list[int] = []  # from the highest so far on to the last, never rising
    for i, height in enumerate(heights):
        while descent and heights[descent[-1]] < height:
            stops[descent.pop()] = i
        starts[i] = descent[-1] + 1 if descent else 0
        descent.append(i)
    return [(starts[i], i, stops[i]) for i in range(n)]


class UnlabelledF1(NamedTuple):
    """How well trees agree with known ones, all in [0, 1].

    Args:
        sentence: mean of the sentences' F1, what the literature on ON-LSTM reports.
        corpus: F1 of all spans of all sentences together.
        precision, recall: of all spans together: found and right / found, found and right / known.
        sentences: how many.
    """

    sentence: float
    corpus: float
    precision: float
    recall: float
    sentences: int


def unlabelled_f1(predicted: Tree | Iterable[Tree], gold: Tree | Iterable[Tree]) -> UnlabelledF1:
    r"""How many spans two bracketings of the same sentences have in common.

    .. math::
        P = \frac{|\hat S \cap S|}{|\hat S|}, \qquad R = \frac{|\hat S \cap S|}{|S|}, \qquad F_1 = \frac{2 P R}{P + R}

    with the sets of spans of a tree, without single words and the whole sentence, which every tree has. As in the
    evaluations of PRPN and ON-LSTM, a sentence that has no such spans in gold counts with R = 1, and with P = 1, so
    F1 = 1, where none were predicted (a sentence of one or two words), else P = F1 = 0 (a flat gold tree).

    Args:
        predicted, gold: trees of the same sentences in the same order; or one and one.

    Raises:
        ValueError: other words, another number of trees, or none.

    Example:
        >>> from pygen.models.onlstm_trees import Tree, right_branching, unlabelled_f1
        >>> gold = Tree.from_brackets("((the dog) (saw (a cat)))", labels=False)
        >>> right = right_branching(gold.words)
        >>> sorted(right.spans()), sorted(gold.spans())  # two in common
        ([(1, 5), (2, 5), (3, 5)], [(0, 2), (2, 5), (3, 5)])
        >>> round(unlabelled_f1(right, gold).sentence, 3)
        0.667
    """
    predictions = [predicted] if isinstance(predicted, Tree) else list(predicted)
    golds = [gold] if isinstance(gold, Tree) else list(gold)
    if len(predictions) != len(golds) or not golds:
        raise ValueError(
            f"unlabelled_f1: predicted and gold must be as many trees, at least one; got {len(predictions)} and "
            f"{len(golds)}"
        )
    total, n_found, n_right, n_known = 0.0, 0, 0, 0
    for i, (mine, known) in enumerate(zip(predictions, golds, strict=True)):
        if mine.words != known.words:
            raise ValueError(f"unlabelled_f1: trees {i} are of different words: {_begin(mine)} and {_begin(known)}")
        found, expected = mine.spans(), known.spans()
        right = len(found & expected)
        total += _f1(right, len(found), len(expected))
        n_found, n_right, n_known = n_found + len(found), n_right + right, n_known + len(expected)
    return UnlabelledF1(
        total / len(golds),
        _f1(n_right, n_found, n_known),
        n_right / n_found if n_found else float(not n_known),
        n_right / n_known if n_known else 1.0,
        len(golds),
    )


def _f1(right: int, found: int, known: int) -> float:
    return 2 * right / (found + known) if found + known else 1.0


def _begin(tree: Tree) -> str:
    words = " ".join(tree.words)
    return repr(words if len(words) <= 60 else words[:57] + "...")


def right_branching(words: Sequence[str]) -> Tree:
    """(a, (b, (c, d))): a good guess for English, and so the baseline to beat there."""
    return Tree.from_spans(words, ((i, len(words)) for i in range(len(words))[:-1]))


def left_branching(words: Sequence[str]) -> Tree:
    """(((a, b), c), d)."""
    return Tree.from_spans(words, ((0, i + 1) for i in range(len(words))[1:]))


def balanced(words: Sequence[str]) -> Tree:
    """Halves of halves; of an odd number of words, the right half has one more."""
    spans, pending = [], [(0, len(words))]
    while pending:
        start, stop = pending.pop()
        if stop - start > 1:
            spans.append((start, stop))
            middle = (start + stop) // 2
            pending += [(start, middle), (middle, stop)]
    return Tree.from_spans(words, spans)


def random_tree(words: Sequence[str], seed: int | random.Random = 0) -> Tree:
    """Every part split at a place that is drawn uniformly. For several trees, give the same random.Random."""
    generator = seed if isinstance(seed, random.Random) else random.Random(seed)
    return distances_to_tree([generator.random() for _ in words], words, rule="gaps")


def default_layer(n_layers: int) -> int:
    """The middle layer, counted from 1: of three the second, whose trees were the published model's best; of two the
    first."""
    return (n_layers + 1) // 2


@torch.no_grad()
def word_distances(model: Any, words: Sequence[str]) -> Tensor:
    """The forget gates' distances of a sentence's words in every layer, (L, T), float32, on the CPU.

    The sentence is read alone, after the sign that ends a sentence ("<eos>", or a line's end for characters) where
    the vocabulary has one. A model of words has one distance a word, of the step that reads it. A model of characters
    reads the words with a space between them, and a word has the distance of its first character: the first step that
    knows that a word has begun, as the step of a word is.

    Args:
        model: an `ONLSTMLanguageModel`; it is left in the mode, training or evaluation, in which it came.
        words: of the sentence, without spaces; what the vocabulary lacks is read as the model reads unknown words.

    Raises:
        ValueError: no words, a word that is empty or has spaces, or one that the model cannot read.
    """
    words = list(words)
    if not words or any(word.split() != [word] for word in words):
        raise ValueError(f"word_distances: words must be at least one, and none empty or with spaces, got {words!r}")
    tokens, positions = _read_as_trained(model, words)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()  # dropout would make another tree of every call
    try:
        distances = model.distances(tokens.unsqueeze(1).to(device))[0]
    finally:
        model.train(was_training)
    return distances[:, positions, 0].float().cpu()


def _read_as_trained(model: Any, words: Sequence[str]) -> tuple[Tensor, list[int]]:
    """(tokens of the sentence and of what ends the one before, where in them each word begins)."""
    ends_line = EOS if model.level == "word" else "\n"
    before = "\n" if ends_line in model.vocabulary else ""
    # How many tokens a word is, with the space after it.
    lengths = [1 if model.level == "word" else len(word) + 1 for word in words]
    positions = list(accumulate(lengths[:-1], initial=len(before)))
    return model.encode(before + " ".join(words)), positions


def parse_sentence(model: Any, words: Sequence[str], layer: int | None = None, *, rule: str = "paper") -> Tree:
    """The tree that a trained ON-LSTM language model sees in a sentence.

    Args:
        model, words: as `word_distances` takes them.
        layer: 1 for the first, the one next to the embedding; by default the middle one, `default_layer`.
        rule: as `distances_to_tree` takes it.

    Raises:
        ValueError: a layer that the model does not have; and as those two do.

    Example:
        >>> from pygen import training
        >>> from pygen.models.onlstm_trees import parse_sentence
        >>> model = training.load_model("runs/onlstm-text")  # doctest: +SKIP
        >>> print(parse_sentence(model, "the dog that ran sleeps".split()).drawing())  # doctest: +SKIP
    """
    distances = word_distances(model, words)
    layer = default_layer(len(distances)) if layer is None else layer
    if not 1 <= layer <= len(distances):
        raise ValueError(f"layer must be 1 to {len(distances)}, got {layer}")
    return distances_to_tree(distances[layer - 1], words, rule=rule)
