"""What K-Means computes, against scikit-learn's Lloyd and mini-batches, and numpy for what scikit-learn does not do."""

import warnings

import numpy as np
import pytest
import torch

from pygen.cluster import KMeans, kmeans
from pygen.cluster._samples import Samples
from pygen.cluster._seeding import draw, kmeans_plus_plus, random_rows

sklearn_cluster = pytest.importorskip("sklearn.cluster")


def blobs(n, d, k, seed=0, spread=0.1, offset=0.0):
    """n rows around k centres with distances near sqrt(2 d); the centres' rows come first."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((k, d))
    label = np.arange(n) % k
    return centers[label] + spread * rng.standard_normal((n, d)) + offset


def digits(n=700):
    from sklearn.datasets import load_digits

    return load_digits().data[:n]


def sklearn_lloyd(x, start, weight=None, **options):
    model = sklearn_cluster.KMeans(len(start), init=start, n_init=1, algorithm="lloyd", **options)
    return model.fit(x, sample_weight=weight)


def assert_same_fit(model, expected, rtol=1e-9):
    np.testing.assert_array_equal(model.labels_, expected.labels_)
    np.testing.assert_allclose(model.inertia_, expected.inertia_, rtol=max(rtol, 1e-9))
    np.testing.assert_allclose(model.cluster_centers_, expected.cluster_centers_, rtol=rtol, atol=rtol)
    assert model.n_iter_ == expected.n_iter_


@pytest.mark.parametrize("d", (1, 2, 3, 8, 15, 17, 64, 1024))
def test_blobs_of_any_dimension_are_clustered_as_by_sklearn(d):
    x = blobs(120, d, 4, spread=0.3)
    start = x[[0, 1, 6, 3]]
    assert_same_fit(KMeans(4, init=start).fit(x), sklearn_lloyd(x, start))


@pytest.mark.parametrize("tol", (0.0, 1e-4, 1e-2))
def test_digits_stop_where_sklearn_stops(tol):
    x = digits()
    start = x[5::70]
    model, expected = KMeans(10, init=start, tol=tol).fit(x), sklearn_lloyd(x, start, tol=tol)
    assert_same_fit(model, expected)
    assert model.converged_ and model.n_iter_ > 2


def test_max_iter_ends_a_run_that_then_has_labels_of_its_last_centres():
    x = digits(300)
    start = x[:10]
    model = KMeans(10, init=start, max_iter=2).fit(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sklearn_lloyd(x, start, max_iter=2)
    assert_same_fit(model, expected)
    assert not model.converged_
    np.testing.assert_array_equal(model.predict(x), model.labels_)


def test_float32_rows_give_the_float64_clustering():
    x = blobs(500, 16, 6, spread=0.3).astype(np.float32)
    model, expected = KMeans(6, init=x[:6]).fit(x), sklearn_lloyd(x.astype(np.float64), x[:6].astype(np.float64))
    assert model.cluster_centers_.dtype == np.float32
    assert_same_fit(model, expected, rtol=1e-6)  # centres are rounded to float32, 6e-8


@pytest.mark.parametrize("zeros", (False, True))
def test_weights_count_as_in_sklearn(zeros):
    x = digits(300)
    weight = np.random.default_rng(1).random(300) * 3
    weight[::4] *= not zeros
    start = x[1:11]
    assert_same_fit(KMeans(10, init=start).fit(x, sample_weight=weight), sklearn_lloyd(x, start, weight))


def test_a_weight_of_two_is_a_row_twice():
    x = blobs(60, 3, 3, spread=0.5)
    weight = np.where(np.arange(60) < 20, 2.0, 1.0)
    twice = KMeans(3, init=x[:3], tol=0).fit(np.concatenate((x, x[:20])))
    model = KMeans(3, init=x[:3], tol=0).fit(x, sample_weight=weight)
    np.testing.assert_allclose(model.cluster_centers_, twice.cluster_centers_, rtol=1e-12)
    assert model.inertia_ == pytest.approx(twice.inertia_, rel=1e-12)
    np.testing.assert_allclose(model.counts_, twice.counts_)


def test_the_empty_cluster_gets_the_farthest_row_as_in_sklearn():
    x = np.array([[0.0], [1.0], [2.0], [3.0], [30.0], [10.0], [11.0]])
    start = np.array([[1.0], [500.0], [10.0]])  # the second is nobody's nearest; 30 is farthest from its own
    model, expected = KMeans(3, init=start, max_iter=1).fit(x), sklearn_lloyd(x, start, max_iter=1)
    np.testing.assert_allclose(model.cluster_centers_, [[1.5], [30.0], [10.5]])
    np.testing.assert_allclose(model.cluster_centers_, expected.cluster_centers_)
    assert_same_fit(KMeans(3, init=start).fit(x), sklearn_lloyd(x, start))


def test_several_empty_clusters_get_the_farthest_rows_in_order():
    x = np.concatenate((blobs(40, 2, 2), [[50.0, 0.0], [0.0, 70.0], [-60.0, 0.0]]))
    start = np.concatenate((x[:2], np.full((3, 2), 1e3)))
    model = KMeans(5, init=start, max_iter=1).fit(x)
    np.testing.assert_allclose(model.cluster_centers_[2:], x[[41, 42, 40]])
    expected = sklearn_lloyd(x, start, max_iter=1)
    np.testing.assert_allclose(
        np.sort(model.cluster_centers_, axis=0), np.sort(expected.cluster_centers_, axis=0), rtol=1e-12
    )


def test_a_cluster_that_loses_all_its_rows_leaves_no_rounding_behind():
    """Rows of weights 0.3 and 0.1 leave theirs, and (0.1 + 0.3) - 0.3 - 0.1 is not 0: it must join the heaviest."""
    x = np.array([[-4.0, -4.0], [7.1, 0.3], [7.7, -0.9], [-4.0, -4.0]])
    start = np.array([[-4.0, -4.0], [5.0, 0.0], [900.0, 0.0], [0.0, 900.0]])
    with pytest.warns(UserWarning, match="only 3 of n_clusters=4"):
        model = KMeans(4, init=start, max_iter=1, tol=0).fit(x, sample_weight=[0.7, 0.1, 0.3, 0.7])
    np.testing.assert_allclose(model.cluster_centers_, [[-4, -4], [-4, -4], [7.7, -0.9], [7.1, 0.3]], rtol=1e-15)


def test_rows_of_weight_zero_do_not_repair():
    x = np.array([[0.0], [1.0], [99.0], [5.0]])
    model = KMeans(2, init=np.array([[0.0], [-500.0]]), max_iter=1).fit(x, sample_weight=[1, 1, 0, 1])
    assert sorted(model.cluster_centers_.ravel()) == [0.5, 5.0]


def test_fewer_distinct_rows_than_clusters_is_said_and_finite():
    x = np.repeat([[0.0, 1.0], [2.0, 3.0]], 10, axis=0)
    for init in ("k-means++", "random", x[:4]):
        with pytest.warns(UserWarning, match="only 2 of n_clusters=4 clusters have samples"):
            model = KMeans(4, init=init, random_state=0).fit(x)
        assert model.inertia_ == 0 and np.isfinite(model.cluster_centers_).all()
        assert set(map(tuple, model.cluster_centers_)) == {(0.0, 1.0), (2.0, 3.0)}


def test_one_cluster_is_the_mean_and_as_many_as_rows_are_the_rows():
    x = blobs(40, 5, 4)
    one = KMeans(1, random_state=0).fit(x)
    np.testing.assert_allclose(one.cluster_centers_, x.mean(0, keepdims=True), rtol=1e-12)
    assert one.inertia_ == pytest.approx(((x - x.mean(0)) ** 2).sum(), rel=1e-12)
    for init in ("k-means++", "random"):
        every = KMeans(40, init=init, random_state=0).fit(x)
        assert every.inertia_ == 0 and sorted(every.labels_) == list(range(40))


@pytest.mark.parametrize("weighted", (False, True))
def test_partial_fit_is_sklearns_batch_by_batch(weighted):
    x = digits(600)
    weight = np.random.default_rng(0).random(600) + 0.5 if weighted else np.ones(600)
    start = x[7:17]
    model = KMeans(10, init=start)
    expected = sklearn_cluster.MiniBatchKMeans(10, init=start, n_init=1, reassignment_ratio=0)
    for first in range(0, 600, 120):
        batch = slice(first, first + 120)
        model.partial_fit(x[batch], sample_weight=weight[batch])
        expected.partial_fit(x[batch], sample_weight=weight[batch])
        np.testing.assert_allclose(model.cluster_centers_, expected.cluster_centers_, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(model.counts_, expected._counts, rtol=1e-12)
        np.testing.assert_array_equal(model.labels_, expected.labels_)
        assert model.inertia_ == pytest.approx(expected.inertia_, rel=1e-9)
    assert model.n_steps_ == expected.n_steps_ == 5


def test_partial_fit_goes_on_from_fit_with_its_rows_counted():
    x = blobs(90, 2, 3)
    model = KMeans(3, init=x[:3]).fit(x[:60]).partial_fit(x[60:])
    np.testing.assert_allclose(model.cluster_centers_, [x[i::3].mean(0) for i in range(3)], rtol=1e-12)
    np.testing.assert_array_equal(model.counts_, [30, 30, 30])


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def spherical(x, start, steps):
    u, c = unit(x), unit(start)
    for _ in range(steps):
        label = (u @ c.T).argmax(1)
        c = unit(np.stack([u[label == k].sum(0) for k in range(len(c))]))
    return c, (u @ c.T).argmax(1), (1 - (u @ c.T).max(1)).sum()


def test_cosine_is_spherical_kmeans():
    x = blobs(200, 6, 5, spread=0.4) * np.random.default_rng(1).uniform(0.1, 10, (200, 1))
    model = KMeans(5, init=x[:5], metric="cosine", tol=0).fit(x)
    centers, labels, inertia = spherical(x, x[:5], model.n_iter_)
    np.testing.assert_allclose(model.cluster_centers_, centers, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(model.labels_, labels)
    assert model.inertia_ == pytest.approx(inertia, rel=1e-9)
    assert model.converged_ and (model.predict(x) == labels).all()
    np.testing.assert_allclose(model.transform(x), 1 - unit(x) @ centers.T, atol=1e-12)


def test_cosine_labels_stay_below_k_also_for_zero_rows():
    x = np.concatenate((np.zeros((3, 4)), blobs(30, 4, 3), -blobs(30, 4, 3)))
    model = KMeans(3, random_state=0, metric="cosine").fit(x)
    assert set(model.labels_) <= {0, 1, 2} and (model.labels_[:3] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(model.cluster_centers_, axis=1), 1, rtol=1e-12)
    assert np.isfinite(model.inertia_)


def test_opposite_rows_leave_a_cosine_centre_where_it_was():
    x = np.array([[0.0, 1.0], [0.0, -1.0]])
    model = KMeans(1, init=np.array([[3.0, 0.0]]), metric="cosine").fit(x)
    np.testing.assert_array_equal(model.cluster_centers_, [[1.0, 0.0]])


def soft_step(x, w, c, temperature):
    """One step written out, and the free energy before it."""
    d = ((x[:, None] - c) ** 2).sum(-1)
    r = np.exp(-(d - d.min(1, keepdims=True)) / temperature)
    energy = -(w * (temperature * np.log(r.sum(1)) - d.min(1))).sum()
    r = w[:, None] * r / r.sum(1, keepdims=True)
    return r.T @ x / r.sum(0)[:, None], energy


def test_a_soft_fit_is_expectation_maximisation():
    x, w = blobs(150, 3, 4, spread=0.6), np.random.default_rng(2).random(150)
    centers, energies = x[:4], []
    for _ in range(6):
        centers, energy = soft_step(x, w, centers, 0.7)
        energies.append(energy)
    assert (np.diff(energies) < 0).all(), "the oracle itself"
    model = KMeans(4, init=x[:4], max_iter=6, tol=0, temperature=0.7).fit(x, sample_weight=w)
    np.testing.assert_allclose(model.cluster_centers_, centers, rtol=1e-11)
    assert model.n_iter_ == 6
    soft = model.predict_soft(x)
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-12)
    np.testing.assert_array_equal(soft.argmax(1), model.labels_)


def test_a_cold_soft_fit_is_the_hard_one():
    x = digits(200)
    hard = KMeans(8, init=x[:8], tol=1e-9).fit(x)
    soft = KMeans(8, init=x[:8], tol=1e-9, temperature=1e-3).fit(x)
    np.testing.assert_array_equal(soft.labels_, hard.labels_)
    np.testing.assert_allclose(soft.cluster_centers_, hard.cluster_centers_, rtol=1e-9, atol=1e-12)


def test_transform_is_zero_from_a_centre_to_itself_however_far_from_the_origin():
    for dtype, rtol in ((np.float64, 1e-9), (np.float32, 1e-6)):
        x = blobs(64, 8, 4, offset=1e4).astype(dtype)
        model = KMeans(64, random_state=0).fit(x)
        distance = model.transform(model.cluster_centers_)
        assert (np.diag(distance) == 0).all()
        exact = np.linalg.norm(x[:, None].astype(np.float64) - model.cluster_centers_.astype(np.float64), axis=-1)
        np.testing.assert_allclose(model.transform(x), exact, rtol=rtol)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("d", (1, 7, 1025))
def test_labels_and_inertia_belong_together_in_every_dtype(dtype, d):
    """Labels are float64's argmin over the centres returned, and the inertia is the sum over these labels."""
    x = torch.from_numpy(blobs(90, d, 5, spread=0.5)).to(dtype)
    result = kmeans(x, 5, generator=torch.Generator().manual_seed(3))
    exact = (x.double()[:, None] - result.centers.double()).square().sum(-1)
    assert torch.equal(result.labels, exact.argmin(1))
    torch.testing.assert_close(result.inertia, exact.min(1).values.sum(), rtol=1e-12, atol=0)
    assert result.centers.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_batch_of_problems_is_each_by_itself():
    x = torch.from_numpy(np.stack([blobs(50, 3, 4, seed) for seed in range(3)]))
    together = kmeans(x, 4, init=x[:, :4])
    for h, rows in enumerate(x):
        alone = kmeans(rows, 4, init=rows[:4])
        for field, expected in zip(together, alone, strict=True):
            assert torch.equal(field[h], expected)


def test_rows_are_drawn_in_proportion_to_their_potential():
    """An even grid of shares meets every row as often as its potential says, give or take the ends of the interval."""
    potential = torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    potential[1000:3500] = 0
    samples = Samples(torch.zeros(5000, 1))
    shares = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    owned, rows = draw(samples, potential, shares)
    expected = potential / potential.sum() * 4000
    assert owned.all() and (torch.bincount(rows, minlength=5000) - expected).abs().max() <= 1
    some = (torch.arange(5000) > 2100) & (torch.arange(5000) < 2200)
    _, ends = draw(samples, some.double(), torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [2101, 2199], "neither before the first nor past the last row of positive potential"
    assert draw(samples, torch.zeros(5000, dtype=torch.float64), shares) is None


def test_kmeans_plus_plus_starts_in_every_blob_and_as_well_as_sklearns():
    x = blobs(300, 2, 12, seed=4, spread=0.02)
    mine, theirs = [], []
    for seed in range(20):
        start = kmeans_plus_plus(Samples(x), 12, torch.Generator().manual_seed(seed)).numpy()
        assert all((row == x).all(1).any() for row in start), "starts are rows of X"
        theirs_start, _ = sklearn_cluster.kmeans_plusplus(x, 12, random_state=seed)
        for found, centers in ((mine, start), (theirs, theirs_start)):
            found.append(((x[:, None] - centers) ** 2).sum(-1).min(1).sum())
    # Both lie near 0.43 with a standard error of 1 to 2 percent; one blob missed would cost more than all the rest.
    assert np.mean(mine) < 1.15 * np.mean(theirs)


def test_rows_of_weight_zero_are_never_drawn():
    x = torch.arange(40.0)[:, None]
    samples = Samples(x, weights=(torch.arange(40) % 4 == 1).double())
    for rule in (kmeans_plus_plus, random_rows):
        start = rule(samples, 10, torch.Generator().manual_seed(0))
        assert sorted(start.flatten().tolist()) == list(range(1, 40, 4))
