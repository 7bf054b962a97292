"""IResNet through the training loop and the command line: what is learned, what holds afterwards, what is said."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import torchrun

for package in ("typer", "rich", "matplotlib", "accelerate", "safetensors"):
    pytest.importorskip(package)

from pygen import data, models, training  # noqa: E402
from pygen.models._iresnet_blocks import bounded_weights  # noqa: E402
from pygen.nn.invertible_residual import InvertibleResidual  # noqa: E402
from pygen.nn.utils._conv_operator import dense_matrix  # noqa: E402
from pygen.nn.utils._spectral_norm import SpectralNorm  # noqa: E402
from pygen.training import metrics  # noqa: E402

CONFIG = training.TrainConfig(epochs=1, batch_size=16, device="cpu", progress=False, learning_rate=1e-2, warmup_steps=0)
OBJECTIVES = ("density", "classifier", "hybrid")
TINY = ("--set", "blocks=1", "--set", "hidden=[8]", "--device", "cpu")


def small_moons():
    moons = data.load("moons")
    return replace(moons, train=moons.train[:128], valid=moons.valid[:32], test=moons.test[:64])


def bars(n=96):
    """Images with a bright row or a bright column, which are the classes 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (n, 1, 4, 4), generator=generator)
    labels, line = (torch.randint(0, most, (n,), generator=generator) for most in (2, 4))
    for image, label, i in zip(x, labels.tolist(), line.tolist(), strict=True):
        image[0].select(label, i).fill_(7)
    cuts = {"train": slice(64), "valid": slice(64, 80), "test": slice(80, n)}
    parts = [x[cut] for cut in cuts.values()]
    return data.Dataset(*parts, 8, (1, 4, 4), "bars", labels={split: labels[cut] for split, cut in cuts.items()})


def new_model(dataset, **options):
    torch.manual_seed(0)
    return models.create("iresnet", models.IResNet.arguments_for(dataset) | {"blocks": 2, "hidden": (8,), **options})


def branch_bounds(model):
    """For each block, the product of its layers' singular values from whole matrices; slopes are at most 1."""

    def norm_of(norm, bounded):
        if isinstance(norm, SpectralNorm):
            return torch.linalg.matrix_norm(bounded.double(), 2).item()
        return torch.linalg.svdvals(dense_matrix(norm.operator, bounded.double()))[0].item()

    return [
        math.prod(norm_of(norm, norm(weight)) for norm, weight in bounded_weights(block))
        for block in model.modules()
        if isinstance(block, InvertibleResidual)
    ]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_writes_a_model_that_reloads_within_its_bounds(objective, tmp_path):
    dataset = bars()
    model = new_model(dataset, objective=objective, blocks=1, n_exact_eval=4)
    tensors = dataset.tensors("test", labelled=model.labelled)
    training.train(model, dataset, CONFIG, tmp_path)
    again = training.load_model(tmp_path)
    assert json.loads(json.dumps(again.config)) == json.loads(json.dumps(model.config))
    assert training.evaluate(again, *tensors, draws=1) == training.evaluate(model, *tensors, draws=1)
    assert max(branch_bounds(again)) <= 0.9 * (1 + 2e-4)
    rows = metrics.read(tmp_path / "metrics.csv")
    assert ("accuracy" in rows[0]) == (objective != "density")
    assert again.invert(again.features(dataset.test)).converged.all()


def test_a_classifier_learns_from_labels_and_validates_with_them(tmp_path):
    dataset = bars()
    model = new_model(dataset, objective="classifier", blocks=1, hidden=(16,))
    training.train(model, dataset, replace(CONFIG, epochs=12, ema=0.5, learning_rate=3e-2), tmp_path)
    found = training.measure(model, *dataset.tensors("train", labelled=True))
    assert found["accuracy"] > 0.9
    best = min(metrics.read(tmp_path / "metrics.csv"), key=lambda row: row["valid"])
    valid = training.measure(model, *dataset.tensors("valid", labelled=True))
    assert valid["accuracy"] == pytest.approx(best["accuracy"])
    assert valid["cross_entropy"] == pytest.approx(best["valid"], abs=1e-5)


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path):
    dataset = small_moons()
    config = replace(CONFIG, epochs=2, final_learning_rate=1.0)  # the cosine of a run of one epoch would be another
    training.train(new_model(dataset), dataset, config, tmp_path / "whole")
    training.train(new_model(dataset), dataset, replace(config, epochs=1), tmp_path / "parts")
    training.train(new_model(dataset), dataset, config, tmp_path / "parts", resume=True)
    expected = training.load_model(tmp_path / "whole", which="last").state_dict()
    for name, tensor in training.load_model(tmp_path / "parts", which="last").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_density_lowers_its_nats(tmp_path):
    dataset = small_moons()
    model = new_model(dataset, hidden=(16, 16)).eval()
    before = training.evaluate(model, dataset.test, draws=1)
    training.train(model, dataset, replace(CONFIG, epochs=6, ema=0.5), tmp_path)
    assert training.evaluate(model, dataset.test, draws=1) < before - 0.1


def test_labels_that_are_not_there_are_a_sentence(tmp_path):
    moons = small_moons()
    model = new_model(moons, objective="classifier", num_classes=2)
    with pytest.raises(ValueError, match="moons: the data have no labels, and this model is trained with labels"):
        training.train(model, moons, CONFIG, tmp_path)


def test_the_command_line_trains_on_moons_and_samples(tmp_path, run_here, monkeypatch):
    monkeypatch.setattr(data.densities, "SIZES", {"train": 256, "valid": 64, "test": 128})
    run = tmp_path / "r"
    code, out, err = run_here("train", "iresnet", "--data", "moons", "--epochs", 1, "--out", run, *TINY)
    assert (code, err) == (0, "") and "bits/dim" in out and "density.png" in out
    assert (run / "density.png").stat().st_size > 5000
    code, out, _ = run_here("sample", run, "--n", 7, "--out", tmp_path / "s.npz", "--plot", tmp_path / "s.png")
    assert code == 0 and np.load(tmp_path / "s.npz")["samples"].shape == (7, 2)
    assert run_here("sample", run, "--interpolate", 2)[0] == 0
    code, _, err = run_here("sample", run, "--reconstruct", 3)
    assert code == 2 and "have no reconstruction picture" in err and "Traceback" not in err


def test_the_command_line_trains_a_classifier_of_digits_and_inverts_it(tmp_path, run_here):
    pytest.importorskip("sklearn")
    run = tmp_path / "r"
    words = ("train", "iresnet", "--set", "objective=classifier", "--epochs", 1, "--out", run)
    code, out, err = run_here(*words, *TINY)
    assert (code, err) == (0, "")
    assert "nats of cross-entropy, accuracy 0." in out and "inversions.png" in out and "--reconstruct 64" in out
    code, out, _ = run_here(
        "sample", run, "--reconstruct", 5, "--out", tmp_path / "x.npz", "--plot", tmp_path / "x.png"
    )
    again = torch.from_numpy(np.load(tmp_path / "x.npz")["reconstructions"])
    test = data.load("digits").test
    assert code == 0 and all((image == test).flatten(1).all(1).any() for image in again), "digits of the test data"
    code, _, err = run_here("sample", run)
    assert code == 2 and "an iresnet that was trained as a classifier has no density to draw from" in err


def test_the_command_line_says_what_is_missing(tmp_path, run_here):
    np.savez(tmp_path / "x.npz", np.random.default_rng(0).integers(0, 4, (60, 5)))
    words = ("train", "iresnet", "--data", tmp_path / "x.npz", "--set", "objective=classifier", "--out", tmp_path / "r")
    code, _, err = run_here(*words)
    assert code == 2 and "needs num_classes, at least 2, got None; data without labels have none" in err
    code, _, err = run_here(*words, "--set", "num_classes=3")
    assert code == 2 and "the data have no labels" in err and "Traceback" not in err


@pytest.mark.slow
def test_the_density_of_trained_moons_integrates_to_one_and_is_close_to_the_truth(tmp_path):
    moons = data.load("moons")
    torch.manual_seed(0)
    model = models.IResNet((2,))
    config = replace(CONFIG, epochs=4, batch_size=128, warmup_steps=20, ema=0.98)
    training.train(model, moons, config, tmp_path)
    truth = data.DENSITIES["moons"]
    line = torch.linspace(-6, 6, 481)
    points = torch.cartesian_prod(line, line)
    with torch.no_grad():
        density = torch.cat([model.log_prob(part) for part in points.split(20_000)]).double().exp()
    area = (line[1] - line[0]).item() ** 2
    assert density.sum().item() * area == pytest.approx(1, abs=0.01)
    with torch.no_grad():
        excess = (truth.log_prob(moons.test) - model.log_prob(moons.test)).mean().item()
    assert -0.02 < excess < 0.15, "nats above the entropy; a normal density is 1.5 above"
    assert max(branch_bounds(model)) <= 0.9 * (1 + 1e-5)
    z, _ = model(moons.test[:500])
    found = model.invert(z)
    assert found.converged.all() and (found.x - moons.test[:500]).abs().max() < 1e-4


@pytest.mark.slow
def test_digits_are_classified_and_found_again_from_their_features(tmp_path):
    pytest.importorskip("sklearn")
    digits = data.load("digits")
    torch.manual_seed(0)
    arguments = models.IResNet.arguments_for(digits)
    model = models.IResNet(**arguments, objective="classifier", blocks=2)
    training.train(model, digits, replace(CONFIG, epochs=10, batch_size=64, warmup_steps=10, ema=0.95), tmp_path)
    assert training.measure(model, *digits.tensors("test", labelled=True))["accuracy"] > 0.9
    found = model.invert(model.features(digits.test))
    assert found.converged.all() and found.iterations.max() < 100
    assert found.error.max() <= 1e-4  # 1e-6 for each of six blocks, which ActNorms between them scale
    assert (found.x - digits.test - 0.5).abs().max() < 0.01, "of a grey level"
    assert torch.equal(model.reconstruct(digits.test), digits.test)
    assert max(branch_bounds(model)) <= 0.9 * (1 + 2e-4)


@pytest.mark.slow
def test_two_processes_keep_equal_weights_and_singular_vectors(tmp_path):
    torchrun(Path(__file__).parents[1] / "training" / "two_processes_iresnet.py", tmp_path / "run")
