"""Loading: what is read is what was written, splits are fixed and disjoint, and every bad file is a sentence."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from pygen import data


def idx_bytes(array):
    """The IDX format, from its description; big-endian throughout."""
    codes = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}
    header = struct.pack(f">HBB{array.ndim}I", 0, codes[array.dtype.name], array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def pixels(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def rows(x):
    return sorted(map(tuple, x.flatten(1).tolist()))


def test_digits_are_scikit_learns_split_once_and_for_all():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    digits = data.load("digits")
    assert (digits.shape, digits.levels, digits.name) == ((1, 8, 8), 17, "digits")
    assert [len(x) for _, x in digits.splits()] == [1347, 150, 300]
    everything = torch.cat([x for _, x in digits.splits()])
    assert rows(everything) == rows(torch.from_numpy(load_digits().images))
    assert torch.equal(digits.test, data.load("digits").test)


def test_npz_with_named_parts_keeps_them(tmp_path):
    parts = {"train": pixels(20, 4, 4), "valid": pixels(5, 4, 4, seed=1), "test": pixels(6, 4, 4, seed=2)}
    np.savez(tmp_path / "mine.npz", **parts, labels=np.arange(3))
    dataset = data.load(tmp_path / "mine.npz")
    assert (dataset.shape, dataset.levels, dataset.name) == ((1, 4, 4), 256, "mine")
    for name, x in dataset.splits():
        assert torch.equal(x.squeeze(1), torch.from_numpy(parts[name])) and x.dtype == torch.uint8


def test_one_array_is_split_into_three_disjoint_parts_the_same_way_every_time(tmp_path):
    x = np.arange(1000)[:, None] * np.ones((1, 3), int)
    np.savez(tmp_path / "x.npz", anything=x)
    dataset, again = (data.load(tmp_path / "x.npz") for _ in range(2))
    assert [len(part) for _, part in dataset.splits()] == [810, 90, 100]
    assert torch.cat([part[:, 0] for _, part in dataset.splits()]).sort().values.tolist() == list(range(1000))
    assert torch.equal(dataset.valid, again.valid) and dataset.levels == 1000


def test_the_source_of_a_dataset_loads_it_again(tmp_path):
    np.savez(tmp_path / "x.npz", pixels(30, 3))
    dataset = data.load(tmp_path / "x.npz", levels=300)
    assert torch.equal(data.load(**dataset.source).train, dataset.train) and dataset.levels == 300
    assert data.load(**data.load("digits").source).name == "digits"


@pytest.mark.parametrize(
    ("array", "shape", "levels"),
    (
        (np.ones((9, 5), bool), (5,), 2),
        (np.full((9, 5), 7, np.int16), (5,), 8),
        (pixels(9, 3, 6, 5), (3, 6, 5), 256),
        (pixels(9, 6, 5, 3), (3, 6, 5), 256),
    ),
)
def test_shapes_and_levels_are_found(tmp_path, array, shape, levels):
    np.savez(tmp_path / "x.npz", array)
    dataset = data.load(tmp_path / "x.npz")
    assert (dataset.shape, dataset.levels) == (shape, levels)


def test_channels_last_pixels_land_where_they_belong(tmp_path):
    x = pixels(9, 6, 5, 3)
    np.savez(tmp_path / "x.npz", train=x, valid=x, test=x)
    assert torch.equal(data.load(tmp_path / "x.npz").train, torch.from_numpy(x).permute(0, 3, 1, 2))


@pytest.mark.parametrize("dtype", ("uint8", "int8", "int16", "int32", "float32", "float64"))
def test_idx_reads_every_type(tmp_path, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    (tmp_path / "x").write_bytes(idx_bytes(array))
    read = data.read_idx(tmp_path / "x")
    assert read.dtype == np.dtype(dtype) and np.array_equal(read, array)


@pytest.mark.parametrize("compress", (False, True))
def test_mnist_style_files_by_folder_and_by_name(tmp_path, compress):
    train, test, suffix = pixels(20, 5, 4), pixels(7, 5, 4, seed=1), ".gz" if compress else ""
    for name, array in (("train-images-idx3-ubyte", train), ("t10k-images-idx3-ubyte", test)):
        raw = idx_bytes(array)
        (tmp_path / (name + suffix)).write_bytes(gzip.compress(raw) if compress else raw)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(20, np.uint8)))
    for path in (tmp_path, tmp_path / f"train-images-idx3-ubyte{suffix}"):
        dataset = data.load(path)
        assert rows(torch.cat((dataset.train, dataset.valid))) == rows(torch.from_numpy(train))
        assert torch.equal(dataset.test.squeeze(1), torch.from_numpy(test)) and dataset.shape == (1, 5, 4)


def test_image_folder_grey_colour_and_resized(tmp_path):
    image = pytest.importorskip("PIL.Image")
    grey, colour = tmp_path / "grey" / "deeper", tmp_path / "colour"
    grey.mkdir(parents=True)
    colour.mkdir()
    originals = pixels(12, 6, 5)
    for i, x in enumerate(originals):
        image.fromarray(x).save(grey / f"{i:02}.png")
        image.fromarray(np.stack([x, x, x], -1) if i else x).save(colour / f"{i:02}.png")
    dataset = data.load(tmp_path / "grey")
    assert dataset.shape == (1, 6, 5)
    assert rows(torch.cat([x for _, x in dataset.splits()])) == rows(torch.from_numpy(originals))
    assert data.load(colour).shape == (3, 6, 5)
    assert data.load(colour, size=4).shape == (3, 4, 4)
    assert data.load(colour, size=(4, 8)).shape == (3, 4, 8)
    image.fromarray(pixels(1, 9, 9)[0]).save(grey / "other.png")
    with pytest.raises(ValueError, match="2 different sizes; give a size"):
        data.load(tmp_path / "grey")
    (grey / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.png: not a readable image"):
        data.load(tmp_path / "grey")


def test_omniglot_by_path():
    folder = os.environ.get("PYGEN_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data"
    path = Path(folder) / "omniglot28.npz"
    if not path.exists():
        pytest.skip("omniglot28.npz is not here; PYGEN_TEST_DATA names the folder that holds it")
    dataset = data.load(path)
    assert (dataset.shape, dataset.levels, len(dataset.test)) == ((1, 28, 28), 256, 484)
    assert len(dataset.train) + len(dataset.valid) == 4356


def npz_of(**arrays):
    def write(path):
        np.savez(path, **arrays)

    return write


BAD_NPZ = {
    "empty file": (lambda path: path.write_bytes(b""), "not a readable .npz file"),
    "text": (lambda path: path.write_text("hello"), "not a readable .npz file"),
    "objects": (npz_of(train=np.array([{}, {}])), "not a readable .npz file"),
    "nothing in it": (npz_of(), "it holds nothing"),
    "no train": (npz_of(a=pixels(3, 2), b=pixels(3, 2)), "array named train .* it holds a, b"),
    "real numbers": (npz_of(train=np.zeros((4, 3))), "must hold integers 0 .. levels - 1, got float64"),
    "one dimension": (npz_of(train=np.zeros(4, int)), r"must be \(N, D\).*got \(4,\)"),
    "five dimensions": (npz_of(train=np.zeros((1, 1, 1, 1, 1), int)), r"got \(1, 1, 1, 1, 1\)"),
    "no samples": (npz_of(train=np.zeros((0, 3), int)), r"is empty, got \(0, 3\)"),
    "one sample": (npz_of(train=np.zeros((1, 3), int)), "is empty; each of train, valid and test needs a sample"),
    "negative": (npz_of(train=np.full((40, 3), -1)), r"must be in 0 \.\. .*, got -1"),
    "other shape": (npz_of(train=pixels(40, 3), test=pixels(4, 5)), r"test must be integers \(N, 3\), got .*\(4, 5\)"),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz_is_a_sentence(tmp_path, case):
    write, words = BAD_NPZ[case]
    path = tmp_path / "bad.npz"
    write(path)
    with pytest.raises(ValueError, match=words) as error:
        data.load(path)
    assert "bad" in str(error.value), "the sentence names the file"


def test_truncated_npz_is_a_sentence(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, train=pixels(50, 8, 8))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="not a readable .npz file"):
        data.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    (
        (lambda raw: b"", "not an IDX file"),
        (lambda raw: b"\1" + raw[1:], "not an IDX file"),
        (lambda raw: raw[:2] + b"\x55" + raw[3:], "not an IDX file"),
        (lambda raw: raw[:9], "its header of 16 bytes is not complete"),
        (lambda raw: raw[:-1], r"its header \(9, 4, 4\) asks for 160 bytes, it has 159"),
        (lambda raw: raw + b"\0", "asks for 160 bytes, it has 161"),
        (lambda raw: gzip.compress(raw)[:-12], "damaged gzip file"),
    ),
)
def test_bad_idx_is_a_sentence(tmp_path, change, words):
    path = tmp_path / "images"
    path.write_bytes(change(idx_bytes(pixels(9, 4, 4))))
    with pytest.raises(ValueError, match=words):
        data.load(path)


def test_unknown_name_lists_what_exists_and_an_empty_folder_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no data set or file 'digit'; there is: digits"):
        data.load("digit")
    with pytest.raises(ValueError, match="no images"):
        data.load(tmp_path)


def test_values_above_the_levels_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", pixels(40, 4))
    with pytest.raises(ValueError, match=r"must be in 0 \.\. 15, got"):
        data.load(tmp_path / "x.npz", levels=16)


def test_unreadable_file_is_an_os_error(tmp_path):
    path = tmp_path / "x.npz"
    path.symlink_to(tmp_path / "x.npz")
    with pytest.raises((OSError, ValueError)):
        data.load(path)
