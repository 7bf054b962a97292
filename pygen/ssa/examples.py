"""Reaction networks of the literature, ready to simulate: the models of the tests, the benchmarks and the tutorial.

Every rate constant and initial count is a keyword argument, and every rate constant is a parameter of the network, so
that `simulate(..., parameters=)` can vary it without building the network again. Rates are stochastic constants: the
propensity of 2A -> B at rate c is c A (A - 1) / 2. Time has the unit of the rate constants' inverse.
"""

from collections.abc import Callable

from pygen.ssa.network import Network, Reaction


def immigration_death(*, immigration: float = 1000.0, death: float = 1.0, X: int = 1000) -> Network:
    r"""Particles arrive at a constant rate and leave independently of one another.

    .. math::
        \emptyset \xrightarrow{a} X, \qquad X \xrightarrow{m} \emptyset

    X(t) is the sum of a Binomial(x0, exp(-m t)) and a Poisson(a (1 - exp(-m t)) / m) variable, independent of one
    another. The benchmark runs to t = 100.

    Args:
        immigration: a, particles per time.
        death: m, per particle and time.
        X: particles at the start.

    Example:
        >>> from pygen.ssa import examples
        >>> examples.immigration_death().species
        ('X',)

    Source: Gillespie, "Exact stochastic simulation of coupled chemical reactions", J. Phys. Chem. 81, 1977; the closed
    form: van Kampen, "Stochastic Processes in Physics and Chemistry", chapter VI.
    """
    return Network(
        species={"X": X},
        parameters={"immigration": immigration, "death": death},
        reactions=[
            Reaction({}, {"X": 1}, rate="immigration", name="immigration"),
            Reaction({"X": 1}, {}, rate="death", name="death"),
        ],
        name="immigration_death",
    )


def birth_death(*, birth: float = 0.1, death: float = 0.11, X: int = 100) -> Network:
    r"""The linear birth-death process.

    .. math::
        X \xrightarrow{l} 2 X, \qquad X \xrightarrow{m} \emptyset

    With E = exp((l - m) t): mean x0 E, variance x0 (l + m) / (l - m) E (E - 1), and 2 l t x0 where l = m.

    Args:
        birth: l, per particle and time.
        death: m, per particle and time.
        X: particles at the start.

    Source: Kendall, "On the generalized birth-and-death process", Ann. Math. Stat. 19, 1948; the defaults are those of
    case 00001 of the Discrete Stochastic Model Test Suite (Evans, Gillespie, Wilkinson, Bioinformatics 24, 2008).
    """
    return Network(
        species={"X": X},
        parameters={"birth": birth, "death": death},
        reactions=[
            Reaction({"X": 1}, {"X": 2}, rate="birth", name="birth"),
            Reaction({"X": 1}, {}, rate="death", name="death"),
        ],
        name="birth_death",
    )


def batch_immigration(*, immigration: float = 1.0, death: float = 0.2, batch: int = 5, X: int = 0) -> Network:
    r"""Particles arrive in batches and leave one by one.

    .. math::
        \emptyset \xrightarrow{a} b X, \qquad X \xrightarrow{m} \emptyset

    From X = 0, with E = exp(-m t): mean (a b / m)(1 - E), variance (a b / m)(1 - E) + a b (b - 1) / (2 m) (1 - E^2).

    Args:
        immigration: a, batches per time.
        death: m, per particle and time.
        batch: b, particles of a batch.
        X: particles at the start.

    Source: the first two moments of the master equation; cases 00037 to 00039 of the Discrete Stochastic Model Test
    Suite (Evans, Gillespie, Wilkinson, Bioinformatics 24, 2008), whose defaults these are (00037).
    """
    return Network(
        species={"X": X},
        parameters={"immigration": immigration, "death": death},
        reactions=[
            Reaction({}, {"X": batch}, rate="immigration", name="immigration"),
            Reaction({"X": 1}, {}, rate="death", name="death"),
        ],
        name="batch_immigration",
    )


def dimer_decay(
    *, k1: float = 1.0, k2: float = 0.002, k3: float = 0.5, k4: float = 0.04, S1: int = 10_000, S2: int = 0, S3: int = 0
) -> Network:
    r"""A monomer that decays, dimerises, and leaves for good as a converted dimer.

    .. math::
        S_1 \xrightarrow{k_1} \emptyset, \quad 2 S_1 \xrightarrow{k_2} S_2, \quad S_2 \xrightarrow{k_3} 2 S_1, \quad
        S_2 \xrightarrow{k_4} S_3

    k2 is the stochastic constant: the second propensity is k2 S1 (S1 - 1) / 2. The benchmark runs to t = 30.

    Args:
        k1: decay of the monomer, per time.
        k2: dimerisation, per pair and time.
        k3: dissociation, per time.
        k4: conversion, per time.
        S1: monomers at the start.
        S2: dimers at the start.
        S3: converted dimers at the start.

    Source: Gillespie, "Approximate accelerated stochastic simulation of chemically reacting systems", J. Chem. Phys.
    115, 2001, section VI.
    """
    return Network(
        species={"S1": S1, "S2": S2, "S3": S3},
        parameters={"k1": k1, "k2": k2, "k3": k3, "k4": k4},
        reactions=[
            Reaction({"S1": 1}, {}, rate="k1", name="decay"),
            Reaction({"S1": 2}, {"S2": 1}, rate="k2", name="dimerisation"),
            Reaction({"S2": 1}, {"S1": 2}, rate="k3", name="dissociation"),
            Reaction({"S2": 1}, {"S3": 1}, rate="k4", name="conversion"),
        ],
        name="dimer_decay",
    )


def michaelis_menten(
    *, k1: float = 0.00166, k2: float = 0.0001, k3: float = 0.1, S: int = 301, E: int = 120, SE: int = 0, P: int = 0
) -> Network:
    r"""An enzyme that turns a substrate into a product.

    .. math::
        S + E \underset{k_2}{\overset{k_1}{\rightleftharpoons}} SE \xrightarrow{k_3} P + E

    Args:
        k1: binding, per pair and time.
        k2: unbinding, per time.
        k3: conversion, per time.
        S: substrate at the start.
        E: free enzyme at the start.
        SE: complexes at the start.
        P: product at the start.

    Source: Wilkinson, "Stochastic Modelling for Systems Biology", 2006, section 7.3 (the constants: 10^6 per molar and
    second in a volume of 10^-15 litres).
    """
    return Network(
        species={"S": S, "E": E, "SE": SE, "P": P},
        parameters={"k1": k1, "k2": k2, "k3": k3},
        reactions=[
            Reaction({"S": 1, "E": 1}, {"SE": 1}, rate="k1", name="binding"),
            Reaction({"SE": 1}, {"S": 1, "E": 1}, rate="k2", name="unbinding"),
            Reaction({"SE": 1}, {"P": 1, "E": 1}, rate="k3", name="conversion"),
        ],
        name="michaelis_menten",
    )


def two_stage_expression(
    *,
    transcription: float = 20.0,
    translation: float = 2.5,
    mrna_decay: float = 1.0,
    protein_decay: float = 1.0,
    m: int = 0,
    n: int = 0,
) -> Network:
    r"""A gene, its mRNA m and its protein n.

    .. math::
        \emptyset \xrightarrow{k_m} m, \quad m \xrightarrow{k_n} m + n, \quad m \xrightarrow{g_m} \emptyset, \quad
        n \xrightarrow{g_n} \emptyset

    In the steady state m is Poisson with mean k_m / g_m, n has mean <m> k_n / g_n and variance
    <n> (1 + k_n / (g_m + g_n)), and their covariance is <n> g_n / (g_m + g_n): 20, 50, 112.5 and 25 with the defaults.

    Args:
        transcription: k_m, mRNA per time.
        translation: k_n, proteins per mRNA and time.
        mrna_decay: g_m, per time.
        protein_decay: g_n, per time.
        m: mRNA at the start.
        n: proteins at the start.

    Source: Thattai, van Oudenaarden, "Intrinsic noise in gene regulatory networks", PNAS 98, 2001.
    """
    return Network(
        species={"m": m, "n": n},
        parameters={
            "transcription": transcription,
            "translation": translation,
            "mrna_decay": mrna_decay,
            "protein_decay": protein_decay,
        },
        reactions=[
            Reaction({}, {"m": 1}, rate="transcription", name="transcription"),
            Reaction({"m": 1}, {"m": 1, "n": 1}, rate="translation", name="translation"),
            Reaction({"m": 1}, {}, rate="mrna_decay", name="mrna_decay"),
            Reaction({"n": 1}, {}, rate="protein_decay", name="protein_decay"),
        ],
        name="two_stage_expression",
    )


def schlogl(*, c1: float = 0.03, c2: float = 1e-4, c3: float = 200.0, c4: float = 3.5, X: int = 250) -> Network:
    r"""Schlogl's bistable model.

    .. math::
        2 X \xrightarrow{c_1} 3 X, \quad 3 X \xrightarrow{c_2} 2 X, \quad \emptyset \xrightarrow{c_3} X, \quad
        X \xrightarrow{c_4} \emptyset

    The first propensity is c1 X (X - 1) / 2, the second c2 X (X - 1) (X - 2) / 6. The stationary distribution has modes
    at 82 and 563, mean 454.861, standard deviation 199.879 and P(X < 256) = 0.220260; the passage from one mode to
    the other takes hundreds of time units. The counts of two further species of the original, held constant, are part
    of c1 = 3e-7 x 1e5 and c3 = 1e-3 x 2e5.

    Args:
        c1: autocatalysis, per pair and time.
        c2: its reverse, per triple and time.
        c3: immigration, per time.
        c4: death, per time.
        X: particles at the start, the default near the barrier between the modes.

    Source: Schlogl, "Chemical reaction models for non-equilibrium phase transitions", Z. Physik 253, 1972; the
    constants: Cao, Li, Petzold, "Efficient formulation of the stochastic simulation algorithm for chemically reacting
    systems", J. Chem. Phys. 121, 2004.
    """
    return Network(
        species={"X": X},
        parameters={"c1": c1, "c2": c2, "c3": c3, "c4": c4},
        reactions=[
            Reaction({"X": 2}, {"X": 3}, rate="c1", name="autocatalysis"),
            Reaction({"X": 3}, {"X": 2}, rate="c2", name="reverse"),
            Reaction({}, {"X": 1}, rate="c3", name="immigration"),
            Reaction({"X": 1}, {}, rate="c4", name="death"),
        ],
        name="schlogl",
    )


def toggle_switch(*, strength: float = 10.0, decay: float = 1.0, A: int = 10, B: int = 10) -> Network:
    r"""Two genes that repress one another.

    .. math::
        \emptyset \xrightarrow{s / (1 + B^2)} A, \quad \emptyset \xrightarrow{s / (1 + A^2)} B, \quad
        A \xrightarrow{d} \emptyset, \quad B \xrightarrow{d} \emptyset

    The benchmark runs to t = 250.

    Args:
        strength: s, proteins per time of a gene that nothing represses.
        decay: d, per time.
        A: first protein at the start.
        B: second protein at the start.

    Source: Gardner, Cantor, Collins, "Construction of a genetic toggle switch in Escherichia coli", Nature 403, 2000
    (equations 1a and 1b with exponent 2).
    """
    return Network(
        species={"A": A, "B": B},
        parameters={"strength": strength, "decay": decay},
        reactions=[
            Reaction({}, {"A": 1}, propensity="strength / (1 + B^2)", name="make_A"),
            Reaction({}, {"B": 1}, propensity="strength / (1 + A^2)", name="make_B"),
            Reaction({"A": 1}, {}, rate="decay", name="lose_A"),
            Reaction({"B": 1}, {}, rate="decay", name="lose_B"),
        ],
        name="toggle_switch",
    )


def lotka_volterra(
    *, c1: float = 10.0, c2: float = 0.01, c3: float = 10.0, prey: int = 1000, predators: int = 1000
) -> Network:
    r"""Prey and predators.

    .. math::
        Y_1 \xrightarrow{c_1} 2 Y_1, \quad Y_1 + Y_2 \xrightarrow{c_2} 2 Y_2, \quad Y_2 \xrightarrow{c_3} \emptyset

    Once the predators are gone the prey grows for ever: bound the run by a time, a stop condition or `max_events`.

    Args:
        c1: birth of prey, per time.
        c2: a predator eats and multiplies, per pair and time.
        c3: death of predators, per time.
        prey: at the start.
        predators: at the start.

    Source: Gillespie, "Exact stochastic simulation of coupled chemical reactions", J. Phys. Chem. 81, 1977, eq. 38.
    """
    return Network(
        species={"prey": prey, "predators": predators},
        parameters={"c1": c1, "c2": c2, "c3": c3},
        reactions=[
            Reaction({"prey": 1}, {"prey": 2}, rate="c1", name="birth"),
            Reaction({"prey": 1, "predators": 1}, {"predators": 2}, rate="c2", name="predation"),
            Reaction({"predators": 1}, {}, rate="c3", name="death"),
        ],
        name="lotka_volterra",
    )


def brusselator(
    *, c1: float = 5000.0, c2: float = 50.0, c3: float = 5e-5, c4: float = 5.0, X: int = 2000, Y: int = 1000
) -> Network:
    r"""A chemical oscillator.

    .. math::
        \emptyset \xrightarrow{c_1} X, \quad X \xrightarrow{c_2} Y, \quad 2 X + Y \xrightarrow{c_3} 3 X, \quad
        X \xrightarrow{c_4} \emptyset

    The third propensity is c3 Y X (X - 1) / 2, that is 2.5e-5 Y X (X - 1). The rate equations have an unstable fixed
    point at X = 1000, Y = 2000 within a limit cycle. The benchmark runs to t = 30.

    Args:
        c1: immigration, per time.
        c2: conversion, per time.
        c3: autocatalysis, per pair of X and Y and time.
        c4: death, per time.
        X: at the start.
        Y: at the start.

    Source: Gillespie, "Exact stochastic simulation of coupled chemical reactions", J. Phys. Chem. 81, 1977, eq. 44.
    """
    return Network(
        species={"X": X, "Y": Y},
        parameters={"c1": c1, "c2": c2, "c3": c3, "c4": c4},
        reactions=[
            Reaction({}, {"X": 1}, rate="c1", name="immigration"),
            Reaction({"X": 1}, {"Y": 1}, rate="c2", name="conversion"),
            Reaction({"X": 2, "Y": 1}, {"X": 3}, rate="c3", name="autocatalysis"),
            Reaction({"X": 1}, {}, rate="c4", name="death"),
        ],
        name="brusselator",
    )


def sir(*, contact: float = 1e-4, recovery: float = 0.01, S: int = 999, I: int = 1, R: int = 0) -> Network:  # noqa: E741
    r"""An epidemic: susceptible, infected, recovered.

    .. math::
        S + I \xrightarrow{b} 2 I, \qquad I \xrightarrow{g} R

    Every trajectory ends by itself once I is 0. The final size has an exact distribution. The benchmark runs to
    t = 250.

    Args:
        contact: b, per pair and time; b (S + I + R) / g, here 10, is the basic reproduction number.
        recovery: g, per time.
        S: susceptible at the start.
        I: infected at the start.
        R: recovered at the start.

    Source: Bailey, "The Mathematical Theory of Infectious Diseases", 1975, chapter 6.
    """
    return Network(
        species={"S": S, "I": I, "R": R},
        parameters={"contact": contact, "recovery": recovery},
        reactions=[
            Reaction({"S": 1, "I": 1}, {"I": 2}, rate="contact", name="infection"),
            Reaction({"I": 1}, {"R": 1}, rate="recovery", name="recovery"),
        ],
        name="sir",
    )


def multistate(
    *,
    kon: float = 0.01,
    koff: float = 0.1,
    kAon: float = 0.01,
    kAoff: float = 0.1,
    kAp: float = 0.01,
    kAdp: float = 0.1,
    R: int = 5360,
    L: int = 1160,
    A: int = 5360,
) -> Network:
    r"""A receptor R that binds a ligand L and an adaptor A, phosphorylated (P) where R holds both.

    .. math::
        R + L \rightleftharpoons RL, \quad R + A \rightleftharpoons RA, \quad RLA \xrightarrow{k_{Ap}} RLA_P, \quad
        A_P \xrightarrow{k_{Adp}} A

    The first two hold whatever else R carries and whether or not A is phosphorylated, the last one wherever A_P is:
    9 species, 18 reactions. Observables: all phosphorylated A, those free, those bound, and those in RLA.

    Args:
        kon: ligand binds, per pair and time.
        koff: ligand leaves, per time.
        kAon: adaptor binds, per pair and time.
        kAoff: adaptor leaves, per time.
        kAp: phosphorylation, per time.
        kAdp: dephosphorylation, per time.
        R: free receptors at the start.
        L: free ligands at the start.
        A: free adaptors at the start.

    Source: Gupta, Mendes, "An overview of network-based and -free approaches for stochastic simulation of biochemical
    systems", Computation 6, 2018, the multi-state model (figure A1); constants as in the network that BioNetGen makes
    of it for the SciML benchmarks.
    """
    reversible = [
        (("R", "L"), "RL", "kon", "koff"),
        (("RA", "L"), "RLA", "kon", "koff"),
        (("RAp", "L"), "RLAp", "kon", "koff"),
        (("R", "A"), "RA", "kAon", "kAoff"),
        (("R", "Ap"), "RAp", "kAon", "kAoff"),
        (("RL", "A"), "RLA", "kAon", "kAoff"),
        (("RL", "Ap"), "RLAp", "kAon", "kAoff"),
    ]
    reactions = []
    for (first, second), whole, forward, backward in reversible:
        reactions.append(Reaction({first: 1, second: 1}, {whole: 1}, rate=forward, name=f"{first}_binds_{second}"))
        reactions.append(Reaction({whole: 1}, {first: 1, second: 1}, rate=backward, name=f"{first}_loses_{second}"))
    reactions.append(Reaction({"RLA": 1}, {"RLAp": 1}, rate="kAp", name="phosphorylation"))
    for before, after in (("Ap", "A"), ("RAp", "RA"), ("RLAp", "RLA")):
        reactions.append(Reaction({before: 1}, {after: 1}, rate="kAdp", name=f"{before}_dephosphorylation"))
    return Network(
        species={"R": R, "L": L, "A": A, "RL": 0, "RA": 0, "RLA": 0, "RLAp": 0, "RAp": 0, "Ap": 0},
        parameters={"kon": kon, "koff": koff, "kAon": kAon, "kAoff": kAoff, "kAp": kAp, "kAdp": kAdp},
        reactions=reactions,
        observables={"A_P": "RLAp + RAp + Ap", "A_unbound_P": "Ap", "A_bound_P": "RLAp + RAp", "RLA_P": "RLAp"},
        name="multistate",
    )


def vilar_oscillator(
    *,
    alpha_A: float = 50.0,
    alpha_a: float = 500.0,
    alpha_R: float = 0.01,
    alpha_r: float = 50.0,
    beta_A: float = 50.0,
    beta_R: float = 5.0,
    delta_MA: float = 10.0,
    delta_MR: float = 0.5,
    delta_A: float = 1.0,
    delta_R: float = 0.2,
    gamma_A: float = 1.0,
    gamma_R: float = 1.0,
    gamma_C: float = 2.0,
    theta_A: float = 50.0,
    theta_R: float = 100.0,
    A: int = 10,
    R: int = 10,
    C: int = 10,
) -> Network:
    r"""A genetic clock: an activator A, and a repressor R that takes it away as the complex C.

    .. math::
        D_A + A \underset{\theta_A}{\overset{\gamma_A}{\rightleftharpoons}} D_A', \quad
        D_R + A \underset{\theta_R}{\overset{\gamma_R}{\rightleftharpoons}} D_R', \quad
        A + R \xrightarrow{\gamma_C} C \xrightarrow{\delta_A} R

    and, for the mRNA M and the proteins, transcription at alpha_A, alpha_a (D_A with A bound), alpha_R, alpha_r (D_R
    with A bound), translation at beta and decay at delta: 9 species, 16 reactions, one copy of either gene. Time in
    hours; a period takes about 25. The benchmark runs to t = 200, some 555,000 events.

    Args:
        alpha_A: transcription of the activator, per hour.
        alpha_a: the same with A bound to the gene.
        alpha_R: transcription of the repressor, per hour.
        alpha_r: the same with A bound to the gene.
        beta_A: translation of the activator, per mRNA and hour.
        beta_R: translation of the repressor, per mRNA and hour.
        delta_MA: decay of the activator's mRNA, per hour.
        delta_MR: decay of the repressor's mRNA, per hour.
        delta_A: decay of the activator, free or in the complex, per hour.
        delta_R: decay of the repressor, per hour.
        gamma_A: A binds to its own gene, per pair and hour.
        gamma_R: A binds to the repressor's gene, per pair and hour.
        gamma_C: A and R form the complex, per pair and hour.
        theta_A: A leaves its own gene, per hour.
        theta_R: A leaves the repressor's gene, per hour.
        A: activators at the start.
        R: repressors at the start.
        C: complexes at the start.

    Source: Vilar, Kueh, Barkai, Leibler, "Mechanisms of noise-resistance in genetic oscillators", PNAS 99, 2002,
    figure 1.
    """
    return Network(
        species={"Da": 1, "Dpa": 0, "Dr": 1, "Dpr": 0, "Ma": 0, "Mr": 0, "A": A, "R": R, "C": C},
        parameters={
            "alpha_A": alpha_A,
            "alpha_a": alpha_a,
            "alpha_R": alpha_R,
            "alpha_r": alpha_r,
            "beta_A": beta_A,
            "beta_R": beta_R,
            "delta_MA": delta_MA,
            "delta_MR": delta_MR,
            "delta_A": delta_A,
            "delta_R": delta_R,
            "gamma_A": gamma_A,
            "gamma_R": gamma_R,
            "gamma_C": gamma_C,
            "theta_A": theta_A,
            "theta_R": theta_R,
        },
        reactions=[
            Reaction({"Da": 1, "A": 1}, {"Dpa": 1}, rate="gamma_A"),
            Reaction({"Dpa": 1}, {"Da": 1, "A": 1}, rate="theta_A"),
            Reaction({"Dr": 1, "A": 1}, {"Dpr": 1}, rate="gamma_R"),
            Reaction({"Dpr": 1}, {"Dr": 1, "A": 1}, rate="theta_R"),
            Reaction({"Da": 1}, {"Da": 1, "Ma": 1}, rate="alpha_A"),
            Reaction({"Dpa": 1}, {"Dpa": 1, "Ma": 1}, rate="alpha_a"),
            Reaction({"Dr": 1}, {"Dr": 1, "Mr": 1}, rate="alpha_R"),
            Reaction({"Dpr": 1}, {"Dpr": 1, "Mr": 1}, rate="alpha_r"),
            Reaction({"Ma": 1}, {"Ma": 1, "A": 1}, rate="beta_A"),
            Reaction({"Mr": 1}, {"Mr": 1, "R": 1}, rate="beta_R"),
            Reaction({"A": 1, "R": 1}, {"C": 1}, rate="gamma_C"),
            Reaction({"C": 1}, {"R": 1}, rate="delta_A"),
            Reaction({"Ma": 1}, {}, rate="delta_MA"),
            Reaction({"Mr": 1}, {}, rate="delta_MR"),
            Reaction({"A": 1}, {}, rate="delta_A"),
            Reaction({"R": 1}, {}, rate="delta_R"),
        ],
        name="vilar_oscillator",
    )


MODELS: dict[str, Callable[..., Network]] = {
    model.__name__: model
    for model in (
        immigration_death,
        birth_death,
        batch_immigration,
        dimer_decay,
        michaelis_menten,
        two_stage_expression,
        schlogl,
        toggle_switch,
        lotka_volterra,
        brusselator,
        sir,
        multistate,
        vilar_oscillator,
    )
}
