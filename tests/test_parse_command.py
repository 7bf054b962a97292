"""`pygen parse`: what a user types, what comes back, and that no mistake shows a traceback."""

import re

import pytest
import torch

for package in ("typer", "rich", "accelerate", "safetensors"):
    pytest.importorskip(package)

from rich.console import Console  # noqa: E402

from pygen import models, training  # noqa: E402
from pygen.data.trees import read_trees  # noqa: E402
from pygen.models.onlstm import ONLSTMLanguageModel  # noqa: E402
from pygen.models.onlstm_trees import parse_sentence, right_branching, unlabelled_f1  # noqa: E402
from pygen.training import checkpoint  # noqa: E402

SENTENCE = "the dog that saw a cat sleeps"
GOLD = """
( (S (NP (NP the dog) (SBAR that (VP saw (NP a cat)))) (VP sleeps)) )
(S (NP the cat) (VP saw
  (NP (NP the dog) (-NONE- *))))
"""


def saved(folder, model):
    folder.mkdir()
    info = {"model": model.name, "config": model.config, "data": "text", "step": 0, "valid": 0.0}
    checkpoint.save_tensors(folder / checkpoint.BEST, checkpoint.with_prefix("ema.", model.state_dict()), info)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of words without training: three layers, whose trees are whatever they are."""
    torch.manual_seed(0)
    words = ["<eos>", "<unk>", *sorted(set(SENTENCE.split()))]
    model = ONLSTMLanguageModel(words, "word", embedding_size=8, hidden_size=12, chunk_size=4)
    return saved(tmp_path_factory.mktemp("parse") / "run", model)


def lines_of(out):
    return [line.rstrip() for line in out.splitlines()]


def test_a_sentence_gives_its_tree_its_distances_and_its_brackets(run, run_here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = run_here("parse", run, SENTENCE)
    assert code == 0 and err == ""
    tree = parse_sentence(training.load_model(run), SENTENCE.split())
    lines = lines_of(out)
    assert tree.brackets() in lines
    words = next(i for i, line in enumerate(lines) if line.split() == SENTENCE.split())
    distances = lines[words + 1].split()
    assert len(distances) == 7 and all(re.fullmatch(r"[01]\.\d\d", distance) for distance in distances)
    assert lines[words - 1] and set(lines[words - 1]) <= set(" ┌┐┴┬─│┼├┤")


def test_layer_and_rule_are_those_asked_for(run, run_here):
    model = training.load_model(run)
    for layer in (1, 2, 3):
        for rule in ("paper", "gaps"):
            _, out, _ = run_here("parse", run, SENTENCE, "--layer", layer, "--rule", rule)
            assert parse_sentence(model, SENTENCE.split(), layer, rule=rule).brackets() in lines_of(out)


def test_several_sentences_are_written_as_brackets_too(run, run_here, tmp_path):
    code, _, _ = run_here("parse", run, SENTENCE, "a dog sleeps", "--out", tmp_path / "trees.txt")
    assert code == 0
    trees = read_trees(tmp_path / "trees.txt", labels=False)
    assert [" ".join(tree.words) for tree in trees] == [SENTENCE, "a dog sleeps"]


def test_a_sentence_wider_than_the_terminal_is_printed_from_left_to_right(run, run_here, monkeypatch):
    monkeypatch.setattr("pygen._parse_command.console", Console(width=30))
    code, out, _ = run_here("parse", run, SENTENCE)
    assert code == 0 and "└ " in out and "┴" not in out
    assert re.search(r"^sleeps +\d\.\d\d$", out, re.MULTILINE)


def test_gold_trees_give_f1_of_every_layer_beside_the_baselines(run, run_here, tmp_path):
    path = tmp_path / "gold.mrg"
    path.write_text(GOLD)
    code, out, err = run_here("parse", run, "--gold", path, "--layer", 3)
    assert code == 0 and err == "" and "2 trees" in out and "layer 3, chosen" in out
    gold = read_trees(path)
    rows = {}
    for line in out.splitlines():
        numbers = re.findall(r"\d+\.\d", line)
        if len(numbers) == 4:
            rows[line.split("│")[1].strip()] = [float(number) for number in numbers]
    assert set(rows) == {
        "layer 1", "layer 2", "layer 3, chosen", "right-branching", "left-branching", "balanced", "random, mean of 5",
    }  # fmt: skip
    model = training.load_model(run)
    expected = unlabelled_f1([parse_sentence(model, tree.words, 3) for tree in gold], gold)
    assert rows["layer 3, chosen"] == pytest.approx([100 * value for value in expected[:4]], abs=0.05)
    expected = unlabelled_f1([right_branching(tree.words) for tree in gold], gold)
    assert rows["right-branching"] == pytest.approx([100 * value for value in expected[:4]], abs=0.05)


def test_gold_words_can_be_written_as_penns_language_model_text_is(run, run_here, tmp_path):
    path = tmp_path / "gold.mrg"
    path.write_text("(S (NP (DT The) (NN dog)) (VP (VBZ Sleeps)) (. .))")
    words = ("parse", run, "--gold", path, "--lower", "--no-punctuation", "--out", tmp_path / "out.txt")
    assert run_here(*words)[0] == 0
    assert read_trees(tmp_path / "out.txt", labels=False)[0].words == ("the", "dog", "sleeps")


def test_unknown_words_are_named(run, run_here):
    code, out, _ = run_here("parse", run, "the unicorn sleeps")
    assert code == 0 and "read as <unk>: unicorn" in out and "unicorn" in out.split("read as")[1]


def test_a_model_of_characters_parses_words(run_here, tmp_path):
    model = ONLSTMLanguageModel(list("\n acdeghlopst"), "character", embedding_size=8, hidden_size=8, chunk_size=4)
    run = saved(tmp_path / "run", model)
    code, out, _ = run_here("parse", run, "the dog sleeps")
    assert code == 0
    assert parse_sentence(training.load_model(run), ["the", "dog", "sleeps"]).brackets() in lines_of(out)
    code, _, err = run_here("parse", run, "the unicorn")
    assert code == 2 and err.startswith("pygen: not in the vocabulary") and "Traceback" not in err


def test_mistakes_are_sentences(run, run_here, tmp_path):
    empty, broken = tmp_path / "empty.mrg", tmp_path / "broken.mrg"
    empty.write_text("\n")
    broken.write_text("(S (NP the dog)\n")
    other = saved(tmp_path / "flow", models.create("realnvp", {"shape": [2], "depth": 2}))
    for words, message in (
        ((run,), "nothing to parse; give"),
        ((run, " "), "a sentence must have words"),
        ((run, "the dog", "--layer", 4), "--layer must be 1 to 3, got 4"),
        ((run, "the dog", "--layer", 0), "--layer must be 1 to 3, got 0"),
        ((run, "the dog", "--rule", "greedy"), "--rule must be one of paper, gaps, got 'greedy'"),
        ((run, "--gold", tmp_path / "none.mrg"), "No such file"),
        ((run, "--gold", empty), "holds no trees"),
        ((run, "--gold", broken), "line 1: a bracket that is never closed"),
        ((tmp_path, "the dog"), "holds no trained model"),
        ((other, "the dog"), "parse needs a run of onlstm"),
    ):
        code, _, err = run_here("parse", *words)
        assert code == 2 and err.startswith("pygen: ") and message in err, (words, err)
        assert len(err.splitlines()) == 1
