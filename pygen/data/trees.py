"""Constituency trees of sentences, and files of them in brackets. models/onlstm_trees.py induces and compares them,
grammar.py samples them."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# Tags of the Penn treebank that are no word's; currency signs are among what evaluations of induced trees leave out.
PUNCTUATION_TAGS = frozenset({".", ",", ":", "-LRB-", "-RRB-", "-LCB-", "-RCB-", "''", "``", "#", "$", "C$", "A$"})
TRACE_TAG = "-NONE-"
_TOKEN = re.compile(r"[()]|[^\s()]+")
_GAP = 1  # columns between two words of a drawing


class Constituent(NamedTuple):
    """Words start .. stop - 1, and what they are called."""

    start: int
    stop: int
    label: str | None = None


@dataclass(frozen=True)
class Tree:
    """The phrases of a sentence: spans of its words that nest.

    Kept flat, so that a tree may be as deep as its sentence is long.

    Args:
        words: of the sentence; at least one, none of them empty or with spaces.
        constituents: outer ones before those inside of them, from left to right; the first is the whole sentence.

    Raises:
        ValueError: no words; constituents that are out of order, cross each other or do not begin with the sentence.

    Example:
        >>> from pygen.data.trees import Tree
        >>> tree = Tree.from_brackets("(S (NP the dog) (VP saw (NP a cat)))")
        >>> sorted(tree.spans())
        [(0, 2), (2, 5), (3, 5)]
        >>> tree.brackets(labels=False)
        '((the dog) (saw (a cat)))'
        >>> print(tree.drawing())
           ┌───┴───┐
           │     ┌─┴─┐
         ┌─┴─┐   │  ┌┴─┐
        the dog saw a cat
    """

    words: tuple[str, ...]
    constituents: tuple[Constituent, ...]

    def __post_init__(self) -> None:
        if not self.words:
            raise ValueError("Tree: words must not be empty")
        for word in self.words:
            if not isinstance(word, str) or not word or word.split() != [word]:
                raise ValueError(f"Tree: a word must be a string that is neither empty nor has spaces, got {word!r}")
        if not self.constituents or self.constituents[0][:2] != (0, len(self.words)):
            first = self.constituents[0][:2] if self.constituents else "none"
            raise ValueError(f"Tree: the first constituent must be the sentence, (0, {len(self.words)}), got {first}")
        around: list[Constituent] = []
        before = self.constituents[0][0], -self.constituents[0][1]
        for constituent in self.constituents:
            start, stop, _ = constituent
            while around and around[-1].stop <= start:
                around.pop()
            inside = 0 <= start < stop <= (around[-1].stop if around else len(self.words))
            if not inside or (start, -stop) < before:
                raise ValueError(
                    "Tree: constituents must nest, outer before inner and left before right; "
                    f"({start}, {stop}) does not fit"
                )
            before = (start, -stop)
            around.append(constituent)

    @classmethod
    def from_spans(cls, words: Iterable[str], spans: Iterable[tuple[int, int]]) -> "Tree":
        """A tree without labels of spans in any order; the whole sentence need not be among them."""
        words = tuple(words)
        ordered = sorted({(0, len(words)), *spans}, key=lambda span: (span[0], -span[1]))
        return cls(words, tuple(Constituent(*span) for span in ordered))

    @classmethod
    def from_brackets(cls, text: str, *, labels: bool = True) -> "Tree":
        """The one tree that a string in brackets holds; `read_trees` has the rules."""
        trees = list(_read(text.splitlines(), labels))
        if len(trees) != 1:
            raise ValueError(f"Tree.from_brackets takes one tree, got {len(trees)}")
        return trees[0]

    def __len__(self) -> int:
        """How many words."""
        return len(self.words)

    def spans(self, *, trivial: bool = False) -> frozenset[tuple[int, int]]:
        """(start, stop) of the constituents; single words and the whole sentence are `trivial`."""
        spans = frozenset((start, stop) for start, stop, _ in self.constituents)
        if trivial:
            return spans
        return frozenset((start, stop) for start, stop in spans if 1 < stop - start < len(self.words))

    def brackets(self, *, labels: bool = True) -> str:
        """One line of nested brackets; parentheses in words become -LRB- and -RRB-."""
        opening = [""] * len(self.words)
        closing = [0] * len(self.words)
        for start, stop, label in self.constituents:
            opening[start] += f"({label} " if labels and label else "("
            closing[stop - 1] += 1
        words = (word.replace("(", "-LRB-").replace(")", "-RRB-") for word in self.words)
        return " ".join(map("{}{}{}".format, opening, words, (")" * n for n in closing)))

    def nested(self) -> Any:
        """Tuples of words and tuples; a constituent that is also the only part of another is left out."""
        built: dict[tuple[int, int], Any] = {(i, i + 1): word for i, word in enumerate(self.words)}
        for span, children in self._branches():
            built[span] = tuple(built[child] for child in children)
        return built[0, len(self.words)]

    def outline(self) -> str:
        """The tree from left to right, a line for every constituent and word, with the labels."""
        lines: list[str] = []
        open_stops: list[int] = []
        pending = list(self.constituents[::-1])
        for i, word in enumerate(self.words):
            while open_stops and open_stops[-1] <= i:
                open_stops.pop()
            while pending and pending[-1].start == i:
                constituent = pending.pop()
                lines.append(_branch(open_stops, constituent.stop) + (constituent.label or "·"))
                open_stops.append(constituent.stop)
            lines.append(_branch(open_stops, i + 1) + word)
        return "\n".join(lines)

    def drawing(self, below: Iterable[Iterable[str]] = ()) -> str:
        """The tree above its words, without labels; `below` has further rows of one string for each word."""
        rows = [self.words, *(tuple(row) for row in below)]
        for row in rows:
            if len(row) != len(self.words):
                raise ValueError(f"Tree.drawing: a row must have {len(self.words)} strings, got {len(row)}")
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        text = [(" " * _GAP).join(map(str.center, row, widths)).rstrip() for row in rows]
        return "\n".join([*self._branch_rows(widths), *text])

    def _branches(self) -> Iterator[tuple[tuple[int, int], list[tuple[int, int]]]]:
        """Spans with two or more parts, and the parts; inner before outer."""
        complete: list[tuple[int, int]] = []  # neighbours that no constituent holds yet, the leftmost last
        ordered = sorted(self.spans(trivial=True), key=lambda span: (-span[0], span[1]))
        position = len(self.words)
        for start, stop in ordered:
            while position > start:
                position -= 1
                complete.append((position, position + 1))
            children = []
            while complete and complete[-1][1] <= stop:
                children.append(complete.pop())
            if len(children) > 1:
                yield (start, stop), children
            if children:
                complete.append((start, stop))

    def _branch_rows(self, widths: list[int]) -> list[str]:
        """The lines above the words, whose columns are `widths` wide."""
        centres: dict[tuple[int, int], int] = {}
        heights: dict[tuple[int, int], int] = {}
        at = 0
        for i, width in enumerate(widths):
            centres[i, i + 1], heights[i, i + 1] = at + width // 2, 0
            at += width + _GAP
        canvas: list[list[str]] = []
        for span, children in self._branches():
            left, right = centres[children[0]], centres[children[-1]]
            centres[span] = centre = (left + right) // 2
            heights[span] = height = 1 + max(heights[child] for child in children)
            while len(canvas) < height:
                canvas.append([" "] * at)
            row = canvas[height - 1]
            row[left : right + 1] = "─" * (right + 1 - left)
            for child in children:
                for lower in canvas[heights[child] : height - 1]:
                    lower[centres[child]] = "│"
                row[centres[child]] = "┬"
            row[left], row[right] = "┌", "┐"
            row[centre] = {"┬": "┼", "┌": "├", "┐": "┤"}.get(row[centre], "┴")
        return ["".join(row).rstrip() for row in reversed(canvas)]


def _branch(open_stops: list[int], stop: int) -> str:
    """What stands before a constituent that ends at `stop`, inside of those that end at `open_stops`."""
    if not open_stops:
        return ""
    # A constituent's line goes on below while it has parts to come, and the innermost's ends with its last part.
    stems = ["  " if inner >= outer else "│ " for outer, inner in zip(open_stops, open_stops[1:], strict=False)]
    return "".join(stems) + ("└ " if stop == open_stops[-1] else "├ ")


class _Open(NamedTuple):
    """A bracket that is not closed yet: its line, where its words begin, and its place among the constituents."""

    line: int
    start: int
    place: int


def _read(lines: Iterable[str], labels: bool, where: str = "") -> Iterator[Tree]:
    """The trees of some lines."""
    words: list[str] = []
    found: list[Constituent] = []
    stack: list[_Open] = []
    wants_label = False
    for number, line in enumerate(lines, 1):
        here = f"{where}line {number}"
        for token in _TOKEN.findall(line):
            if token == "(":
                if wants_label and len(stack) > 1:
                    raise ValueError(f"{here}: a bracket without a label; labels=False reads trees without labels")
                stack.append(_Open(number, len(words), len(found)))
                found.append(Constituent(len(words), -1))
                wants_label = labels
            elif not stack:
                what = "a closing bracket that nothing opened" if token == ")" else f"{token!r} outside of brackets"
                raise ValueError(f"{here}: {what}")
            elif token == ")":
                opened, wants_label = stack.pop(), False
                if opened.start == len(words):
                    raise ValueError(f"{here}: a bracket without words")
                found[opened.place] = found[opened.place]._replace(stop=len(words))
                if not stack:
                    yield Tree(tuple(words), tuple(_without_wrapper(found, labels, here)))
                    words, found = [], []
            elif wants_label:
                found[-1], wants_label = found[-1]._replace(label=token), False
            else:
                words.append(token)
    if stack:
        raise ValueError(f"{where}line {stack[0].line}: a bracket that is never closed")


def _without_wrapper(found: list[Constituent], labels: bool, here: str) -> list[Constituent]:
    """Penn's files put a bracket without a label around every tree: it is not part of it."""
    if not labels or found[0].label is not None:
        return found
    if len(found) < 2 or found[1][:2] != found[0][:2]:
        raise ValueError(f"{here}: a sentence's bracket has no label; labels=False reads trees without labels")
    return found[1:]


def _kept(tree: Tree, traces: bool, punctuation: bool) -> Tree | None:
    """The tree without what is not wanted, or None where nothing is left."""
    tags: dict[int, str | None] = {c.start: c.label for c in tree.constituents if c.stop - c.start == 1}
    before = [0]  # kept words before each word
    words = []
    for i, word in enumerate(tree.words):
        tag = tags.get(i)
        silent = not any(map(str.isalnum, word)) if tag is None else tag in PUNCTUATION_TAGS
        if (traces or tag != TRACE_TAG) and (punctuation or tag == TRACE_TAG or not silent):
            words.append(word)
        before.append(len(words))
    moved = (Constituent(before[start], before[stop], label) for start, stop, label in tree.constituents)
    return Tree(tuple(words), tuple(c for c in moved if c.start < c.stop)) if words else None


def read_trees(
    path: str | os.PathLike[str], *, labels: bool = True, traces: bool = False, punctuation: bool = True
) -> list[Tree]:
    """The trees of a bracketed file, as those of the Penn treebank: one to a line, or over several.

    Args:
        path: a text file (UTF-8).
        labels: the first word after a bracket is its label, as in `(S (NP the dog) (VP barks))`; False for
            `((the dog) barks)`. A bracket around a tree that has no label itself is Penn's, and not part of the tree.
        traces: keep the empty elements, whose tag is -NONE-.
        punctuation: keep punctuation and currency signs: what has a tag of `PUNCTUATION_TAGS` or, where words have no
            tags, neither letter nor digit.

    Returns:
        The trees that have words left, in the order of the file. Constituents of which nothing is left are gone.

    Raises:
        ValueError: brackets that do not match, or that have no words or no label, with the line.
        OSError: no such file.

    Example:
        >>> import tempfile
        >>> from pygen.data.trees import read_trees
        >>> with tempfile.NamedTemporaryFile("w", suffix=".mrg") as file:
        ...     _ = file.write("((S (NP (NNP Ada)) (VP (VBZ writes) (NP (-NONE- *))) (. .)))")
        ...     file.flush()
        ...     [tree.nested() for tree in read_trees(file.name, punctuation=False)]
        [('Ada', 'writes')]
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error.reason})") from None
    trees = (_kept(tree, traces, punctuation) for tree in _read(lines, labels, f"{path}, "))
    return [tree for tree in trees if tree is not None]


def write_trees(path: str | os.PathLike[str], trees: Iterable[Tree], *, labels: bool = True) -> None:
    """One tree to a line, as `Tree.brackets` has it."""
    Path(path).write_text("".join(tree.brackets(labels=labels) + "\n" for tree in trees), encoding="utf-8")
