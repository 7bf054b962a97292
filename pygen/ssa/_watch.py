"""Runs the engine in a thread beside the caller's, which meanwhile answers Ctrl-C and draws a progress bar."""

import contextlib
import importlib.util
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pygen.ssa import engine

_PATIENCE = 2.0  # seconds without a progress bar
_POLL = 0.1  # seconds between two looks at the engine


class Watch:
    """Watches over the blocks of one simulation; a context manager.

    The first Ctrl-C asks the engine to stop and sets `interrupted`; a second one raises KeyboardInterrupt. Only the
    main thread of a process receives Ctrl-C.

    Args:
        total: trajectories in all blocks together.
        progress: draw the bar always (True), never (False), or on a terminal after two seconds (None).
    """

    def __init__(self, total: int, progress: bool | None) -> None:
        self.control = engine.new_control()
        self.interrupted = False
        self._total, self._done = total, 0
        wanted = sys.stderr.isatty() and importlib.util.find_spec("rich") is not None if progress is None else progress
        self._bar_from = time.monotonic() + (0.0 if progress else _PATIENCE) if wanted else float("inf")
        self._bar: Any = None
        self._task: Any = None
        self._previous: Any = None

    def __enter__(self) -> "Watch":
        # A handler of its own rather than `except KeyboardInterrupt`: a block of results is never left half added up.
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            self._previous = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        self.control[engine.STOP] = 1  # whatever may still be running, after an exception
        if self._bar is not None:
            self._bar.stop()

    def _on_interrupt(self, signum: int, frame: object) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self._stop()

    def _stop(self) -> None:
        self.interrupted = True
        self.control[engine.STOP] = 1

    def run(self, work: Callable[[Tensor], None], n: int, device: torch.device) -> None:
        """Call work(control), which simulates n trajectories on `device`, and wait for it."""
        self.control[engine.PROGRESS] = 0
        failure: list[BaseException] = []
        # A thread has its own current stream: the results must be ready on the caller's.
        stream = torch.cuda.stream(torch.cuda.current_stream(device)) if device.type == "cuda" else None

        def body() -> None:
            try:
                with stream or contextlib.nullcontext():
                    work(self.control)
            except BaseException as error:  # noqa: BLE001 - handed to the caller's thread, whatever it is
                failure.append(error)

        thread = threading.Thread(target=body, name="pygen-ssa", daemon=True)
        thread.start()
        while thread.is_alive():
            try:
                thread.join(_POLL)
                self._draw(self._done + int(self.control[engine.PROGRESS]))
            except KeyboardInterrupt:  # of a handler that is not ours
                if self.interrupted:
                    raise
                self._stop()
        if failure:
            raise failure[0]
        self._done += n

    def _draw(self, done: int) -> None:
        if time.monotonic() < self._bar_from:
            return
        if self._bar is None:
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TextColumn("{task.completed:,.0f} of {task.total:,.0f} trajectories"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("simulating", total=self._total)
        self._bar.update(self._task, completed=done)
