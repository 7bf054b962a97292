"""Probabilistic context-free grammars that sample sentences with their trees: text whose phrases are known. Made for
models/onlstm_trees.py, whose trees are compared with data/trees.py's."""

import random
import re
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from pygen.data.trees import Constituent, Tree

_RULE = re.compile(r"(?P<left>\S+)\s*->\s*(?P<right>.*)")
_CHOICE = re.compile(r"(?P<symbols>.*?)\s*(?:\[(?P<probability>[^\]]*)\])?")
_TOLERANCE = 1e-6  # of a sum of probabilities that a person typed
_MOST_TRIES = 10_000  # sentences drawn in vain before a bound on the length is called impossible

# Nouns and verbs agree in number across whatever stands between them, possessors nest to the left, what follows a noun
# makes the subject heavy, relative clauses nest in the middle; neither branching direction is a good guess.
TOY = """
S   -> NPs VPs [0.5] | NPp VPp [0.5]
NPs -> DTs Ns [0.55] | POS Ns [0.2] | NPs PP [0.13] | NPs RCs [0.12]
NPp -> DTp Np [0.55] | POS Np [0.2] | NPp PP [0.13] | NPp RCp [0.12]
POS -> NPs 's [0.5] | NPp 's [0.5]
PP  -> P NPs [0.5] | P NPp [0.5]
RCs -> that VPs [0.6] | that GAPs [0.2] | that GAPp [0.2]
RCp -> that VPp [0.6] | that GAPs [0.2] | that GAPp [0.2]
GAPs -> NPs VTs
GAPp -> NPp VTp
VPs -> VIs [0.45] | VTs NPs [0.275] | VTs NPp [0.275]
VPp -> VIp [0.45] | VTp NPs [0.275] | VTp NPp [0.275]
DTs -> the | a | this | every
DTp -> the | some | these | many
Ns  -> dog | cat | king | boat | house | child | bird | horse
Np  -> dogs | cats | kings | boats | houses | children | birds | horses
P   -> near | with | behind | beside
VIs -> sleeps | barks | sings | falls | waits
VIp -> sleep | bark | sing | fall | wait
VTs -> sees | likes | follows | hears | wants
VTp -> see | like | follow | hear | want
"""


class Production(NamedTuple):
    """One way to rewrite a symbol."""

    probability: float
    symbols: tuple[str, ...]


@dataclass(frozen=True)
class PCFG:
    r"""A probabilistic context-free grammar.

    A derivation starts with the symbol `start`; each symbol that has productions is replaced by one of them, drawn by
    their probabilities, whatever stands around it. The probability of a tree is the product of those of its
    productions. Symbols without productions are words.

    Args:
        start: where derivations start.
        productions: for each symbol its productions; their probabilities sum to 1.

    Raises:
        ValueError: probabilities that are not in (0, 1] or do not sum to 1, an empty production, a start without
            productions, or a grammar whose sentences have no finite expected length.

    Example:
        >>> from pygen.data.grammar import PCFG
        >>> grammar = PCFG.from_text('''
        ... S  -> NP VP
        ... NP -> the N [0.75] | NP near NP [0.25]
        ... N  -> dog | cat
        ... VP -> sleeps
        ... ''')
        >>> grammar.sample(1, seed=0, shortest=5)[0].brackets()
        '(S (NP (NP the (N dog)) near (NP the (N dog))) (VP sleeps))'
        >>> grammar.expected_length()
        4.5
    """

    start: str
    productions: Mapping[str, Sequence[Production]]

    def __post_init__(self) -> None:
        if self.start not in self.productions:
            raise ValueError(f"PCFG: the start {self.start!r} has no productions")
        for symbol, choices in self.productions.items():
            for probability, symbols in choices:
                if not 0 < probability <= 1 or not symbols:
                    raise ValueError(
                        f"PCFG: a production must have a probability in (0, 1] and at least one symbol, got "
                        f"{symbol} -> {' '.join(symbols)} [{probability:g}]"
                    )
            total = sum(choice.probability for choice in choices)
            if abs(total - 1) > _TOLERANCE:
                raise ValueError(f"PCFG: the probabilities of {symbol} must sum to 1, got {total:g}")
        # The expected number of children of each kind decides whether derivations end (a branching process).
        growth = np.abs(np.linalg.eigvals(self._children())).max()
        if not growth < 1:
            raise ValueError(
                f"PCFG: sentences must have a finite expected length; the symbols multiply by {growth:.4g} a generation"
            )

    @classmethod
    def from_text(cls, text: str) -> "PCFG":
        """A grammar of lines `A -> B c [0.7] | d [0.3]`; without numbers, the choices of a line are equally likely.

        The first line's left side is the start. Empty lines and what follows a # are skipped; a symbol may have
        several lines if its productions all have probabilities.

        Raises:
            ValueError: a line that is no rule, with its number; and as the class does.
        """
        productions: dict[str, list[Production]] = {}
        for number, raw in enumerate(text.splitlines(), 1):
            line = raw.partition("#")[0].strip()
            if not line:
                continue
            rule = _RULE.fullmatch(line)
            if not rule:
                raise ValueError(
                    f"PCFG.from_text: line {number}: a rule is SYMBOL -> SYMBOLS [NUMBER] | ..., got {line!r}"
                )
            productions.setdefault(rule["left"], []).extend(_choices(rule["right"], number))
        if not productions:
            raise ValueError("PCFG.from_text: the text has no rules")
        return cls(next(iter(productions)), productions)

    def words(self) -> list[str]:
        """What sentences are made of, sorted."""
        used = {symbol for choices in self.productions.values() for _, symbols in choices for symbol in symbols}
        return sorted(used - set(self.productions))

    def expected_length(self) -> float:
        """Mean number of words of a sentence, exactly: the solution of one linear equation for each symbol."""
        names = list(self.productions)
        own = np.zeros(len(names))
        for i, name in enumerate(names):
            for probability, symbols in self.productions[name]:
                own[i] += probability * sum(symbol not in self.productions for symbol in symbols)
        lengths = np.linalg.solve(np.eye(len(names)) - self._children(), own)
        return round(float(lengths[names.index(self.start)]), 12)

    def _children(self) -> np.ndarray:
        """(i, j): how many symbols j one symbol i is expected to be replaced by."""
        place = {name: i for i, name in enumerate(self.productions)}
        expected = np.zeros((len(place), len(place)))
        for name, choices in self.productions.items():
            for probability, symbols in choices:
                for symbol in symbols:
                    if symbol in place:
                        expected[place[name], place[symbol]] += probability
        return expected

    def sample(self, n: int, *, seed: int = 0, longest: int | None = None, shortest: int = 1) -> list[Tree]:
        """n sentences with their trees, labels and all; the same for the same seed.

        Args:
            n: how many.
            seed: of random.Random.
            longest, shortest: draw again what has more or fewer words, so that the sentences are those of the grammar
                given their length.

        Raises:
            ValueError: n is negative, or no sentence within the bounds comes up.
        """
        if n < 0:
            raise ValueError(f"PCFG.sample: n must not be negative, got {n}")
        generator = random.Random(seed)
        bounds = {name: list(accumulate(p for p, _ in choices)) for name, choices in self.productions.items()}
        found: list[Tree] = []
        tries = 0
        while len(found) < n:
            tree = self._derive(generator, bounds, longest)
            tries += 1
            if tree is not None and len(tree) >= shortest:
                found.append(tree)
                tries = 0
            elif tries == _MOST_TRIES:
                raise ValueError(
                    f"PCFG.sample: none of {tries} sentences had from {shortest} to {longest or 'any number of'} words"
                )
        return found

    def _derive(
        self, generator: random.Random, bounds: Mapping[str, Sequence[float]], longest: int | None
    ) -> Tree | None:
        """One derivation from left to right, or None when it gets too long."""
        words: list[str] = []
        found: list[Constituent] = []
        pending: list[str | int] = [self.start]  # symbols to come, and constituents that end there
        while pending:
            item = pending.pop()
            if isinstance(item, int):
                found[item] = found[item]._replace(stop=len(words))
            elif item in self.productions:
                choices, bound = self.productions[item], bounds[item]
                # The last bound is 1 to rounding, and the draw is below 1.
                chosen = min(bisect(bound, generator.random()), len(choices) - 1)
                pending.append(len(found))
                pending.extend(reversed(choices[chosen].symbols))
                found.append(Constituent(len(words), -1, item))
            else:
                words.append(item)
                if longest is not None and len(words) > longest:
                    return None
        return Tree(tuple(words), tuple(found))


def _choices(text: str, number: int) -> list[Production]:
    """The productions of a line."""
    parts = [_CHOICE.fullmatch(part.strip()) for part in text.split("|")]
    given = [part["probability"] if part else None for part in parts]
    if all(probability is None for probability in given):
        given = [str(1 / len(parts))] * len(parts)
    found = []
    for part, probability in zip(parts, given, strict=True):
        if part is None or probability is None:
            raise ValueError(
                f"PCFG.from_text: line {number}: either all choices of a line have a probability or none, got {text!r}"
            )
        try:
            found.append(Production(float(probability), tuple(part["symbols"].split())))
        except ValueError:
            raise ValueError(
                f"PCFG.from_text: line {number}: a probability must be a number, got {probability!r}"
            ) from None
    return found
