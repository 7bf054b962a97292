"""Every flow through the training loop: a run that reloads, and real digits better explained than by a Gaussian."""

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("safetensors")

from flow_models import VARIANTS, variant  # noqa: E402
from pygen import data, models, training  # noqa: E402
from pygen.models.baselines import FullGaussian  # noqa: E402


@pytest.mark.parametrize("name", VARIANTS)
def test_two_steps_of_training_write_a_model_that_reloads(name, tmp_path):
    model = variant(name, levels=4, dropout=0.1, reversible=True)
    x = torch.randint(0, 4, (48, *model.shape), generator=torch.Generator().manual_seed(0))
    dataset = data.Dataset(x[:32], x[32:40], x[40:], 4, model.shape, "noise")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = training.TrainConfig(epochs=1, batch_size=16, device="cpu", progress=False)
    assert training.train(model, dataset, config, tmp_path).steps == 2
    assert any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    again = training.load_model(tmp_path)
    assert again.config == model.config
    assert training.evaluate(again, dataset.test) == training.evaluate(model, dataset.test)


@pytest.mark.parametrize(
    ("kind", "arguments", "epochs"),
    (
        ("nice", {"logit": True, "depth": 2, "hidden": (32,)}, 6),
        ("realnvp", {"depth": 4, "hidden": (32,)}, 4),
        ("realnvp", {"architecture": "multiscale", "depth": 2, "hidden": (8,)}, 3),
        ("glow", {"steps": 1, "hidden": (8,)}, 4),
        ("nsf", {"depth": 2, "hidden": (32,)}, 3),
        ("nsf", {"architecture": "multiscale", "depth": 1, "hidden": (8,)}, 4),
    ),
)
def test_a_few_epochs_on_digits_are_better_than_the_full_covariance_gaussian(kind, arguments, epochs, tmp_path):
    pytest.importorskip("sklearn")
    digits = data.load("digits")
    torch.manual_seed(0)
    model = models.create(kind, {"shape": digits.shape, "levels": digits.levels, "alpha": 0.01, **arguments})
    config = training.TrainConfig(
        epochs=epochs, batch_size=64, device="cpu", progress=False, learning_rate=2e-2, warmup_steps=10, ema=0.9
    )
    training.train(model, digits, config, tmp_path)
    gaussian = FullGaussian(digits.train).bits_per_dim(digits.test).mean().item()
    assert training.evaluate(model, digits.test, draws=2) < gaussian - 0.2
