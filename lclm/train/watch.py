"""What happens around the steps of a stage: lines of metrics, validation, probes, when to save."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lclm.data.batch import Batch, Step
from lclm.train.ends import Requeue
from lclm.train.feed import Tally, inputs
from lclm.train.metrics import Recorder, matmul_flops, memory_gib, step_flops
from lclm.train.processes import Processes
from lclm.train.slow import Found, Slowness

if TYPE_CHECKING:
    from lclm.train.spikes import Rewind
    from lclm.train.trainer import StageTrainer

PROBE_DOCUMENTS = 2000
"""Held-out documents, and as many conversations, that probes draw from."""


class Watcher:
    """Watches a stage's trainer; every process has one, the main process's writes."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer, self.settings = trainer, trainer.recipe.train
        self.state, self.stepper, self.processes = trainer.state, trainer.stepper, trainer.processes
        folder = trainer.run.folder
        self.recorder = Recorder(
            folder.metrics,
            folder.tensorboard,
            main=self.processes.main,
            keep_bytes=self.state.metrics_bytes,
            step=self.state.step,
        )
        self._before = self.state.seconds - time.monotonic()
        self._saved = time.monotonic()
        self._window: dict[str, float] = {}
        self._validation: list[Batch] | None = None
        peak = self.settings.peak_tflops
        self._peak = peak * 1e12 if peak else matmul_flops(self.processes.device)
        self._flops = step_flops(self.stepper.engine.model)
        self._slowness = Slowness(self.processes, self.stepper.engine.zero)

    @property
    def seconds(self) -> float:
        """Time of the run so far, restarts included."""
        return self._before + time.monotonic()

    def __enter__(self) -> Watcher:
        stage, state = self.trainer.stage, self.state
        unit = (stage.steps, state.stage_step) if stage.steps else (int(stage.tokens), state.stage_tokens)
        self.trainer.progress.stage(self.trainer.name, *unit)
        if self.trainer.rewind is not None:
            self._went_back(self.trainer.rewind)
        else:
            self.event("resume" if self.trainer.resumed else "stage_start")
        self.stepper.clock.reset()
        return self

    def __exit__(self, *_: object) -> None:
        self.recorder.close()

    def _went_back(self, rewind: Rewind) -> None:
        self.event("rewind", rewinds=rewind.rewinds, **rewind.about)
        self.trainer.progress.say(
            f"the loss jumped at step {rewind.about['from_step']:,} (task {rewind.about['task']}: "
            f"{rewind.about['loss']:.3f}, expected {rewind.about['expected']:.3f}): back to step "
            f"{self.state.step:,}, and on with the data after it"
        )

    def line_is_due(self, stage_step: int) -> bool:
        """Whether a line of metrics follows the stage's step of that number."""
        return (
            stage_step == 1
            or stage_step % self.settings.log_every == 0
            or stage_step == self.trainer.stage.steps
        )

    def save_is_wanted(self) -> bool:
        """Whether this process's clock asks for a checkpoint."""
        minutes = self.settings.save_every_minutes
        return bool(minutes and self.processes.main and time.monotonic() - self._saved > minutes * 60)

    def save_is_due(self, tally: Tally) -> bool:
        """Whether all processes save now."""
        every = self.settings.save_every_steps
        return tally.save or bool(every and self.state.stage_step % every == 0)

    def saved(self) -> None:
        """A checkpoint was written, or begun, or could not be."""
        self._saved = time.monotonic()
        self.stepper.clock.reset()
        self._window.clear()

    def after_step(self, tally: Tally) -> None:
        """Write what is due after a step."""
        for name, value in tally.totals.items():
            self._window[name] = self._window.get(name, 0.0) + value
        if tally.skipped:
            about = tally.spike or {}
            self.event("skip", reason=tally.reason, keys=self.stepper.guard.blamed, **about)
        if tally.damage:
            self.event("damage", **tally.damage)
            self.trainer.progress.say(f"data left out: {tally.damage['found']}; {tally.damage['files']}")
        if self.line_is_due(self.state.stage_step):
            self._line(tally)
        paused = False
        for every, act in (
            (self.settings.validate_every, self.validate),
            (self.settings.probe_every, self.probe),
        ):
            if every and self.state.step % every == 0 and self.trainer.made < 1:
                act()
                paused = True
        if paused:
            self.stepper.clock.reset()
            self._window.clear()

    def at_end(self) -> None:
        """Validate and, after the last stage, probe in full."""
        self.validate()
        self.event("stage_end")
        if self.trainer.last:
            self.probe(final=True)
            self.event("done")

    def _line(self, tally: Tally) -> None:
        stepper, clock, state = self.stepper, self.stepper.clock, self.state
        norms = stepper.guard.gradient_norms() if not tally.skipped else {}
        line = loss_figures(state.losses) | {"loss_tokens": int(tally.loss_tokens), "grad_norm": norms}
        line["lr"] = {group["name"]: group["lr"] for group in stepper.engine.base.param_groups}
        state.losses = {}
        found: list[Found] = []
        if clock.steps:
            spent, window = clock.seconds, self._window
            shares = {name: value / spent for name, value in clock.spent.items()}
            passes = shares["forward"] + shares["backward"]
            shares = {"data": shares["data"], "model": passes, "update": shares["update"]}
            look = self._slowness.look(clock, state.stage_step)
            found = look.found
            line |= {
                "step_seconds": spent / clock.steps,
                "source_tokens_per_second": window["source_tokens"] / spent,
                "positions_per_second": window["positions"] / spent,
                "mfu": sum(self._flops[name] * window[name] for name in self._flops)
                / (spent * self._peak * self.processes.size),
                "waste": {
                    name: 1 - window[name] / max(1.0, window[f"{name}_budget"])
                    for name in ("positions", "rows", "latents")
                },
                "time": shares | {"other": 1 - sum(shares.values())},
            }
            line |= {"processes": look.spread} if look.spread else {}
        line |= {"memory_gib": memory_gib(self.processes.device), "skipped": state.skipped}
        line["dropped"] = stepper.feed.dropped()
        self._write("train", line)
        for slow in found:
            self.event(**slow.event)
            self.trainer.progress.say(slow.text)
        figures = f"loss {line.get('loss', float('nan')):.4f}"
        if "positions_per_second" in line:
            figures += f" {line['positions_per_second']:,.0f} positions/s"
        done = state.stage_step if self.trainer.stage.steps else state.stage_tokens
        self.trainer.progress.update(done, figures)
        clock.reset()
        self._window.clear()

    def validate(self) -> None:
        """Loss on held-out data, the same data every time. Collective."""
        if not self.settings.validate_batches or not self.trainer.recipe.data.heldout:
            return
        if self._validation is None:
            self._validation = self.stepper.feed.heldout(self.settings.validate_batches)
        losses: dict[str, list[float]] = {}
        with evaluating(self.stepper.engine.model) as model:
            for batch in self._validation:
                self.processes.at("validation")
                tally = Tally(Step([batch]), self.processes, False)
                tally.add_losses(
                    batch, model(**inputs(batch, self.processes.device), num_items_in_batch=1.0), 1.0
                )
                for task, (total, tokens) in tally.task_losses.items():
                    before = losses.get(task, [0.0, 0.0])
                    losses[task] = [before[0] + total, before[1] + tokens]
        line = loss_figures(losses)
        self._write("validation", line | {"loss_tokens": int(sum(tokens for _, tokens in losses.values()))})
        if "loss" in line:
            self.trainer.progress.say(
                f"{self.trainer.name} step {self.state.stage_step:,}: held-out loss {line['loss']:.4f}"
            )

    def probe(self, final: bool = False) -> None:
        """Run the probes on the main process, while the others wait. Those between steps yield to a stop."""
        engine = self.stepper.engine
        model = self.trainer.whole_model() if engine.zero == 3 else engine.model
        with self.processes.alone("probes"), contextlib.ExitStack() as cut_short:
            if not final:
                cut_short.enter_context(contextlib.suppress(Requeue))
                cut_short.enter_context(self.trainer.stop.at_once())
            if self.processes.main:
                self._run_probes(model, final)

    def _run_probes(self, model: Any, final: bool) -> None:
        from lclm.eval.probes import run_probes

        engine = self.stepper.engine
        if engine.zero == 3:
            model = model.to(self.processes.device, torch.bfloat16 if engine.bf16 else torch.float32)
        settings = probe_settings(self.trainer.recipe)
        settings = settings if final else settings.during_training()
        documents, conversations = heldout_samples(self.trainer.recipe)
        with idle_cores(self.processes):
            result = run_probes(model, self.stepper.processor, documents, conversations, settings)
        self._write("probe", {"probes": result})
        self._samples(result)

    def _samples(self, result: dict[str, Any]) -> None:
        parts = [f"# Step {self.state.step} ({self.trainer.name})\n"]
        for text in result.get("texts", []):
            about = f"question: {text['question']}\n" if "question" in text else ""
            parts.append(
                f"## {text['kind']} at {text['ratio']}x\n\n{about}\ntruth:\n\n```\n{text['truth']}\n```\n\n"
                f"written:\n\n```\n{text['written']}\n```\n"
            )
        if len(parts) > 1:
            path = self.trainer.run.folder.samples
            with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
                file.write("\n".join(parts) + "\n")
            self.recorder.text("samples", "\n".join(parts), self.state.step)

    def event(self, event: str, **figures: Any) -> None:
        """Write a line about something that happened."""
        self._write("event", {"event": event, **figures})

    def _write(self, kind: str, figures: dict[str, Any]) -> None:
        state = self.state
        self.recorder.write(
            {
                "step": state.step,
                "stage": self.trainer.name,
                "stage_step": state.stage_step,
                "kind": kind,
                "seconds": self.seconds,
                "source_tokens": state.source_tokens,
                **figures,
            }
        )


def loss_figures(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Loss over all tasks and of each, from {task: [nats, tokens]}; nothing where there were no tokens."""
    losses = {task: pair for task, pair in losses.items() if pair[1]}
    tokens = sum(pair[1] for pair in losses.values())
    if not tokens:
        return {}
    return {
        "loss": sum(pair[0] for pair in losses.values()) / tokens,
        "task_loss": {task: pair[0] / pair[1] for task, pair in losses.items() if task},
        "task_tokens": {task: int(pair[1]) for task, pair in losses.items() if task},
    }


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[Any]:
    """The model in evaluation mode, without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(training)


@contextlib.contextmanager
def idle_cores(processes: Processes) -> Iterator[None]:
    """On a CPU, use the cores of this machine's other processes, which wait meanwhile."""
    threads = torch.get_num_threads()
    if processes.device.type == "cpu":
        torch.set_num_threads(threads * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def probe_settings(recipe: Any) -> Any:
    """The recipe's probes; the reconstruction prompt comes from its reconstruct task unless they name one."""
    if recipe.probes.reconstruct_prompt is not None:
        return recipe.probes
    tasks = [
        task for task in recipe.data.tasks.values() if task.task == "reconstruct" and task.excerpt is None
    ]
    return replace(recipe.probes, reconstruct_prompt=tasks[0].option("prompt")) if tasks else recipe.probes


def heldout_samples(recipe: Any) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """Held-out documents and conversations that the probes draw from, the first of each data set."""
    from lclm.data.shards import DataSet

    texts: list[str] = []
    conversations: list[list[dict[str, Any]]] = []
    for source in recipe.data.heldout.values():
        data = DataSet.open(source.path, recipe.data.reading)
        for sample in itertools.islice(data.undamaged(), PROBE_DOCUMENTS):
            if sample.text is not None:
                texts.append(sample.text)
            elif sample.messages is not None:
                conversations.append(sample.messages)
    return texts, conversations
