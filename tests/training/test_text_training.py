"""Language models in the training loop: streams in order, states through checkpoints, averaged SGD."""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness import torchrun

pytest.importorskip("accelerate")
pytest.importorskip("safetensors")

from pygen import data, training  # noqa: E402
from pygen.models.onlstm import ONLSTMLanguageModel  # noqa: E402
from pygen.training import checkpoint, metrics  # noqa: E402

CONFIG = training.TrainConfig(epochs=2, batch_size=4, device="cpu", progress=False, learning_rate=1e-2)
SGD = replace(CONFIG, optimizer="asgd", learning_rate=1.0, warmup_steps=0, final_learning_rate=1.0, patience=1)
SMALL = {"embedding_size": 8, "hidden_size": 12, "num_layers": 2, "chunk_size": 4}
WINDOW = 6


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Letters from a seed: nothing to learn but their frequencies, so that validation gets stuck soon."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    letters = torch.randint(0, 6, (450,), generator=torch.Generator().manual_seed(0))
    file.write_text("".join("abcde "[i] for i in letters))
    return file


@pytest.fixture(scope="module")
def text(path):
    return data.load(path, window=WINDOW)


def new_model(text, kind=ONLSTMLanguageModel, seed=0, **options):
    """With all that is random in a step: every dropout, and DropConnect."""
    torch.manual_seed(seed)
    rates = dict.fromkeys(("dropout", "dropouti", "dropouth", "dropoute", "wdrop"), 0.2)
    return kind(**(kind.arguments_for(text) | SMALL | rates | {"alpha": 1.0, "beta": 1.0} | options))


class Watched(ONLSTMLanguageModel):
    """Keeps what it is given in training, with the states it begins with, and calls `hook` with the step."""

    hook = staticmethod(lambda step: None)

    def loss(self, x):
        if self.training:
            self.seen = [*getattr(self, "seen", []), (x.clone(), self.carried)]
            self.hook(len(self.seen))
        return super().loss(x)


def watched(text, hook=lambda step: None, **options):
    model = new_model(text, Watched, **options)
    model.hook = hook
    return model


def interrupt_at(step):
    return lambda call: os.kill(os.getpid(), signal.SIGINT) if call == step else None


def assert_same_bits(run, other):
    for name in ("last", "best"):
        mine, theirs = (checkpoint.load_tensors(Path(r) / f"{name}.safetensors")[0] for r in (run, other))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    columns = ("epoch", "step", "loss", "valid", "perplexity", "bits_per_character")
    mine, theirs = ([[row[c] for c in columns] for row in metrics.read(Path(r) / "metrics.csv")] for r in (run, other))
    assert mine == theirs


def test_a_batch_is_parallel_streams_that_go_on_where_they_were(text, tmp_path):
    model = watched(text)
    result = training.train(model, text, replace(CONFIG, epochs=2), tmp_path)
    steps = len(text.train) // 4
    assert result.steps == 2 * steps == len(model.seen)
    for epoch in range(2):
        seen = torch.stack([x for x, _ in model.seen[epoch * steps : (epoch + 1) * steps]])
        for i in range(4):
            assert torch.equal(seen[:, i], text.train[i * steps : (i + 1) * steps]), "in order, in every epoch"


def test_states_are_carried_without_gradient_and_an_epoch_begins_without(text, tmp_path):
    model = watched(text)
    training.train(model, text, replace(CONFIG, epochs=2), tmp_path)
    steps = len(text.train) // 4
    for step, (_, carried) in enumerate(model.seen):
        if step % steps == 0:
            assert carried == ()
        else:
            assert [state.shape for state in carried] == [(4, 12)] * 4
            assert not any(state.requires_grad for state in carried) and carried[0].abs().max() > 0
    assert model.carried is None, "the model comes back as one that stands alone"


@pytest.mark.parametrize(("rnn", "step"), (("onlstm", 1), ("onlstm", 10), ("onlstm", 16), ("lstm", 20)))
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(text, tmp_path, step, rnn):
    """16 steps an epoch: interrupted at the first step, within an epoch, at its end, and within the second."""
    assert len(text.train) // 4 == 16
    training.train(new_model(text, rnn=rnn), text, CONFIG, tmp_path / "whole")
    first = training.train(watched(text, interrupt_at(step), rnn=rnn), text, CONFIG, tmp_path / "parts")
    assert first.interrupted and first.steps == step
    torch.manual_seed(123)  # the state of the new process must not matter
    second = training.train(new_model(text, seed=5, rnn=rnn), text, CONFIG, tmp_path / "parts", resume=True)
    assert not second.interrupted and second.steps == 2 * 16
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def test_a_run_of_averaged_sgd_resumes_to_the_bit_too(text, tmp_path):
    config = replace(SGD, epochs=6, learning_rate=20.0)  # so much that it gets stuck
    whole = training.train(new_model(text), text, config, tmp_path / "whole")
    since = checkpoint.load_tensors(tmp_path / "whole" / "last.safetensors")[1]["averaged_since"]
    assert since is not None and since < whole.steps, "the average must have begun for this test to mean anything"
    stops = (5, since + 3)  # before the average begins, and behind
    for resumed, (before, step) in enumerate(zip((0, *stops), (*stops, whole.steps), strict=True)):
        model = watched(text, interrupt_at(step - before if step < whole.steps else 0), seed=5 * resumed)
        assert training.train(model, text, config, tmp_path / "parts", resume=resumed > 0).steps == step
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def test_resuming_with_other_streams_begins_the_epoch_again(text, tmp_path):
    training.train(watched(text, interrupt_at(20)), text, CONFIG, tmp_path)
    model = watched(text)
    training.train(model, text, replace(CONFIG, batch_size=2), tmp_path, resume=True)
    assert model.seen[0][1] == () and torch.equal(model.seen[0][0][0], text.train[0])


def test_a_small_model_learns_a_repeated_text_by_heart(tmp_path):
    (tmp_path / "t.txt").write_text("to be or not to be, that is the question\n" * 60)
    text = data.load(tmp_path / "t.txt", window=20)
    plain = dict.fromkeys(("dropout", "dropouth", "wdrop", "alpha", "beta"), 0.0)
    for rnn in ("onlstm", "lstm"):
        model = new_model(text, rnn=rnn, embedding_size=16, hidden_size=32, dropouti=0.0, dropoute=0.0, **plain)
        config = replace(CONFIG, epochs=12, learning_rate=3e-2, ema=0.9, clip=1.0)
        training.train(model, text, config, tmp_path / rnn)
        loss = training.evaluate(model, text.train, streams=1)
        assert loss < 0.05, "nats per character; 2.6 for the frequencies of the letters"
        assert model.sample(1, 30, temperature=0, prompt="to be or ") == [
            "to be or not to be, that is the question"[:39]
        ]


def test_metrics_are_the_loss_in_the_units_of_the_level(text, path, tmp_path):
    training.train(new_model(text), text, CONFIG, tmp_path / "characters")
    words = data.load(path, level="word", window=3, min_count=1)
    training.train(new_model(words), words, CONFIG, tmp_path / "words")
    for name in ("characters", "words"):
        for row in metrics.read(tmp_path / name / "metrics.csv"):
            assert row["perplexity"] == pytest.approx(math.exp(row["valid"]))
            assert ("bits_per_character" in row) == (name == "characters")
            assert row.get("bits_per_character", 0) in (0, pytest.approx(row["valid"] / math.log(2)))


def test_validation_reads_the_text_in_streams_and_leaves_training_alone(text, tmp_path):
    """The loss that is logged is that of the averaged weights over every window once."""
    model = new_model(text)
    training.train(model, text, replace(CONFIG, epochs=1), tmp_path)
    row = metrics.read(tmp_path / "metrics.csv")[-1]
    assert training.evaluate(model, text.valid) == pytest.approx(row["valid"], rel=1e-6)


def test_averaged_sgd_is_sgd_and_then_the_mean_of_all_weights_since(text, tmp_path):
    history = []
    model = watched(text, lambda step: history.append([p.detach().clone() for p in model.parameters()]))
    config = replace(SGD, epochs=6, learning_rate=100.0, clip=0.1, weight_decay=0.0)
    training.train(model, text, config, tmp_path)
    tensors, info = checkpoint.load_tensors(tmp_path / "last.safetensors")
    names = [f"model.{name}" for name, _ in model.named_parameters()]
    weights = [*history[1:], [tensors[name] for name in names]]
    valid, since = [row["valid"] for row in metrics.read(tmp_path / "metrics.csv")], info["averaged_since"]
    stuck = next(i for i in range(2, 6) if valid[i] > min(valid[: i - 1]))
    assert since == 16 * (stuck + 1), "the first validation that is above one that is older than the last"
    for i, name in enumerate(names):
        mean = torch.stack([step[i].double() for step in weights[since:]]).mean(0)
        torch.testing.assert_close(tensors[name.replace("model.", "ema.")].double(), mean, rtol=0, atol=1e-5)
    move = sum((a - b).square().sum() for a, b in zip(history[0], history[1], strict=True)).sqrt().item()
    assert move == pytest.approx(100 * 0.1, rel=1e-3), "a step is rate times a gradient that is clipped"


def test_before_it_averages_the_weights_of_sgd_are_validated_as_they_are(text, tmp_path):
    training.train(new_model(text), text, replace(SGD, epochs=1), tmp_path)
    tensors = checkpoint.load_tensors(tmp_path / "last.safetensors")[0]
    assert all(torch.equal(tensors[name.replace("model.", "ema.")], tensors[name])
               for name in tensors if name.startswith("model."))  # fmt: skip


def test_another_text_is_refused(text, tmp_path):
    (tmp_path / "other.txt").write_text("xyz" * 200)
    other = data.load(tmp_path / "other.txt", window=WINDOW)
    with pytest.raises(ValueError, match="other is not the text of this model's vocabulary: expected its 6 characters"):
        training.train(new_model(text), other, CONFIG, tmp_path / "run")


def test_bfloat16_autocast_trains(text, tmp_path):
    exact = training.train(new_model(text), text, CONFIG, tmp_path / "float32").best_valid
    found = training.train(new_model(text), text, replace(CONFIG, precision="bf16"), tmp_path / "bf16").best_valid
    assert found != exact and found == pytest.approx(exact, abs=0.05)


def test_a_saved_model_needs_no_text_to_sample_and_encode(text, tmp_path):
    model = new_model(text)
    training.train(model, text, replace(CONFIG, epochs=1), tmp_path)
    loaded = training.load_model(tmp_path)
    assert loaded.vocabulary == list(text.vocabulary) and loaded.level == "character"
    assert loaded.sample(2, 9, temperature=0, prompt="abc") == model.sample(2, 9, temperature=0, prompt="abc")


def test_an_unknown_optimizer_and_no_patience_are_a_sentence():
    with pytest.raises(ValueError, match="optimizer must be one of adamw, asgd, got 'sgd'"):
        training.TrainConfig(optimizer="sgd")
    with pytest.raises(ValueError, match="patience must be positive, got 0"):
        training.TrainConfig(patience=0)
    with pytest.raises(ValueError, match="streams must be positive, got 0"):
        model = ONLSTMLanguageModel(list("ab"), "character", **SMALL).eval()
        training.evaluate(model, torch.zeros(2, 4, dtype=torch.uint8), streams=0)


def test_two_processes_have_streams_of_their_own(path, tmp_path):
    torchrun(Path(__file__).parent / "two_processes_onlstm.py", tmp_path / "run", path)
    assert [row["epoch"] for row in metrics.read(tmp_path / "run" / "metrics.csv")] == [1, 2]
