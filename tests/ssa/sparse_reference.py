"""The method "sparse" in plain Python: the reference with the sums and the choice that csrc/cpu/ssa_sparse.h defines.

Everything else of a trajectory (events, breakpoints, grid, statuses) is reference.py's. Laws come from the packed
program, whose instructions are run one by one.
"""

import math
from collections import Counter
from unittest import mock

import torch

from pygen.ssa import reference
from pygen.ssa.program import OPS


def engine_function(name):
    """exp, log or pow with the engine's own bits."""
    number = OPS.index(name)

    def call(*args):
        a, *b = (torch.tensor([x], dtype=torch.float64) for x in args)
        return torch.ops.pygen.ssa_math(number, a, b[0] if b else a).item()

    return call


FUNCTIONS = {name: engine_function(name) for name in ("log", "exp", "pow")}
_OPERANDS = {**dict.fromkeys(("copy", "neg", "not", "exp", "log", "sqrt", "abs", "floor", "ceil"), 1), "select": 3}


class Laws:
    """The propensities of a packed program: rate, factors [(slot, offset), ...] of every reaction, groups."""

    def __init__(self, program, values, t0):
        self.head, self.tables = program.header, program.sections()
        self.functions = {**reference._FUNCTIONS, **FUNCTIONS, "copy": lambda a: a}
        self.slots = [0.0] * self.head["n_slots"]
        inputs = [*values, *program.literals.tolist(), t0]
        self.slots[: len(inputs)] = inputs
        self.run("setup")
        tables, n = self.tables, self.head["R"]
        self.rate = tables["rate_slot"].tolist()
        start = tables["factor_start"]
        pairs = list(zip(tables["factor_slot"].tolist(), tables["factor_offset"].tolist(), strict=True))
        self.factors = [pairs[start[j] : start[j + 1]] for j in range(n)]
        self.changed = Counter(tables["change_slot"].tolist())
        steps = tables["instructions"][self.head["step_begin"] : self.head["step_end"], 1]
        self.changing = {*steps.tolist(), *tables["assignment_target"].tolist()}
        self.group()

    def run(self, part):
        for op, target, *operands in self.tables["instructions"][
            self.head[f"{part}_begin"] : self.head[f"{part}_end"]
        ].tolist():
            used = [self.slots[operand] for operand in operands[: _OPERANDS.get(OPS[op], 2)]]
            self.slots[target] = float(self.functions[OPS[op]](*used))

    def is_fixed(self, slot):
        return slot >= self.head["S"] and slot not in self.changing

    def can_be_grouped(self, j):
        factors = self.factors[j]
        whole = all(
            s < self.head["S"] and all((s, lower) in factors for lower in range(offset)) for s, offset in factors
        )
        return bool(factors) and whole and self.is_fixed(self.rate[j])

    def group(self):
        """self.groups: [(species or None, [(reaction, factors left)])]."""
        able = [self.can_be_grouped(j) for j in range(len(self.rate))]
        alone = Counter(factors[0][0] for j, factors in enumerate(self.factors) if able[j] and len(factors) == 1)
        members = {}
        for j, factors in enumerate(self.factors):
            species, left = None, list(factors)
            if able[j]:
                candidates = [s for s, offset in factors if offset == 0]
                species = min(candidates, key=lambda s: (alone[s], -self.changed[s]))
                left.remove((species, 0))
            members.setdefault(species, []).append((j, left))
        self.groups = sorted(members.items(), key=lambda group: math.inf if group[0] is None else group[0])

    def leaf(self, j, factors):
        value = self.slots[self.rate[j]]
        for slot, offset in factors:
            value = value * (self.slots[slot] - offset)
        return value

    def sums(self, values, time):
        """(a0, u2 -> reaction) in a state; a0 is NaN if a law is not a number >= 0 or a0 not finite."""
        self.slots[: len(values)] = values
        self.slots[self.head["time_slot"]] = time
        self.run("step")
        factors = [1.0 if species is None else values[species] for species, _ in self.groups]
        heaps = [heap_of([self.leaf(*member) for member in members]) for _, members in self.groups]
        over = heap_of([x * heap[1] if x > 0 else 0.0 for x, heap in zip(factors, heaps, strict=True)])
        total = over[1]
        if not all(self.leaf(*law) >= 0 for law in enumerate(self.factors)) or not math.isfinite(total):
            total = math.nan

        def chosen(u2):
            group, target = descend(over, u2 * total, 1.0)
            member, _ = descend(heaps[group], target, factors[group])
            return self.groups[group][1][member][0]

        return total, chosen


def heap_of(values):
    """Nodes 1 .. 2P - 1 of the sum, in a list whose element 0 is not used."""
    size = 1
    while size < len(values):
        size *= 2
    nodes = [0.0] * size + list(values) + [0.0] * (size - len(values))
    for i in reversed(range(1, size)):
        nodes[i] = nodes[2 * i] + nodes[2 * i + 1]
    return nodes


def descend(nodes, target, factor):
    i = 1
    while 2 * i < len(nodes):
        left, right = nodes[2 * i] * factor, nodes[2 * i + 1]
        i *= 2
        if target >= left and right > 0:
            target, i = target - left, i + 1
    return i - len(nodes) // 2, target


class SparseRun(reference._Run):
    """`_Run` with another `simulate`."""

    program = None

    def simulate(self, draw, log, max_events):
        laws = Laws(self.program, self.values, self.t)
        ended, n = self.settle(), 0
        while ended is None:
            total, chosen = laws.sums(self.values, self.t)
            if math.isnan(total):
                return "invalid_propensity"
            u1, u2 = draw(n)
            n += 1
            t_new = self.t + -log(u1) / total if total > 0 else math.inf
            instant = min((b for b in self.breaks if self.t < b <= self.times[-1]), default=math.inf)
            if t_new >= instant and instant < math.inf:
                self.write_before(instant)
                self.t = instant
                ended = self.settle()
                continue
            self.write_before(t_new)
            if self.row == len(self.times):
                return "absorbed" if total == 0 else "completed"
            self.t = t_new
            ended = self.jump(chosen(u2)) or self.settle()
            if ended is None and self.n_events == max_events:
                ended = "max_events"
        return ended


def simulate_one_sparse(net, times, *, stop=None, **options):
    """`simulate_one`, by the method "sparse"."""
    run = type("Run", (SparseRun,), {"program": net.program(stop)})
    with mock.patch.object(reference, "_Run", run):
        return reference.simulate_one(
            net, times, stop=stop, record_path=True, log=FUNCTIONS["log"], math_functions=FUNCTIONS, **options
        )
