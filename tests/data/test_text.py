"""Texts as data: what becomes a token, where a text is cut, and what a file that is none answers."""

import pytest
import torch

from pygen import data
from pygen.data.text import Vocabulary

LETTERS = "the cat sat on the mat\n" * 40


@pytest.fixture
def write(tmp_path):
    def write(text, name="text.txt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def tokens_of(windows):
    """The text that windows were cut from."""
    return torch.cat((windows[0, :1], windows[:, 1:].flatten()))


def test_windows_follow_each_other_and_share_one_token(write):
    found = data.load(write(LETTERS), window=7)
    for _, x in found.splits():
        assert x.shape[1:] == (8,) == found.shape and torch.equal(x[1:, 0], x[:-1, -1])


def test_a_file_is_cut_by_position_into_90_5_and_5_percent(write):
    text = "".join(chr(ord("a") + i % 26) if i % 7 else str(i % 10) for i in range(2000))
    found = data.load(write(text), window=10)
    vocabulary = Vocabulary(found.vocabulary, found.level)
    parts = [vocabulary.decode(tokens_of(x)) for _, x in found.splits()]
    for part, whole in zip(parts, (text[:1800], text[1800:1900], text[1900:]), strict=True):
        assert whole.startswith(part) and len(whole) - len(part) < 10, "only an incomplete window is left out"


def test_characters_are_numbered_by_their_code_points_wherever_they_occur(write):
    found = data.load(write(LETTERS + "zäß€"), window=5)
    assert found.vocabulary == tuple(sorted(set(LETTERS + "zäß€"))) and found.level == "character"
    assert found.levels == len(found.vocabulary) and found.train.dtype == torch.uint8


def test_words_are_numbered_by_first_appearance_and_lines_end_in_eos(write):
    found = data.load(write("b a\n\na b c" * 30), level="word", window=4, min_count=1)
    assert found.vocabulary[:3] == ("b", "a", "<eos>") and found.vocabulary[-1] == "<unk>"
    assert tokens_of(found.train)[:5].tolist() == [0, 1, 2, 2, 1]


def test_rare_words_and_those_of_other_parts_are_unknown(write):
    text = "often rare " + "often seldom " * 100 + "new " * 9
    found = data.load(write(text), level="word", window=4)
    assert set(found.vocabulary) == {"often", "seldom", "<eos>", "<unk>"}
    unknown = found.vocabulary.index("<unk>")
    assert tokens_of(found.train)[1] == unknown and unknown in tokens_of(found.test)
    everything = data.load(write(text), level="word", window=4, min_count=1)
    assert "rare" in everything.vocabulary and "new" not in everything.vocabulary


def test_a_text_with_unk_in_it_keeps_its_rare_words(write):
    """Penn Treebank comes with `<unk>` for them already."""
    found = data.load(write("once <unk> " + "a b " * 60), level="word", window=4)
    assert "once" in found.vocabulary and found.vocabulary.count("<unk>") == 1


def test_rare_characters_become_one_where_min_count_is_given(write):
    found = data.load(write("ab" * 100 + "ß"), window=3, min_count=2)
    assert found.vocabulary == ("a", "b", "\N{REPLACEMENT CHARACTER}")


def test_a_folder_with_train_valid_and_test_is_read_by_words(tmp_path):
    for name, text in (("train", "a b c\n" * 9), ("valid", "b c\n" * 4), ("test", "c <unk>\n" * 4)):
        (tmp_path / f"{name}.txt").write_text(text)
    found = data.load(tmp_path, window=3, min_count=1)
    assert found.level == "word" and found.vocabulary == ("a", "b", "c", "<eos>", "<unk>")
    assert tokens_of(found.test)[:4].tolist() == [2, 4, 3, 2]
    assert len(found.train) == (4 * 9 - 1) // 3


def test_more_than_256_symbols_are_int64(write):
    text = "".join(chr(0x4E00 + i) for i in range(300)) * 5
    assert data.load(write(text), window=5).train.dtype == torch.int64


def test_line_ends_of_every_system_and_a_byte_order_mark_are_the_same_text(write):
    plain = data.load(write("a b\nc\n" * 50), window=5)
    for other in ("a b\r\nc\r\n" * 50, "a b\rc\r" * 50, "\ufeff" + "a b\nc\n" * 50):
        found = data.load(write(other), window=5)
        assert found.vocabulary == plain.vocabulary and torch.equal(found.train, plain.train)


def test_any_utf8_file_is_text_and_a_level_makes_every_file_one(write):
    assert data.load(write(LETTERS, "README"), window=5).level == "character"
    # A character of three bytes lies across the place where the look at the file ends.
    assert data.load(write("x" + "€" * 4000, "notes"), window=5).level == "character"
    assert data.load(write(LETTERS + "\0", "with-a-zero"), level="character", window=5).levels == len(set(LETTERS)) + 1


def test_the_source_of_a_text_loads_it_again(write):
    found = data.load(write(LETTERS), level="word", window=6, min_count=3)
    again = data.load(**found.source)
    assert again.vocabulary == found.vocabulary and torch.equal(again.train, found.train)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    (
        (b"", {}, "text.txt: the file is empty; a text is needed"),
        (b" \n\n", {}, "text.txt: the file is empty"),
        ("schön".encode("latin1") * 90, {}, r"not UTF-8 text \(byte 0xf6 at position 3\); convert it"),
        (b"\x89PNG" * 90, {}, r"not UTF-8 text \(byte 0x89 at position 0\)"),
        (
            b"too short",
            {},
            r"has 9 characters, shorter than two windows of 100 to train on.*403 characters; give a lon",
        ),
        (b"a b c " * 9, {"level": "word"}, "has 28 words, shorter than two windows of 70"),
        (b"abc" * 99, {"level": "byte"}, "level must be one of character, word, got 'byte'"),
        (b"abc" * 99, {"window": 0}, "window and min_count must be at least 1, got 0 and None"),
        (b"abc" * 99, {"window": 9, "min_count": 0}, "window and min_count must be at least 1, got 9 and 0"),
    ),
)
def test_a_file_that_is_no_text_is_a_sentence(write, content, options, words):
    with pytest.raises(ValueError, match=words):
        data.load(write(content), **options)


def test_the_shortest_text_has_two_windows_to_train_on(write):
    least = 2 * 8 + 2 * 7 + 1
    found = data.load(write("a" * least), window=7)
    assert [len(x) for _, x in found.splits()] == [2, 1, 1]
    with pytest.raises(ValueError, match=f"has {least - 1} characters, shorter"):
        data.load(write("a" * (least - 1)), window=7)


def test_a_part_of_a_folder_that_is_too_short_or_missing_is_named(tmp_path):
    (tmp_path / "train.txt").write_text("a b c\n" * 9)
    with pytest.raises(OSError, match="valid.txt"):
        data.load(tmp_path, window=3)
    (tmp_path / "valid.txt").write_text("a\n")
    (tmp_path / "test.txt").write_text("a b c\n" * 9)
    with pytest.raises(ValueError, match=r"the valid part has 2 words, too few for 1 window of 3 \+ 1"):
        data.load(tmp_path, window=3)


@pytest.mark.parametrize("text", ("", "a", "a b", "a b\nb a\n", "\n\n", "a\n\nb"))
def test_decode_is_the_inverse_of_encode(text):
    for vocabulary in (Vocabulary(["a", "b", " ", "\n"], "character"), Vocabulary(["a", "b", "<eos>"], "word")):
        tokens = vocabulary.encode(text)
        assert tokens.dtype == torch.int64 and tokens.dim() == 1
        assert vocabulary.decode(tokens) == text


def test_unknown_symbols_are_named_where_nothing_stands_for_them():
    with pytest.raises(ValueError, match="not in the vocabulary of 2 characters: 'x', 'y', 'z', '1', '2' and 1 more"):
        Vocabulary("ab", "character").encode("axxyz123")
    with pytest.raises(ValueError, match="not in the vocabulary of 1 words: 'b'"):
        Vocabulary(["a"], "word").encode("a b")
    assert Vocabulary(["a", "\N{REPLACEMENT CHARACTER}"], "character").encode("aé").tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"tokens must be in 0 \.\. 1, got -1 \.\. 2"):
        Vocabulary("ab", "character").decode([-1, 2])


@pytest.mark.parametrize(
    ("symbols", "level", "words"),
    (
        ([], "word", "different symbols, one at least, got 0"),
        (["a", "a"], "word", "got 2, of which 1 differ"),
        (["ab"], "character", "a character of the vocabulary must be one character, got 'ab'"),
        (["a", ""], "word", "a word of the vocabulary must be one word, got ''"),
        (["a"], "syllable", "level must be one of character, word"),
    ),
)
def test_a_vocabulary_that_is_none_is_a_sentence(symbols, level, words):
    with pytest.raises(ValueError, match=words):
        Vocabulary(symbols, level)


def test_shakespeare_has_65_characters(real_data):
    found = data.load(real_data / "tinyshakespeare.txt")
    assert found.levels == 65 and len(tokens_of(found.train)) > 1_003_000
