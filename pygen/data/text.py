"""Text as a data set: files, cut into the windows of a language model, and the vocabulary between strings and tokens.

`loaders.load` calls `load_text`; `pygen.models.onlstm` keeps the vocabulary with its weights.
"""

import codecs
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pygen.data.dataset import SPLITS, Dataset

LEVELS = ("character", "word")
WINDOWS = {"character": 100, "word": 70}  # tokens that a gradient looks back; 70 is the published one
EOS, UNKNOWN = "<eos>", "<unk>"  # of words: the end of a line, and whatever is not in the vocabulary
UNKNOWN_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_SUFFIXES = (".txt", ".text")
_HEAD = 4096  # bytes that are looked at to tell text from an array
_PART = 0.05  # of the text: each of validation and test
_SHOWN = 5  # unknown symbols that an error names
_BYTES = 256


class Vocabulary:
    """The symbols of a text and their numbers: `encode` and `decode` between strings and tokens.

    Args:
        symbols: all different; the number of a symbol is its place.
        level: "character", or "word": words are what white space separates, and a line ends in `<eos>`.

    Raises:
        ValueError: no symbols, the same one twice, one that the level cannot have, or an unknown level.

    Example:
        >>> from pygen.data.text import Vocabulary
        >>> words = Vocabulary(["a", "b", "<eos>", "<unk>"], "word")
        >>> words.encode("a b\\na c")
        tensor([0, 1, 2, 0, 3])
        >>> words.decode([0, 1, 2, 0, 3])
        'a b\\na <unk>'
    """

    def __init__(self, symbols: Sequence[str], level: str) -> None:
        check_level(level)
        self.symbols, self.level = list(symbols), level
        self.numbers = {symbol: number for number, symbol in enumerate(self.symbols)}
        if not self.symbols or len(self.numbers) < len(self.symbols):
            raise ValueError(
                f"a vocabulary must be different symbols, one at least, got {len(self.symbols)}, of which "
                f"{len(self.numbers)} differ"
            )
        wrong = [s for s in self.symbols if not isinstance(s, str) or (len(s) != 1 if level == "character" else not s)]
        if wrong:
            raise ValueError(f"a {level} of the vocabulary must be one {level}, got {wrong[0]!r}")
        self._unknown = self.numbers.get(UNKNOWN_CHARACTER if level == "character" else UNKNOWN)

    def __len__(self) -> int:
        return len(self.symbols)

    def split(self, text: str) -> Sequence[str]:
        """The symbols of a text, known or not: its characters, or its words with `<eos>` between lines."""
        return split(text, self.level)

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, int64 (T,).

        Raises:
            ValueError: symbols that are not in the vocabulary, which has none for the unknown either.
        """
        return torch.from_numpy(self.numbers_of(self.split(text)))

    def numbers_of(self, symbols: Sequence[str]) -> np.ndarray:
        """int64 (T,), of symbols of this level."""
        default = -1 if self._unknown is None else self._unknown
        get = self.numbers.get
        found = np.fromiter((get(symbol, default) for symbol in symbols), np.int64, len(symbols))
        if self._unknown is None and (found < 0).any():
            missing = list(dict.fromkeys(symbol for symbol in symbols if symbol not in self.numbers))
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise ValueError(
                f"not in the vocabulary of {len(self)} {self.level}s: "
                f"{', '.join(repr(symbol) for symbol in missing[:_SHOWN])}{more}"
            )
        return found

    def decode(self, tokens: Tensor | Iterable[int]) -> str:
        """The text of tokens (T,).

        Raises:
            ValueError: a number that no symbol has.
        """
        numbers = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(self):
            raise ValueError(f"decode: tokens must be in 0 .. {len(self) - 1}, got {min(numbers)} .. {max(numbers)}")
        symbols = [self.symbols[number] for number in numbers]
        if self.level == "character":
            return "".join(symbols)
        lines: list[list[str]] = [[]]
        for symbol in symbols:
            if symbol == EOS:
                lines.append([])
            else:
                lines[-1].append(symbol)
        return "\n".join(" ".join(line) for line in lines)


def check_level(level: str) -> None:
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")


def split(text: str, level: str) -> Sequence[str]:
    """A text as characters, or as words with `<eos>` in place of each line break."""
    if level == "character":
        return text
    first, *others = text.split("\n")
    words = first.split()
    for line in others:
        words.append(EOS)
        words += line.split()
    return words


def is_text(path: Path) -> bool:
    """Whether a file is called text, or looks like it: UTF-8 without a zero byte."""
    if path.suffix.lower() in _SUFFIXES:
        return True
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut in two
    except UnicodeDecodeError:
        return False
    return bool(head) and b"\0" not in head


def is_text_folder(path: Path) -> bool:
    """Whether a folder has a train.txt: Penn Treebank's layout, with valid.txt and test.txt beside it."""
    return (path / "train.txt").is_file()


def load_text(
    path: Path, *, level: str | None = None, window: int | None = None, min_count: int | None = None
) -> Dataset:
    """A text as windows of `window` + 1 tokens behind each other, of which each begins with the last of the one before.

    Inputs are `x[:, :-1]` and what is to be predicted `x[:, 1:]`, so that every token but the first is predicted once.
    What is left behind a part's last whole window is not used.

    A file is cut by position: the first 90 % to train on, then 5 % for validation and 5 % for the test (at least a
    window each). A folder has train.txt, valid.txt and test.txt.

    Args:
        path: a UTF-8 file, or such a folder.
        level: "character" (by default of a file) or "word" (of a folder).
        window: how many tokens a window predicts; 100 characters or 70 words by default.
        min_count: words that are rarer in the training part become `<unk>`, as do those that are not in it. By default
            2, or 1 for a text that has `<unk>` in it already. Characters are all in the vocabulary, wherever they
            occur, unless min_count is given; the others then become U+FFFD.

    Returns:
        A `Dataset` of (N, window + 1) with `vocabulary` and `level`: characters in the order of their numbers, words in
        the order of their first appearance.

    Raises:
        ValueError: not UTF-8, empty, too short, or an option out of its range. OSError: the file cannot be read.
    """
    level = level or ("word" if path.is_dir() else "character")
    check_level(level)
    window = WINDOWS[level] if window is None else window
    if window < 1 or (min_count is not None and min_count < 1):
        raise ValueError(f"window and min_count must be at least 1, got {window} and {min_count}")
    texts = [read_text(path / f"{name}.txt") for name in SPLITS] if path.is_dir() else [read_text(path)]
    parts = [_closed(split(text, level), level) for text in texts]
    if len(parts) == 1:
        parts = _by_position(path, parts[0], window, level)
    vocabulary = _vocabulary(parts, level, min_count)
    train, valid, test = (
        _windows(path, name, vocabulary.numbers_of(part), window, level, len(vocabulary))
        for name, part in zip(SPLITS, parts, strict=True)
    )
    source = {"name_or_path": str(path.resolve()), "level": level, "window": window, "min_count": min_count}
    symbols = tuple(vocabulary.symbols)
    return Dataset(train, valid, test, len(symbols), (window + 1,), path.stem, source, vocabulary=symbols, level=level)


def read_text(path: Path) -> str:
    r"""A UTF-8 file as text, with \n between lines whatever the file has.

    Raises:
        ValueError: not UTF-8, or empty. OSError: the file cannot be read.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text (byte 0x{raw[error.start]:02x} at position {error.start}); "
            "convert it, as with: iconv -f latin1 -t utf-8"
        ) from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; a text is needed")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _closed(symbols: Sequence[str], level: str) -> Sequence[str]:
    """Words of a file whose last line has its end, also where the file forgot it."""
    return [*symbols, EOS] if level == "word" and symbols[-1] != EOS else symbols


def _by_position(path: Path, symbols: Sequence[str], window: int, level: str) -> list[Sequence[str]]:
    held_out = max(window + 1, round(len(symbols) * _PART))
    least = 2 * (window + 1) + 2 * window + 1  # validation and test with a window each, and training with two
    if len(symbols) < least:
        raise ValueError(
            f"{path}: has {len(symbols)} {level}s, shorter than two windows of {window} to train on and one each for "
            f"validation and test, {least} {level}s; give a longer text or a smaller window"
        )
    first, second = len(symbols) - 2 * held_out, len(symbols) - held_out
    return [symbols[:first], symbols[first:second], symbols[second:]]


def _vocabulary(parts: Sequence[Sequence[str]], level: str, min_count: int | None) -> Vocabulary:
    if level == "character" and min_count is None:
        return Vocabulary(sorted(set().union(*parts)), level)
    counts = Counter(parts[0])  # in the order of first appearance
    if min_count is None:
        min_count = 1 if UNKNOWN in counts else 2
    special = (EOS, UNKNOWN) if level == "word" else (UNKNOWN_CHARACTER,)
    kept = [symbol for symbol, count in counts.items() if count >= min_count or symbol in special]
    if level == "character":
        kept.sort()
    return Vocabulary([*kept, *(symbol for symbol in special if symbol not in counts)], level)


def _windows(path: Path, name: str, tokens: np.ndarray, window: int, level: str, levels: int) -> Tensor:
    n = (len(tokens) - 1) // window
    least = 2 if name == "train" else 1
    if n < least:
        raise ValueError(
            f"{path}: the {name} part has {len(tokens)} {level}s, too few for {least} window{'s' * (least > 1)} of "
            f"{window} + 1; give a longer text or a smaller window"
        )
    part = torch.from_numpy(tokens.astype(np.uint8) if levels <= _BYTES else tokens)
    return part[: n * window + 1].unfold(0, window + 1, window)
