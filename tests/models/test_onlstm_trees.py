"""Trees: from distances, compared with each other, in brackets, and drawn from a grammar."""

import math
import random
import sys
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pygen.data.grammar import PCFG, TOY, Production
from pygen.data.trees import Constituent, Tree, read_trees, write_trees
from pygen.models.onlstm_trees import (
    balanced,
    default_layer,
    distances_to_tree,
    left_branching,
    parse_sentence,
    random_tree,
    right_branching,
    unlabelled_f1,
    word_distances,
)

DISTANCES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1), min_size=1, max_size=12)
SIGMAS = 5


def unlabelled(text):
    return Tree.from_brackets(text, labels=False)


def split_by_the_paper(distances, words):
    """The definition, word by word: ((before t), (t, (after t))), tuples of fewer than two parts being their part."""
    if len(words) < 2:
        return words[0]
    t = max(range(len(words)), key=lambda i: (distances[i], -i))
    right = words[t]
    if t + 1 < len(words):
        right = (words[t], split_by_the_paper(distances[t + 1 :], words[t + 1 :]))
    return (split_by_the_paper(distances[:t], words[:t]), right) if t else right


def split_in_gaps(distances, words):
    """The definition: (before t), (t and after), for t > 0."""
    if len(words) < 2:
        return words[0]
    t = max(range(1, len(words)), key=lambda i: (distances[i], -i))
    return split_in_gaps(distances[:t], words[:t]), split_in_gaps(distances[t:], words[t:])


# From distances to a tree


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ([0.3], "w0"),
        ([0.3, 0.9], ("w0", "w1")),
        ([0.9, 0.3], ("w0", "w1")),
        ([0.9, 0.8, 0.7], ("w0", ("w1", "w2"))),
        ([0.7, 0.8, 0.9], (("w0", "w1"), "w2")),
        ([0.1, 0.9, 0.2, 0.3], ("w0", ("w1", ("w2", "w3")))),
        # After the split at w1, w1 stands alone although w2 and w3 are closer to it than w4: the lean to the right.
        ([0.1, 0.9, 0.2, 0.3, 0.8], ("w0", ("w1", (("w2", "w3"), "w4")))),
        ([0.1, 0.2, 0.9, 0.3, 0.1, 0.5], (("w0", "w1"), ("w2", (("w3", "w4"), "w5")))),
    ],
)
def test_the_papers_rule_by_hand(distances, expected):
    assert distances_to_tree(distances, [f"w{i}" for i in range(len(distances))]).nested() == expected


def test_the_rule_of_gaps_by_hand_and_what_the_papers_rule_makes_of_the_same():
    distances = [0.5, 0.1, 0.9, 0.2, 0.6]
    assert distances_to_tree(distances, list("abcde"), rule="gaps").nested() == (("a", "b"), (("c", "d"), "e"))
    assert distances_to_tree(distances, list("abcde")).nested() == (("a", "b"), ("c", ("d", "e")))


def test_the_first_words_distance_counts_in_the_papers_rule_only():
    low, high = [0.0, 0.2, 0.9], [1.0, 0.2, 0.9]
    assert distances_to_tree(low, "abc", rule="gaps") == distances_to_tree(high, "abc", rule="gaps")
    assert distances_to_tree(low, "abc").nested() == (("a", "b"), "c")
    assert distances_to_tree(high, "abc").nested() == ("a", ("b", "c"))


@pytest.mark.parametrize("rule", ["paper", "gaps"])
def test_of_equal_distances_the_first_splits(rule):
    assert distances_to_tree([0.5] * 6, rule=rule) == right_branching("012345")


@settings(max_examples=300, deadline=None)
@given(DISTANCES)
def test_trees_are_those_of_the_recursive_definitions(distances):
    words = tuple(f"w{i}" for i in range(len(distances)))
    assert distances_to_tree(distances, words).nested() == split_by_the_paper(distances, words)
    assert distances_to_tree(distances, words, rule="gaps").nested() == split_in_gaps(distances, words)


@pytest.mark.parametrize("rule", ["paper", "gaps"])
def test_trees_as_deep_as_a_sentence_of_5000_words_take_linear_time(rule):
    n = 5_000
    assert n > 4 * sys.getrecursionlimit()
    begin = time.perf_counter()
    right = distances_to_tree(range(n, 0, -1), rule=rule)
    left = distances_to_tree(range(n), rule=rule)
    assert time.perf_counter() - begin < 5  # 0.03 s; each step on a slice, as the definition has it, takes minutes
    assert right == right_branching(right.words) and left == left_branching(left.words)
    for tree in (right, left):
        assert unlabelled(tree.brackets()) == tree
        assert unlabelled_f1(tree, tree).sentence == 1
        nested, depth = tree.nested(), 0
        while isinstance(nested, tuple):
            nested, depth = nested[rule == "gaps" and tree is left and -1 or 0], depth + 1
        assert depth in (1, n - 1)


def test_distances_may_be_a_tensor_of_any_type_with_a_gradient():
    x = torch.tensor([0.1, 0.9, 0.2], requires_grad=True)
    for given_as in (x, x.bfloat16(), x.double().detach().numpy(), x.tolist()):
        assert distances_to_tree(given_as, "abc").nested() == ("a", ("b", "c"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), r"\(T,\) with T >= 1, got \(0,\)"),
        (([[0.1, 0.2]],), r"got \(1, 2\)"),
        (([0.1, math.nan],), "NaN, at position 1"),
        (([0.1, 0.2], ["a"]), "2 distances for 1 tokens"),
        (([0.1, 0.2], ["a", "b c"]), "neither empty nor has spaces"),
    ],
)
def test_distances_that_are_no_sentences_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        distances_to_tree(*arguments)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="one of paper, gaps, got 'gap'"):
        distances_to_tree([0.1], rule="gap")


# Agreement


def test_f1_counted_by_hand():
    gold = unlabelled("((the dog) (saw (a cat)))")  # (0, 2), (2, 5), (3, 5)
    f1 = unlabelled_f1(unlabelled("(the (dog (saw (a cat))))"), gold)  # (1, 5), (2, 5), (3, 5)
    assert f1 == pytest.approx((2 / 3, 2 / 3, 2 / 3, 2 / 3, 1))
    flat = unlabelled("((the dog) (saw a cat))")  # (0, 2), (2, 5)
    assert unlabelled_f1(gold, flat) == pytest.approx((4 / 5, 4 / 5, 2 / 3, 1, 1))
    assert unlabelled_f1([gold, gold], [gold, flat]) == pytest.approx(((1 + 4 / 5) / 2, 10 / 11, 5 / 6, 1, 2))


def test_sentence_and_whole_words_do_not_count():
    assert unlabelled("((a) (b c))").spans() == {(1, 3)}
    assert unlabelled("((a) (b c))").spans(trivial=True) == {(0, 1), (0, 3), (1, 3)}
    assert unlabelled_f1(unlabelled("((a b) c)"), unlabelled("(a (b c))")).sentence == 0


def test_a_sentence_without_gold_spans_counts_as_published():
    two, flat = unlabelled("(a b)"), unlabelled("(a b c)")
    assert unlabelled_f1(two, two) == (1, 1, 1, 1, 1)
    assert unlabelled_f1(right_branching("abc"), flat) == (0, 0, 0, 1, 1)
    assert unlabelled_f1(flat, right_branching("abc")) == (0, 0, 0, 0, 1)
    assert unlabelled_f1([two, right_branching("abc")], [two, flat]).sentence == 0.5


def test_a_label_or_a_bracket_around_a_bracket_changes_nothing():
    gold = Tree.from_brackets("(ROOT (S (NP (NP (D the) (N dog))) (VP (V barks))))")
    assert unlabelled_f1(unlabelled("((the dog) barks)"), gold).sentence == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=4))
def test_f1_is_that_of_counting_substrings(cases):
    trees = [[random_tree([f"w{i}" for i in range(n)], seed) for n, *seeds in cases for seed in seeds[k : k + 1]]
             for k in range(2)]  # fmt: skip
    per_sentence, totals = [], Counter()
    for mine, known in zip(*trees, strict=True):
        phrases = [set(), set()]  # every phrase as its words, read off the nested tuples
        for phrase, tree in zip(phrases, (mine, known), strict=True):
            pending = [tree.nested()]
            while pending:
                node = pending.pop()
                if isinstance(node, tuple):
                    pending += node
                    leaves, inner = [], list(node)
                    while inner:
                        part = inner.pop(0)
                        inner, leaves = (
                            (list(part) + inner, leaves) if isinstance(part, tuple) else (inner, [*leaves, part])
                        )  # noqa: E501
                    if len(leaves) < len(tree):
                        phrase.add(tuple(leaves))
        common = sum(phrase in phrases[1] for phrase in phrases[0])
        if not phrases[1]:
            per_sentence.append(1.0 if not phrases[0] else 0.0)
        else:
            p, r = common / len(phrases[0]), common / len(phrases[1])
            per_sentence.append(2 * p * r / (p + r) if p + r else 0.0)
        totals.update(common=common, mine=len(phrases[0]), known=len(phrases[1]))
    f1 = unlabelled_f1(*trees)
    assert f1.sentence == pytest.approx(sum(per_sentence) / len(per_sentence))
    if totals["mine"]:
        assert f1.corpus == pytest.approx(2 * totals["common"] / (totals["mine"] + totals["known"]))


def test_trees_of_other_sentences_are_refused():
    with pytest.raises(ValueError, match="trees 1 are of different words: 'a b' and 'a c'"):
        unlabelled_f1([unlabelled("(a b)")] * 2, [unlabelled("(a b)"), unlabelled("(a c)")])
    with pytest.raises(ValueError, match="as many trees, at least one; got 0 and 0"):
        unlabelled_f1([], [])
    with pytest.raises(ValueError, match="got 1 and 2"):
        unlabelled_f1([unlabelled("(a b)")], [unlabelled("(a b)")] * 2)


# Baselines


def test_baselines_branch_as_they_are_called():
    assert right_branching("abcd").nested() == ("a", ("b", ("c", "d")))
    assert left_branching("abcd").nested() == ((("a", "b"), "c"), "d")
    assert balanced("abcdefg").nested() == (("a", ("b", "c")), (("d", "e"), ("f", "g")))
    for make in (right_branching, left_branching, balanced, random_tree):
        assert make(["a"]).brackets() == "(a)" and make("ab").brackets() == "(a b)"
        with pytest.raises(ValueError, match="words|distances"):
            make([])


def test_a_random_tree_is_binary_its_seeds_and_splits_anywhere_equally_often():
    words = [f"w{i}" for i in range(5)]
    assert random_tree(words, 3) == random_tree(words, 3)
    generator, n = random.Random(0), 2_000
    trees = [random_tree(words, generator) for _ in range(n)]
    assert {len(tree.spans(trivial=True)) for tree in trees} == {4}
    for place in range(1, 5):  # where the sentence itself is split
        parts = {(0, place), (place, 5)}
        count = sum(
            (parts - {(0, 1), (4, 5)}) <= tree.spans(trivial=True) and len(tree.nested()) == 2 for tree in trees
        )
        assert abs(count - n / 4) < SIGMAS * math.sqrt(n * 3 / 16)


# Trees in brackets


LABELLED = "(S (NP (NP (DT the) (NN dog)) (PP (IN in) (NP (DT a) (JJ big) (NN house)))) (VP (VBZ sleeps)))"


def test_brackets_round_trip_with_and_without_labels(tmp_path):
    tree = Tree.from_brackets(LABELLED)
    assert tree.brackets() == LABELLED and len(tree) == 7
    assert tree.nested() == ((("the", "dog"), ("in", ("a", "big", "house"))), "sleeps")
    write_trees(tmp_path / "gold.mrg", [tree, tree])
    assert read_trees(tmp_path / "gold.mrg") == [tree, tree]
    write_trees(tmp_path / "plain.mrg", [tree], labels=False)
    (plain,) = read_trees(tmp_path / "plain.mrg", labels=False)
    assert plain.spans() == tree.spans() and plain.words == tree.words


@settings(max_examples=100, deadline=None)
@given(DISTANCES, st.sampled_from(["paper", "gaps"]))
def test_induced_trees_round_trip(distances, rule):
    tree = distances_to_tree(distances, rule=rule)
    assert unlabelled(tree.brackets()) == tree


def test_parentheses_in_words_are_escaped():
    assert right_branching(["f", "(x)"]).brackets() == "(f -LRB-x-RRB-)"


PENN = """
( (S
    (NP-SBJ (NNP Ada) (NNP Lovelace) )
    (, ,)
    (VP (VBD wrote)
      (NP (-NONE- *T*-1) )
      (NP (CD 3) (NNS notes) ))
    (. .) ))
( (INTJ (. ...) ))
( (S (NP-SBJ (PRP It)) (VP (VBD cost) (NP ($ $) (CD 5)))) )
"""


def test_files_of_the_penn_treebank(tmp_path):
    path = tmp_path / "wsj.mrg"
    path.write_text(PENN)
    trees = read_trees(path)
    assert [" ".join(tree.words) for tree in trees] == ["Ada Lovelace , wrote 3 notes .", "...", "It cost $ 5"]
    assert trees[0].constituents[0] == Constituent(0, 7, "S")
    assert trees[0].spans() == {(0, 2), (3, 6), (4, 6)}
    assert "*T*-1" in read_trees(path, traces=True)[0].words
    bare = read_trees(path, punctuation=False)
    assert [" ".join(tree.words) for tree in bare] == ["Ada Lovelace wrote 3 notes", "It cost 5"]
    assert bare[0].spans() == {(0, 2), (2, 5), (3, 5)}
    assert "NONE" not in bare[0].brackets()


def test_punctuation_without_tags_is_what_has_no_letter_or_digit(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("((the (dog 's)) (-- barks) .)")
    (tree,) = read_trees(path, labels=False, punctuation=False)
    assert tree.brackets() == "((the (dog 's)) (barks))"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(S (NP a b)\n(VP c)\n", "line 1: a bracket that is never closed"),
        ("(S (NP a b))\n\n(S c))\n", "line 3: a closing bracket that nothing opened"),
        ("(S a b)\nc d\n", "line 2: 'c' outside of brackets"),
        ("(S a\n(NP) b)", "line 2: a bracket without words"),
        ("()", "line 1: a bracket without words"),
        ("((a b) c)", "line 1: a sentence's bracket has no label; labels=False"),
        ("(S\n(NP ((a b) c)))", "line 2: a bracket without a label"),
    ],
)
def test_brackets_that_do_not_fit_are_named_with_their_line(tmp_path, text, message):
    path = tmp_path / "gold.mrg"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_trees(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "gold.mrg"
    path.write_bytes(b"(S \xff\xfe)")
    with pytest.raises(ValueError, match="not a text file in UTF-8"):
        read_trees(path)


@pytest.mark.parametrize(
    ("constituents", "message"),
    [
        ([], "got none"),
        ([(0, 2)], r"must be the sentence, \(0, 4\), got \(0, 2\)"),
        ([(0, 4), (0, 2), (1, 3)], r"\(1, 3\) does not fit"),
        ([(0, 4), (2, 4), (0, 2)], r"\(0, 2\) does not fit"),
        ([(0, 4), (2, 5)], r"\(2, 5\) does not fit"),
        ([(0, 4), (2, 2)], r"\(2, 2\) does not fit"),
    ],
)
def test_constituents_that_do_not_nest_are_refused(constituents, message):
    with pytest.raises(ValueError, match=message):
        Tree(tuple("abcd"), tuple(Constituent(*span) for span in constituents))


def test_from_brackets_takes_one_tree():
    with pytest.raises(ValueError, match="one tree, got 2"):
        unlabelled("(a b) (c d)")


# Pictures of trees


def test_the_drawing_stands_above_its_words():
    tree = Tree.from_brackets(LABELLED)
    assert tree.drawing([["0.1"] * 7]).splitlines() == [
        "        ┌─────────┴──────────┐",
        "   ┌────┴────┐               │",
        "   │     ┌───┴───┐           │",
        " ┌─┴─┐   │   ┌───┼────┐      │",
        "the dog  in  a  big house sleeps",
        "0.1 0.1 0.1 0.1 0.1  0.1   0.1",
    ]
    assert unlabelled("(a)").drawing() == "a"
    with pytest.raises(ValueError, match="a row must have 7 strings, got 1"):
        tree.drawing([["0.1"]])


def test_the_outline_has_the_labels():
    tree = Tree.from_brackets("(S (NP the dog) (VP saw (NP a cat)))")
    assert tree.outline().splitlines() == [
        "S", "├ NP", "│ ├ the", "│ └ dog", "└ VP", "  ├ saw", "  └ NP", "    ├ a", "    └ cat",
    ]  # fmt: skip


# Grammars


def test_the_text_of_a_grammar():
    grammar = PCFG.from_text("# a comment\nS -> A b [0.25] | b [0.75]\n\nA -> c | d | e e  # equally likely")
    assert grammar.start == "S" and grammar.words() == ["b", "c", "d", "e"]
    assert grammar.productions["S"] == [Production(0.25, ("A", "b")), Production(0.75, ("b",))]
    assert [p.probability for p in grammar.productions["A"]] == [1 / 3] * 3
    assert grammar.expected_length() == pytest.approx(0.25 * (4 / 3 + 1) + 0.75)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rules"),
        ("S -> a\nS b", "line 2: a rule is"),
        ("S -> a [0.5] | b", "line 1: either all choices of a line have a probability or none"),
        ("S -> a [half] | b [0.5]", "line 1: a probability must be a number, got 'half'"),
        ("S -> a [0.5] | b [0.4]", "probabilities of S must sum to 1, got 0.9"),
        ("S -> a [1.5] | b [-0.5]", r"S -> a \[1.5\]"),
        ("S -> a | ", "at least one symbol"),
        ("S -> S S [0.5] | a [0.5]", "multiply by 1 a generation"),
        ("S -> S a", "multiply by 1 a generation"),
    ],
)
def test_a_grammar_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        PCFG.from_text(text)


@pytest.fixture(scope="module")
def toy():
    return PCFG.from_text(TOY)


@pytest.fixture(scope="module")
def sampled(toy):
    return toy.sample(2_000, seed=0)


def test_productions_come_as_often_as_they_are_likely(toy, sampled):
    seen = {symbol: Counter() for symbol in toy.productions}
    for tree in sampled:
        spans = [*tree.constituents, Constituent(len(tree), len(tree) + 1)]
        for i, (start, stop, symbol) in enumerate(tree.constituents):
            parts, at, j = [], start, i + 1
            while at < stop:  # the next constituent that begins here is a part, or the word is
                if spans[j].start == at:
                    parts.append(spans[j].label)
                    at = spans[j].stop
                    while spans[j].start < at:
                        j += 1
                else:
                    parts.append(tree.words[at])
                    at += 1
            seen[symbol][tuple(parts)] += 1
    for symbol, productions in toy.productions.items():
        n = sum(seen[symbol].values())
        assert n > 200 and set(seen[symbol]) == {right for _, right in productions}
        for p, right in productions:
            assert abs(seen[symbol][right] - n * p) <= SIGMAS * math.sqrt(n * p * (1 - p)), (symbol, right)


def test_sentences_are_as_long_as_expected(toy, sampled):
    lengths = torch.tensor([len(tree) for tree in sampled], dtype=torch.float64)
    assert abs(lengths.mean() - toy.expected_length()) < SIGMAS * lengths.std() / math.sqrt(len(lengths))


def test_a_seed_decides_the_sentences_and_bounds_their_length(toy, sampled):
    assert toy.sample(20, seed=0) == sampled[:20] != toy.sample(20, seed=1)
    short = toy.sample(50, seed=0, longest=8, shortest=4)
    assert {len(tree) for tree in short} <= set(range(4, 9))
    assert len(short) == 50 and short == toy.sample(50, seed=0, longest=8, shortest=4)
    assert toy.sample(0) == []
    with pytest.raises(ValueError, match="none of 10000 sentences had from 1 to 1 words"):
        toy.sample(1, longest=1)
    with pytest.raises(ValueError, match="n must not be negative, got -1"):
        toy.sample(-1)


def test_subject_and_verb_of_the_toy_grammar_agree_whatever_stands_between(toy, sampled):
    verbs = {number: set() for number in "sp"}
    for number in "sp":
        verbs[number] = {p.symbols[0] for symbol in ("VI", "VT") for p in toy.productions[symbol + number]}
    far = 0
    for tree in sampled:
        number = next(c.label for c in tree.constituents if c.label in ("NPs", "NPp"))[-1]
        verb = next(c for c in tree.constituents[2:] if c.label == "VP" + number and c.stop == len(tree))
        assert tree.words[verb.start] in verbs[number]
        far += verb.start > 4
    assert far > 200


def test_neither_direction_is_a_good_guess_of_the_toy_grammar(toy):
    trees = toy.sample(1_000, seed=1, longest=24, shortest=5)

    def f1(make, *more):
        return unlabelled_f1([make(tree.words, *more) for tree in trees], trees).sentence

    assert max(f1(right_branching), f1(left_branching)) < 0.42 and f1(balanced) < 0.5
    assert f1(random_tree, random.Random(0)) < 0.35


# Of a model


class Reader:
    """A model whose distances are known: layer l says l + (token's number) / 100 of a token, plus its place / 10000."""

    training = False

    def __init__(self, vocabulary, level):
        self.vocabulary, self.level = vocabulary, level

    def encode(self, text):
        words = text.replace("\n", " <eos> ").split() if self.level == "word" else text
        return torch.tensor([self.vocabulary.index(word) for word in words])

    def parameters(self):
        return iter([torch.zeros(1)])

    def eval(self):
        return self

    def train(self, mode):
        return self

    def distances(self, tokens):
        place = torch.arange(len(tokens)).unsqueeze(1) / 10_000
        return torch.stack([layer + tokens / 100 + place for layer in range(3)]), tokens * math.nan


def test_words_have_the_distances_of_their_steps_after_the_end_of_a_sentence():
    found = word_distances(Reader(["<eos>", "a", "b"], "word"), ["b", "a"])
    torch.testing.assert_close(found[0], torch.tensor([0.0201, 0.0102]))
    torch.testing.assert_close(found[2], torch.tensor([2.0201, 2.0102]))
    without_end = word_distances(Reader(["a", "b"], "word"), ["b", "a"])
    torch.testing.assert_close(without_end[0], torch.tensor([0.01, 0.0001]))


def test_words_of_characters_have_the_distance_of_their_first():
    found = word_distances(Reader(list("\n abc"), "character"), ["ab", "cab", "b"])
    torch.testing.assert_close(found[0], torch.tensor([0.0201, 0.0404, 0.0308]))


def test_the_layer_is_counted_from_one_and_the_middle_one_by_default():
    assert [default_layer(n) for n in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    model = Reader(["<eos>", "a", "b", "c"], "word")
    assert parse_sentence(model, ["a", "c", "b"]).nested() == ("a", ("c", "b"))
    assert parse_sentence(model, ["a", "b", "c"], 3, rule="gaps").nested() == (("a", "b"), "c")
    for layer in (0, 4, -1):
        with pytest.raises(ValueError, match=f"layer must be 1 to 3, got {layer}"):
            parse_sentence(model, ["a"], layer)


@pytest.mark.parametrize("words", [[], ["a", ""], ["a b"]])
def test_what_is_no_sentence_is_refused(words):
    with pytest.raises(ValueError, match="at least one, and none empty or with spaces"):
        word_distances(Reader(["a"], "word"), words)


@pytest.mark.parametrize("level", ["word", "character"])
def test_a_model_reads_a_sentence_in_eval_mode_and_stays_in_its_own(level):
    from pygen.models.onlstm import ONLSTMLanguageModel

    torch.manual_seed(0)
    vocabulary = ["<eos>", "<unk>", "the", "dog", "sleeps"] if level == "word" else list("\n abcdeghlopst")
    model = ONLSTMLanguageModel(vocabulary, level, embedding_size=8, hidden_size=8, chunk_size=2)
    words = ["the", "dog", "sleeps"]
    first, second = word_distances(model, words), word_distances(model, words)
    assert model.training and first.shape == (3, 3) and torch.equal(first, second)
    assert parse_sentence(model, words) == distances_to_tree(first[1], words)
    # The published evaluation: the forget gate, of the sentence behind the end of another.
    symbols = ["<eos>", *words] if level == "word" else list("\nthe dog sleeps")
    tokens = torch.tensor([[vocabulary.index(symbol)] for symbol in symbols])
    steps = [1, 2, 3] if level == "word" else [1, 5, 9]
    torch.testing.assert_close(first, model.eval().distances(tokens)[0][:, steps, 0])
