"""Networks packed for the engine: mass action as tables, all other laws, triggers and events as instructions.

network.py has the laws; the engine (csrc/shared) reads the tensors made here and knows nothing else of a network.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pygen.ssa.breakpoints import instants
from pygen.ssa.expression import Call, Expr, Number, Symbol, Time, chain_exponent, walk

if TYPE_CHECKING:
    from pygen.ssa.network import Formula, Network

VERSION = 1
# An instruction is (op, destination, a, b, c); an op's number is its place here. The engine has the same list.
OPS = (
    *("copy", "add", "sub", "mul", "div", "pow", "neg", "lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"),
    *("min", "max", "exp", "log", "sqrt", "abs", "floor", "ceil", "select"),
)
_NUMBER = {op: number for number, op in enumerate(OPS)}
HEADER = (
    *("version", "S", "P", "n_literals", "n_slots", "time_slot", "R", "n_factors", "n_changes", "n_instructions"),
    *("setup_begin", "setup_end", "step_begin", "step_end", "check_begin", "check_end", "n_breaks", "n_events"),
    *("attention_slot", "stop_slot", "n_checked", "n_assignments", "check_laws", "reserved"),
)
PERSISTENT, VALUES_AT_TRIGGER_TIME = 1, 2
# A count may grow by this much per jump without a look at it: 2^53 is then billions of jumps away.
LARGEST_UNCHECKED_CHANGE = 2**20
# The engine has one bit for each event that waits for its turn.
LARGEST_NUMBER_OF_EVENTS = 64
# Until all literals are known, a slot that lies behind them bears a provisional number from one of these on.
_LITERAL, _TIME, _TEMPORARY = 1 << 28, 1 << 29, 1 << 30


@dataclass(frozen=True, eq=False)
class Program:
    """A network in the engine's form: one float64 slot per quantity, instructions between slots.

    The slots are species, parameters, literals, time, temporaries. `code` starts with the numbers named in HEADER; the
    sections follow in the order of `sections()`.
    """

    code: Tensor
    """int32."""
    literals: Tensor
    """float64 [n_literals]."""
    names: tuple[str, ...]
    """Of species and parameters, in the order of the slots."""
    reaction_names: tuple[str, ...]

    @property
    def header(self) -> dict[str, int]:
        """The first numbers of `code`, by name."""
        return dict(zip(HEADER, self.code[: len(HEADER)].tolist(), strict=True))

    @property
    def n_slots(self) -> int:
        return int(self.code[HEADER.index("n_slots")])

    def sections(self) -> dict[str, np.ndarray]:
        """The tables in `code`, by name; instructions as [I, 5]."""
        head, code, at = self.header, self.code.numpy(), len(HEADER)
        events = dict.fromkeys(
            ("trigger_slot", "previous_slot", "program_begin", "program_end", "priority_slot", "event_flags"),
            head["n_events"],
        )
        sizes = {
            "rate_slot": head["R"],
            "factor_start": head["R"] + 1,
            "factor_slot": head["n_factors"],
            "factor_offset": head["n_factors"],
            "change_start": head["R"] + 1,
            "change_slot": head["n_changes"],
            "change_delta": head["n_changes"],
            "instructions": 5 * head["n_instructions"],
            "break_slot": head["n_breaks"],
            "checked_slot": head["n_checked"],
            **events,
            "assignment_start": head["n_events"] + 1,
            "assignment_target": head["n_assignments"],
            "assignment_source": head["n_assignments"],
        }
        tables = {}
        for name, size in sizes.items():
            tables[name] = code[at : at + size]
            at += size
        tables["instructions"] = tables["instructions"].reshape(-1, 5)
        return tables

    def slot_names(self) -> tuple[str, ...]:
        """A name for every slot: the network's names, the literals' values, time, %0, %1, ... for temporaries."""
        known = (*self.names, *(f"{value:g}" for value in self.literals.tolist()), "time")
        return (*known, *(f"%{index}" for index in range(self.n_slots - len(known))))

    def describe(self) -> str:
        """The program as readable text, to debug with: laws, changes, then the instructions of every part."""
        head, tables, slot = self.header, self.sections(), self.slot_names()
        lines = [f"{head['n_slots']} slots, {head['R']} reactions, {head['n_instructions']} instructions"]
        for index, name in enumerate(self.reaction_names):
            factors = slice(*tables["factor_start"][index : index + 2])
            changes = slice(*tables["change_start"][index : index + 2])
            law = [slot[tables["rate_slot"][index]]]
            for factor, offset in zip(tables["factor_slot"][factors], tables["factor_offset"][factors], strict=True):
                law.append(f"({slot[factor]} - {offset})" if offset else slot[factor])
            moves = zip(tables["change_slot"][changes], tables["change_delta"][changes], strict=True)
            lines.append(f"{name}: {' * '.join(law)}; {', '.join(f'{slot[s]} {d:+d}' for s, d in moves)}")
        parts = {part: (head[f"{part}_begin"], head[f"{part}_end"]) for part in ("setup", "step", "check")}
        for event in range(head["n_events"]):
            parts[f"event {event}"] = (tables["program_begin"][event], tables["program_end"][event])
        for part, (begin, end) in parts.items():
            lines.append(f"{part}:")
            for op, target, *operands in tables["instructions"][begin:end].tolist():
                used = operands[: _N_OPERANDS[op]]
                lines.append(f"  {slot[target]} = {OPS[op]} {' '.join(slot[operand] for operand in used)}")
        lines += self._describe_events(slot)
        return "\n".join(lines)

    def _describe_events(self, slot: Sequence[str]) -> list[str]:
        head, tables = self.header, self.sections()
        lines = []
        for event in range(head["n_events"]):
            part = slice(*tables["assignment_start"][event : event + 2])
            pairs = zip(tables["assignment_target"][part], tables["assignment_source"][part], strict=True)
            assignments = ", ".join(f"{slot[target]} <- {slot[source]}" for target, source in pairs)
            lines.append(f"event {event} when {slot[tables['trigger_slot'][event]]}: {assignments}")
        for table in ("break_slot", "checked_slot"):
            lines.append(f"{table}: {' '.join(slot[one] for one in tables[table])}")
        for one in ("attention_slot", "stop_slot"):
            lines.append(f"{one}: {slot[head[one]] if head[one] >= 0 else 'none'}")
        return lines


_N_OPERANDS = [1 if op in ("copy", "neg", "not", "exp", "log", "sqrt", "abs", "floor", "ceil") else 2 for op in OPS]
_N_OPERANDS[_NUMBER["select"]] = 3


class _Part:
    """A run of instructions, and which slot has which result within it."""

    def __init__(self) -> None:
        self.code: list[tuple[int, int, int, int, int]] = []
        self.known: dict[tuple[int, ...], int] = {}


class _Compiler:
    def __init__(self, network: "Network") -> None:
        self.network = network
        self.slots = network._slots
        self.n_species = len(network.species)
        self.literals: dict[tuple[float, float], int] = {}
        self.n_temporaries = 0
        self.setup, self.step, self.check = _Part(), _Part(), _Part()
        self.breaks: dict[int, None] = {}
        # Slots that keep their value during a trajectory (literals always do).
        self.fixed = {self.slots[name] for name in network.parameters if name not in network.changed_parameters}

    # ---- slots and instructions

    def literal(self, value: float) -> int:
        # 0.0 == -0.0, but their signs are bits too.
        return self.literals.setdefault((value, math.copysign(1.0, value)), _LITERAL + len(self.literals))

    def temporary(self) -> int:
        self.n_temporaries += 1
        return _TEMPORARY + self.n_temporaries - 1

    def is_fixed(self, slot: int) -> bool:
        return slot in self.fixed or _LITERAL <= slot < _TIME

    def emit(self, part: _Part, op: str, *operands: int) -> int:
        """The slot of an operation's result: computed once per trajectory if it can be, and never twice in one part."""
        number = _NUMBER[op]
        key = (number, *operands)
        fixed = all(map(self.is_fixed, operands))
        part = self.setup if fixed else part
        if key not in part.known:
            slot = part.known[key] = self.temporary()
            a, b, c = (*operands, 0, 0)[:3]
            part.code.append((number, slot, a, b, c))
            if fixed:
                self.fixed.add(slot)
        return part.known[key]

    def power(self, part: _Part, base: int, exponent: int) -> int:
        if exponent == 0:
            return self.literal(1.0)
        result = base
        for _ in range(abs(exponent) - 1):
            result = self.emit(part, "mul", result, base)
        return result if exponent > 0 else self.emit(part, "div", self.literal(1.0), result)

    def slot(self, part: _Part, expr: Expr) -> int:
        """The slot that holds the expression's value after the part has run."""

        def visit(node: Expr, operands: list[int]) -> int:
            if isinstance(node, Symbol):
                return self.slots[node.name]
            if isinstance(node, Number):
                return self.literal(node.value)
            if isinstance(node, Time):
                return _TIME
            exponent = chain_exponent(node)
            return self.emit(part, node.op, *operands) if exponent is None else self.power(part, operands[0], exponent)

        return walk(expr, visit)

    def slot_in_steps(self, part: _Part, expr: Expr) -> int:
        """The same for a law, trigger or stopping condition, whose instants become breakpoints."""
        for instant in instants(expr):
            self.breaks[self.slot(self.setup, instant)] = None
        return self.slot(part, expr)

    # ---- laws

    def factor(self, expr: Expr) -> tuple[int, int] | None:
        """(slot, k) if the expression is n or n - k with n a species' count and k a whole number >= 0."""
        offset = 0
        if isinstance(expr, Call) and expr.op == "sub" and isinstance(expr.args[1], Number):
            value = expr.args[1].value
            if not 0 <= value < 2**31 or value != int(value):
                return None
            expr, offset = expr.args[0], int(value)
        slot = self.slots[expr.name] if isinstance(expr, Symbol) else self.n_species
        return (slot, offset) if slot < self.n_species else None

    def product(self, law: Expr) -> tuple[Expr, list[tuple[int, int]]]:
        """A law as rest * factor * factor ... in the very order of its products: then the tables serve it."""
        factors: list[tuple[int, int]] = []
        while isinstance(law, Call) and law.op == "mul":
            last = self.factor(law.args[1])
            if last is None:
                # n * k is k * n, to the bit.
                first = self.factor(law.args[0])
                if first is not None and isinstance(law.args[1], (Symbol, Number)):
                    return law.args[1], [first, *reversed(factors)]
                break
            factors.append(last)
            law = law.args[0]
        return law, factors[::-1]

    def laws(self) -> None:
        """The tables of rates, factors and changes, in lists."""
        network, slots = self.network, self.slots
        combinatorial = network.mass_action == "combinatorial"
        self.rate: list[int] = []
        self.factor_start, self.factor_slot, self.factor_offset = [0], [], []  # type: ignore[var-annotated]
        self.change_start, self.change_slot, self.change_delta = [0], [], []  # type: ignore[var-annotated]
        self.checked: set[int] = set()
        self.check_laws = False
        # Reactions with the same rate share one tree (see Network), so its slot is looked up by identity.
        known: dict[int, int] = {}
        for index, (reaction, law, change) in enumerate(
            zip(network.reactions, network._laws, network._changes, strict=True)
        ):
            if reaction.propensity is None:
                rate = known.get(id(law))
                if rate is None:
                    rate = known[id(law)] = self.slot_in_steps(self.step, law)
                    self.check_laws |= not self.is_fixed(rate)
                higher = False
                for name, number in reaction.reactants.items():
                    if number == 1:
                        self.factor_slot.append(slots[name])
                        self.factor_offset.append(0)
                    else:
                        higher = True
                        self.factor_slot.extend([slots[name]] * number)
                        self.factor_offset.extend(range(number))
                if higher and combinatorial:
                    rate = self.emit(self.step, "div", rate, self.literal(network.divisor(index)))
                self.rate.append(rate)
            else:
                self.expression_law(law, change)
            self.factor_start.append(len(self.factor_slot))
            self.change_slot.extend(change)
            self.change_delta.extend(change.values())
            self.change_start.append(len(self.change_slot))
        large = np.abs(np.array(self.change_delta, dtype=np.int64)) > LARGEST_UNCHECKED_CHANGE
        self.checked.update(np.array(self.change_slot, dtype=np.int64)[large].tolist())

    def expression_law(self, law: Expr, change: dict[int, int]) -> None:
        rest, factors = self.product(law)
        rate = self.slot_in_steps(self.step, rest)
        self.rate.append(rate)
        self.factor_slot.extend(slot for slot, _ in factors)
        self.factor_offset.extend(offset for _, offset in factors)
        # The law is 0 at every offset. Offsets 0 ... g - 1 without a gap: it can only fire with g molecules or more.
        zeros: dict[int, set[int]] = {}
        for slot, offset in [*factors, *([(rate, 0)] if rate < self.n_species else [])]:
            zeros.setdefault(slot, set()).add(offset)
        guaranteed = {slot: next(g for g in range(len(at) + 1) if g not in at) for slot, at in zeros.items()}
        gaps = any(guaranteed[slot] < len(at) for slot, at in zeros.items())
        self.check_laws |= gaps or not (self.is_fixed(rate) or rate < self.n_species)
        self.checked.update(slot for slot, delta in change.items() if -delta > guaranteed.get(slot, 0))

    # ---- events and the stopping condition

    def events(self, stop: Expr | None) -> None:
        """Triggers into `check`, initial values into `setup`, each event's assignments into a part of its own."""
        self.triggers: list[int] = []
        self.previous: list[int] = []
        self.priorities: list[int] = []
        self.parts: list[_Part] = []
        self.targets: list[int] = []
        self.sources: list[int] = []
        self.assignment_start = [0]
        attention = -1
        for event, law in zip(self.network.events, self.network.event_laws, strict=True):
            trigger = self.held(self.check, self.slot_in_steps(self.check, law.trigger))
            previous = self.temporary()
            self.setup.code.append((_NUMBER["copy"], previous, self.literal(float(event.initial_value)), 0, 0))
            fires = self.emit(self.check, "and", trigger, self.emit(self.check, "not", previous))
            attention = fires if attention < 0 else self.emit(self.check, "or", attention, fires)
            self.triggers.append(trigger)
            self.previous.append(previous)
            self.priorities.append(-1 if law.priority is None else self.slot(self.check, law.priority))
            part = _Part()
            self.sources.extend([self.held(part, self.slot(part, value)) for value in law.values])
            self.targets.extend(law.targets)
            self.parts.append(part)
            self.assignment_start.append(len(self.targets))
        self.stop = -1
        if stop is not None:
            self.stop = self.held(self.check, self.slot_in_steps(self.check, stop))
            attention = self.stop if attention < 0 else self.emit(self.check, "or", attention, self.stop)
        self.attention = attention

    def held(self, part: _Part, slot: int) -> int:
        """A slot that keeps the value it has now: a copy of a count, of a changing parameter or of time."""
        return slot if self.is_fixed(slot) or slot >= _TEMPORARY else self.emit(part, "copy", slot)

    # ---- packing

    def relocated(self, slots: Iterable[int] | np.ndarray) -> np.ndarray:
        """Provisional slot numbers made final."""
        slots = np.asarray(slots if isinstance(slots, np.ndarray) else list(slots), dtype=np.int64)
        time = len(self.slots) + len(self.literals)
        final = np.where(slots >= _LITERAL, slots - _LITERAL + len(self.slots), slots)
        final = np.where(slots >= _TIME, time, final)
        return np.where(slots >= _TEMPORARY, slots - _TEMPORARY + time + 1, final)

    def pack(self) -> Program:
        network = self.network
        parts = [self.setup, self.step, self.check, *self.parts]
        ends = np.cumsum([len(part.code) for part in parts]).tolist()
        begins = [0, *ends[:-1]]
        flags = [
            PERSISTENT * event.persistent + VALUES_AT_TRIGGER_TIME * event.values_from_trigger_time
            for event in network.events
        ]
        instructions = np.array([one for part in parts for one in part.code], dtype=np.int64).reshape(-1, 5)
        instructions[:, 1:] = self.relocated(instructions[:, 1:])
        n_slots = len(self.slots) + len(self.literals) + 1 + self.n_temporaries
        attention, stop = self.relocated([self.attention, self.stop]).tolist()
        header = [
            *(VERSION, self.n_species, len(network.parameters), len(self.literals), n_slots),
            *(len(self.slots) + len(self.literals), len(self.rate), len(self.factor_slot), len(self.change_slot)),
            *(len(instructions), begins[0], ends[0], begins[1], ends[1], begins[2], ends[2]),
            *(len(self.breaks), len(self.parts), attention, stop, len(self.checked), len(self.targets)),
            *(int(self.check_laws), 0),
        ]
        sections = [
            *(header, self.relocated(self.rate), self.factor_start, self.factor_slot, self.factor_offset),
            *(self.change_start, self.change_slot, self.change_delta, instructions.ravel()),
            *(self.relocated(self.breaks), sorted(self.checked)),
            *(self.relocated(self.triggers), self.relocated(self.previous), begins[3:], ends[3:]),
            *(self.relocated(self.priorities), flags, self.assignment_start, self.targets),
            self.relocated(self.sources),
        ]
        code = np.concatenate([np.asarray(section, dtype=np.int32) for section in sections])
        values = [value for value, _ in self.literals]
        names = (*network.species, *network.parameters)
        return Program(torch.from_numpy(code), torch.tensor(values, dtype=torch.float64), names, network.reaction_names)


def compile_network(network: "Network", stop: "Formula | None" = None) -> Program:
    """Pack a network, with a stopping condition or without, for the engine.

    What depends on neither state, time nor parameters that events change is computed once per trajectory; a product
    of a rate and counts becomes a row of a table, whether it was given as a mass-action rate or as an expression.

    Args:
        network: the network.
        stop: an expression; the trajectory ends at the first jump, event or instant after which it is true.

    Raises:
        ValueError: the stopping condition cannot be read or has an unknown name; more than 64 events.

    Example:
        >>> from pygen.ssa.network import Network, Reaction
        >>> net = Network({"A": 9}, {"k": 0.5}, [Reaction({"A": 2}, {}, rate="k")])
        >>> print(compile_network(net).describe().splitlines()[1])
        r0: %0 * A * (A - 1); A -2
    """
    if len(network.events) > LARGEST_NUMBER_OF_EVENTS:
        raise ValueError(f"Network: expected at most {LARGEST_NUMBER_OF_EVENTS} events, got {len(network.events)}")
    compiler = _Compiler(network)
    compiler.laws()
    compiler.events(None if stop is None else network.law(stop, "stop"))
    return compiler.pack()
