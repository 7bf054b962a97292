"""The commands of `pygen` (typer). Each is thin: it reads options, calls the package, and prints. Started by cli.py."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from pygen import data as datasets
from pygen import models
from pygen._parse_command import parse
from pygen._simulate_command import simulate

app = typer.Typer(
    help="Fused, exact and reproducible kernels for generative models in PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

INTERRUPTED = 130  # what a shell reports for Ctrl-C
INTERPOLATION_STEPS = 10
_SAMPLES, _TEXTS, _LENGTH = 64, 3, 400  # how many samples, and of texts how many and how long, by default
_BETWEEN_TEXTS = "-" * 40
_PICTURE_SECONDS = 30.0  # between two drawings of the pictures of a training


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
) -> None:
    """cli.py looks for --debug by itself; the option is here for the help."""


@app.command()
def doctor() -> None:
    """Say which kernel serves which op on which device here, and why not a faster one."""
    from pygen import backends

    console.print(backends.report(), markup=False, highlight=False, soft_wrap=True)


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _model_options(words: list[str]) -> dict[str, Any]:
    """["depth=4", "hidden=[64,64]"] as {"depth": 4, "hidden": [64, 64]}."""
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ValueError(f"--set takes NAME=VALUE, got {word!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def _changed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the user gave."""
    return {name: value for name, value in settings.items() if value is not None}


def _saved_run(run: Path, cannot: str) -> dict[str, Any]:
    """What config.json of a run says; `cannot` begins the sentence when there is none."""
    try:
        return json.loads((run / "config.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{cannot}: {run} holds no run (config.json is missing)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{run / 'config.json'} is damaged: {error}") from None


def _saved_data(saved: dict[str, Any]) -> datasets.Dataset:
    """The data that a run was trained on."""
    return datasets.load(**(saved["data"] if isinstance(saved["data"], dict) else {"name_or_path": saved["data"]}))


@app.command()
def train(
    model: Annotated[str | None, typer.Argument(help=f"One of: {', '.join(sorted(models.MODELS))}.")] = None,
    data: Annotated[
        str, typer.Option(help="digits, moons, a .npz or IDX file, a folder of images, a text.")
    ] = "digits",
    out: Annotated[Path | None, typer.Option(help="Folder of the run. [default: runs/MODEL-DATA]")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data. [default: 100, or until --minutes]")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step and process. [default: 128]")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, or asgd: averaged SGD. [default: adamw]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate. [default: 0.001]")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of the optimizer. [default: 0.0001]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, data order and noise. [default: 0]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. [default: auto]")] = None,
    precision: Annotated[str | None, typer.Option(help="no or bf16. [default: no]")] = None,
    options: Annotated[list[str] | None, typer.Option("--set", help="A model's argument, as depth=12.")] = None,
    levels: Annotated[int | None, typer.Option(help="How many values the data can have. [default: found]")] = None,
    size: Annotated[int | None, typer.Option(help="Resize the images of a folder to this square.")] = None,
    level: Annotated[str | None, typer.Option(help="Of a text: character, or word. [default: character]")] = None,
    window: Annotated[
        int | None, typer.Option(help="Of a text: tokens that a gradient looks back. [default: 100, by words 70]")
    ] = None,
    min_count: Annotated[int | None, typer.Option(help="Of a text: rarer words become <unk>. [default: 2]")] = None,
) -> None:
    """Train a model; Ctrl-C keeps what it has, --resume continues."""
    from pygen import training

    given = _changed(
        {
            "epochs": epochs,
            "max_minutes": minutes,
            "batch_size": batch_size,
            "optimizer": optimizer,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "seed": seed,
            "device": device,
            "precision": precision,
        }
    )
    if resume is not None:
        saved = _saved_run(resume, "nothing to resume")
        if model not in (None, saved["model"]):
            raise ValueError(f"{resume} holds a {saved['model']}, not a {model}")
        dataset = _saved_data(saved)
        settings = training.TrainConfig(**{**saved["train"], **given})
        network, run = models.create(saved["model"], saved["config"]), resume
    else:
        if model is None:
            raise ValueError(f"which model? pygen train MODEL, one of: {', '.join(sorted(models.MODELS))}")
        models.check_name(model)
        dataset = datasets.load(data, levels=levels, size=size, level=level, window=window, min_count=min_count)
        usual = {"epochs": None if minutes else 100} | dict(models.MODELS[model].train_defaults)
        if optimizer == "asgd":
            usual |= models.MODELS[model].asgd_defaults
        settings = training.TrainConfig(**(usual | given))
        torch.manual_seed(settings.seed)
        arguments = models.MODELS[model].arguments_for(dataset) | _model_options(options or [])
        network, run = models.create(model, arguments), out or Path("runs") / f"{model}-{dataset.name}"
    draw = _pictures_now_and_then(run, dataset)
    result = training.train(network, dataset, settings, run, resume=resume is not None, on_validation=draw)
    if _is_main_process():
        _report(network, dataset, result)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _pictures(run: Path, model: models.Model, dataset: datasets.Dataset) -> list[Path]:
    """Write what the model says shows what it learned, of test data, into the run's folder."""
    if not model.pictures:
        return []
    from pygen import _plots
    from pygen.training import checkpoint, metrics

    return _plots.save_pictures(run, model, dataset.test, metrics.read(run / checkpoint.METRICS))


def _pictures_now_and_then(run: Path, dataset: datasets.Dataset) -> Callable[[models.Model], None]:
    """Draws them after the first validation, and then at most every half minute: they take a second."""
    due = 0.0

    def draw(model: models.Model) -> None:
        nonlocal due
        if time.monotonic() >= due:
            _pictures(run, model, dataset)
            due = time.monotonic() + _PICTURE_SECONDS

    return draw


def _report(model: models.Model, dataset: datasets.Dataset, result: Any) -> None:
    from pygen import training

    pictures = _pictures(result.run_dir, model, dataset)
    if result.interrupted:
        console.print(f"interrupted after {result.steps} steps; continue with: pygen train --resume {result.run_dir}")
        return
    tensors = dataset.tensors("test", labelled=model.labelled)
    test = training.evaluate(model, *tensors)
    measured = "".join(
        f", {name.replace('_', ' ')} {value:.4g}" for name, value in training.measure(model, *tensors).items()
    )
    files = ["best.safetensors", "last.safetensors", "metrics.csv", *(path.name for path in pictures)]
    can_sample = hasattr(model, "sample") and "sample" not in model.cannot
    following = f"{result.run_dir}" if can_sample else f"{result.run_dir} --reconstruct 64"
    if can_sample and hasattr(model, "interpolate"):
        following += ", and with --interpolate 8"
    console.print(
        f"{result.epochs} epochs, {result.steps} steps, {result.seconds:.0f} s; validation {result.best_valid:.4f}, "
        f"test {test:.4f} {model.loss_unit}{measured}\n{result.run_dir}: {', '.join(files)}\n"
        f"next: pygen sample {following}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or its best.safetensors.")],
    n: Annotated[int | None, typer.Option(help="How many samples. [default: 64, of texts 3]", min=1)] = None,
    interpolate: Annotated[
        int | None, typer.Option(help="Instead: so many rows, each from one test sample to another.", min=1)
    ] = None,
    reconstruct: Annotated[
        int | None, typer.Option(help="Instead: what a VQ-VAE or an IResNet makes of so many test samples.", min=1)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write a picture. [default: samples.png, interpolations.png or reconstructions.png in RUN]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write them as an array (.npz), texts as text.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Of a text: how many characters or words. [default: 400]", min=1)
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What a text begins with.")] = None,
    temperature: Annotated[float, typer.Option(help="Below 1: closer to the mode.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same samples.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Draw samples from a trained model, interpolate between samples of its data, or reconstruct some."""
    from pygen import training
    from pygen.models.onlstm import ONLSTMLanguageModel

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be cpu, or cuda where torch sees a GPU, got {device!r}")
    if interpolate is not None and reconstruct is not None:
        raise ValueError("--interpolate and --reconstruct exclude each other; give one of them")
    model: Any = training.load_model(run, device=device)
    folder = run.parent if run.suffix == ".safetensors" else run
    generator = torch.Generator(device).manual_seed(seed)
    if isinstance(model, ONLSTMLanguageModel) and interpolate is None and reconstruct is None:
        if plot is not None:
            raise ValueError("a text has no picture; --out FILE.txt writes it")
        texts = model.sample(
            n or _TEXTS, length or _LENGTH, temperature=temperature, prompt=prompt or "", generator=generator
        )
        _show_texts(texts, out)
        return
    if prompt is not None or length is not None:
        raise ValueError(f"--prompt and --length are for models of texts, not for {_with_article(model.name)}")
    n = n or _SAMPLES
    test = torch.empty(0)
    if reconstruct is not None:
        _check_can(model, "reconstruct")
        what, name = f"{reconstruct} reconstructions", "reconstructions"
        test = _test_samples(folder, reconstruct, f"--reconstruct {reconstruct}", "reconstruct", seed)
        x = model.reconstruct(test.to(device))
    elif interpolate is not None:
        _check_can(model, "interpolate")
        what, name = f"{interpolate} interpolations", "interpolations"
        test = _test_samples(folder, 2 * interpolate, f"--interpolate {interpolate}", "interpolate between", seed)
        x = model.interpolate(*test.to(device).chunk(2), INTERPOLATION_STEPS)
    else:
        _check_can(model, "sample")
        what, name = f"{n} samples", "samples"
        x = model.sample(n, temperature=temperature, generator=generator)
    x = x.cpu()
    written = []
    if out is not None:
        _write_array(out, name, x)
        written.append(str(out))
    if plot is not None or out is None:
        from pygen import _plots

        plot = plot or folder / f"{name}.png"
        if reconstruct is not None:
            _plots.save_reconstructions(plot, test, x, model.levels, below=model.reconstruction)
        else:
            save = _plots.save_samples if interpolate is None else _plots.save_interpolations
            save(plot, x, model.levels)
        written.append(str(plot))
    console.print(f"{what}: {', '.join(written)}", highlight=False, soft_wrap=True)


_CANNOT = {
    "sample": "has no prior over its codes to draw from; --reconstruct 64 shows what it makes of test samples",
    "interpolate": "has codes with nothing in between; --reconstruct 64 shows what it makes of test samples",
    "reconstruct": "gives its data back exactly; --reconstruct is for models that do not",
}


def _check_can(model: models.Model, what: str) -> None:
    if what in model.cannot or not hasattr(model, what):
        raise ValueError(f"{_with_article(model.name)} {model.cannot.get(what, _CANNOT[what])}")


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _show_texts(texts: list[str], out: Path | None) -> None:
    """Print texts, a line between them, or write them so."""
    joined = f"\n{_BETWEEN_TEXTS}\n".join(texts) + "\n"
    if out is None:
        typer.echo(joined, nl=False)
        return
    out.write_text(joined, encoding="utf-8")
    console.print(f"{len(texts)} texts: {out}", highlight=False, soft_wrap=True)


def _test_samples(run: Path, n: int, option: str, purpose: str, seed: int) -> torch.Tensor:
    """n different test samples of the data that a run was trained on, (n, *shape); `option` is what asks for them."""
    test = _saved_data(_saved_run(run, f"no data to {purpose}")).test
    if len(test) < n:
        raise ValueError(f"{option} needs {n} test samples, the data has {len(test)}")
    return test[torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:n]]


def _write_array(path: Path, name: str, x: torch.Tensor) -> None:
    import numpy as np

    # Through an open file, because savez would add .npz to any other name.
    with open(path, "wb") as file:
        np.savez_compressed(file, **{name: x.numpy()})  # type: ignore[arg-type]


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(help="How long to train each of the two flows.")] = 1.0,
    out: Annotated[Path, typer.Option(help="Folder for the run and the pictures.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of weights, data order and noise.")] = 0,
) -> None:
    """Train RealNVP and Glow on real digits, a minute each, and show what came out."""
    from pygen import _demo

    if _demo.run(console, minutes=minutes, out=out, seed=seed):
        raise typer.Exit(INTERRUPTED)


app.command()(simulate)
app.command()(parse)

# Installed with the package, but not part of it where only `pygen` itself is on the path.
with suppress(ModuleNotFoundError):
    from pygen.benchmarks.command import bench

    app.command(name="bench")(bench)
