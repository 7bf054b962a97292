"""Adversarial training in the one training loop: two players by turns, each with its optimizer, and one checkpoint."""

import json
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

SMALL = {"width": 4, "latent_dim": 4}
CONFIG = training.TrainConfig(
    epochs=3, batch_size=16, device="cpu", progress=False, learning_rate=1e-2, warmup_steps=5, weight_decay=0.0
)


@pytest.fixture(scope="module")
def dataset():
    """Grey squares on black: images with something to learn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(120, 1, 8, 8, dtype=torch.int64)
    for image, (row, column, level) in zip(x, torch.randint(0, 5, (120, 3), generator=generator).tolist(), strict=True):
        image[0, row : row + 3, column : column + 3] = level + 3
    return data.Dataset(x[:80], x[80:100], x[100:], 8, (1, 8, 8), "squares")


def new_model(dataset, kind=models.SNGAN, **options):
    torch.manual_seed(0)
    return kind(**(kind.arguments_for(dataset) | SMALL | options))


def tensors_of(run, name="last"):
    return checkpoint.load_tensors(Path(run) / f"{name}.safetensors")[0]


class Watched(models.SNGAN):
    """Calls `hook(player, turn)` before each turn, and multiplies its loss by what that returns."""

    hook = staticmethod(lambda player, turn: None)
    taken = 0

    def player_loss(self, player, x):
        self.taken += 1
        factor = self.hook(player, self.taken)
        loss = super().player_loss(player, x)
        return loss if factor is None else loss * factor


def of(model, player):
    return {name: p.detach().clone() for name, p in model.get_submodule(player).named_parameters()}


def test_each_turn_changes_its_own_player_only_and_every_step_both(dataset, tmp_path):
    model = new_model(dataset, Watched, n_critic=2)
    states, players = [], []

    def look(player, turn):
        players.append(player)
        states.append({name: of(model, name) for name in model.players})
        others = [p for name in model.players if name != player for p in model.get_submodule(name).parameters()]
        assert not any(p.requires_grad for p in others), "gradients that nobody uses"
        assert all(p.requires_grad for p in model.get_submodule(player).parameters())

    model.hook = look
    training.train(model, dataset, replace(CONFIG, epochs=1, batch_size=20, warmup_steps=0), tmp_path)
    assert players == ["discriminator", "discriminator", "generator"] * 2
    for player, before, after in zip(players, states, states[1:], strict=False):
        for name in model.players:
            same = [torch.equal(before[name][key], after[name][key]) for key in before[name]]
            if name != player:
                assert all(same), f"the {player}'s turn changed the {name}"
            else:
                assert not any(same), f"the {player}'s turn did not change all of it"
    assert all(p.requires_grad for p in model.parameters())


def test_both_optimizers_are_in_the_checkpoint_with_their_own_step_counts(dataset, tmp_path):
    model = new_model(dataset, n_critic=2)
    training.train(model, dataset, CONFIG, tmp_path)
    tensors = tensors_of(tmp_path)
    for player, steps in (("discriminator", 15), ("generator", 7)):
        count = len(list(model.get_submodule(player).parameters()))
        found = {name: t for name, t in tensors.items() if name.startswith(f"optimizer.{player}.")}
        assert len(found) == 3 * count
        assert {t.item() for name, t in found.items() if name.endswith(".step")} == {steps}


@pytest.mark.parametrize("step", (1, 5, 8))
@pytest.mark.parametrize("options", ({}, {"n_critic": 2, "loss": "wasserstein", "gradient_penalty": 1.0}))
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(dataset, tmp_path, options, step):
    """Interrupted in the first step, at an epoch's last step, and within an epoch; the singular vectors, the running
    statistics, and both optimizers belong to the state that a checkpoint keeps."""
    training.train(new_model(dataset, **options), dataset, CONFIG, tmp_path / "whole")
    model = new_model(dataset, Watched, **options)
    steps = 0

    def interrupt(player, turn):
        nonlocal steps
        steps += player == "discriminator"
        if player == "discriminator" and steps == step:
            os.kill(os.getpid(), signal.SIGINT)

    model.hook = interrupt
    first = training.train(model, dataset, CONFIG, tmp_path / "parts")
    assert first.interrupted and first.steps == step
    torch.manual_seed(123)  # the state of the new process must not matter
    training.train(new_model(dataset, **options), dataset, CONFIG, tmp_path / "parts", resume=True)
    for name in ("last", "best"):
        whole, parts = tensors_of(tmp_path / "whole", name), tensors_of(tmp_path / "parts", name)
        assert whole.keys() == parts.keys() and any(key.endswith("0._u") for key in whole)
        # Where a run stops within its first epoch it is validated there, which may be the best.
        assert name == "best" or [key for key in whole if not torch.equal(whole[key], parts[key])] == []
    columns = ("step", "loss", "valid", "score_real", "score_fake", "largest_sigma")
    logged = [[[row[c] for c in columns] for row in metrics.read(tmp_path / run / "metrics.csv")]
              for run in ("whole", "parts")]  # fmt: skip
    assert logged[0] == logged[1]


def test_only_the_generator_is_averaged(dataset, tmp_path):
    """Averaged weights of a discriminator would have no norm of 1, and judge another generator's samples."""
    training.train(new_model(dataset), dataset, CONFIG, tmp_path)
    tensors = tensors_of(tmp_path)
    mine = {name.removeprefix("ema."): t for name, t in tensors.items() if name.startswith("ema.")}
    same = {name: torch.equal(t, tensors[f"model.{name}"]) for name, t in mine.items()}
    assert all(equal for name, equal in same.items() if name.startswith("discriminator."))
    generators = [name for name in same if name.startswith("generator.") and name.endswith(("weight", "bias"))]
    assert generators and not any(same[name] for name in generators)


@pytest.mark.parametrize(("player", "turn"), (("discriminator", 15), ("generator", 16)))
def test_a_player_that_diverges_stops_the_run_is_named_and_keeps_the_last_checkpoint(dataset, tmp_path, player, turn):
    model = new_model(dataset, Watched)
    model.hook = lambda name, taken: math.nan if taken == turn else None
    with pytest.raises(training.TrainingDiverged, match=rf"the {player}'s loss became nan at step 8; the last good"):
        training.train(model, dataset, replace(CONFIG, checkpoint_seconds=0), tmp_path)
    tensors, info = checkpoint.load_tensors(tmp_path / "last.safetensors")
    assert info["step"] == 7 and all(t.isfinite().all() for t in tensors.values())


def test_the_gradient_of_each_player_is_clipped_by_itself(dataset, tmp_path, monkeypatch):
    clipped = []
    monkeypatch.setattr(
        "accelerate.Accelerator.clip_grad_norm_",
        lambda self, parameters, bound: clipped.append((parameters, bound)) or torch.ones(()),
    )
    model = new_model(dataset)
    training.train(model, dataset, replace(CONFIG, epochs=1, clip=0.5), tmp_path)
    assert len(clipped) == 10 and {bound for _, bound in clipped} == {0.5}
    for i, (parameters, _) in enumerate(clipped):
        own = model.get_submodule(model.players[i % 2]).parameters()
        assert [id(p) for p in parameters] == [id(p) for p in own]


def test_validation_is_the_distance_of_samples_and_the_best_is_the_nearest(dataset, tmp_path):
    model = new_model(dataset)
    before = training.evaluate(model.eval(), dataset.test)
    result = training.train(model, dataset, replace(CONFIG, epochs=15, learning_rate=3e-3, ema=0.8), tmp_path)
    rows = metrics.read(tmp_path / "metrics.csv")
    assert list(rows[0])[-3:] == ["score_real", "score_fake", "largest_sigma"]
    assert result.best_valid == min(row["valid"] for row in rows)
    assert training.evaluate(model, dataset.test) < 0.5 * before
    assert all(0.9 < row["largest_sigma"] < 1.3 for row in rows)
    measured = [training.measure(model, dataset.test) for _ in range(2)]
    assert measured[0] == measured[1], "the noise of samples is seeded"


def test_training_begins_from_the_models_own_settings(dataset, tmp_path):
    settings = dict(models.SNGAN.train_defaults)
    assert settings["weight_decay"] == 0.0 and tuple(settings["betas"]) == (0.5, 0.99)
    model = new_model(dataset, Watched)

    def stop(player, turn):
        raise MemoryError

    model.hook = stop
    with pytest.raises(MemoryError):
        training.train(model, dataset, run_dir=tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["train"]
    assert {name: saved[name] for name in settings} == {**settings, "betas": list(settings["betas"])}


def test_bfloat16_trains_both_players(dataset, tmp_path):
    model = new_model(dataset)
    training.train(model, dataset, replace(CONFIG, epochs=1, precision="bf16"), tmp_path)
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_two_processes_keep_equal_players_vectors_and_running_statistics(tmp_path):
    torchrun(Path(__file__).parent / "two_processes_sngan.py", tmp_path / "run")
    assert [row["epoch"] for row in metrics.read(tmp_path / "run" / "metrics.csv")] == [1, 2, 3, 4]


def test_the_command_trains_with_pictures_and_samples_from_the_run(tmp_path, run_here):
    for package in ("typer", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    run = tmp_path / "run"
    options = ("--minutes", 1 / 60, "--batch-size", 512, "--set", "width=4", "--set", "latent_dim=4")
    code, out, err = run_here("train", "sngan", "--data", "digits", "--out", run, "--device", "cpu", *options)
    assert code == 0, err
    assert "x 10^-3 squared kernel distance, score real" in out and out.rstrip().endswith(f"next: pygen sample {run}")
    assert all((run / name).stat().st_size > 1000 for name in ("samples.png", "scores.png"))
    saved = training.load_model(run)
    assert saved.config["distance_scale"] == models.SNGAN.arguments_for(data.load("digits"))["distance_scale"]
    drawn = (run / "samples.png").read_bytes()
    code, out, err = run_here("sample", run, "--n", 9, "--seed", 1, "--out", tmp_path / "s.npz")
    assert code == 0 and "9 samples" in out, err

    found = torch.from_numpy(np.load(tmp_path / "s.npz")["samples"])
    assert torch.equal(found, saved.sample(9, generator=torch.Generator().manual_seed(1)))
    code, _, err = run_here("sample", run)
    assert code == 0 and (run / "samples.png").read_bytes() != drawn, err
    code, _, err = run_here("sample", run, "--reconstruct", 2)
    assert code == 2 and "a sngan has no encoder to reconstruct by" in err
    code, _, err = run_here("sample", run, "--interpolate", 2)
    assert code == 2 and "a sngan has no latents of its data to interpolate between" in err
