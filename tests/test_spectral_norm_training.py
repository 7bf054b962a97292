"""The claim of examples/spectral_norm_training.py, over fewer steps: normalised weights have the norm that they claim
to have while they are trained."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "spectral_norm_training.py"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("matplotlib")
    specification = importlib.util.spec_from_file_location("spectral_norm_training", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_true_norms_stay_within_one_percent_while_training_and_are_those_of_torchs(example):
    found = [
        example.train(partial(normalize, n_power_iterations=40), steps=80) for normalize in example.NORMALIZERS.values()
    ]
    for norms in found:
        assert len(norms.steps) == 9 and (norms.values - 1).abs().max() < 0.01
    # Rounding is all that the two trainings differ by, and Adam multiplies it.
    torch.testing.assert_close(found[0].values, found[1].values, atol=1e-3, rtol=0)


def test_with_one_step_the_norm_lags_behind_the_weights_but_never_lies_below_one(example):
    """sigma = u^T W v with unit vectors is at most the norm."""
    norms = example.train(partial(example.spectral_norm, n_power_iterations=1), steps=60)
    assert norms.values.min() > 1 - 1e-6 and 1.01 < norms.values.max() < 1.2
