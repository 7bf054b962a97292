"""The command line: what a user types, what comes back, and that no mistake shows a traceback."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("typer", "rich", "matplotlib", "accelerate", "safetensors", "sklearn"):
    pytest.importorskip(package)

from pygen import _plots, cli  # noqa: E402

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
TINY = ("--set", "depth=2", "--set", "hidden=[8]", "--device", "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs that the tests below read and do not change."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit) as done:
        cli.main(["train", "realnvp", "--data", "digits", "--out", str(folder), "--epochs", "2", *TINY])
    assert not done.value.code
    return folder


def test_train_writes_a_run_and_says_what_came_out(tmp_path, run_here):
    code, out, err = run_here("train", "realnvp", "--out", tmp_path / "r", "--epochs", 1, *TINY)
    assert code == 0 and err == ""
    assert "bits/dim" in out and "pygen sample" in out
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == {"best.safetensors", "last.safetensors", "config.json", "metrics.csv"}
    saved = json.loads((tmp_path / "r" / "config.json").read_text())
    assert saved["config"]["depth"] == 2 and saved["config"]["hidden"] == [8]


def test_resume_takes_model_data_and_settings_from_the_run(tmp_path, run_here):
    np.savez(tmp_path / "x.npz", np.random.default_rng(0).integers(0, 4, (60, 5)))
    words = ("train", "realnvp", "--data", tmp_path / "x.npz", "--out", tmp_path / "r", "--seed", 3, *TINY)
    assert run_here(*words, "--epochs", 2)[0] == 0
    code, out, _ = run_here("train", "--resume", tmp_path / "r", "--epochs", 3)
    assert code == 0 and out.replace("\r", "\n").find("3 epochs") > 0
    rows = (tmp_path / "r" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2", "3"]


def test_sample_writes_a_picture_and_an_array(trained, tmp_path, run_here):
    words = ("sample", trained, "--n", 5, "--plot", tmp_path / "new" / "s.png", "--out", tmp_path / "s.npz")
    assert run_here(*words)[0] == 0
    samples = np.load(tmp_path / "s.npz")["samples"]
    assert samples.shape == (5, 1, 8, 8) and samples.min() >= 0 and samples.max() <= 16
    from PIL import Image

    with Image.open(tmp_path / "new" / "s.png") as picture:
        assert picture.width > 300 and picture.height > 300
    run_here("sample", trained, "--n", 5, "--out", tmp_path / "again.npz")
    assert np.array_equal(np.load(tmp_path / "again.npz")["samples"], samples), "same seed, same samples"
    run_here("sample", trained, "--n", 5, "--out", tmp_path / "other.npz", "--seed", 1)
    assert not np.array_equal(np.load(tmp_path / "other.npz")["samples"], samples)


FLOWS = {
    "nice": ("--set", "depth=2", "--set", "hidden=[8]"),
    "realnvp": ("--set", "architecture=multiscale", "--set", "depth=2", "--set", "hidden=[4]"),
    "glow": ("--set", "steps=1", "--set", "hidden=[4]"),
    "nsf": ("--set", "depth=2", "--set", "hidden=[8]", "--set", "num_bins=4"),
}


@pytest.fixture(scope="module")
def omniglot(real_data, tmp_path_factory):
    """A part of the characters, as they come: train and test of bytes (N, 28, 28), and labels beside them."""
    path = tmp_path_factory.mktemp("omniglot") / "omniglot.npz"
    with np.load(real_data / "omniglot28.npz") as file:
        np.savez(path, **{name: array[:96] for name, array in ((name, file[name]) for name in file.files)})
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Colour images of different sizes in folders of folders."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(24):
        (folder / str(i % 3)).mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (10 + i, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / str(i % 3) / f"{i}.png")
    return folder


@pytest.mark.parametrize("source", ("digits", "omniglot", "photographs"))
@pytest.mark.parametrize("model", FLOWS)
def test_every_flow_trains_samples_and_interpolates_on_every_kind_of_data(model, source, tmp_path, run_here, request):
    path = source if source == "digits" else request.getfixturevalue(source)
    run = tmp_path / "run"
    words = ("train", model, "--data", path, "--size", 8, "--out", run, "--epochs", 1, "--batch-size", 64)
    code, out, err = run_here(*words, "--device", "cpu", *FLOWS[model])
    assert code == 0, err
    assert float(re.search(r"test ([0-9.]+) bits/dim", out).group(1)) < 16
    shape = {"digits": (1, 8, 8), "omniglot": (1, 28, 28), "photographs": (3, 8, 8)}[source]
    highest = 16 if source == "digits" else 255
    assert run_here("sample", run, "--n", 4, "--out", tmp_path / "s.npz", "--plot", tmp_path / "s.png")[0] == 0
    assert np.load(tmp_path / "s.npz")["samples"].shape == (4, *shape)
    words = ("sample", run, "--interpolate", 1, "--out", tmp_path / "i.npz", "--plot", tmp_path / "i.png")
    assert run_here(*words)[0] == 0
    between = np.load(tmp_path / "i.npz")["interpolations"]
    assert between.shape[2:] == shape and between.min() >= 0 and between.max() <= highest
    assert (tmp_path / "s.png").stat().st_size > 1000 and (tmp_path / "i.png").stat().st_size > 1000


def test_interpolations_begin_and_end_with_test_images(trained, tmp_path, run_here):
    from pygen import data

    code, out, _ = run_here("sample", trained, "--interpolate", 3, "--out", tmp_path / "i.npz")
    assert code == 0 and "3 interpolations" in out
    between = torch.from_numpy(np.load(tmp_path / "i.npz")["interpolations"])
    test = data.load("digits").test.long()
    ends = between[:, [0, -1]].flatten(0, 1)
    found = (ends[:, None] == test).flatten(2).all(2)
    assert between.shape == (3, 10, 1, 8, 8) and (found.sum(1) == 1).all()
    assert found.any(0).sum() == 6, "pairs of different images"
    run_here("sample", trained / "best.safetensors", "--interpolate", 3, "--out", tmp_path / "again.npz")
    assert np.array_equal(np.load(tmp_path / "again.npz")["interpolations"], between), "same seed, same pairs"
    assert run_here("sample", trained, "--interpolate", 2)[0] == 0
    assert (trained / "interpolations.png").stat().st_size > 1000


def test_interpolation_without_data_is_a_sentence(trained, tmp_path, run_here):
    code, _, err = run_here("sample", trained, "--interpolate", 151)
    assert code == 2 and "--interpolate 151 needs 302 test samples, the data has 300" in err
    (tmp_path / "best.safetensors").write_bytes((trained / "best.safetensors").read_bytes())
    code, _, err = run_here("sample", tmp_path, "--interpolate", 2)
    assert code == 2 and "no data to interpolate between: " in err and "config.json is missing" in err


TINY_VQVAE = ("--set", "num_hiddens=8", "--set", "codebook_size=16", "--batch-size", 64, "--device", "cpu")


@pytest.fixture(scope="module")
def trained_vqvae(tmp_path_factory):
    """A run of two epochs that the tests below read and do not change."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit) as done:
        cli.main([str(w) for w in ("train", "vqvae", "--data", "digits", "--out", folder, "--epochs", 2, *TINY_VQVAE)])
    assert not done.value.code
    return folder


@pytest.mark.parametrize("source", ("digits", "omniglot", "photographs"))
def test_vqvae_trains_on_every_kind_of_images_and_draws_what_it_learned(source, tmp_path, run_here, request):
    path = source if source == "digits" else request.getfixturevalue(source)
    run = tmp_path / "run"
    words = ("train", "vqvae", "--data", path, "--size", 8, "--out", run, "--epochs", 1, *TINY_VQVAE)
    code, out, err = run_here(*words)
    assert code == 0, err
    found = re.search(r"test ([0-9.]+) of the data's variance, perplexity ([0-9.]+), active codes ([0-9.]+)", out)
    assert found and float(found[1]) < 2 and 1 <= float(found[2]) <= float(found[3]) <= 16
    assert "reconstructions.png" in out and "--reconstruct 64" in out
    assert all((run / name).stat().st_size > 1000 for name in ("reconstructions.png", "codebook.png"))
    header, row = (run / "metrics.csv").read_text().splitlines()
    assert header.endswith("perplexity,active_codes") and len(row.split(",")) == len(header.split(","))


def test_vqvae_resumes_and_draws_again(trained_vqvae, tmp_path, run_here):
    run = tmp_path / "run"
    shutil.copytree(trained_vqvae, run)
    (run / "codebook.png").unlink()
    code, out, err = run_here("train", "--resume", run, "--epochs", 3)
    assert code == 0 and "3 epochs" in out, err
    assert (run / "codebook.png").exists() and len((run / "metrics.csv").read_text().splitlines()) == 4


def test_reconstruct_writes_test_samples_above_what_the_codes_keep(trained_vqvae, tmp_path, run_here):
    words = ("sample", trained_vqvae, "--reconstruct", 5, "--plot", tmp_path / "r.png", "--out", tmp_path / "r.npz")
    code, out, err = run_here(*words)
    assert code == 0 and "5 reconstructions" in out, err
    from pygen import data, training

    again = torch.from_numpy(np.load(tmp_path / "r.npz")["reconstructions"])
    model, test = training.load_model(trained_vqvae), data.load("digits").test
    possible = model.reconstruct(test)
    assert again.shape == (5, 1, 8, 8)
    assert all((image == possible).flatten(1).all(1).any() for image in again)
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_what_a_model_cannot_do_is_a_sentence(trained, trained_vqvae, run_here):
    code, _, err = run_here("sample", trained_vqvae)
    assert code == 2 and "a vqvae has no prior over its codes to draw from; --reconstruct 64 shows" in err
    code, _, err = run_here("sample", trained_vqvae, "--interpolate", 2)
    assert code == 2 and "a vqvae has codes with nothing in between" in err
    code, _, err = run_here("sample", trained, "--reconstruct", 2)
    assert code == 2 and "a realnvp gives its data back exactly" in err
    code, _, err = run_here("sample", trained_vqvae, "--reconstruct", 301)
    assert code == 2 and "--reconstruct 301 needs 301 test samples, the data has 300" in err
    code, _, err = run_here("sample", trained, "--reconstruct", 2, "--interpolate", 2)
    assert code == 2 and "exclude each other" in err


MISTAKES = {
    "vqvae on vectors": (("train", "vqvae", "--data", "{tmp}/vectors.npz"), "VQVAE: shape must be an image's, (H, W)"),
    "unknown quantizer": (
        ("train", "vqvae", "--set", "quantizer=lookup"),
        "quantizer must be one of ema, gradient, residual, got 'lookup'",
    ),
    "unknown model": (("train", "glowing"), "unknown model 'glowing'; there is: "),
    "no model": (("train",), "which model? pygen train MODEL, one of: "),
    "unknown data": (("train", "realnvp", "--data", "digitz"), "no data set or file 'digitz'; there is: digits"),
    "nothing to resume": (("train", "--resume", "{tmp}/none"), "nothing to resume: "),
    "no such option of the model": (("train", "realnvp", "--set", "colour=3"), "unexpected keyword argument 'colour'"),
    "half an option": (("train", "realnvp", "--set", "depth"), "--set takes NAME=VALUE, got 'depth'"),
    "wrong type of an option": (("train", "realnvp", "--set", "depth=many"), "pygen: "),
    "no epochs": (("train", "realnvp", "--epochs", "0"), "epochs must be positive, got 0"),
    "no time": (("train", "realnvp", "--minutes", "-1"), "max_minutes must be positive, got -1"),
    "unknown device": (("train", "realnvp", "--device", "tpu"), "device must be auto, cpu or cuda, got 'tpu'"),
    "unknown precision": (("train", "realnvp", "--precision", "fp8"), "precision must be one of no, bf16"),
    "not a number": (("train", "realnvp", "--epochs", "ten"), "--epochs"),
    "unknown option": (("train", "realnvp", "--colour", "red"), "--colour"),
    "unknown command": (("trane",), "trane"),
    "folder that cannot be made": (("train", "realnvp", "--out", "{tmp}/file/run"), "file"),
    "no run": (("sample", "{tmp}/none"), "holds no trained model"),
    "no samples": (("sample", "{tmp}/none", "--n", "0"), "--n"),
    "empty file": (("train", "realnvp", "--data", "{tmp}/empty.npz"), "empty.npz: not a readable .npz file"),
    "damaged run": (("sample", "{tmp}/damaged"), "best.safetensors is not a readable pygen checkpoint"),
    "no rows": (("sample", "{tmp}/none", "--interpolate", "0"), "--interpolate"),
    "glow on vectors": (("train", "glow", "--data", "{tmp}/vectors.npz"), "Glow: shape must be an image's, (H, W) or"),
    "too many scales": (("train", "glow", "--set", "scales=4"), "divisible by 16, got 8 x 8; choose fewer scales"),
    "conditional without context": (
        ("train", "nice", "--set", "context_features=2", "--out", "{tmp}/c"),
        "context must",
    ),
    "one width": (
        ("train", "glow", "--set", "hidden=64"),
        "hidden must be a list of positive widths, as [64, 64], got 64",
    ),
    "unknown prior": (
        ("train", "nice", "--set", "prior=cauchy"),
        "prior must be one of normal, logistic, got 'cauchy'",
    ),
    "damaged settings": (("train", "--resume", "{tmp}/damaged"), "config.json is damaged"),
    "demo without time": (("demo", "--minutes", "0", "--out", "{tmp}/demo"), "max_minutes must be positive, got 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_sentence_and_exit_code_2(tmp_path, run_here, mistake):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "vectors.npz", np.zeros((30, 6), np.uint8))
    (tmp_path / "damaged").mkdir()
    for name in ("best.safetensors", "config.json"):
        (tmp_path / "damaged" / name).write_bytes(b"damaged")
    words, sentence = MISTAKES[mistake]
    code, _, err = run_here(*(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert code == 2
    assert sentence in err and len(err.strip().splitlines()) == 1


def test_an_existing_run_is_not_overwritten(trained, run_here):
    before = (trained / "last.safetensors").read_bytes()
    code, _, err = run_here("train", "realnvp", "--out", trained, "--epochs", 1, *TINY)
    assert code == 2 and "already holds a run: resume it" in err
    assert (trained / "last.safetensors").read_bytes() == before


def test_temperature_below_zero_and_an_unwritable_file(trained, tmp_path, run_here):
    code, _, err = run_here("sample", trained, "--temperature", -1)
    assert code == 2 and "temperature must be a number >= 0" in err
    code, _, err = run_here("sample", trained, "--out", tmp_path / "no" / "folder.npz")
    assert code == 2 and "No such file" in err


def test_debug_lets_the_traceback_through():
    for words in (["--debug", "train", "glowing"], ["train", "glowing", "--debug"]):
        with pytest.raises(ValueError, match="unknown model"):
            cli.main(words)


@pytest.mark.parametrize(
    ("package", "extra", "words"), (("typer", "cli", ["doctor"]), ("accelerate", "train", ["train", "realnvp"]))
)
def test_without_its_packages_the_command_says_what_to_install(monkeypatch, run_here, package, extra, words):
    import pygen

    for name in [name for name in sys.modules if name.startswith(("pygen._commands", "pygen.training"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("_commands", "training"):
        monkeypatch.delattr(pygen, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # what the import system takes for "not installed"
    code, _, err = run_here(*words)
    assert code == 2 and package in err and f"pip install 'pygen[{extra}]'" in err


def test_ctrl_c_in_training_keeps_a_checkpoint_that_resumes(tmp_path, run_here):
    command = [sys.executable, "-m", "pygen.cli", "train", "realnvp", "--out", str(tmp_path / "r"), *TINY]
    process = subprocess.Popen(
        [*command, "--epochs", "100000"], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics, deadline = tmp_path / "r" / "metrics.csv", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert "continue with: pygen train --resume" in " ".join(out.split()) and "Traceback" not in err
    from pygen.training import checkpoint

    step = checkpoint.load_tensors(tmp_path / "r" / "last.safetensors")[1]["step"]
    assert step > 0
    assert run_here("train", "--resume", tmp_path / "r", "--epochs", step // 10 + 2)[0] == 0


def test_doctor_prints_the_report(run_here):
    from pygen import backends

    code, out, _ = run_here("doctor")
    assert code == 0 and "affine_coupling" in out
    assert str(backends.report()).split()[0] in out


def test_help_names_every_command(run_here):
    code, out, _ = run_here("--help")
    assert code == 0 and all(name in out for name in ("doctor", "train", "sample", "demo", "bench"))


def test_demo_ends_with_its_pictures_and_a_flow_better_than_both_baselines(tmp_path, run_here):
    """Nine seconds each instead of a minute: RealNVP is ahead long before the end, Glow later."""
    code, out, err = run_here("demo", "--minutes", 0.15, "--out", tmp_path)
    assert code == 0, err
    bits = {}
    for line in out.splitlines():
        for name in ("Gaussian", "histogram", "RealNVP", "Glow"):
            cells = [cell.strip() for cell in line.split("│") if cell.strip()]
            if len(cells) == 2 and cells[0].startswith(name):
                bits[name] = float(cells[1])
    assert bits["RealNVP"] < bits["histogram"] < bits["Gaussian"]
    assert bits["Glow"] < bits["Gaussian"]
    assert {"samples.png", "interpolations.png", "bench.png"} <= {path.name for path in tmp_path.iterdir()}
    assert all((tmp_path / "run-1" / name / "best.safetensors").exists() for name in ("realnvp", "glow"))


def test_grid_puts_every_image_in_its_place():
    x = torch.randint(0, 5, (5, 1, 3, 4))
    picture = _plots.grid(x, levels=5, columns=2)
    assert picture.shape == (3 * 4 + 1, 2 * 5 + 1, 1)
    for i in range(5):
        top, left = (i // 2) * 4 + 1, (i % 2) * 5 + 1
        assert np.allclose(picture[top : top + 3, left : left + 4, 0] * 4, x[i, 0])


def test_every_reconstruction_is_below_its_sample():
    x, below = torch.zeros(5, 1, 3, 4, dtype=torch.int64), torch.full((5, 1, 3, 4), 2)
    picture = _plots.pairs_grid(x, below, levels=5, columns=3)
    pair = 2 * 4 + 1  # the height of a row of samples and a row of reconstructions
    assert picture.shape == (2 * pair + 5, 3 * 5 + 1, 1)
    for top, images in ((0, 3), (pair + 5, 2)):
        for i in range(images):
            assert (picture[top + 1 : top + 4, i * 5 + 1 : i * 5 + 5] == 0).all()
            assert (picture[top + 5 : top + 8, i * 5 + 1 : i * 5 + 5] == 0.5).all()
    assert (picture[pair : pair + 5] == 1).all()


def test_what_has_no_picture_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"samples of shape \(7,\) have no picture"):
        _plots.save_samples(Path(tmp_path) / "x.png", torch.zeros(3, 7), None)
    with pytest.raises(ValueError, match=r"samples of shape \(7,\) have no picture"):
        _plots.save_interpolations(Path(tmp_path) / "x.png", torch.zeros(3, 4, 7), None)
    _plots.save_samples(Path(tmp_path) / "x.png", torch.randn(30, 2), None)
    _plots.save_interpolations(Path(tmp_path) / "y.png", torch.randn(3, 4, 2), None)
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("x.png", "y.png"))
