"""BioNetGen's reaction networks (.net files, what `generate_network` writes) as `Network`s of pygen.ssa."""

import gc
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from pygen.ssa.expression import Call, Expr, Number, Symbol, parse, symbols, to_text
from pygen.ssa.network import Network, Reaction

# Blocks that say how the network was generated: the network itself is in the blocks of `_READERS`.
_IGNORED_BLOCKS = {
    "molecule types",
    "seed species",
    "observables",
    "energy patterns",
    "population maps",
    "compartments",
    "reaction rules",
    "reactions_text",
    "actions",
    "model",
}
_RATE_LAW_TYPES = {"Sat", "MM", "Hill", "FunctionProduct", "Arrhenius", "Ele"}
_CALL = re.compile(r"\b([A-Za-z_]\w*)\s*\(")
_CONSTANTS = {"_pi": repr(math.pi), "_e": repr(math.e)}


def split_arguments(text: str, begin: int) -> tuple[list[str], int]:
    """The comma-separated arguments of a call whose parenthesis opened just before `begin`; where the call ends."""
    arguments: list[str] = []
    depth, start = 0, begin
    for position in range(begin, len(text)):
        character = text[position]
        if character == "(":
            depth += 1
        elif character == ")" and depth == 0:
            return [*arguments, text[start:position]], position + 1
        elif character == ")":
            depth -= 1
        elif character == "," and depth == 0:
            arguments.append(text[start:position])
            start = position + 1
    raise ValueError(f"a parenthesis is not closed in {text!r}")


def rewrite_calls(text: str, functions: Mapping[str, Callable[..., str]]) -> str:
    """Express another tool's functions in the language of `expression.parse`; a call without arguments loses its ()."""
    pieces, position = [], 0
    while match := _CALL.search(text, position):
        arguments, end = split_arguments(text, match.end())
        arguments = [rewrite_calls(argument, functions) for argument in arguments]
        name = match[1]
        pieces.append(text[position : match.start()])
        if arguments == [""]:
            pieces.append(name)
        elif name in functions:
            try:
                pieces.append(functions[name](*arguments))
            except TypeError:
                raise ValueError(f"{name} does not take {len(arguments)} arguments in {text!r}") from None
        else:
            pieces.append(f"{name}({','.join(arguments)})")
        position = end
    return "".join([*pieces, text[position:]])


def _refuse_log(*_: str) -> str:
    raise ValueError("log(x) is natural in some versions of BioNetGen and decimal in others: write ln(x) or log10(x)")


_FUNCTIONS: dict[str, Callable[..., str]] = {
    "log2": lambda x: f"(log({x})/log(2))",
    "log10": lambda x: f"(log({x})/log(10))",
    "log": _refuse_log,
}


def _expression(text: str) -> Expr:
    text = rewrite_calls(text, _FUNCTIONS).replace("~=", "!=")
    return parse(re.sub(r"\b(_pi|_e)\b", lambda match: _CONSTANTS[match[0]], text))


def _value(text: str) -> float | Expr:
    try:
        return float(text)
    except ValueError:
        return _expression(text)


def _count(value: float | Expr) -> int | Expr:
    """What a network takes as initial count; it refuses the numbers that are not whole."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else Number(value)
    return value


def _is_name(text: str) -> bool:
    """Can `text` stand for itself in an expression?"""
    if not (text.isascii() and text.isidentifier()):
        return False
    try:
        return parse(text) == Symbol(text)
    except ValueError:
        return False


def _sum(terms: list[Expr]) -> Expr:
    """A balanced tree: sums of hundreds of species would otherwise nest as deep as they are long."""
    if not terms:
        return Number(0.0)
    while len(terms) > 1:
        pairs = [Call("add", (terms[i], terms[i + 1])) for i in range(0, len(terms) - 1, 2)]
        terms = pairs + terms[2 * len(pairs) :]
    return terms[0]


def _fields(line: str, number: int, what: str) -> list[str]:
    fields = line.split(None, number - 1)
    if len(fields) != number:
        raise ValueError(f"expected {what!r}, got {line!r}")
    return fields


def _indexed(line: str, what: str, optional_index: bool = False) -> tuple[int, str, str]:
    """`index name rest`; parameters of old files come without their index."""
    if optional_index and not line.split(None, 1)[0].isdigit():
        name, rest = _fields(line, 2, what)
        return 0, name, rest
    index, name, rest = _fields(line, 3, what)
    if not index.isdigit():
        raise ValueError(f"expected {what!r} with an integer index, got {line!r}")
    return int(index), name, rest


class _NetFile:
    """What has been read so far. One method a block, called with each of its lines."""

    def __init__(self) -> None:
        self.parameters: dict[str, float | Expr] = {}
        self.functions: dict[str, Expr] = {}
        self.groups: dict[str, list[tuple[float, int]]] = {}
        self.patterns: dict[int, str] = {}
        self.initial: dict[int, float | Expr] = {}
        self.names: dict[str, str] = {}  # a species' index, as reactions write it -> its name
        self.reactions: list[Reaction] = []
        self._rates: dict[str, str] = {}

    def read_parameter(self, line: str) -> None:
        _, name, value = _indexed(line, "index name value", optional_index=True)
        if name in self.parameters:
            raise ValueError(f"parameter {name!r} is defined twice")
        self.parameters[name] = _value(value)

    def read_function(self, line: str) -> None:
        line = line.split(None, 1)[1] if line.split(None, 1)[0].isdigit() and " " in line else line
        match = re.fullmatch(r"([A-Za-z_]\w*)\s*\(\s*\)\s*=?\s*(.+)", line)
        if match is None:
            raise ValueError(f"expected 'index name() expression', got {line!r}")
        self.functions[match[1]] = _expression(match[2])

    def read_species(self, line: str) -> None:
        index, pattern, value = _indexed(line, "index pattern initial")
        if index in self.patterns:
            raise ValueError(f"species {index} is defined twice")
        self.patterns[index] = pattern
        self.initial[index] = _value(value)

    def read_group(self, line: str) -> None:
        if len(line.split()) == 2:  # an observable that matches no species
            line += " 0"
        _, name, members = _indexed(line, "index name weight*species,...")
        terms = []
        for member in members.split(","):
            weight, _, index = member.strip().rpartition("*")
            if not index.isdigit() or (int(index) and int(index) not in self.patterns):
                raise ValueError(f"group {name!r} names species {index!r}, which the species block lacks")
            if index != "0":
                terms.append((float(weight or 1), int(index)))
        self.groups[name] = terms

    def read_reaction(self, line: str) -> None:
        _, left, right, rate = _fields(line, 4, "index reactants products rate")
        law = self._rates.get(rate)
        if law is None:
            # As text: the network reads equal texts once.
            law = self._rates[rate] = to_text(self._rate(rate))
        self.reactions.append(Reaction(self._side(left), self._side(right), rate=law))

    def _rate(self, text: str) -> Expr:
        words = text.split()
        if words[0] in _RATE_LAW_TYPES and len(words) > 1:
            raise ValueError(f"the rate law type {words[0]} is not supported: write it as a function")
        if "TotalRate" in words:
            raise ValueError("the rate law modifier TotalRate is not supported")
        return _expression(text)

    def _side(self, text: str) -> dict[str, int]:
        side: dict[str, int] = {}
        for index in text.split(","):
            if index == "0":
                continue
            name = self.names.get(index)
            if name is None:
                raise ValueError(f"species {index!r} is not in the species block")
            side[name] = side.get(name, 0) + 1
        return side

    def name_species(self) -> None:
        """A pattern that is an identifier (`A` or `A()`) names its species, any other becomes S and its index."""
        taken = {*self.parameters, *self.functions, *self.groups}
        plain = {index: pattern.removeprefix("$").removesuffix("()") for index, pattern in self.patterns.items()}
        uses = Counter(plain.values())
        own = {i: name for i, name in plain.items() if name not in taken and uses[name] == 1 and _is_name(name)}
        taken.update(own.values())
        for index in self.patterns:
            name = own.get(index, f"S{index}")
            while index not in own and name in taken:
                name += "_"
            taken.add(name)
            self.names[str(index)] = name

    def _weighted_sum(self, members: list[tuple[float, int]]) -> Expr:
        """Species of equal weight are summed first: fewer operations, and exact, as counts are integers."""
        by_weight: dict[float, list[Expr]] = {}
        for weight, index in members:
            by_weight.setdefault(weight, []).append(Symbol(self.names[str(index)]))
        return _sum(
            [
                _sum(terms) if weight == 1 else Call("mul", (Number(weight), _sum(terms)))
                for weight, terms in by_weight.items()
            ]
        )

    def network(self, name: str) -> Network:
        sums = {group: self._weighted_sum(members) for group, members in self.groups.items()}
        # A function of an observable may be a rate, so that such an observable must be a rule.
        laws = [*self.functions.values(), *map(parse, self._rates.values())]
        used = {symbol for law in laws for symbol in symbols(law)}
        net = Network(
            species={self.names[str(index)]: _count(value) for index, value in self.initial.items()},
            parameters=self.parameters,
            reactions=self.reactions,
            rules={**{g: s for g, s in sums.items() if g in used}, **self.functions},
            observables={g: s for g, s in sums.items() if g not in used},
            boundary=[self.names[str(index)] for index, p in self.patterns.items() if p.startswith("$")],
            # BioNetGen counts pairs of identical reactants in the factor that it writes before the rate: one rule
            # of the EGFR network gives `7,11 9 kp2` for two different complexes and `7,7 8 0.5*kp2` for two equal
            # ones. n (n - 1) / 2 pairs react with kp2 each, hence 0.5*kp2 stands for kp2/2 and multiplies n (n - 1).
            mass_action="falling",
            name=name,
        )
        # What the identifiers stand for in the file.
        net.labels = {self.names[str(index)]: pattern for index, pattern in self.patterns.items()}
        return net


# In the order in which they need each other, whatever the order in the file.
_READERS: dict[str, Callable[[_NetFile, str], None]] = {
    "parameters": _NetFile.read_parameter,
    "functions": _NetFile.read_function,
    "species": _NetFile.read_species,
    "groups": _NetFile.read_group,
    "reactions": _NetFile.read_reaction,
}


def _check_option(line: str) -> None:
    """The lines between blocks are actions; only the one about units changes what the numbers mean."""
    if re.match(r"substanceUnits\s*\(\s*[\"']?Conc", line, re.IGNORECASE):
        raise ValueError("substanceUnits is Concentration: an exact simulation needs numbers of molecules")


def _blocks(text: str, where: str) -> dict[str, list[tuple[int, str]]]:
    blocks: dict[str, list[tuple[int, str]]] = {}
    inside: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        words = line.split()
        if words[0] in ("begin", "end") and len(words) > 1:
            name = " ".join(words[1:])
            if name == "model":
                continue
            if (words[0] == "begin") == (inside is not None) or (inside is not None and name != inside):
                raise ValueError(f"{where}, line {number}: {line!r} inside block {inside!r}")
            if name not in _READERS and name not in _IGNORED_BLOCKS:
                raise ValueError(f"{where}, line {number}: block {name!r} is not supported")
            inside = name if words[0] == "begin" else None
            blocks.setdefault(name, [])
        elif inside is not None:
            blocks[inside].append((number, line))
        else:
            try:
                _check_option(line)
            except ValueError as error:
                raise ValueError(f"{where}, line {number}: {error}") from None
    if inside is not None:
        raise ValueError(f"{where}: block {inside!r} is not closed")
    return blocks


def read_bngl_net(path: str | PathLike[str]) -> Network:
    r"""Read a network that BioNetGen has generated (a ``.net`` file).

    Parameters, functions, species, reactions and groups are read. A reaction of rate r (a parameter, a number, an
    expression of both, or a function) with reactants :math:`\nu_i` has the propensity :math:`r \prod_i n_i (n_i - 1)
    \cdots (n_i - \nu_i + 1)`: BioNetGen has put the symmetry factor of identical reactants into r, so the network uses
    the "falling" convention. Functions become rules, groups (weighted sums of species) become observables, or rules
    where a function uses them; a species written with ``$`` is a boundary species.

    A species is named after its pattern where that is an identifier (``A`` or ``A()``) and nothing else has the name,
    else S and its index in the file; ``net.labels`` maps each name to its pattern.

    Args:
        path: the file.

    Raises:
        ValueError: a malformed line, a rate law of type Sat, MM or Hill, the modifier TotalRate, a function that
            `parse` does not know; with file and line number.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from pygen.ssa.bngl import read_bngl_net
        >>> lines = "begin parameters", "1 k 0.5", "end parameters", "begin species", "1 A(b) 10", "end species"
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "pairs.net"
        ...     _ = path.write_text("\n".join([*lines, "begin reactions", "1 1,1 0 0.5*k", "end reactions"]))
        ...     net = read_bngl_net(path)
        >>> print(net.propensity_table(), net.labels, sep="\n")
        r0  2 S1 -> 0  0.5 * k * S1 * (S1 - 1)
        mass action is falling: c * n! / (n - nu)! for every reactant
        {'S1': 'A(b)'}

    Source: Blinov et al., BioNetGen: software for rule-based modeling of signal transduction, Bioinformatics 20, 2004.
    """
    path = Path(path)
    with _collector_at_rest():
        return _read(path)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Python's cycle collector looks at everything alive, torch included, after so many new objects: of the thousands
    made here none is garbage, and a look takes four times as long as reading."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read(path: Path) -> Network:
    blocks = _blocks(path.read_text(), path.name)
    if "species" not in blocks:
        raise ValueError(f"{path.name}: no species block; is it a .net file that generate_network has written?")
    file = _NetFile()
    for block, read in _READERS.items():
        if block == "reactions":
            file.name_species()
        for number, line in blocks.get(block, ()):
            try:
                read(file, line)
            except ValueError as error:
                raise ValueError(f"{path.name}, line {number}: {error}") from error
    return file.network(path.stem)
