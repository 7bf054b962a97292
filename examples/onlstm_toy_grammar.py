"""Does an ON-LSTM find the phrases of a language that it has only read? A language model learns from the sentences of a
small grammar, without their brackets; its trees of sentences that it has not seen are compared with the grammar's.

    python examples/onlstm_toy_grammar.py --out onlstm-toy-grammar.png

The grammar (`pygen.data.grammar.TOY`) has subjects and verbs that agree across prepositional phrases, relative clauses
and clauses in the middle of clauses, and possessors that nest to the left, so that neither branching direction is a
good guess. What the gates of so small a model settle on depends on the seed: it is trained from several, and seed,
layer and rule of splitting are chosen on validation sentences. The table has all of them, on test sentences too. Needs
the `train` and `cli` extras; about a minute on one thread.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch

from pygen import data, training
from pygen.data.grammar import PCFG, TOY
from pygen.data.trees import Tree
from pygen.models import onlstm_trees as trees
from pygen.models.onlstm import ONLSTMLanguageModel

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the choice of a backend that needs no window)

LONGEST = 24  # words of a sentence
SHORTEST = 5  # of a held-out one: in "the dog sleeps" there is only one phrase to find
HELD_OUT = 500  # sentences of validation, and of the test
WINDOW = 40
RANDOM_TREES = 5  # of each sentence
COLOURS = {"known": "#22303c", "induced": "#0b7a75", "bars": "#d9a21b"}
MODEL = {
    "embedding_size": 64,
    "hidden_size": 64,
    "num_layers": 2,
    "chunk_size": 2,
    "dropout": 0.3,
    "dropouti": 0.3,
    "dropouth": 0.3,
    "dropoute": 0.1,
    "wdrop": 0.3,
    "alpha": 0.0,
    "beta": 0.0,
}
TRAINING = {"batch_size": 32, "learning_rate": 5e-3, "weight_decay": 1e-4, "clip": 1.0, "ema": 0.98, "device": "cpu"}


class Sentences(NamedTuple):
    """Trees of the grammar; no sentence of `valid` or `test` is in another part."""

    train: list[Tree]
    valid: list[Tree]
    test: list[Tree]


class Scores(NamedTuple):
    """A row of the table."""

    name: str
    valid: trees.UnlabelledF1
    test: trees.UnlabelledF1


def sentences(n: int, seed: int) -> Sentences:
    grammar = PCFG.from_text(TOY)
    train = grammar.sample(n, seed=seed, longest=LONGEST)
    rest = grammar.sample(4 * HELD_OUT, seed=seed + 1, longest=LONGEST, shortest=SHORTEST)
    seen = {tree.words for tree in train}
    held_out = [tree for words, tree in {tree.words: tree for tree in rest}.items() if words not in seen]
    return Sentences(train, held_out[:HELD_OUT], held_out[HELD_OUT : 2 * HELD_OUT])


def trained(known: Sentences, epochs: int, seed: int, run: Path) -> ONLSTMLanguageModel:
    """A language model of the sentences' words, which is all that it gets to see."""
    with tempfile.TemporaryDirectory() as folder:
        for part, members in known._asdict().items():
            (Path(folder) / f"{part}.txt").write_text("".join(" ".join(tree.words) + "\n" for tree in members))
        text = data.load(folder, window=WINDOW, min_count=1)
        torch.manual_seed(seed)
        model = ONLSTMLanguageModel(text.vocabulary, text.level, **MODEL)
        result = training.train(model, text, training.TrainConfig(epochs=epochs, seed=seed, **TRAINING), run)
    if result.interrupted:
        raise KeyboardInterrupt
    print(f"{result.steps} steps in {result.seconds:.0f} s, perplexity {torch.tensor(result.best_valid).exp():.2f}")
    return model.eval()


def induced_trees(model: ONLSTMLanguageModel, known: Sequence[Tree]) -> dict[tuple[int, str], list[Tree]]:
    """(layer, rule) -> the trees of all sentences."""
    found: dict[tuple[int, str], list[Tree]] = {}
    for tree in known:
        for layer, distances in enumerate(trees.word_distances(model, tree.words), 1):
            for rule in trees.RULES:
                induced = trees.distances_to_tree(distances, tree.words, rule=rule)
                found.setdefault((layer, rule), []).append(induced)
    return found


def scores(model: ONLSTMLanguageModel, known: Sentences, seed: int) -> dict[tuple[int, str], Scores]:
    """A row for every layer and rule."""
    valid, test = induced_trees(model, known.valid), induced_trees(model, known.test)
    return {
        key: Scores(
            f"seed {seed}, layer {key[0]}, rule {key[1]}",
            trees.unlabelled_f1(valid[key], known.valid),
            trees.unlabelled_f1(test[key], known.test),
        )
        for key in valid
    }


def baselines(known: Sentences) -> list[Scores]:
    makers: dict[str, Callable[[Sequence[str]], Tree]] = {
        "right-branching": trees.right_branching,
        "left-branching": trees.left_branching,
        "balanced": trees.balanced,
    }
    rows = [
        Scores(name, *(measured(make, part) for part in (known.valid, known.test))) for name, make in makers.items()
    ]
    generator = random.Random(0)
    means = []
    for part in (known.valid, known.test):
        draws = [measured(lambda words: trees.random_tree(words, generator), part) for _ in range(RANDOM_TREES)]
        means.append(trees.UnlabelledF1(*(sum(values) / RANDOM_TREES for values in zip(*draws, strict=True))))
    return [*rows, Scores(f"random, mean of {RANDOM_TREES}", *means)]


def measured(make: Callable[[Sequence[str]], Tree], known: Sequence[Tree]) -> trees.UnlabelledF1:
    return trees.unlabelled_f1([make(tree.words) for tree in known], known)


def table(rows: Sequence[Scores], chosen: str) -> str:
    lines = ["| trees | validation F1 | test F1 | test F1, corpus |", "| --- | ---: | ---: | ---: |"]
    for name, valid, test in rows:
        mark = "**" if name == chosen else ""
        cells = (name, *(f"{100 * value:.1f}" for value in (valid.sentence, test.sentence, test.corpus)))
        lines.append("| " + " | ".join(f"{mark}{cell}{mark}" for cell in cells) + " |")
    return "\n".join(lines)


def draw_tree(axis: plt.Axes, tree: Tree, colour: str) -> None:
    """Right-angled branches above the words' places 0, 1, ..."""
    points = {(i, i + 1): (float(i), 0) for i in range(len(tree))}
    for start, stop in sorted(tree.spans(trivial=True), key=lambda span: span[1] - span[0]):
        if stop - start == 1:
            continue
        inside = [span for span in points if start <= span[0] and span[1] <= stop]
        parts = [span for span in inside if not any(_within(span, other) for other in inside)]
        xs = [points[part][0] for part in parts]
        height = 1 + max(points[part][1] for part in parts)
        for part, x in zip(parts, xs, strict=True):
            axis.plot((x, x), (points[part][1], height), color=colour, lw=1.6)
        axis.plot((min(xs), max(xs)), (height, height), color=colour, lw=1.6, solid_capstyle="round")
        points[start, stop] = ((min(xs) + max(xs)) / 2, height)
    axis.set_axis_off()


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def draw(model: ONLSTMLanguageModel, known: Tree, layer: int, rule: str, title: str, path: Path) -> None:
    """The known tree, the induced one, and the distances that it comes from, above the same words."""
    distances = trees.word_distances(model, known.words)[layer - 1]
    induced = trees.distances_to_tree(distances, known.words, rule=rule)
    figure, axes = plt.subplots(3, figsize=(11, 6.6), sharex=True, height_ratios=(1.1, 1.1, 1), layout="constrained")
    f1 = trees.unlabelled_f1(induced, known).sentence
    draw_tree(axes[0], known, COLOURS["known"])
    axes[0].set_title("the grammar's tree", loc="left", fontsize=10)
    draw_tree(axes[1], induced, COLOURS["induced"])
    axes[1].set_title(f"induced from layer {layer}: F1 {100 * f1:.0f} here, {title}", loc="left", fontsize=10)
    axes[2].bar(range(len(known)), distances, color=COLOURS["bars"], width=0.5)
    axes[2].set_ylabel("distance: 1 - mean forget gate")
    axes[2].set_xticks(range(len(known)), known.words)
    for side in ("top", "right"):
        axes[2].spines[side].set_visible(False)
    figure.savefig(path, dpi=120, facecolor="white", bbox_inches="tight")
    plt.close(figure)


def pictured(known: Sequence[Tree]) -> Tree:
    """The first sentence that has a possessor, a clause and a phrase behind a noun, but fits the page."""
    wanted = {"POS", "PP"}
    for tree in known:
        labels = {constituent.label for constituent in tree.constituents}
        if wanted <= labels and labels & {"RCs", "RCp"} and 11 <= len(tree) <= 15:
            return tree
    return known[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=10_000, help="to learn from")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one model each")
    parser.add_argument("--runs", type=Path, help="folder that keeps the models, for `pygen parse`")
    parser.add_argument("--out", type=Path, default=Path("onlstm-toy-grammar.png"))
    options = parser.parse_args()

    torch.set_num_threads(1)
    known = sentences(options.sentences, seed=1)
    rows: list[Scores] = []
    chosen: tuple[float, Scores, ONLSTMLanguageModel, int, str] | None = None
    try:
        with tempfile.TemporaryDirectory() as temporary:
            for seed in options.seeds:
                model = trained(known, options.epochs, seed, (options.runs or Path(temporary)) / f"seed-{seed}")
                for (layer, rule), row in scores(model, known, seed).items():
                    rows.append(row)
                    if chosen is None or row.valid.sentence > chosen[0]:
                        chosen = row.valid.sentence, row, model, layer, rule
    except ValueError as error:  # a folder that already holds a run, for one
        parser.error(str(error))
    assert chosen is not None
    _, best, model, layer, rule = chosen
    print(table([*rows, *baselines(known)], best.name))
    draw(
        model, pictured(known.test), layer, rule, f"{100 * best.test.sentence:.0f} over all test sentences", options.out
    )
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
