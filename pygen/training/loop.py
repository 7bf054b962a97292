"""One training loop for every model, on accelerate: CPU, GPU, or several processes started by torchrun."""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pygen.data import Dataset
from pygen.models.model import Model
from pygen.training import checkpoint, metrics
from pygen.training.averaging import Average
from pygen.training.config import Result, TrainConfig, TrainingDiverged
from pygen.training.evaluate import summed_loss, summed_statistics
from pygen.training.order import shuffled, streams
from pygen.training.players import Player
from pygen.training.progress import Bar, progress_bar

try:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
except ImportError as error:
    raise ImportError("pygen.training needs accelerate and safetensors: pip install 'pygen[train]'") from error

Callback = Callable[[Mapping[str, float]], None]
OnValidation = Callable[[Model], None]

_VALIDATION_SEED = 0x5EED  # the noise of validation is always the same, so that two epochs compare
_SEED_STRIDE = 1_000_003  # a prime above any number of processes: (seed, step, rank) give different streams


def train(
    model: Model,
    data: Dataset,
    config: TrainConfig | None = None,
    run_dir: str | Path = "runs/run",
    *,
    resume: bool = False,
    callbacks: Iterable[Callback] = (),
    on_validation: OnValidation | None = None,
) -> Result:
    """Train a model by AdamW (or averaged SGD) with warm-up, cosine decay, gradient clipping and averaged weights.

    A model of several players (`Model.players`) has an optimizer for each: in a step those that `Model.turns` names
    move one after the other, each by its `player_loss` of the same batch. A sequential model (`Model.sequential`) reads
    the training data in order, as `batch_size` parallel streams of each process, and carries its state from step to
    step and through checkpoints; an epoch begins without one.

    The randomness of a step (data order, dropout, noise) is a function of the seed, the step and the process alone, so
    a run that was stopped and resumed ends with the same bits as one that was not (when `epochs` ends it: a run that
    `max_minutes` ends depends on the clock). The global random state of torch is set by it.

    Files in `run_dir`: `last.safetensors` (weights, average, optimizer, position), `best.safetensors` (averaged weights
    of the lowest validation loss), `config.json`, `metrics.csv`. Afterwards `model` holds the best weights, in eval
    mode.

    Args:
        model: a `models.model.Model`: its `loss` is minimised, its `metrics` are logged, and `models.create` rebuilds
            it from `name` and `config`.
        data: what to train and validate on.
        config: settings; the model's `train_defaults` when left out.
        run_dir: created when missing.
        resume: continue the run in run_dir; `epochs` and `max_minutes` are totals, so larger ones prolong it.
        callbacks: called with every row of metrics, by the main process.
        on_validation: called with the averaged model after every validation and its row of metrics, by the main
            process; the model is to be left as it is.

    Returns:
        A `Result`; after Ctrl-C too, with `interrupted`, and a checkpoint written.

    Raises:
        TrainingDiverged: loss or gradient became NaN or infinite; the last checkpoint is kept.
        ValueError: nothing to resume, a run that would be overwritten, or a device that is not there.
        OSError: a checkpoint could not be written (no space); the previous one is kept.

    Example:
        >>> from pygen import data, models, training
        >>> digits = data.load("digits")
        >>> model = models.RealNVP(digits.shape, levels=digits.levels)
        >>> training.train(model, digits, training.TrainConfig(epochs=20), "runs/digits")  # doctest: +SKIP
    """
    run = _Run(model, data, config or TrainConfig(**model.train_defaults), Path(run_dir))
    if resume:
        run.restore()
    else:
        run.begin()
    with progress_bar(run.config.progress and run.is_main) as bar, _interrupt_flag() as interrupted:
        return run.loop(list(callbacks), on_validation, bar, interrupted)


class _Run:
    """The state of one call of `train`."""

    def __init__(self, model: Model, data: Dataset, config: TrainConfig, run_dir: Path) -> None:
        model.check_data(data)
        self.config, self.data, self.dir, self.model = config, data, run_dir, model
        self.accelerator = _accelerator(config)
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.players = {name: Player(model, name, config, self.accelerator) for name in model.players}
        self.average = Average(model, config)
        self.ema = self.average.model
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self.step = self.epoch = self.batch = 0  # `batch` is the position in the epoch
        self.seconds, self.loss_sum = 0.0, 0.0
        self.best = math.inf
        self.metrics: dict[str, float] = {}  # of the last validation
        per_process = len(data.train) // self.world
        if per_process == 0:
            raise ValueError(f"{len(data.train)} training samples are too few for {self.world} processes")
        self.batch_size = min(config.batch_size, per_process)
        self.batches = per_process // self.batch_size
        self.saved_at = time.monotonic()

    # Beginning and resuming

    def begin(self) -> None:
        """Take an empty run_dir, and write down what will run in it."""
        if (self.dir / checkpoint.LAST).exists():
            raise ValueError(f"{self.dir} already holds a run: resume it, or choose another folder")
        self.accelerator.wait_for_everyone()  # nobody looks for the file after somebody wrote it
        if self.is_main:
            self.dir.mkdir(parents=True, exist_ok=True)
            content = {**self._identity(), "data": self.data.source or self.data.name, "train": asdict(self.config)}
            checkpoint.write_atomically(self.dir / checkpoint.CONFIG, json.dumps(content, indent=2).encode())
            metrics.start(self.dir / checkpoint.METRICS, self.model.metric_names)

    def restore(self) -> None:
        """Continue where last.safetensors stopped."""
        path = self.dir / checkpoint.LAST
        if not path.exists():
            raise ValueError(f"nothing to resume: {path} does not exist")
        tensors, info = checkpoint.load_tensors(path)
        if {key: info.get(key) for key in self._identity()} != self._identity():
            raise ValueError(f"{self.dir} holds another model: {info.get('model')} {self._differences(info)}")
        self.model.load_state_dict(checkpoint.without_prefix("model.", tensors))
        self.ema.load_state_dict(checkpoint.without_prefix("ema.", tensors))
        for player in self.players.values():
            state = checkpoint.without_prefix(player.key, tensors)
            checkpoint.load_optimizer_tensors(player.optimizer.optimizer, state)
        for name in ("step", "epoch", "batch", "seconds", "best"):
            setattr(self, name, info[name])
        self.average.restore(info)
        if (info["batches"], len(info["loss_sum"])) == (self.batches, self.world):
            self.loss_sum = info["loss_sum"][self.rank]
            if self.model.sequential:
                carried = checkpoint.without_prefix(f"carried.{self.rank}.", tensors)
                self.model.carried = [carried[str(i)].to(self.device) for i in range(len(carried))]
        else:
            self.batch = 0  # other batches than before: begin this epoch again
        self.accelerator.wait_for_everyone()
        if self.is_main:
            metrics.truncate(self.dir / checkpoint.METRICS, self.step, self.model.metric_names)

    def _identity(self) -> dict[str, Any]:
        return {"model": self.model.name, "config": self.model.config}

    def _differences(self, info: dict[str, Any]) -> dict[str, Any]:
        """What the config of a checkpoint has otherwise."""
        own = self.model.config
        return {name: value for name, value in (info.get("config") or {}).items() if own.get(name) != value}

    # The loop

    def loop(
        self, callbacks: list[Callback], on_validation: OnValidation | None, bar: Bar, interrupted: threading.Event
    ) -> Result:
        began, first_step, before = time.monotonic(), self.step, self.seconds
        stopped, rate = False, 0.0
        while not (stopped or self._finished()):
            for batch in self._epoch():
                self._train_step(batch)
                self.seconds = before + time.monotonic() - began
                rate = (self.step - first_step) * self.batch_size * self.world / (self.seconds - before)
                bar.update(self._progress(), self.loss_sum / self.batch, self.best, rate, self.metrics)
                stopped, self.seconds = self._agree(interrupted.is_set())
                if stopped or self._out_of_time():
                    break
                self._checkpoint_if_due()
            else:
                self._end_epoch(callbacks, on_validation, rate)
        self._save_last()
        if self.best == math.inf and self.step:
            # Stopped within the first epoch: there is a best all the same. last.safetensors does not know of it, so
            # that a resumed run ends with the best of one that was not stopped.
            self._validate()
        self._load_best()
        seconds = self.seconds - before
        rate = (self.step - first_step) * self.batch_size * self.world / seconds if seconds > 0 else 0.0
        return Result(self.step, self.epoch, self.seconds, self.best, rate, stopped, self.dir)

    def _epoch(self) -> Iterator[tuple[Tensor, ...]]:
        """What is left of this epoch's batches, this process's share, in an order that only seed and epoch decide."""
        tensors = self.data.tensors("train", labelled=self.model.labelled)
        if self.model.sequential:
            order = streams(self.batches, self.batch_size, self.rank)
            if self.batch == 0:
                self.model.carried = ()
        else:
            seed = self.config.seed * _SEED_STRIDE + self.epoch
            order = shuffled(len(self.data.train), self.batches, self.batch_size, self.rank, self.world, seed)
        for indices in order[self.batch :]:
            yield tuple(tensor[indices].to(self.device) for tensor in tensors)

    def _train_step(self, batch: tuple[Tensor, ...]) -> None:
        torch.manual_seed((self.config.seed * _SEED_STRIDE + self.step) * _SEED_STRIDE + self.rank)
        # What is logged of a step is the loss of whoever moves first: a discriminator moves in every step.
        loss, *_ = [self._turn(self.players[name], batch) for name in self.model.turns(self.step)]
        self._average_running_statistics()
        self.step, self.batch, self.loss_sum = self.step + 1, self.batch + 1, self.loss_sum + loss
        self.average.update(self.step)

    def _turn(self, player: Player, batch: tuple[Tensor, ...]) -> float:
        """One update of one player; its loss before."""
        for group in player.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        player.objective.train()
        with player.alone():
            loss = player.objective(*batch)
            self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(player.parameters, self.config.clip)
        value = loss.item()
        # Before the step, so that weights, average and checkpoint are never touched by it. DDP has summed the
        # gradients: what one process finds in their norm, all find.
        if not (math.isfinite(norm.item()) and math.isfinite(value)):
            raise TrainingDiverged(self._divergence(player, value))
        player.optimizer.step()
        player.optimizer.zero_grad()
        return value

    @torch.no_grad()
    def _average_running_statistics(self) -> None:
        """BatchNorm's, which each process has taken of its own samples: their mean, so that all have one model."""
        if self.world == 1 or not self.norms:
            return
        buffers = [b for norm in self.norms for b in (norm.running_mean, norm.running_var) if b is not None]
        total = torch.cat([b.flatten() for b in buffers])
        torch.distributed.all_reduce(total)
        for b, mean in zip(buffers, (total / self.world).split([b.numel() for b in buffers]), strict=True):
            b.copy_(mean.view_as(b))

    def _divergence(self, player: Player, loss: float) -> str:
        owner = f"the {player.name}'s" if player.name else "the"
        what = f"{owner} loss became {loss}" if not math.isfinite(loss) else f"{owner} gradient became NaN or infinite"
        path = self.dir / checkpoint.LAST
        kept = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint had been written yet"
        return f"{what} at step {self.step + 1}; {kept}. A lower learning rate usually helps"

    # Schedule and time

    def _progress(self) -> float:
        """How much of the run is done, in [0, 1]."""
        by_steps = self.step / (self.config.epochs * self.batches) if self.config.epochs else 0.0
        by_time = self.seconds / (60 * self.config.max_minutes) if self.config.max_minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def _learning_rate(self) -> float:
        warmup = min(1.0, (self.step + 1) / (self.config.warmup_steps + 1))
        cosine = 0.5 * (1 + math.cos(math.pi * self._progress()))
        final = self.config.final_learning_rate
        return self.config.learning_rate * warmup * (final + (1 - final) * cosine)

    def _out_of_time(self) -> bool:
        return self.config.max_minutes is not None and self.seconds >= 60 * self.config.max_minutes

    def _finished(self) -> bool:
        return self._out_of_time() or (self.config.epochs is not None and self.epoch >= self.config.epochs)

    def _agree(self, stop: bool) -> tuple[bool, float]:
        """What all processes take for the time and for Ctrl-C: they must leave the loop at the same step."""
        if self.world == 1:
            return stop, self.seconds
        # Times in float64 survive a reduction on every backend.
        both = torch.tensor([float(stop), self.seconds], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        return bool(both[0].item()), both[1].item()

    # Validation and files

    def _end_epoch(self, callbacks: list[Callback], on_validation: OnValidation | None, rate: float) -> None:
        loss = self._mean(self.loss_sum / self.batches)
        self.epoch, self.batch, self.loss_sum = self.epoch + 1, 0, 0.0
        due = self.epoch % self.config.validate_epochs == 0 or self._finished()
        valid = self._validate() if due else math.nan
        if due:
            self.average.validated(valid, self.step)
        if not self.is_main:
            return
        row = {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, "loss": loss, "valid": valid,
               "learning_rate": self._learning_rate(), "samples_per_second": rate}  # fmt: skip
        row |= self.metrics if due else dict.fromkeys(self.model.metric_names, math.nan)
        metrics.append(self.dir / checkpoint.METRICS, row)
        for callback in callbacks:
            callback(row)
        if due and on_validation is not None:
            on_validation(self.ema)

    def _validate(self) -> float:
        """The averaged weights' loss and metrics on the validation data, of which each process measures a share."""
        torch.manual_seed(_VALIDATION_SEED + self.rank)
        tensors = self.data.tensors("valid", labelled=self.model.labelled)
        # Of a sequence each process has a piece: neighbours stay together.
        share = [tensor.tensor_split(self.world)[self.rank] if self.model.sequential
                 else tensor[self.rank :: self.world] for tensor in tensors]  # fmt: skip
        with self.accelerator.autocast():
            loss = summed_loss(self.ema, *share, draws=self.config.validation_draws, device=self.device)
            statistics = summed_statistics(self.ema, *share, device=self.device)
        total = torch.cat((statistics.new_tensor([loss, len(share[0])]), statistics))
        if self.world > 1:
            torch.distributed.all_reduce(total)
        valid = (total[0] / total[1]).item()
        self.metrics = self.ema.metrics(total[2:]) | self.ema.metrics_of_loss(valid)
        if valid < self.best or (self.best == math.inf and not math.isfinite(valid)):
            self.best = valid
            if self.is_main:
                info = {**self._identity(), "data": self.data.name, "step": self.step, "valid": valid}
                weights = checkpoint.with_prefix("ema.", self.ema.state_dict())
                checkpoint.save_tensors(self.dir / checkpoint.BEST, weights, info)
        return valid

    def _mean(self, value: float) -> float:
        return sum(self._gather(value)) / self.world

    def _gather(self, value: float) -> list[float]:
        """One number of every process."""
        if self.world == 1:
            return [value]
        mine = torch.tensor([value], dtype=torch.float64, device=self.device)
        return self.accelerator.gather(mine).tolist()

    def _checkpoint_if_due(self) -> None:
        due = time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
        if self.world > 1:
            due = self._agree(due)[0]
        if due:
            self._save_last()

    def _save_last(self) -> None:
        loss_sum, carried = self._gather(self.loss_sum), self._carried()
        if self.is_main:
            info = {
                **self._identity(),
                "data": self.data.name,
                "step": self.step,
                "epoch": self.epoch,
                "batch": self.batch,
                "batches": self.batches,
                "seconds": self.seconds,
                "best": self.best,
                "loss_sum": loss_sum,
                **self.average.state(),
            }
            tensors = {
                **carried,
                **checkpoint.with_prefix("model.", self.model.state_dict()),
                **checkpoint.with_prefix("ema.", self.ema.state_dict()),
            }
            for player in self.players.values():
                state = checkpoint.optimizer_tensors(player.optimizer.optimizer)
                tensors |= checkpoint.with_prefix(player.key, state)
            checkpoint.save_tensors(self.dir / checkpoint.LAST, tensors, info)
        self.saved_at = time.monotonic()

    def _carried(self) -> dict[str, Tensor]:
        """What a sequential model carries, of all processes."""
        found: dict[str, Tensor] = {}
        for i, state in enumerate(self.model.carried or ()):
            everyones = state if self.world == 1 else self.accelerator.gather(state.contiguous())
            found |= {f"carried.{rank}.{i}": part for rank, part in enumerate(everyones.chunk(self.world))}
        return found

    def _load_best(self) -> None:
        self.accelerator.wait_for_everyone()
        path = self.dir / checkpoint.BEST
        if path.exists():
            tensors, _ = checkpoint.load_tensors(path)
            self.model.load_state_dict(checkpoint.without_prefix("ema.", tensors))
        self.model.carried = None
        self.model.eval()


def _accelerator(config: TrainConfig) -> Accelerator:
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {config.device!r}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no GPU here; use --device cpu")
    # accelerate keeps the precision of the process's first Accelerator for ever, and refuses any other.
    AcceleratorState._reset_state(reset_partial_state=False)
    return Accelerator(cpu=config.device == "cpu", mixed_precision=config.precision)


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """Ctrl-C sets a flag that the loop reads between steps; a second Ctrl-C interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
