"""The Discrete Stochastic Model Test Suite (Evans et al., Bioinformatics 24, 2008), with one criterion corrected.

n trajectories of a model with published mean mu and standard deviation sigma at every time give

    Z = sqrt(n) (mean(x) - mu) / sigma            Y = sqrt(n / 2) (mean((x - mu)^2) / sigma^2 - 1)

Z is a standard normal number for a correct simulator. Y is one for Gaussian x only: its standard deviation is
sqrt((excess kurtosis + 2) / 2), up to 6.9 in this suite. The kurtosis is exact: where the laws are linear it comes from
the moment equations, which close, for the dimerisation from the master equation, which has 51 states. Both are written
down here by hand, without the reader or the engine, and held against the published moments.
"""

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from pygen import ssa

pytest.importorskip("libsbml", reason="needs python-libsbml")

TRAJECTORIES = 10_000
VERSIONS = ("l2v4", "l3v1", "l3v2")
TIMES = 51
MEAN_RANGE, VARIANCE_RANGE = 3.0, 5.0
# Birth rate, death rate, X at the start.
BIRTH_DEATH = {
    **dict.fromkeys(["00001", "00002", "00006", "00007", "00008", "00009", "00010", "00012"], (0.1, 0.11, 100)),
    **dict.fromkeys(["00013", "00014", "00015", "00016", "00017", "00019"], (0.1, 0.11, 100)),
    "00003": (1.0, 1.1, 100),
    "00004": (0.1, 0.11, 10),
}
# Immigration rate, molecules at a time, death rate, and what X is at t = 25 if an event sets it.
IMMIGRATION = {
    "00020": (1.0, 1, 0.1, None),
    "00022": (5.0, 1, 0.1, None),
    "00024": (10.0, 1, 0.1, None),
    "00025": (10.0, 1, 0.1, None),
    "00027": (1.0, 1, 0.1, None),
    "00028": (1.0, 1, 0.1, 50),
    "00037": (1.0, 5, 0.2, None),
    "00038": (1.0, 10, 0.4, None),
}
# Is the state reset at t = 25?
DIMERISATION = {"00030": False, "00032": True, "00034": False, "00035": False}
CASES = sorted([*BIRTH_DEATH, *IMMIGRATION, *DIMERISATION])


# ---- exact moments: arrays [time, 4] of raw moments 1 ... 4


def linear_moments(reactions, x0: int, sink: bool, times: int) -> np.ndarray:
    """Moments of X, or of the number of deaths so far, from d/dt E f = sum_r E a_r (f(x + change) - f(x)).

    f are the monomials up to degree 4. `reactions`: (constant, factor of X) of a_r, changes of X and of the deaths.
    """
    monomials = [(i, j) for i in range(5) for j in range(5 - i)]
    index = {monomial: k for k, monomial in enumerate(monomials)}
    generator = np.zeros((len(monomials), len(monomials)))
    for (i, j), row in index.items():
        for constant, slope, dx, ds in reactions:
            for p in range(i + 1):
                for q in range(j + 1):
                    if (p, q) == (i, j):
                        continue
                    weight = math.comb(i, p) * float(dx) ** (i - p) * math.comb(j, q) * float(ds) ** (j - q)
                    generator[row, index[p, q]] += constant * weight
                    if weight and slope:
                        generator[row, index[p + 1, q]] += slope * weight
    step, state, rows = expm(generator), np.array([float(x0) ** i * 0.0**j for i, j in monomials]), []
    for _ in range(times):
        rows.append([state[index[(0, k) if sink else (k, 0)]] for k in range(1, 5)])
        state = step @ state
    return np.array(rows)


def dimer_moments(monomers: bool, times: int) -> np.ndarray:
    """2 P <-> P2 from 100 P, rates .001 P (P - 1) / 2 and .01 P2: the distribution of P2 is a vector of 51 numbers."""
    dimers = np.arange(51.0)
    generator = np.zeros((51, 51))
    for n in range(51):
        up, down = 0.001 * (100 - 2 * n) * (99 - 2 * n) / 2, 0.01 * n
        generator[n, n] -= up + down
        if n < 50:
            generator[n + 1, n] += up
        if n:
            generator[n - 1, n] += down
    step, state, rows = expm(generator), np.eye(51)[0], []
    values = 100 - 2 * dimers if monomers else dimers
    for _ in range(times):
        rows.append([state @ values**k for k in range(1, 5)])
        state = step @ state
    return np.array(rows)


def exact_moments(case: str, variable: str) -> np.ndarray:
    if case in DIMERISATION:
        parts = [25, TIMES - 25] if DIMERISATION[case] else [TIMES]
        return np.concatenate([dimer_moments(variable == "P", times) for times in parts])
    if case in BIRTH_DEATH:
        birth, death, x0 = BIRTH_DEATH[case]
        reactions, starts = [(0, birth, 1, 0), (0, death, -1, 1)], [(x0, TIMES)]
    else:
        immigration, batch, death, reset = IMMIGRATION[case]
        reactions = [(immigration, 0, batch, 0), (0, death, -1, 1)]
        starts = [(0, TIMES)] if reset is None else [(0, 25), (reset, TIMES - 25)]
    moments = np.concatenate([linear_moments(reactions, x, variable == "Sink", times) for x, times in starts])
    return moments * 2.0 ** np.arange(1, 5) if variable == "y" else moments


def central(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, variance and fourth central moment."""
    m1, m2, m3, m4 = moments.T
    return m1, m2 - m1**2, m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4


# ---- the published files


def read_settings(folder, case: str) -> list[str]:
    lines = (folder / "dsmts" / case / f"{case}-settings.txt").read_text().splitlines()
    settings = dict(line.split(":", 1) for line in lines if ":" in line)
    assert [settings[key].strip() for key in ("start", "duration", "steps")] == ["0", "50", "50"]
    return [name.strip() for name in settings["variables"].split(",")]


def read_results(folder, case: str) -> dict[str, np.ndarray]:
    with open(folder / "dsmts" / case / f"{case}-results.csv", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    columns = np.array([[float(value) for value in row] for row in rows[1:]]).T
    return dict(zip([name.strip() for name in rows[0]], columns, strict=True))


def read_network(folder, case: str, version: str):
    return ssa.read_sbml(folder / "dsmts" / case / f"{case}-sbml-{version}.xml")


def described(net) -> tuple:
    """All that a simulation depends on. What a trigger was before the start is for level 3 only; none is true there."""
    parameters = dict(zip(net.parameters, net.parameter_values.tolist(), strict=True))
    state = dict(zip(net.species, net.initial.tolist(), strict=True)), net.boundary, parameters, net.rules
    events = [dataclasses.replace(event, initial_value=True) for event in net.events]
    return *state, str(net.propensity_table()), net.stoichiometry.tolist(), events


# ---- the tests


def test_every_case_of_the_folder_is_here(real_data):
    assert sorted(path.name for path in (real_data / "dsmts").iterdir() if path.is_dir()) == CASES


@pytest.mark.parametrize("case", CASES)
def test_levels_of_sbml_read_equal(real_data, case):
    first, *others = (described(read_network(real_data, case, version)) for version in VERSIONS)
    for other in others:
        assert other == first


@pytest.mark.parametrize("case", CASES)
def test_published_moments_are_those_of_the_exact_distribution(real_data, case):
    results = read_results(real_data, case)
    for variable in read_settings(real_data, case):
        if not results[f"{variable}-sd"].any():
            continue
        mean, variance, _ = central(exact_moments(case, variable))
        np.testing.assert_allclose(results[f"{variable}-mean"], mean, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(results[f"{variable}-sd"], np.sqrt(np.abs(variance)), rtol=1e-5, atol=1e-5)


def deviations(folder, case: str, version: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Z, Y and the standard deviation of Y at every point with sigma > 0, and the trajectories' values there."""
    net, results = read_network(folder, case, version), read_results(folder, case)
    run = ssa.simulate(net, t=torch.linspace(0, 50, TIMES), trajectories=TRAJECTORIES, seed=seed)
    columns: list[tuple] = []
    for variable in read_settings(folder, case):
        values = run[variable].numpy()
        assert values.shape == (TRAJECTORIES, TIMES)
        mu, sigma = results[f"{variable}-mean"], results[f"{variable}-sd"]
        certain = sigma == 0
        # Exactly what is published, in every trajectory: the first row, the row of an event, species that are fixed.
        assert (values[:, certain] == mu[certain]).all(), (case, version, variable)
        _, variance, fourth = central(exact_moments(case, variable)[~certain])
        values, mu, sigma = values[:, ~certain], mu[~certain], sigma[~certain]
        z = math.sqrt(TRAJECTORIES) * (values.mean(0) - mu) / sigma
        y = math.sqrt(TRAJECTORIES / 2) * (((values - mu) ** 2).mean(0) / sigma**2 - 1)
        columns += zip(z, y, np.sqrt((fourth / variance**2 - 1) / 2), values.T, strict=True)
    z, y, spread, values = zip(*columns, strict=True)
    return np.array(z), np.array(y), np.array(spread), np.array(values)


def variance_of_count(values: np.ndarray, limit: float, rng: np.random.Generator) -> float:
    """Variance of the number of |Z| > limit in one run. Its points follow each other: Z is Gaussian, but correlated."""
    eigenvalues, vectors = np.linalg.eigh(np.corrcoef(values))
    root = vectors * np.sqrt(np.clip(eigenvalues, 0, None))
    return (np.abs(rng.standard_normal((4000, len(values))) @ root.T) > limit).sum(1).var()


def test_means_and_variances_of_ten_thousand_trajectories_are_the_published_ones(real_data):
    rng = np.random.default_rng(1)
    means, variances, scaled, variance = [], [], [], 0.0
    for seed, version in enumerate(VERSIONS[:2], 1):
        for case in CASES:
            z, y, spread, values = deviations(real_data, case, version, seed)
            variance += variance_of_count(values, MEAN_RANGE, rng)
            means.append(z)
            variances.append(y)
            scaled.append(y / spread)
    z, y, scaled_y = (np.abs(np.concatenate(each)) for each in (means, variances, scaled))
    beyond = int((z > MEAN_RANGE).sum())
    expected = z.size * math.erfc(MEAN_RANGE / math.sqrt(2))
    report = (
        f"{z.size} points: {beyond} with |Z| > 3 (expected {expected:.1f} +- {math.sqrt(variance):.1f}), "
        f"largest {z.max():.2f}; "
        f"{(scaled_y > VARIANCE_RANGE).sum()} with |Y| > 5 standard deviations, largest {scaled_y.max():.2f}; "
        f"{(y > VARIANCE_RANGE).sum()} with |Y| > 5 unscaled"
    )
    print(report)
    assert beyond <= expected + 4.5 * math.sqrt(variance), report
    # One in 1.7 million, times the number of points: about 0.002.
    assert z.max() < 5 and scaled_y.max() < VARIANCE_RANGE, report
