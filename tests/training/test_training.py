"""The training loop: reproducible, resumable to the bit, and nothing lost whatever stops it."""

import errno
import json
import math
import os
import signal
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from harness import torchrun

pytest.importorskip("accelerate")
pytest.importorskip("safetensors")

from pygen import data, models, training  # noqa: E402
from pygen.training import checkpoint, metrics  # noqa: E402

CONFIG = training.TrainConfig(epochs=4, batch_size=16, device="cpu", progress=False, learning_rate=1e-2)


@pytest.fixture(scope="module")
def dataset():
    """Pixels that depend on each other: a pair is equal, the rest uniform."""
    x = torch.randint(0, 4, (120, 6), generator=torch.Generator().manual_seed(0))
    x[:, 1::2] = x[:, ::2]
    return data.Dataset(x[:80], x[80:100], x[100:], 4, (6,), "pairs")


def new_model(seed=0, **options):
    torch.manual_seed(seed)
    return models.RealNVP((6,), levels=4, **({"depth": 4, "hidden": (16,), "dropout": 0.1} | options))


def tensors_of(run, name="last"):
    return checkpoint.load_tensors(Path(run) / f"{name}.safetensors")[0]


def assert_same_bits(run, other):
    for name in ("last", "best"):
        mine, theirs = tensors_of(run, name), tensors_of(other, name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    columns = ("epoch", "step", "loss", "valid", "learning_rate")
    mine, theirs = ([[row[c] for c in columns] for row in metrics.read(Path(r) / "metrics.csv")] for r in (run, other))
    assert mine == theirs


class Hooked(models.RealNVP):
    """Calls `hook` before the training loss of every step; otherwise the same model."""

    hook = staticmethod(lambda step: None)
    calls = 0

    def loss(self, x, context=None):
        if self.training:
            self.calls += 1
            value = self.hook(self.calls)
            if value is not None:
                return super().loss(x, context) * value
        return super().loss(x, context)


def hooked(hook, **options):
    torch.manual_seed(0)
    model = Hooked((6,), levels=4, **({"depth": 4, "hidden": (16,), "dropout": 0.1} | options))
    model.hook = hook
    return model


def interrupt_at(step):
    return lambda call: os.kill(os.getpid(), signal.SIGINT) if call == step else None


def test_training_lowers_the_loss_on_data_it_did_not_see(dataset, tmp_path):
    model = new_model().eval()
    before = training.evaluate(model, dataset.test)
    result = training.train(model, dataset, replace(CONFIG, epochs=60), tmp_path / "run")
    after = training.evaluate(model, dataset.test)
    assert after < before - 0.5 and after < math.log2(4), "half of the pixels are known from the others"
    assert (result.epochs, result.steps, result.interrupted) == (60, 300, False)
    assert not model.training, "the model comes back in eval mode"


def test_same_seed_same_bits_other_seed_other_weights(dataset, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        training.train(new_model(), dataset, replace(CONFIG, seed=seed), tmp_path / name)
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    key = next(key for key in tensors_of(tmp_path / "a") if key.startswith("model.") and key.endswith("weight"))
    assert not torch.equal(tensors_of(tmp_path / "a")[key], tensors_of(tmp_path / "c")[key])


@pytest.mark.parametrize("step", (1, 8, 10, 15))
def test_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(dataset, tmp_path, step):
    """Five steps an epoch: interrupted at the first step, within an epoch, and at an epoch's last step."""
    training.train(new_model(), dataset, CONFIG, tmp_path / "whole")
    first = training.train(hooked(interrupt_at(step)), dataset, CONFIG, tmp_path / "parts")
    assert first.interrupted and first.steps == step
    torch.manual_seed(123)  # the state of the new process must not matter
    second = training.train(new_model(seed=5), dataset, CONFIG, tmp_path / "parts", resume=True)
    assert not second.interrupted and second.steps == 20
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def test_resuming_a_finished_run_prolongs_it_or_does_nothing(dataset, tmp_path):
    training.train(new_model(), dataset, CONFIG, tmp_path)
    before = tensors_of(tmp_path)
    same = training.train(new_model(), dataset, CONFIG, tmp_path, resume=True)
    assert same.steps == 20 and all(torch.equal(before[k], v) for k, v in tensors_of(tmp_path).items())
    assert training.train(new_model(), dataset, replace(CONFIG, epochs=6), tmp_path, resume=True).epochs == 6
    assert [row["epoch"] for row in metrics.read(tmp_path / "metrics.csv")] == [1, 2, 3, 4, 5, 6]


def test_a_killed_run_resumes_and_its_metrics_have_no_doubles(dataset, tmp_path):
    """Killed, not asked: what comes after the last checkpoint is done again, and its rows are replaced."""

    def die(call):
        if call == 13:
            raise MemoryError

    config = replace(CONFIG, checkpoint_seconds=0)
    with pytest.raises(MemoryError):
        training.train(hooked(die), dataset, config, tmp_path / "parts")
    metrics.append(tmp_path / "parts" / "metrics.csv", {"epoch": 9, "step": 45, "loss": 1.0})
    training.train(new_model(), dataset, config, tmp_path / "parts", resume=True)
    training.train(new_model(), dataset, config, tmp_path / "whole")
    assert_same_bits(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(dataset, tmp_path, value):
    model = hooked(lambda call: value if call == 8 else None)
    with pytest.raises(training.TrainingDiverged, match=r"at step 8; the last good checkpoint is .*last\.safetensors"):
        training.train(model, dataset, replace(CONFIG, checkpoint_seconds=0), tmp_path)
    tensors, info = checkpoint.load_tensors(tmp_path / "last.safetensors")
    assert info["step"] == 7 and all(t.isfinite().all() for t in tensors.values())
    assert training.train(new_model(), dataset, CONFIG, tmp_path, resume=True).steps == 20


def test_a_gradient_that_is_not_finite_stops_too(dataset, tmp_path):
    model = new_model()
    parameter = next(model.parameters())
    parameter.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(training.TrainingDiverged, match="the gradient became NaN.*no checkpoint had been written yet"):
        training.train(model, dataset, CONFIG, tmp_path)


def test_best_is_the_lowest_validation_loss_and_is_what_the_model_holds_afterwards(dataset, tmp_path):
    model = new_model(dropout=0.0, hidden=(64,))
    result = training.train(model, dataset, replace(CONFIG, epochs=150, weight_decay=0.0), tmp_path)
    rows = metrics.read(tmp_path / "metrics.csv")
    valid = [row["valid"] for row in rows]
    assert result.best_valid == min(valid) < valid[-1], "the run must overfit for this test to mean anything"
    loaded = training.load_model(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    share = checkpoint.load_tensors(tmp_path / "best.safetensors")[1]
    assert share["step"] == rows[valid.index(min(valid))]["step"]


def test_average_follows_the_weights(dataset, tmp_path):
    """Recomputed here from the weights after every step, in float64."""
    history = []
    model = hooked(lambda call: history.append([p.detach().double().clone() for p in model.parameters()]))
    training.train(model, dataset, replace(CONFIG, epochs=2, ema=0.8), tmp_path)
    tensors = tensors_of(tmp_path)
    names = [f"model.{name}" for name, _ in model.named_parameters()]
    weights = [*history[1:], [tensors[name].double() for name in names]]
    average = history[0]
    for step, current in enumerate(weights, 1):
        decay = min(0.8, step / (10 + step))
        average = [decay * a + (1 - decay) * c for a, c in zip(average, current, strict=True)]
    for name, expected in zip(names, average, strict=True):
        torch.testing.assert_close(tensors[name.replace("model.", "ema.")].double(), expected, rtol=0, atol=1e-6)


def test_learning_rate_warms_up_and_ends_low(dataset, tmp_path):
    config = replace(CONFIG, epochs=20, warmup_steps=9, final_learning_rate=0.1)
    rates = []
    training.train(new_model(), dataset, config, tmp_path, callbacks=[lambda row: rates.append(row["learning_rate"])])
    assert rates[0] < max(rates) and rates.index(max(rates)) in (1, 2)
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False))
    assert rates[-1] == pytest.approx(0.1 * 1e-2)


def test_time_limit_ends_the_run_within_an_epoch(dataset, tmp_path):
    config = replace(CONFIG, epochs=None, max_minutes=0.6 / 60)
    result = training.train(new_model(), dataset, config, tmp_path)
    assert 0.6 <= result.seconds < 3 and result.steps > 0
    assert (tmp_path / "best.safetensors").exists()


def test_every_sample_is_used_once_an_epoch_in_another_order(dataset, tmp_path):
    seen = []

    class Spy(models.RealNVP):
        def loss(self, x, context=None):
            if self.training:
                seen.append(x.clone())
            return super().loss(x, context)

    training.train(Spy((6,), levels=4, depth=2, hidden=(8,)), dataset, replace(CONFIG, epochs=2), tmp_path)
    epochs = torch.cat(seen[:5]), torch.cat(seen[5:])
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(dataset.train.tolist())


def test_checkpoint_survives_a_full_disk(dataset, tmp_path):
    """/dev/full answers every write with ENOSPC, as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    training.train(new_model(), dataset, CONFIG, tmp_path)
    before = (tmp_path / "last.safetensors").read_bytes()
    (tmp_path / "last.safetensors.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"could not write .*last.*: no space left on the device; the previous") as error:
        training.train(new_model(), dataset, replace(CONFIG, epochs=5), tmp_path, resume=True)
    assert error.value.errno == errno.ENOSPC
    assert (tmp_path / "last.safetensors").read_bytes() == before
    assert training.train(new_model(), dataset, replace(CONFIG, epochs=5), tmp_path, resume=True).epochs == 5


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoint.write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error; the previous file is unchanged"):
        checkpoint.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_nothing_to_resume_and_nothing_to_overwrite(dataset, tmp_path):
    with pytest.raises(ValueError, match="nothing to resume: .* does not exist"):
        training.train(new_model(), dataset, CONFIG, tmp_path, resume=True)
    training.train(new_model(), dataset, CONFIG, tmp_path)
    with pytest.raises(ValueError, match="already holds a run: resume it, or choose another folder"):
        training.train(new_model(), dataset, CONFIG, tmp_path)
    with pytest.raises(ValueError, match="holds another model: realnvp"):
        training.train(new_model(depth=2), dataset, CONFIG, tmp_path, resume=True)


@pytest.mark.parametrize("damage", (lambda raw: b"", lambda raw: raw[: len(raw) // 2], lambda raw: b"x" * 100))
def test_a_damaged_checkpoint_is_a_sentence(dataset, tmp_path, damage):
    training.train(new_model(), dataset, CONFIG, tmp_path)
    for name in ("last", "best"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="last.safetensors is not a readable pygen checkpoint"):
        training.train(new_model(), dataset, CONFIG, tmp_path, resume=True)
    with pytest.raises(ValueError, match="best.safetensors is not a readable pygen checkpoint"):
        training.load_model(tmp_path)


def test_load_model_of_a_folder_without_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no trained model"):
        training.load_model(tmp_path / "missing")


def test_run_folder_says_what_ran_in_it(dataset, tmp_path):
    model = new_model()
    training.train(model, dataset, CONFIG, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["model"] == "realnvp" and said["config"] == model.config and said["data"] == "pairs"
    assert training.TrainConfig(**said["train"]) == replace(CONFIG, betas=list(CONFIG.betas))
    assert asdict(CONFIG)["epochs"] == 4


def test_bfloat16_autocast_trains(dataset, tmp_path):
    result = training.train(new_model(), dataset, replace(CONFIG, precision="bf16"), tmp_path / "bf16")
    again = training.train(new_model(), dataset, CONFIG, tmp_path / "float32")
    assert math.isfinite(result.best_valid) and result.best_valid != again.best_valid
    assert result.best_valid == pytest.approx(again.best_valid, abs=0.1)


def test_training_works_outside_the_main_thread(dataset, tmp_path):
    """Signals cannot be caught there; training must not try."""
    results = []
    thread = threading.Thread(target=lambda: results.append(training.train(new_model(), dataset, CONFIG, tmp_path)))
    thread.start()
    thread.join()
    assert results[0].steps == 20


def test_a_second_interrupt_does_not_wait():
    from pygen.training.loop import _interrupt_flag

    # A shell starts its background jobs with SIGINT ignored; the claim is about a program that is not.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), _interrupt_flag() as flag:
            os.kill(os.getpid(), signal.SIGINT)
            assert flag.is_set()
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_evaluate_is_repeatable_and_leaves_the_random_state(dataset):
    model = new_model().eval()
    torch.manual_seed(7)
    first = training.evaluate(model, dataset.test)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), drawn) and training.evaluate(model, dataset.test) == first
    with pytest.raises(ValueError, match="in training mode"):
        training.evaluate(model.train(), dataset.test)
    with pytest.raises(ValueError, match="x is empty"):
        training.evaluate(model.eval(), dataset.test[:0])


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"epochs": None}, "give epochs or max_minutes"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"precision": "fp16"}, "precision must be one of no, bf16, got 'fp16'"),
    ),
)
def test_settings_out_of_range_are_a_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        training.TrainConfig(**options)


def test_unknown_and_absent_devices_are_a_sentence(dataset, tmp_path):
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'tpu'"):
        training.train(new_model(), dataset, replace(CONFIG, device="tpu"), tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no GPU here"):
            training.train(new_model(), dataset, replace(CONFIG, device="cuda"), tmp_path)


def test_two_processes_train_one_model_and_resume_it(tmp_path):
    torchrun(Path(__file__).parent / "two_processes.py", tmp_path / "run")
    assert [row["epoch"] for row in metrics.read(tmp_path / "run" / "metrics.csv")] == [1, 2, 3, 4]
