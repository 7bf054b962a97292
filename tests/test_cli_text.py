"""Language models on the command line: train on a text, go on, sample, and every mistake a sentence."""

import json
import re

import pytest
import torch

for package in ("typer", "rich", "matplotlib", "accelerate", "safetensors"):
    pytest.importorskip(package)

from pygen import cli  # noqa: E402

TEXT = "the cat sat on the mat\nand the dog sat on the log\n" * 30
TINY = ("--set", "embedding_size=8", "--set", "hidden_size=12", "--set", "num_layers=2", "--set", "chunk_size=4",
        "--window", 8, "--batch-size", 8, "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "cats.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A run of two epochs that the tests below read and do not change."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit) as done:
        cli.main([str(w) for w in ("train", "onlstm", "--data", text, "--out", folder, "--epochs", 2, *TINY)])
    assert not done.value.code
    return folder


def test_training_by_characters_says_bits_per_character_and_draws(text, tmp_path, run_here):
    run = tmp_path / "run"
    code, out, err = run_here("train", "onlstm", "--data", text, "--out", run, "--epochs", 1, *TINY)
    assert code == 0, err
    found = re.search(r"test ([0-9.]+) nats per character, bits per character ([0-9.]+), perplexity ([0-9.]+)", out)
    assert found and float(found[2]) == pytest.approx(float(found[1]) * 1.442695, rel=1e-2)
    assert f"next: pygen sample {run}" in out and "--interpolate" not in out
    assert all((run / name).stat().st_size > 1000 for name in ("curves.png", "distances.png"))
    assert (run / "metrics.csv").read_text().splitlines()[0].endswith("bits_per_character,perplexity")
    saved = json.loads((run / "config.json").read_text())
    assert saved["config"]["vocabulary"] == sorted(set(TEXT)) and saved["config"]["level"] == "character"
    assert saved["data"] | {"name_or_path": ""} == {
        "name_or_path": "", "level": "character", "window": 8, "min_count": None}  # fmt: skip


def test_training_by_words_says_perplexity(text, tmp_path, run_here):
    words = ("train", "onlstm", "--data", text, "--level", "word", "--min-count", 1, "--epochs", 1, *TINY)
    code, out, err = run_here(*words, "--out", tmp_path / "run")
    assert code == 0, err
    assert re.search(r"nats per token, perplexity [0-9.]+", out) and "bits per character" not in out
    code, out, err = run_here("sample", tmp_path / "run", "--n", 1, "--length", 12, "--prompt", "the cat")
    assert code == 0 and out.startswith("the cat"), err
    assert len(re.findall(r"\S+|\n", out.rstrip("\n"))) >= 12


def test_a_folder_of_three_texts_and_an_lstm_by_averaged_sgd(tmp_path, run_here):
    for name, times in (("train", 30), ("valid", 4), ("test", 4)):
        (tmp_path / f"{name}.txt").write_text("the cat sat\n" * times)
    words = ("train", "onlstm", "--data", tmp_path, "--out", tmp_path / "run", "--epochs", 2, *TINY)
    code, out, err = run_here(*words, "--optimizer", "asgd", "--set", "rnn=lstm")
    assert code == 0 and "distances.png" not in out, err
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert (settings["optimizer"], settings["learning_rate"], settings["clip"]) == ("asgd", 30.0, 0.25)
    assert (settings["warmup_steps"], settings["final_learning_rate"]) == (0, 1.0), "a constant rate"


def test_resume_takes_text_level_and_window_from_the_run(text, tmp_path, run_here):
    run = tmp_path / "run"
    words = ("train", "onlstm", "--data", text, "--level", "word", "--out", run, "--epochs", 1, *TINY)
    assert run_here(*words)[0] == 0
    code, out, err = run_here("train", "--resume", run, "--epochs", 2)
    assert code == 0 and "2 epochs" in out, err
    assert [row.split(",")[0] for row in (run / "metrics.csv").read_text().splitlines()] == ["epoch", "1", "2"]


def test_resume_with_a_text_that_has_changed_is_a_sentence(tmp_path, run_here):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert run_here("train", "onlstm", "--data", path, "--out", tmp_path / "run", "--epochs", 1, *TINY)[0] == 0
    path.write_text(TEXT + "XYZ")
    code, _, err = run_here("train", "--resume", tmp_path / "run", "--epochs", 2)
    assert code == 2 and "text is not the text of this model's vocabulary: expected its 14 characters, got 17" in err


def test_samples_are_printed_and_the_same_for_the_same_seed(trained, run_here):
    code, out, err = run_here("sample", trained, "--length", 30, "--prompt", "the ")
    assert code == 0 and err == ""
    texts = out.split("-" * 40)
    assert len(texts) == 3 and all(part.strip("\n").startswith("the ") for part in texts)
    assert run_here("sample", trained, "--length", 30, "--prompt", "the ")[1] == out
    assert run_here("sample", trained, "--length", 30, "--prompt", "the ", "--seed", 1)[1] != out
    greedy = run_here("sample", trained, "--n", 2, "--length", 20, "--temperature", 0)[1]
    first, second = greedy.rstrip("\n").split("\n" + "-" * 40 + "\n")
    assert first == second and len(first) == 20


def test_samples_are_written_as_text_without_the_data(trained, text, tmp_path, run_here):
    moved = text.rename(text.with_name("moved.txt"))
    try:
        code, out, err = run_here("sample", trained, "--n", 2, "--length", 9, "--out", tmp_path / "s.txt")
    finally:
        moved.rename(text)
    assert code == 0 and "2 texts: " in out, err
    assert len((tmp_path / "s.txt").read_text()) == 2 * 10 + 41
    assert not (trained / "samples.png").exists()


def test_distances_of_a_trained_model_are_there(trained):
    from pygen import training

    model = training.load_model(trained)
    forget, written = model.distances(model.encode("the cat").unsqueeze(1))
    assert forget.shape == written.shape == (2, 7, 1)
    assert ((torch.cat((forget, written)) >= 0) & (torch.cat((forget, written)) <= 1)).all()


MISTAKES = {
    "no text": (("train", "onlstm", "--data", "digits"), "onlstm learns from a text: give a .txt file or a folder"),
    "empty": (("train", "onlstm", "--data", "{tmp}/empty.txt"), "empty.txt: the file is empty; a text is needed"),
    "bytes": (("train", "onlstm", "--data", "{tmp}/bytes.txt"), "bytes.txt: not UTF-8 text (byte 0xff at position 3)"),
    "short": (("train", "onlstm", "--data", "{tmp}/short.txt"), "has 5 characters, shorter than two windows of 100"),
    "no file": (("train", "onlstm", "--data", "{tmp}/none.txt"), "no data set or file "),
    "level": (("train", "onlstm", "--data", "{text}", "--level", "byte"), "level must be one of character, word"),
    "window": (("train", "onlstm", "--data", "{text}", "--window", "0"), "window and min_count must be at least 1"),
    "chunk": (("train", "onlstm", "--data", "{text}", "--set", "chunk_size=7"), "chunk_size"),
    "rnn": (("train", "onlstm", "--data", "{text}", "--set", "rnn=gru"), "rnn must be one of onlstm, lstm, got 'gru'"),
    "optimizer": (
        ("train", "onlstm", "--data", "{text}", "--optimizer", "sgd"),
        "optimizer must be one of adamw, asgd",
    ),
    "unknown character": (("sample", "{run}", "--prompt", "Q!"), "not in the vocabulary of 14 characters: 'Q', '!'"),
    "temperature": (("sample", "{run}", "--temperature", "-1"), "temperature must be a number >= 0, got -1"),
    "length": (("sample", "{run}", "--length", "0"), "--length"),
    "picture": (("sample", "{run}", "--plot", "{tmp}/x.png"), "a text has no picture; --out FILE.txt writes it"),
    "interpolate": (("sample", "{run}", "--interpolate", "2"), "an onlstm has nothing between two texts"),
    "reconstruct": (("sample", "{run}", "--reconstruct", "2"), "an onlstm has no codes to reconstruct from"),
    "no folder": (("sample", "{run}", "--out", "{tmp}/no/x.txt"), "No such file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_sentence_and_exit_code_2(trained, text, tmp_path, run_here, mistake):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"abc\xff" * 200)
    (tmp_path / "short.txt").write_text("short")
    words, sentence = MISTAKES[mistake]
    code, _, err = run_here(*(word.format(tmp=tmp_path, text=text, run=trained) for word in words))
    assert code == 2
    assert sentence in err and len(err.strip().splitlines()) == 1


def test_a_text_for_a_model_of_images_is_a_sentence(text, tmp_path, run_here):
    code, _, err = run_here("train", "nice", "--data", text, "--out", tmp_path / "run")
    assert code == 2 and "nice does not learn from a text" in err and len(err.strip().splitlines()) == 1


def test_a_prompt_for_a_model_of_images_is_a_sentence(tmp_path, run_here):
    pytest.importorskip("sklearn")
    run = tmp_path / "run"
    assert run_here("train", "nice", "--out", run, "--epochs", 1, "--set", "depth=2", "--set", "hidden=[8]")[0] == 0
    for option in (("--prompt", "a"), ("--length", 5)):
        code, _, err = run_here("sample", run, *option)
        assert code == 2 and "--prompt and --length are for models of texts, not for a nice" in err
