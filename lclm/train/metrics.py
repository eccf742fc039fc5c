"""What is watched: metrics.jsonl, TensorBoard, the progress bar.

`RUN/metrics.jsonl`, written by the main process only, holds one JSON object a line. Every line has

    step         optimizer steps done since the start of the run, over all stages (skipped steps count)
    stage        the stage's name
    stage_step   steps done in this stage
    kind         "train" | "validation" | "probe" | "event"
    seconds      training seconds of the run so far (restarts included)
    source_tokens  source tokens (before compression) read so far, all ranks

and, by kind (a figure that could not be measured is left out):

    train, every `log_every` steps; means, rates and shares are over the steps since the last line
        loss         nats per loss-bearing token
        task_loss    {task: nats per token}       task_tokens  {task: loss-bearing tokens}
        loss_tokens  loss-bearing tokens of this step, all ranks
        grad_norm    {component: norm before clipping, "all": norm} of this step
        lr           {group: rate} of this step; a group is "<component>", "<component>.plain" (without weight
                     decay) or "<component>.muon"
        step_seconds, source_tokens_per_second (before compression), positions_per_second (after it)
        mfu          share of `train.peak_tflops`, or of the measured matrix-multiplication rate
        waste        {"positions"|"rows"|"latents": padded share of the pack's budget}
        time         shares of the time: {"data": waiting for data, "model": forward and backward passes,
                     "update": the engine's step, "other": the rest}
        processes    with several: {"data"|"forward"|"update": {"median", "most": seconds a step, "process":
                     the slowest}}; at ZeRO 3, where passes wait for others, "product": seconds of a fixed
                     matrix product, instead of "forward"
        memory_gib   peak memory of the main process (device memory on CUDA)
        skipped      steps left out so far: a loss or gradient was not finite, or the loss jumped
        dropped      {"task: reason": samples left out or shortened so far}, and {"source: reason": damaged}
    validation       loss, loss_tokens, task_loss, task_tokens, on held-out data
    probe            probes: what `lclm.eval.probes.run_probes` returned
    event            event: "start" | "resume" | "rewind" | "damage" | "stage_start" | "stage_end" | "skip" |
                     "checkpoint" | "save_failed" | "save_in_foreground" | "save_waited" | "slow" |
                     "slow_step" | "fit" | "done", and figures of its own (skip:
                     reason, keys of samples, the worst first, for a spike also task, loss, expected, sigmas;
                     rewind: the same and from_step, rewinds; damage, once for each "source: reason": found,
                     files; fit: factor, step_seconds; checkpoint: of_step of the stage, save,
                     waited_seconds of training, write_seconds in the background; save_failed: of_step,
                     message, in_a_row; save_in_foreground: reason; save_waited: seconds;
                     slow, a process that takes longer than the others, three lines in a row: process, host,
                     part, seconds, others; slow_step: of_step, seconds, usual, and if one process was the
                     cause, process, host, part; ...)

On resume the lines after the checkpoint's step are cut off, so a step appears once. TensorBoard holds the
same figures under `<kind>/<name>` and `<kind>/<name>/<key>`.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Recorder:
    """Writes what is watched. On other processes than the main one it does nothing."""

    def __init__(
        self, path: Path, tensorboard: Path, *, main: bool, keep_bytes: int | None, step: int
    ) -> None:
        """`keep_bytes` of an older file stay (None: all); TensorBoard forgets what came after `step`."""
        self._file: Any = None
        self._board: Any = None
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter

        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        if keep_bytes is not None and self._file.tell() > keep_bytes:
            self._file.truncate(keep_bytes)
        self._lost = 0
        self._board = SummaryWriter(str(tensorboard), purge_step=step + 1 if step else None)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line (see the module's page for its keys) and its numbers to TensorBoard."""
        if self._file is None:
            return
        line = _finite(dict(line))
        self._append(json.dumps(line).encode() + b"\n")
        shared = ("step", "stage_step", "seconds")
        for name, value in _flat({k: v for k, v in line.items() if k not in shared}):
            self._show("add_scalar", f"{line['kind']}/{name}", value, line["step"])

    def _append(self, line: bytes) -> None:
        """Write a whole line or, on a full disk, none: what is watched does not end what it watches."""
        before = self.bytes
        try:
            if self._file.write(line) == len(line):
                return
            self._file.truncate(before)
        except OSError as error:
            if not self._lost:
                print(
                    f"metrics.jsonl cannot be written ({error}): lines are lost", file=sys.stderr, flush=True
                )
        self._lost += 1

    def _show(self, what: str, *values: Any) -> None:
        """Give TensorBoard something, until it cannot write: its thread has ended then."""
        if self._board is not None:
            try:
                getattr(self._board, what)(*values)
            except OSError as error:
                print(f"TensorBoard is left out from here: {error}", file=sys.stderr, flush=True)
                self._board = None

    def text(self, name: str, text: str, step: int) -> None:
        """A text to TensorBoard."""
        self._show("add_text", name, text, step)

    @property
    def bytes(self) -> int:
        """Length of metrics.jsonl so far."""
        return os.fstat(self._file.fileno()).st_size if self._file is not None else 0

    def close(self) -> None:
        """Write everything out."""
        if self._file is not None:
            self._file.close()
            self._show("close")


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinity: they become null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            pairs += _flat(item, f"{prefix}{key}/")
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            pairs.append((f"{prefix}{key}", float(item)))
    return pairs


class Clock:
    """Where the time of the steps since the last line went, on this process.

    With CUDA, passes are timed on the device: the host only puts them into its queue.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Start a new interval now."""
        self.started = self._mark = self._step_began = time.perf_counter()
        self._spent = dict.fromkeys(("data", "forward", "backward", "update"), 0.0)
        self._events: list[tuple[str, Any, Any]] = []
        self._event: Any = None
        self._before = dict(self._spent)
        self.steps = 0
        self.seconds_of_steps: list[float] = []
        self.longest: dict[str, float] = {}

    def start(self) -> None:
        """The beginning of something that `stop` will name."""
        self._mark = time.perf_counter()
        self._event = self._record()

    def stop(self, name: str) -> None:
        """Count the time since `start` (or the last `stop`) as `name`: "data", "forward", "backward" or
        "update"."""
        now = time.perf_counter()
        if self._cuda and name != "data":
            event = self._record()
            self._events.append((name, self._event, event))
            self._event = event
        else:
            self._spent[name] += now - self._mark
        self._mark = now

    def _record(self) -> Any:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end_step(self) -> None:
        """A step is over. Remembers where the time of the longest one went (with CUDA, of data only)."""
        now = time.perf_counter()
        seconds, self._step_began = now - self._step_began, now
        if seconds > max(self.seconds_of_steps, default=0.0):
            parts = {name: value - self._before[name] for name, value in self._spent.items()}
            self.longest = {"step": float(self.steps), "seconds": seconds, **parts}
        self._before = dict(self._spent)
        self.seconds_of_steps.append(seconds)
        self.steps += 1

    @property
    def spent(self) -> dict[str, float]:
        """Seconds by name since the interval began. With CUDA, waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._spent[name] += start.elapsed_time(end) / 1e3
            self._events = []
        return self._spent

    @property
    def seconds(self) -> float:
        """Length of the interval so far."""
        return time.perf_counter() - self.started


class Progress:
    """A progress bar for a stage on a terminal, plain lines elsewhere, nothing but on the main process."""

    PAUSE = 10.0
    """Seconds between plain lines at least."""

    def __init__(self, *, main: bool) -> None:
        self._main, self._said = main, 0.0
        self._bar: Any = None
        self._task: Any = None
        self._name, self._total = "", 0
        if main and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("[bold]{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[figures]}"),
                console=Console(stderr=True),
            )
            self._bar.start()

    def stage(self, name: str, total: int, done: int) -> None:
        """A new stage of `total` units begins, `done` of them are done."""
        self._name, self._total = name, total
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(name, total=total, completed=done, figures="")

    def update(self, done: int, figures: str, force: bool = False) -> None:
        """Show that `done` units are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=figures)
        elif self._main and (force or time.monotonic() - self._said > self.PAUSE):
            self._said = time.monotonic()
            print(f"{self._name} {done:,}/{self._total:,} {figures}", flush=True)

    def say(self, text: str) -> None:
        """A line of text above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self._main:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process: on the device with CUDA, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def matmul_flops(device: torch.device, seconds: float = 0.1) -> float:
    """Measured floating-point operations a second of a large matrix product in the training precision."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    left = torch.randn(size, size, device=device).to(dtype)
    left @ left
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        left @ left
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def step_flops(model: Any) -> dict[str, float]:
    """{"rows" | "latents" | "positions" | "loss_tokens": floating-point operations of training on one}.

    Two per weight of a matrix forward, two more where gradients pass through it, two more where it learns.
    The attention's own products are left out.
    """
    from lclm.model.build import components

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = getattr(model.get_output_embeddings(), "weight", None)
    parts = components(model)
    flows = False
    flops = dict.fromkeys(("rows", "latents", "positions", "loss_tokens"), 0.0)
    for name, unit in (("encoder", "rows"), ("adapter", "latents"), ("decoder", "positions")):
        flows = flows or name == "decoder" or any(weight.requires_grad for _, weight in parts[name])
        for _, weight in parts[name]:
            shape = getattr(weight, "ds_shape", weight.shape)
            at = "loss_tokens" if weight is head else unit
            if len(shape) == 2 and (weight is head or id(weight) not in embeddings):
                flops[at] += (2 + 2 * flows + 2 * weight.requires_grad) * math.prod(shape)
    return flops
