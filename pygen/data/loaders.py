"""`load`: built-in data by name, and .npz, IDX, image-folder and text data by path, into one `Dataset`."""

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pygen.data.dataset import SPLITS, Dataset, split
from pygen.data.densities import DENSITIES
from pygen.data.idx import read_idx
from pygen.data.text import is_text, is_text_folder, load_text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
IDX_IMAGES = "*images*idx3*"
_UINT8_LEVELS = 256


def load(
    name_or_path: str | Path,
    *,
    levels: int | None = None,
    size: int | tuple[int, int] | None = None,
    level: str | None = None,
    window: int | None = None,
    min_count: int | None = None,
) -> Dataset:
    """Load a data set and split it, the same way for everybody.

    ================  =====================================================================================
    "digits"          scikit-learn's 1,797 real handwritten digits, 8 x 8, 17 levels, with labels
    "moons" ...       pairs of real numbers from a known density: `densities.DENSITIES` has the names
    FILE.npz          integer arrays `train`, and `valid`, `test` if they exist; or one array of any name
    FILE or folder    MNIST-style IDX, gzipped or not; `t10k-images...` beside `train-images...` is the test set
    folder            images (needs Pillow), in any depth of folders; grey if all are, else RGB
    FILE.txt          text, as windows of tokens that follow each other: `text.load_text`
    folder            with train.txt, valid.txt and test.txt: text, by words
    ================  =====================================================================================

    Without a test part, a tenth of the samples becomes one; without a validation part, a tenth of the rest. Of a text
    in one file the last 5 % are for the test, and the 5 % before them for validation.

    Args:
        name_or_path: a name, or a path.
        levels: how many values an element can have; by default 2 for data with nothing above 1, else 256 for 8-bit
            data, else the largest value + 1.
        size: resize the images of a folder to (height, width), or to a square.
        level, window, min_count: of a text: "character" or "word", how many tokens a window predicts, and how often a
            word must occur to be in the vocabulary; see `text.load_text`. A file with a level is read as text.

    Returns:
        A `Dataset` whose samples are (D,) or (C, H, W); integers, but for the densities.

    Raises:
        ValueError: an unknown name, a damaged or empty file, a wrong rank, or values that do not fit. OSError: the file
            cannot be read. RuntimeError: an optional package is missing.

    Example:
        >>> from pygen import data
        >>> data.load("digits").test.shape
        torch.Size([300, 1, 8, 8])
    """
    if str(name_or_path) in BUILT_IN:
        return BUILT_IN[str(name_or_path)]()
    path = Path(name_or_path)
    if not path.exists():
        raise ValueError(
            f"no data set or file {str(name_or_path)!r}; there is: {', '.join(BUILT_IN)}, "
            "or the path of a .npz file, an IDX file, a text or a folder of images"
        )
    told = level is not None or window is not None or min_count is not None
    if is_text_folder(path) if path.is_dir() else told or (path.suffix != ".npz" and is_text(path)):
        return load_text(path, level=level, window=window, min_count=min_count)
    if path.is_dir():
        idx = _idx_training_file(path)
        parts = _from_idx(idx) if idx else {"all": _from_images(path, size)}
    elif path.suffix == ".npz":
        parts = _from_npz(path)
    else:
        parts = _from_idx(path)
    source = {"name_or_path": str(path.resolve()), "levels": levels, "size": size}
    return replace(_assemble(path, parts, levels), source=source)


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError("the digits come with scikit-learn: pip install 'pygen[train]'") from error
    digits = load_digits()
    x = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    # Tests of 300 images: enough to tell densities apart, few enough to leave something to learn from.
    parts = 150 / len(x), 300 / len(x)
    train, valid, test = split(x, *parts)
    labels = dict(zip(SPLITS, split(torch.from_numpy(digits.target.astype(np.int64)), *parts), strict=True))
    return Dataset(train, valid, test, 17, (1, 8, 8), "digits", {"name_or_path": "digits"}, labels)


BUILT_IN: dict[str, Callable[[], Dataset]] = {"digits": _digits}
BUILT_IN |= {name: density.dataset for name, density in DENSITIES.items()}


def _from_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"all": loaded}
        with loaded as file:
            arrays = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error})") from error
    if "train" in arrays:
        return {name: arrays[name] for name in ("train", "valid", "test") if name in arrays}
    if len(arrays) != 1:
        names = ", ".join(sorted(arrays)) or "nothing"
        raise ValueError(f"{path}: must hold an array named train (and valid, test), or one array; it holds {names}")
    return {"all": next(iter(arrays.values()))}


def _idx_training_file(folder: Path) -> Path | None:
    files = sorted(folder.glob(IDX_IMAGES))
    return next((f for f in files if "train" in f.name), files[0] if files else None)


def _from_idx(path: Path) -> dict[str, np.ndarray]:
    tests = [p for p in sorted(path.parent.glob(IDX_IMAGES)) if p.name.startswith(("t10k", "test"))]
    if "train" in path.name and tests:
        return {"train": read_idx(path), "test": read_idx(tests[0])}
    return {"all": read_idx(path)}


def _from_images(folder: Path, size: int | tuple[int, int] | None) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise RuntimeError("reading images needs Pillow: pip install pillow") from error
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) and no IDX files in this folder")
    height_width = (size, size) if isinstance(size, int) else size
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                grey = image.mode in ("1", "L", "LA", "I;16")
                picture = image.convert("L" if grey else "RGB")
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"{file}: not a readable image ({error})") from error
        if height_width is not None:
            picture = picture.resize(height_width[::-1], Image.Resampling.BILINEAR)
        images.append(picture)
    mode = "L" if all(picture.mode == "L" for picture in images) else "RGB"
    sizes = {picture.size for picture in images}
    if len(sizes) > 1:
        raise ValueError(f"{folder}: images of {len(sizes)} different sizes; give a size to resize them to")
    x = np.stack([np.asarray(picture.convert(mode)) for picture in images])
    return x[:, None] if mode == "L" else x.transpose(0, 3, 1, 2)


def _assemble(path: Path, parts: dict[str, np.ndarray], levels: int | None) -> Dataset:
    tensors = {name: _integers(path, name, array) for name, array in parts.items()}
    if levels is None:
        highest = max(int(x.max()) for x in tensors.values())
        eight_bits = all(array.dtype == np.uint8 for array in parts.values())
        levels = 2 if highest <= 1 else _UINT8_LEVELS if eight_bits else highest + 1
    if levels <= _UINT8_LEVELS:
        tensors = {
            name: x.to(torch.uint8) if int(x.min()) >= 0 and int(x.max()) < levels else x for name, x in tensors.items()
        }
    if "all" in tensors:
        tensors["train"], tensors["test"] = split(tensors["all"], 0.1)
    if "test" not in tensors:
        tensors["train"], tensors["test"] = split(tensors["train"], 0.1)
    if "valid" not in tensors:
        tensors["train"], tensors["valid"] = split(tensors["train"], 0.1)
    train = tensors["train"]
    return Dataset(train, tensors["valid"], tensors["test"], levels, tuple(train.shape[1:]), path.stem)


def _integers(path: Path, name: str, array: np.ndarray) -> Tensor:
    """An array as uint8 or int64 (N, D) or (N, C, H, W)."""
    label = f"{path}: array {name}" if name != "all" else f"{path}"
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{label} must hold integers 0 .. levels - 1, got {array.dtype}")
    if array.ndim not in (2, 3, 4):
        raise ValueError(f"{label} must be (N, D), (N, H, W), (N, C, H, W) or (N, H, W, C), got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{label} is empty, got {array.shape}")
    # Bytes stay bytes: eight times less memory for the usual images.
    x = torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8 if array.dtype == np.uint8 else np.int64))
    if x.dim() == 3:
        x = x.unsqueeze(1)
    if x.dim() == 4 and x.size(-1) in (1, 3) and x.size(1) not in (1, 3):
        x = x.permute(0, 3, 1, 2).contiguous()
    return x
