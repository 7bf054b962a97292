"""`pygen parse`: the trees that a trained ON-LSTM sees in sentences, and how well they agree with known ones."""

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from pygen.data.trees import Tree
    from pygen.models.onlstm_trees import UnlabelledF1

_RANDOM_TREES = 5  # of each sentence; the baseline is their mean
console = Console()


def _language_model(run: Path) -> Any:
    from pygen import training

    model: Any = training.load_model(run)
    if model.name != "onlstm":
        raise ValueError(f"parse needs a run of onlstm, {run} holds one of {model.name}")
    return model


def _as_in_penn_text(word: str) -> str:
    return re.sub("[0-9]+", "N", word.lower())


def _gold(path: Path, labels: bool, punctuation: bool, lower: bool) -> "list[Tree]":
    from pygen.data.trees import Tree, read_trees

    trees = read_trees(path, labels=labels, punctuation=punctuation)
    if not trees:
        raise ValueError(f"--gold {path}: holds no trees")
    return [Tree(tuple(map(_as_in_penn_text, t.words)), t.constituents) for t in trees] if lower else trees


def parse(
    run: Annotated[Path, typer.Argument(help="Folder of a run of onlstm, or its best.safetensors.")],
    sentences: Annotated[
        list[str] | None, typer.Argument(help='As "the dog sleeps", words with spaces between.')
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Whose distances, 1 for the first. [default: the middle one, 2 of 3]")
    ] = None,
    rule: Annotated[str, typer.Option(help="How to split: paper (leans to the right) or gaps (does not).")] = "paper",
    gold: Annotated[Path | None, typer.Option(help="Trees in brackets, to compare with.")] = None,
    labels: Annotated[bool, typer.Option(help="A bracket in --gold begins with a label.")] = True,
    punctuation: Annotated[bool, typer.Option(help="Of --gold: keep it.")] = True,
    lower: Annotated[bool, typer.Option("--lower", help="Of --gold: small letters, and N for numbers.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the trees in brackets, one a line.")] = None,
) -> None:
    """Print the tree that a trained ON-LSTM sees in a sentence, or how well its trees agree with known ones."""
    from pygen.data.trees import write_trees
    from pygen.models.onlstm_trees import RULES, default_layer, distances_to_tree, word_distances

    if not sentences and gold is None:
        raise ValueError('nothing to parse; give "a sentence", or --gold FILE')
    if rule not in RULES:
        raise ValueError(f"--rule must be one of {', '.join(RULES)}, got {rule!r}")
    asked = [sentence.split() for sentence in sentences or ()]
    if not all(asked):
        raise ValueError("a sentence must have words, got an empty one")
    known = [] if gold is None else _gold(gold, labels, punctuation, lower)
    model = _language_model(run)
    _warn_of_unknown(model, asked)
    found = [word_distances(model, words) for words in (*asked, *(tree.words for tree in known))]
    n_layers = len(found[0])
    if layer is not None and not 1 <= layer <= n_layers:
        raise ValueError(f"--layer must be 1 to {n_layers}, got {layer}")
    layer = layer or default_layer(n_layers)

    trees = [
        distances_to_tree(distances[layer - 1], words, rule=rule)
        for distances, words in zip(found, (*asked, *(tree.words for tree in known)), strict=True)
    ]
    for tree, distances in zip(trees[: len(asked)], found, strict=False):
        _print_tree(tree, distances[layer - 1])
    if known:
        _print_f1(known, found[len(asked) :], layer, rule)
    if out is not None:
        write_trees(out, trees)
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)


def _warn_of_unknown(model: Any, sentences: Sequence[Sequence[str]]) -> None:
    """Words that the model reads as <unk> have the distances of it."""
    from pygen.data.text import UNKNOWN

    if model.level == "word" and UNKNOWN in model.vocabulary:
        vocabulary = set(model.vocabulary)
        missing = dict.fromkeys(word for words in sentences for word in words if word not in vocabulary)
        if missing:
            console.print(
                f"not in the vocabulary, and read as {UNKNOWN}: {', '.join(missing)}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def _print_tree(tree: "Tree", distances: "Tensor") -> None:
    """The tree above its words and their distances; from left to right where the terminal is too narrow."""
    numbers = [f"{distance:.2f}" for distance in distances.tolist()]
    text = tree.drawing([numbers])
    if max(map(len, text.splitlines())) > console.width:
        width = max(map(len, tree.words))
        rows = (f"{word:<{width}}  {number}" for word, number in zip(tree.words, numbers, strict=True))
        text = "\n".join((tree.outline(), "", *rows))
    console.print(f"{text}\n{tree.brackets()}\n", markup=False, highlight=False, soft_wrap=True)


def _print_f1(known: "list[Tree]", found: "Sequence[Tensor]", layer: int, rule: str) -> None:
    """Every layer's agreement with the known trees, beside what needs no model."""
    from pygen.models import onlstm_trees as trees

    def measured(make: Callable[[Sequence[str]], "Tree"]) -> "UnlabelledF1":
        return trees.unlabelled_f1([make(tree.words) for tree in known], known)

    table = Table("trees", "sentence F1", "corpus F1", "precision", "recall")
    for column in table.columns[1:]:
        column.justify = "right"
    for i in range(len(found[0])):
        induced = [
            trees.distances_to_tree(distances[i], tree.words, rule=rule)
            for distances, tree in zip(found, known, strict=True)
        ]
        name, style = (f"layer {i + 1}, chosen", "bold") if i + 1 == layer else (f"layer {i + 1}", None)
        table.add_row(*_cells(name, trees.unlabelled_f1(induced, known)), style=style)
    baselines = {"right-branching": trees.right_branching, "left-branching": trees.left_branching,
                 "balanced": trees.balanced}  # fmt: skip
    for name, make in baselines.items():
        table.add_row(*_cells(name, measured(make)))
    generator = random.Random(0)
    draws = [measured(lambda words: trees.random_tree(words, generator)) for _ in range(_RANDOM_TREES)]
    mean = (sum(values) / _RANDOM_TREES for values in zip(*draws, strict=True))
    table.add_row(*_cells(f"random, mean of {_RANDOM_TREES}", trees.UnlabelledF1(*mean)))
    console.print(f"{len(known):,} trees, unlabelled, in percent; rule: {rule}", highlight=False, soft_wrap=True)
    console.print(table)


def _cells(name: str, f1: "UnlabelledF1") -> list[str]:
    return [name, *(f"{100 * value:.1f}" for value in f1[:4])]
