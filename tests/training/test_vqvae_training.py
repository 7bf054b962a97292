"""A VQ-VAE through the training loop: what it logs, what it leaves, and one codebook in several processes."""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import torchrun

pytest.importorskip("accelerate")
pytest.importorskip("safetensors")

from pygen import data, models, training  # noqa: E402
from pygen.training import checkpoint, metrics  # noqa: E402

CONFIG = training.TrainConfig(epochs=3, batch_size=16, device="cpu", progress=False, learning_rate=1e-2, warmup_steps=5)
SMALL = {"num_hiddens": 16, "num_residual_hiddens": 4, "codebook_size": 32, "codebook_dim": 8}
QUANTIZERS = (
    {"quantizer": "ema"},
    {"quantizer": "gradient"},
    {"quantizer": "residual", "num_quantizers": 2},
)


@pytest.fixture(scope="module")
def dataset():
    """Two grey squares on black: images with something to learn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(120, 1, 8, 8, dtype=torch.int64)
    for image, (row, column, level) in zip(x, torch.randint(0, 5, (120, 3), generator=generator).tolist(), strict=True):
        image[0, row : row + 3, column : column + 3] = level + 3
        image[0, column : column + 2, row : row + 2] = 7
    return data.Dataset(x[:80], x[80:100], x[100:], 8, (1, 8, 8), "squares")


def new_model(dataset, kind=models.VQVAE, **options):
    torch.manual_seed(0)
    return kind(**(kind.arguments_for(dataset) | SMALL | options))


def tensors_of(run, name):
    return checkpoint.load_tensors(Path(run) / f"{name}.safetensors")[0]


@pytest.mark.parametrize("options", QUANTIZERS, ids=lambda options: options["quantizer"])
def test_training_lowers_the_loss_and_logs_perplexity_of_the_validation_data(dataset, tmp_path, options):
    model = new_model(dataset, **options).eval()
    before = training.evaluate(model, dataset.test)
    training.train(model, dataset, replace(CONFIG, epochs=12, ema=0.9), tmp_path)
    assert training.evaluate(model, dataset.test) < 0.7 * before
    rows = metrics.read(tmp_path / "metrics.csv")
    assert list(rows[0])[-2:] == ["perplexity", "active_codes"] and len(rows) == 12
    best = min(rows, key=lambda row: row["valid"])
    codes = model.encode(dataset.valid).numpy().reshape(-1, options.get("num_quantizers", 1))
    expected = []
    for column in codes.T:
        p = np.unique(column, return_counts=True)[1] / len(column)
        expected.append(np.exp(-(p * np.log(p)).sum()))
    assert best["perplexity"] == pytest.approx(np.mean(expected))
    assert best["active_codes"] == pytest.approx(np.mean([len(np.unique(column)) for column in codes.T]))
    assert training.measure(model, dataset.valid)["perplexity"] == pytest.approx(best["perplexity"])


def test_a_flow_logs_nothing_more_than_before(tmp_path):
    x = torch.randint(0, 4, (60, 6), generator=torch.Generator().manual_seed(0))
    flow = models.RealNVP((6,), levels=4, depth=2, hidden=(8,))
    training.train(flow, data.Dataset(x[:40], x[40:50], x[50:], 4, (6,), "noise"), CONFIG, tmp_path)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert header == "epoch,step,seconds,loss,valid,learning_rate,samples_per_second"
    assert training.measure(flow, x) == {}


class Interrupted(models.VQVAE):
    calls, at = 0, None

    def loss(self, x):
        self.calls += self.training
        if self.training and self.calls == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().loss(x)


@pytest.mark.parametrize(
    "options", (*QUANTIZERS, {"kmeans_init": True}), ids=lambda options: options.get("quantizer", "kmeans")
)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(dataset, tmp_path, options):
    """The codebook's averages and its revived codes belong to the state that a checkpoint keeps."""
    training.train(new_model(dataset, **options), dataset, CONFIG, tmp_path / "whole")
    model = new_model(dataset, Interrupted, **options)
    model.at = 7
    assert training.train(model, dataset, CONFIG, tmp_path / "parts").interrupted
    torch.manual_seed(123)
    training.train(new_model(dataset, **options), dataset, CONFIG, tmp_path / "parts", resume=True)
    for name in ("last", "best"):
        whole, parts = tensors_of(tmp_path / "whole", name), tensors_of(tmp_path / "parts", name)
        assert whole.keys() == parts.keys() and any("cluster_size" in key for key in whole)
        assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []
    columns = ("step", "loss", "valid", "perplexity", "active_codes")
    logged = [[[row[c] for c in columns] for row in metrics.read(tmp_path / run / "metrics.csv")]
              for run in ("whole", "parts")]  # fmt: skip
    assert logged[0] == logged[1]


def test_epochs_without_validation_have_no_perplexity_and_pictures_are_offered_after_those_with(dataset, tmp_path):
    seen = []

    def look(model):
        assert not model.training
        seen.append((training.evaluate(model, dataset.valid), len(metrics.read(tmp_path / "metrics.csv"))))

    config = replace(CONFIG, epochs=4, validate_epochs=2)
    training.train(new_model(dataset), dataset, config, tmp_path, on_validation=look)
    rows = metrics.read(tmp_path / "metrics.csv")
    assert [math.isnan(row["perplexity"]) for row in rows] == [True, False, True, False]
    assert [row for _, row in seen] == [2, 4], "the row of this validation is there already"
    assert [loss for loss, _ in seen] == pytest.approx([rows[1]["valid"], rows[3]["valid"]], rel=1e-6)


def test_two_epochs_of_digits_use_many_codes(tmp_path):
    """Without revival a few codes are chosen by everything, and the rest never."""
    pytest.importorskip("sklearn")
    digits = data.load("digits")
    model = new_model(digits, num_hiddens=16, codebook_size=128, codebook_dim=16, downsamplings=1)
    config = replace(CONFIG, epochs=2, batch_size=64, learning_rate=3e-3, ema=0.9)
    training.train(model, digits, config, tmp_path)
    measured = training.measure(model, digits.test)
    assert measured["perplexity"] > 32 and measured["active_codes"] > 64
    assert training.evaluate(model, digits.test) < 0.6


@pytest.mark.parametrize("options", ("ema", "residual"))
def test_two_processes_keep_one_codebook_with_one_all_reduce_a_step(tmp_path, options):
    torchrun(Path(__file__).parent / "two_processes_vqvae.py", tmp_path / "run", options)
    assert [row["epoch"] for row in metrics.read(tmp_path / "run" / "metrics.csv")] == [1, 2, 3, 4]
