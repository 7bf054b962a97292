"""How `KMeans` is used: data of every kind and size, reproducibility, scikit-learn's tools around it, bad input."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pygen.cluster import KMeans, NotFittedError, kmeans

ATTRIBUTES = ("cluster_centers_", "labels_", "inertia_", "n_iter_", "counts_")


def rows(n=5000, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) + 3 * rng.standard_normal((7, d))[rng.integers(7, size=n)]


def assert_same_bits(model, expected):
    for name in ATTRIBUTES:
        np.testing.assert_array_equal(np.asarray(getattr(model, name)), np.asarray(getattr(expected, name)), name)


class Counted:
    """An array of which only slices can be had; it counts rows."""

    def __init__(self, x, interrupt_after=None):
        self.x, self.shape, self.dtype = x, x.shape, x.dtype
        self.most, self.reads, self.interrupt_after = 0, 0, interrupt_after

    def __getitem__(self, where):
        assert isinstance(where, slice), "only slices of rows are asked for"
        self.reads += where.stop > where.start
        if self.reads == self.interrupt_after:
            raise KeyboardInterrupt
        self.most = max(self.most, where.stop - where.start)
        return self.x[where]


@pytest.mark.parametrize("options", ({}, {"metric": "cosine"}, {"temperature": 0.5}, {"init": "random", "n_init": 2}))
def test_no_bit_depends_on_the_chunk_size(options):
    x, weight = rows(40000), np.random.default_rng(1).random(40000)  # three blocks
    models = [
        KMeans(7, random_state=0, chunk_size=size, max_iter=5, **options).fit(x, sample_weight=weight)
        for size in (1, 20000, None)
    ]
    assert_same_bits(models[0], models[2])
    assert_same_bits(models[1], models[2])


def test_no_bit_depends_on_the_number_of_threads(two_threads):
    x = rows(20000, 20)
    model = KMeans(7, random_state=0, max_iter=5).fit(x)
    torch.set_num_threads(1)
    assert_same_bits(KMeans(7, random_state=0, max_iter=5).fit(x), model)


def test_a_memory_map_is_read_in_chunks_and_gives_what_the_array_gives(tmp_path):
    x = rows(20000).astype(np.float32)
    x.tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", np.float32, "r", shape=x.shape)
    counted = Counted(mapped)
    models = [KMeans(7, random_state=0, chunk_size=1, max_iter=4).fit(data) for data in (x, mapped, counted)]
    assert_same_bits(models[1], models[0])
    assert_same_bits(models[2], models[0])
    assert isinstance(models[1].labels_, np.ndarray) and models[1].labels_.dtype == np.int32
    for method in ("predict", "transform", "score"):
        np.testing.assert_array_equal(getattr(models[0], method)(counted), getattr(models[0], method)(x))
    assert counted.most == 16384


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss counts KiB on Linux alone")
def test_neither_x_nor_n_by_k_is_ever_in_memory_nor_scikit_learn():
    """A fit may hold labels (2 MiB), some chunks of 16384 rows, and K x D; X itself is 64 MiB and N x K 128."""
    script = Path(__file__).parent / "peak_memory.py"
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) < 48


@pytest.mark.filterwarnings("ignore:only")  # of bool there are few distinct rows
@pytest.mark.parametrize("dtype", ("uint8", "int16", "int64", "float16", ">f4", "bool"))
def test_numbers_of_any_kind_enter_exactly(dtype):
    x = (rows(200) * 5 + 30).clip(0, 200).round().astype(dtype)
    before = x.copy()
    model = KMeans(4, random_state=0).fit(x)
    expected = KMeans(4, random_state=0).fit(x.astype(model.cluster_centers_.dtype))
    assert model.cluster_centers_.dtype == (np.float64 if dtype == "int64" else np.float32)
    assert_same_bits(model, expected)
    np.testing.assert_array_equal(x, before)


def test_lists_and_views_are_data_too():
    x = rows(100)
    model = KMeans(3, init=x[:3]).fit(x)
    assert_same_bits(KMeans(3, init=x[:3].tolist()).fit(x.tolist()), model)
    assert_same_bits(KMeans(3, init=x[:3]).fit(np.asfortranarray(x)), model)
    assert_same_bits(KMeans(3, init=x[:3]).fit(torch.from_numpy(x)[:, [2, 1, 0]].flip(1)), model)


def test_tensors_give_tensors_and_arrays_arrays():
    x = torch.from_numpy(rows(100)).float()
    model = KMeans(3, random_state=0).fit(x)
    assert isinstance(model.cluster_centers_, torch.Tensor) and model.labels_.dtype == torch.int64
    assert model.transform(x).dtype == torch.float32
    labels = model.predict(x.numpy())
    assert labels.dtype == np.int32 and (labels == model.labels_.numpy()).all()
    assert not model.cluster_centers_.requires_grad
    KMeans(3, random_state=0).fit(x.requires_grad_())


def test_the_same_seed_is_the_same_result():
    x = rows(300)
    model = KMeans(5, random_state=7).fit(x)
    assert_same_bits(KMeans(5, random_state=7).fit(x), model)
    assert_same_bits(KMeans(5, random_state=np.int64(7)).fit(torch.from_numpy(x)), model)
    fits = []
    for state in (np.random.RandomState, np.random.default_rng, lambda seed: torch.Generator().manual_seed(seed)):
        assert_same_bits(KMeans(5, random_state=state(3)).fit(x), KMeans(5, random_state=state(3)).fit(x))
        generator = state(3)
        fits += [KMeans(5, n_init=1, init="random", max_iter=1, random_state=generator).fit(x) for _ in range(2)]
    assert fits[0].inertia_ != fits[1].inertia_, "a generator goes on"
    torch.manual_seed(5)
    first = kmeans(torch.from_numpy(x), 5).centers
    torch.manual_seed(5)
    assert torch.equal(kmeans(torch.from_numpy(x), 5).centers, first)


def test_of_several_starts_the_best_is_kept():
    x = rows(400)
    single = [KMeans(7, init="random", n_init=1, random_state=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert single[0].fit(x).inertia_ == single[1].fit(x).inertia_
    best = KMeans(7, init="random", random_state=0).fit(x)  # ten starts
    assert best.inertia_ <= KMeans(7, init="random", n_init=1, random_state=0).fit(x).inertia_
    assert best.inertia_ == pytest.approx(-best.score(x), rel=1e-12)


def test_a_start_from_some_rows_is_a_start_of_rows():
    x = rows(4000)
    model = KMeans(7, init_size=100, random_state=0).fit(x)
    assert model.inertia_ < 1.5 * KMeans(7, random_state=0).fit(x).inertia_
    assert_same_bits(KMeans(7, init_size=100, random_state=0, chunk_size=1).fit(Counted(x)), model)


def test_an_interrupted_fit_keeps_its_last_centres():
    x = rows(2048)
    model = KMeans(7, init=x[:7], tol=0).fit(x)
    with pytest.raises(KeyboardInterrupt):
        model.fit(Counted(x, interrupt_after=4))  # one pass for the variance and two for iterations
    expected = KMeans(7, init=x[:7], tol=0, max_iter=2).fit(x)
    np.testing.assert_array_equal(model.cluster_centers_, expected.cluster_centers_)
    assert model.n_iter_ == 2 and not hasattr(model, "labels_")
    assert model.predict(x).shape == (2048,)


def test_a_failed_call_changes_nothing():
    x = rows(100)
    model = KMeans(3, random_state=0).partial_fit(x)
    before = pickle.loads(pickle.dumps(model))
    for bad in (np.full((5, 3), np.nan), np.zeros((5, 4))):
        for call in (model.partial_fit, model.predict):
            with pytest.raises(ValueError):
                call(bad)
    assert_same_bits_of_partial(model, before)


def assert_same_bits_of_partial(model, expected):
    for name in ("cluster_centers_", "labels_", "inertia_", "counts_", "n_steps_"):
        np.testing.assert_array_equal(getattr(model, name), getattr(expected, name))


def test_scikit_learns_tools_take_it_for_one_of_theirs():
    base = pytest.importorskip("sklearn.base")
    from sklearn.exceptions import NotFittedError as theirs
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.utils.validation import check_is_fitted

    x = rows(150)
    model = KMeans(3, random_state=0, init=x[:3], metric="cosine")
    copy = base.clone(model)
    assert copy is not model and copy.get_params()["metric"] == "cosine" and base.is_clusterer(model)
    with pytest.raises(theirs):
        check_is_fitted(copy)
    check_is_fitted(model.fit(x))
    assert not hasattr(base.clone(model), "cluster_centers_")
    pipeline = make_pipeline(StandardScaler(), KMeans(3, random_state=0)).fit(x)
    assert pipeline.predict(x).shape == (150,) and pipeline.transform(x).shape == (150, 3)
    assert list(pipeline.get_feature_names_out()) == ["kmeans0", "kmeans1", "kmeans2"]
    assert "KMeans(n_clusters=3, random_state=0)" in repr(pipeline)
    pipeline.set_params(kmeans__n_clusters=2).fit(x)
    assert len(pipeline[-1].cluster_centers_) == 2
    assert GridSearchCV(KMeans(random_state=0), {"n_clusters": [2, 5]}, cv=2).fit(x).best_params_ == {"n_clusters": 5}


def test_fit_predict_and_fit_transform_are_both_calls():
    x = rows(80)
    model = KMeans(4, random_state=0)
    np.testing.assert_array_equal(model.fit_predict(x), model.predict(x))
    np.testing.assert_array_equal(KMeans(4, random_state=0).fit_transform(x), model.transform(x))


X = np.zeros((6, 3))
BAD = {
    "n_clusters=9": (KMeans(9), X, r"X must have at least n_clusters=9 samples, got 6"),
    "n_clusters=0": (KMeans(0), X, r"n_clusters must be at least 1, got 0"),
    "n_clusters=2.5": (KMeans(2.5), X, r"n_clusters must be an int, got 2.5"),
    "max_iter": (KMeans(2, max_iter=0), X, r"max_iter must be at least 1, got 0"),
    "tol": (KMeans(2, tol=-1.0), X, r"tol must be at least 0, got -1.0"),
    "n_init": (KMeans(2, n_init=0), X, r"n_init must be at least 1, got 0"),
    "init": (KMeans(2, init="best"), X, r"init must be one of k-means\+\+, random or the centres, got 'best'"),
    "init's shape": (KMeans(2, init=X), X, r"init must be \(2, 3\), a centre for each cluster, got \(6, 3\)"),
    "init's NaN": (KMeans(2, init=X[:2] + np.nan), X, r"init must be finite"),
    "init_size": (KMeans(4, init_size=3), X, r"init_size must be at least 4, got 3"),
    "metric": (KMeans(2, metric="dot"), X, r"metric must be one of euclidean, cosine, got 'dot'"),
    "temperature": (KMeans(2, temperature=0.0), X, r"temperature must be positive, or None for hard .* got 0.0"),
    "chunk_size": (KMeans(2, chunk_size=0), X, r"chunk_size must be at least 1, got 0"),
    "sync": (KMeans(2, sync="all"), X, r"sync must be True, False or a process group, got str"),
    "random_state": (KMeans(2, random_state="x"), X, r"random_state must be None, an int, .* got str"),
    "one row": (KMeans(2), X[0], r"X must be \(samples, features\), got shape \(3,\)"),
    "no feature": (KMeans(2), X[:, :0], r"X must have a feature, got shape \(6, 0\)"),
    "NaN": (KMeans(2), X + [0, np.nan, 0], r"X must be finite, got 6 rows with NaN or infinity"),
    "text": (KMeans(2), X.astype(str), r"X must be of real numbers, got <U32"),
    "complex": (KMeans(2), torch.zeros(6, 3, dtype=torch.complex64), r"X must be of real numbers, got torch.complex64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_sentence(name):
    model, x, message = BAD[name]
    for call in (model.fit, model.partial_fit):
        with pytest.raises((ValueError, TypeError), match=message):
            call(x)
    assert not hasattr(model, "cluster_centers_")


def test_bad_weights_and_bad_calls_are_sentences():
    model, x = KMeans(2, random_state=0), rows(6)
    for weight, message in (
        (np.ones(5), r"sample_weight must be \(6,\), a number for each sample, got \(5,\)"),
        (-np.ones(6), "sample_weight must be finite and not negative"),
        (np.full(6, np.nan), "sample_weight must be finite and not negative"),
        (np.zeros(6), "sample_weight must not be 0 for all samples"),
    ):
        for call in (model.fit, model.partial_fit):
            with pytest.raises(ValueError, match=message):
                call(x, sample_weight=weight)
    for call in (model.predict, model.transform, model.score, lambda x: model.predict_soft(x, 1.0)):
        with pytest.raises(NotFittedError, match="this KMeans has no centres yet: call fit or partial_fit first"):
            call(x)
    model.fit(x)
    for call in (model.predict, model.transform, model.score, model.partial_fit):
        with pytest.raises(ValueError, match="X must have 3 features, as in fit, got 2"):
            call(x[:, :2])
    with pytest.raises(ValueError, match="X must be finite, got NaN or infinity in row 4"):
        model.predict(np.where(np.arange(6)[:, None] == 4, np.inf, x))
    with pytest.raises(ValueError, match="predict_soft needs a temperature"):
        model.predict_soft(x)
    with pytest.raises(ValueError, match="KMeans has no parameter 'k'; it has n_clusters, init"):
        model.set_params(k=3)
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got torch.int64"):
        kmeans(torch.zeros(6, 2, dtype=torch.int64), 2)
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match="X must be dense, got csr_matrix"):
        model.fit(sparse.csr_matrix(x))
    with pytest.warns(RuntimeWarning, match="init gives the centres: one start instead of n_init=5"):
        KMeans(2, init=x[:2], n_init=5).fit(x)
