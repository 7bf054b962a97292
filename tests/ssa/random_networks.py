"""Random networks for test_fuzz.py: small, and full of what a simulator trips over.

Counts of zero, rates of zero and of 1e300, laws that turn negative or NaN, events at the start, at grid times and all
at once, conditions that are numbers instead of truths. Everything comes from one random.Random: where a network is
found that fails, hypothesis' own (`strategies.randoms(use_true_random=False)`) finds a smaller one.
"""

from dataclasses import dataclass

from pygen.ssa.network import Event, Network, Reaction

# Grids, breakpoints and t0 come from the same few instants, so that they coincide.
INSTANTS = [0.0, 0.1, 0.25, 0.25, 0.5, 1.0, 2.0]
COUNTS = [0, 0, 1, 2, 3, 5, 12, 40]
CONSTANTS = ["0", "1", "2", "0.5", "3", "7.3", "0.01", "-1", "1e6", "1e300", "5e-324"]
RATES = ["0", "0.5", "1", "2.5", "0.03", "k0", "k1", "k0 * k1", "T", "1e4", "1e-310", "-k1"]
PARAMETERS = [0.0, 0.3, 1.0, 1.0, 2.5, 17.0, 1e-3]
HUGE_CHANGE = 2**30


@dataclass
class Case:
    """A network and what it is asked for."""

    net: Network
    times: list[float]
    options: dict

    def __repr__(self):
        net = self.net
        species = dict(zip(net.species, net.initial.tolist(), strict=True))
        parameters = dict(zip(net.parameters, net.parameter_values.tolist(), strict=True))
        return "\n  ".join(
            [
                f"Case:\n{net.propensity_table()}",
                f"{species} {parameters}, boundary {net.boundary}",
                *(repr(event) for event in net.events),
                f"times {self.times} {self.options}",
            ]
        )


class Writer:
    """Writes random expressions of the names it is given, as text."""

    def __init__(self, rng, names):
        self.rng, self.names = rng, list(names)

    def pick(self, *choices):
        return self.rng.choice(choices)

    def percent(self, number):
        return self.rng.randrange(100) < number

    def expression(self, depth):
        if depth == 0 or self.percent(15):
            return self.pick(*self.names) if self.percent(75) else self.pick(*CONSTANTS)
        inner = [self.expression(depth - 1) for _ in range(2)]
        kind = self.rng.randrange(14)
        if kind <= 5:
            return f"({inner[0]} {self.pick('+', '-', '*', '*', '/')} {inner[1]})"
        if kind == 6:
            return f"({inner[0]})^{self.pick('2', '3', '-1', '0.5', '-1.5', '17', '0')}"
        if kind == 7:
            return f"({inner[0]} ^ {inner[1]})"
        if kind <= 9:
            return f"{self.pick('exp', 'log', 'sqrt', 'abs', 'floor', 'ceil')}({inner[0]})"
        if kind == 10:
            return f"{self.pick('min', 'max')}({inner[0]}, {inner[1]})"
        return f"piecewise({inner[0]}, {self.condition(depth - 1)}, {inner[1]})"

    def condition(self, depth):
        kind = self.rng.randrange(10)
        if kind <= 2:
            instant = self.pick(*INSTANTS, "T", "T / 2")
            forms = ("time >= {0}", "time > {0}", "time < {0}", "2 * time - {0} <= {0}")
            return f"({self.pick(*forms).format(instant)})"
        if kind <= 6:
            comparison = self.pick("<", "<=", ">", ">=", "==", "!=")
            return f"({self.expression(0)} {comparison} {self.expression(depth)})"
        if kind <= 8 and depth:
            return f"({self.condition(depth - 1)} {self.pick('and', 'or')} not {self.condition(depth - 1)})"
        return self.expression(depth)  # a number: true unless 0, even if it is NaN

    def reaction(self, species):
        def side(most):
            return {self.pick(*species): self.pick(1, 1, 1, 2, 3) for _ in range(self.rng.randrange(most + 1))}

        reactants, products = side(2), side(2)
        while sum(reactants.values()) > 3:
            reactants.popitem()
        if products and self.percent(2):
            products[next(iter(products))] = HUGE_CHANGE
        kind = self.rng.randrange(10)
        if kind <= 5:
            return Reaction(reactants, products, rate=self.pick(*RATES))
        law = self.expression(self.rng.randint(1, 3))
        if kind == 6:
            return Reaction(reactants, products, rate=f"min(abs({law}), 4)")
        if kind == 7:
            return Reaction(reactants, products, propensity=law)
        # min(NaN, 9) is 9: such a law never fails, and a factor keeps counts from turning negative.
        guard = " * ".join(f"({name} >= {number})" for name, number in reactants.items()) or "1"
        return Reaction(reactants, products, propensity=f"{guard} * min(abs({law}), 9)")

    def event(self, species):
        def new_value(target):
            if target == "k0":
                return self.pick("0", "k0 + 1", "2 * k0", "abs(time)")
            other = self.pick(*species)
            usual = ("0", "7", f"{target} + 1", f"max({target} - 1, 0)", other, f"floor({other} / 2)", f"{other} + 1")
            return self.pick(*(usual * 5), "0.5", "-1", f"{target} - 1", "2^60")

        targets = {self.pick(*species, "k0") for _ in range(self.rng.randint(1, 2))}
        return Event(
            self.condition(self.rng.randrange(3)),
            {target: new_value(target) for target in sorted(targets)},
            priority=self.pick(None, None, 1, 2, "k1", species[0], "log(-1 * T)"),
            persistent=self.percent(50),
            initial_value=self.percent(50),
            values_from_trigger_time=self.percent(50),
        )


def random_case(rng):
    """A network of 1 to 5 species, 0 to 8 reactions and 0 to 4 events, and a grid for it."""
    species = list("ABCDE")[: rng.randint(1, 5)]
    parameters = {"k0": rng.choice(PARAMETERS), "k1": rng.choice(PARAMETERS), "T": rng.choice([0.25, 0.5, 1.0])}
    writer = Writer(rng, [*species, *species, *parameters])
    rules = {}
    for rule in ("r0", "r1")[: rng.randrange(3)]:
        rules[rule] = writer.expression(2)
        writer.names.append(rule)
    initial = {one: rng.choice(COUNTS) for one in species}
    if writer.percent(2):
        initial["A"] = 2**53 - HUGE_CHANGE
    net = Network(
        initial,
        parameters,
        [writer.reaction(species) for _ in range(rng.choice([0, *range(1, 9), *range(1, 9)]))],
        [writer.event(species) for _ in range(rng.choice([0, 0, 1, 2, 4]))],
        rules=rules,
        boundary=[species[-1]] if writer.percent(15) else [],
        mass_action=rng.choice(["combinatorial", "falling"]),
    )
    t0 = rng.choice([0.0, 0.0, 0.25, -1.0])
    times = sorted(rng.choice([t for t in INSTANTS if t >= t0]) for _ in range(rng.randint(1, 6)))
    stop = writer.condition(2) if writer.percent(25) else None
    return Case(net, times, {"t0": t0, "stop": stop, "max_events": rng.choice([1, 7, 60, 60, 60, 60])})
