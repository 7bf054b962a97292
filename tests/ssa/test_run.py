"""What a run holds: statistics against NumPy, expressions, files, tables and pictures."""

import json
import os

import numpy as np
import pytest
import torch

from pygen.ssa import _store, examples
from pygen.ssa.network import Event, Network, Reaction
from pygen.ssa.run import Run, load
from pygen.ssa.simulate import replay, simulate

T = (0.0, 1.0, 2.5, 2.5, 6.0)
N = 41


@pytest.fixture(scope="module")
def net():
    return Network(
        {"A": 20, "B": 3},
        {"k": 0.5, "twice": "2 * k", "made": 2.0},
        [
            Reaction({"A": 1}, {"B": 1}, rate="k"),
            Reaction({"B": 2}, {}, rate="0.01"),
            Reaction({}, {"A": 1}, rate="made"),
        ],
        rules={"share": "A / (A + B)"},
        observables={"fast": "share * twice", "late": "piecewise(A, time >= 2, 0)"},
        name="made_up",
    )


@pytest.fixture(scope="module")
def rates():
    return np.linspace(0.1, 1, N)


@pytest.fixture(scope="module")
def run(net, rates):
    return simulate(net, T, N, 1, first=3, parameters={"k": rates}, stop="B >= 20")


@pytest.fixture(scope="module")
def reduced(net, rates):
    kept = ("covariance", "histogram", "first_passage")
    return simulate(net, T, N, 1, first=3, parameters={"k": rates}, stop="B >= 20", reduce=kept)


@pytest.fixture(scope="module")
def ended_early(net):
    with pytest.warns(UserWarning, match="max_events"):
        return simulate(net, T, N, 1, max_events=48)


# ---- statistics and expressions


def test_statistics_are_numpys(run):
    x = run.counts.numpy()
    np.testing.assert_allclose(run.mean(), x.mean(0), rtol=1e-15)
    np.testing.assert_allclose(run.var(), x.var(0, ddof=1), rtol=1e-13)
    np.testing.assert_allclose(run.std(), x.std(0, ddof=1), rtol=1e-13)
    for t in range(len(T)):
        np.testing.assert_allclose(run.covariance()[t], np.cov(x[:, t].T), rtol=1e-12)
    for q in (0.0, 0.1, 0.5, 0.95, 1.0):
        assert np.array_equal(run.quantile(q), np.quantile(x, q, axis=0, method="inverted_cdf"))
    assert run.quantile([0.1, 0.5]).shape == (2, len(T), 2)
    values, numbers = run.histogram("B")
    assert (numbers.sum(1) == N).all() and numbers.shape == (len(T), len(values))
    assert torch.equal((numbers * values).sum(1), run.counts[:, :, 1].sum(0))


def test_statistics_leave_out_what_was_never_reached(ended_early):
    x = ended_early.counts.numpy()[:, -1].astype(float)
    x = x[x[:, 0] >= 0]
    assert 0 < len(x) < N and ended_early.present[-1] == len(x)
    np.testing.assert_allclose(ended_early.var()[-1], x.var(0, ddof=1), rtol=1e-13)
    assert np.array_equal(ended_early.quantile(0.3)[-1], np.quantile(x, 0.3, axis=0, method="inverted_cdf"))
    assert int(ended_early.histogram("A")[1][-1].sum()) == len(x)
    assert int(ended_early["A * 0 + 1"].isnan()[:, -1].sum()) == N - len(x)


def test_expressions_of_a_run_follow_each_trajectorys_parameters(run, rates):
    a, b = run.counts.double().unbind(2)
    k = torch.from_numpy(rates)[:, None]
    assert torch.equal(run["A"], a) and run["A"].dtype == torch.float64
    assert torch.equal(run["share"], a / (a + b))
    assert torch.equal(run["fast"], a / (a + b) * (2 * k))
    assert torch.equal(run["late"], torch.where(run.t >= 2, a, 0))
    assert torch.equal(run["max(A, B) + made - time"], torch.maximum(a, b) + 2 - run.t)
    assert run["7"].tolist() == [[7.0] * len(T)] * N


def test_an_expression_that_cannot_be_computed_says_why(net, run, reduced):
    with pytest.raises(ValueError, match="unknown name 'C'; there is: A, B, k, made, twice, share, fast, late"):
        run["A + C"]
    only_a = simulate(net, T, 3, 1, record="A")
    with pytest.raises(ValueError, match="species 'B' was not recorded; add it to record="):
        only_a["share"]
    with pytest.raises(ValueError, match=r"run\['A'\] needs trajectories, and this run kept none"):
        reduced["A"]
    fed = Network({"A": 5}, {"k": 1.0}, [Reaction({"A": 1}, {}, rate="k")], [Event("time >= 1", {"k": "2"})])
    with pytest.raises(ValueError, match="'k' is a parameter that events change"):
        simulate(fed, T, 3, 1)["k * A"]


def test_a_reduced_run_says_what_it_lacks(net):
    moments, histograms = (simulate(net, T, 9, 1, reduce=what) for what in ("moments", "histogram"))
    with pytest.raises(ValueError, match='kept no covariances: simulate with reduce="covariance"'):
        moments.covariance()
    with pytest.raises(ValueError, match='kept no histograms: simulate with reduce="histogram"'):
        moments.quantile(0.5)
    with pytest.raises(ValueError, match='kept no moments: simulate with reduce="moments"'):
        histograms.mean()
    assert histograms.present.tolist() == [9] * len(T)
    with pytest.raises(ValueError, match="needs trajectories"):
        moments.plot("trajectories")
    with pytest.raises(ValueError, match="'C' is not a species; there is: A, B"):
        histograms.histogram("C")
    wide = simulate(net, T, 9, 1, reduce="histogram", bins={"B": [0, 10, 100]})
    assert wide.histogram("B")[1].sum(1).tolist() == [9] * len(T)
    with pytest.raises(ValueError, match="bins of width 1; B was given edges"):
        wide.quantile(0.5)
    with pytest.raises(ValueError, match="q must be from 0 to 1, got 1.5"):
        wide.quantile(1.5)


def test_repr_says_what_it_is_and_how_it_ended(run, reduced):
    text = repr(run)
    assert "'made_up': 41 trajectories x 5 times x 2 species; seed 1, direct on cpu" in text
    assert f"{run.status_counts['stopped']} stopped" in text and "events in" in text
    assert "2 species, reduced" in repr(reduced)


# ---- files


ENDINGS = {".npz": (), ".nc": ("xarray", "h5netcdf"), ".zarr": ("xarray", "zarr")}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", ("run", "reduced"))
def test_a_saved_run_comes_back_bit_for_bit(kind, ending, tmp_path, request):
    for package in ENDINGS[ending]:
        pytest.importorskip(package)
    original, path = request.getfixturevalue(kind), tmp_path / "new" / f"x{ending}"
    for _ in range(2):  # the second time over the first
        original.save(path)
    assert [one.name for one in path.parent.iterdir()] == [path.name], "no temporary file stays"
    back = load(path)
    assert isinstance(back, Run) and repr(back) == repr(original)
    for name in ("t", "stop_time", "parameters"):
        assert torch.equal(getattr(back, name), getattr(original, name)), name
    assert back.status_counts == original.status_counts and back.origin == original.origin
    assert back.model == original.model and "A / (A + B)" in back.model.definitions["share"]
    for statistic in ("mean", "var", "covariance"):
        assert torch.equal(getattr(back, statistic)(), getattr(original, statistic)()), statistic
    assert torch.equal(back.quantile([0.2, 0.7]), original.quantile([0.2, 0.7]))
    if kind == "run":
        assert torch.equal(back.counts, original.counts) and back.counts.dtype == torch.int64
        assert torch.equal(back.status, original.status) and torch.equal(back.n_events, original.n_events)
        assert torch.equal(back["fast"], original["fast"]), "rules and parameters survive"
    else:
        assert back.counts is None and back.n_events == original.n_events


def test_histograms_with_edges_come_back(net, tmp_path):
    original = simulate(net, T, 9, 1, reduce="histogram", bins={"B": [0, 2.5, 100]})
    original.save(tmp_path / "x.npz")
    back = load(tmp_path / "x.npz")
    for name in ("A", "B"):
        assert all(torch.equal(a, b) for a, b in zip(back.histogram(name), original.histogram(name), strict=True))


def test_a_file_that_cannot_be_finished_leaves_the_old_one(run, tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    run.save(path)
    before = path.read_bytes()

    def full(file, **_):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_store.np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        run.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.npz"]


def test_files_that_are_no_runs_are_refused_with_a_sentence(run, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK no zip")
    np.savez(tmp_path / "y.npz", a=np.zeros(3))
    run.save(tmp_path / "z.npz")
    with np.load(tmp_path / "z.npz") as file:
        newer = {name: file[name] for name in file.files}
    newer["pygen_run"] = np.array(json.dumps({**json.loads(str(newer["pygen_run"])), "format": 99}))
    np.savez(tmp_path / "z.npz", **newer)
    for name, sentence in (
        ("x.npz", "is not a run that pygen saved, or is damaged"),
        ("y.npz", "is not a run that pygen saved"),
        ("z.npz", "it has format 99, this version of pygen reads 1"),
        ("x.csv", "a .csv holds too little"),
        ("x.h5", "the name must end in one of .npz, .nc, .zarr, .csv"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none.npz"):
        load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="the name must end in"):
        run.save(tmp_path / "x")


def test_xarray_has_named_dimensions_and_how_it_was_made(run, reduced):
    pytest.importorskip("xarray")
    data = run.to_xarray()
    assert data["counts"].dims == ("trajectory", "time", "species") and data["counts"].dtype == np.int64
    assert np.shares_memory(data["counts"].values, run.counts.numpy())
    assert data["counts"].sel(species="B", trajectory=5).values.tolist() == run.counts[2, :, 1].tolist()
    assert data["parameters"].dims == ("trajectory", "parameter")
    assert {name: data.attrs[name] for name in ("seed", "stream", "first", "method")} == {
        "seed": 1,
        "stream": 0,
        "first": 3,
        "method": "direct",
    }
    assert "A -> B" in data.attrs["model"] and data.attrs["version"]
    kept = reduced.to_xarray()
    assert np.array_equal(kept["mean"], run.mean()) and kept["covariance"].dims[1:] == ("species", "other_species")
    assert int(kept["histogram_A"].sel(time=6.0).sum()) == N and "counts" not in kept


def test_pandas_has_a_row_per_trajectory_and_time(run, reduced, tmp_path):
    pandas = pytest.importorskip("pandas")
    table = run.to_pandas()
    assert table.index.names == ["trajectory", "time"] and list(table.columns) == ["A", "B"]
    assert table.loc[(5, 6.0), "B"] == run.counts[2, -1, 1] and len(table) == N * len(T)
    statistics = reduced.to_pandas()
    assert statistics.loc[(6.0, "A")].tolist() == [N, float(run.mean()[-1, 0]), float(run.std()[-1, 0])]
    run.save(tmp_path / "x.csv")
    assert pandas.read_csv(tmp_path / "x.csv")["A"].tolist() == run.counts[:, :, 0].flatten().tolist()


# ---- pictures


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_the_mean_is_drawn_with_a_band_and_some_trajectories(pyplot, run):
    figure = run.plot()
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["A", "B"]
    for k, axis in enumerate(figure.axes):
        *steps, mean = axis.get_lines()
        assert np.array_equal(mean.get_ydata(), run.mean()[:, k]) and len(steps) == 3
        assert np.array_equal(steps[0].get_ydata(), run.counts[0, :, k]) and steps[0].get_drawstyle() == "steps-post"
        corners = axis.collections[0].get_paths()[0].vertices
        assert set(corners[:, 1]) == set(run.quantile([0.05, 0.95])[:, :, k].flatten().tolist())
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["5% to 95%", "mean"]


def test_reduced_runs_are_drawn_with_the_band_they_have(pyplot, net, reduced):
    assert reduced.plot().axes[0].get_legend().get_texts()[0].get_text() == "5% to 95%"
    moments = simulate(net, T, 9, 1, reduce="moments").plot(species="B")
    assert moments.axes[0].get_legend().get_texts()[0].get_text() == "mean ± standard deviation"
    assert len(moments.axes) == 1


def test_a_histogram_is_a_probability_density_at_the_nearest_time(pyplot, run, reduced):
    for which in (run, reduced):
        figure = which.plot("histogram", species=["A"], at=0.8)
        assert "at time 1 of" in figure.get_suptitle()
        values, edges, _ = figure.axes[0].patches[0].get_data()
        assert values.sum() == pytest.approx(1) and set(np.diff(edges)) == {1.0}
        assert edges[0] + 0.5 == run.counts[:, 1, 0].min()


def test_a_wide_histogram_has_wide_bins(pyplot):
    wide = simulate(examples.immigration_death(), [0.5], 300, 1, initial={"X": range(0, 3000, 10)})
    values, edges, _ = wide.plot("histogram").axes[0].patches[0].get_data()
    assert len(values) <= 80 and (values * np.diff(edges)).sum() == pytest.approx(1)


def test_pictures_are_written_and_mistakes_are_sentences(pyplot, net, run, tmp_path):
    run.plot("trajectories", path=tmp_path / "new" / "x.png")
    replay(net, seed=1, trajectory=0, t=4.0).plot(path=tmp_path / "new" / "y.png")
    assert all((tmp_path / "new" / name).stat().st_size > 5000 for name in ("x.png", "y.png"))
    assert not pyplot.get_fignums(), "what is written is closed"
    with pytest.raises(ValueError, match="kind must be one of mean, trajectories, histogram, got 'bars'"):
        run.plot("bars")
    with pytest.raises(ValueError, match="no species 'C' was recorded; there is: A, B"):
        run.plot(species="C")
    with pytest.raises(ValueError, match="at is the time of"):
        run.plot(at=1.0)


def test_a_replay_is_drawn_as_steps_from_start_to_end(pyplot, net):
    again = replay(net, seed=1, trajectory=0, t=4.0)
    (line,) = again.plot(species="A").axes[0].get_lines()
    assert line.get_xdata()[0] == 0 and line.get_xdata()[-1] == 4.0
    assert line.get_ydata()[:-1].tolist() == again.states[:, 0].tolist()
