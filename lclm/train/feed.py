"""The steps' data, and what is counted over all processes: tokens, losses by task, what is not finite."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any, NoReturn

import torch

from lclm.data.batch import Batch, Loader, Step, merge_states
from lclm.data.reading import count_damaged, damaged_only, too_many
from lclm.data.settings import ReadingSettings
from lclm.train.ends import Lost, Requeue
from lclm.train.metrics import Clock
from lclm.train.processes import Processes

TOTALS = (
    *("loss_tokens", "source_tokens", "positions", "rows", "latents"),
    *("positions_budget", "rows_budget", "latents_budget", "samples", "save", "stop", "unsaved"),
    *("read", "damaged", "failed"),
)
"""What `Tally` sums over all processes before the first forward pass of a step."""
NOTES, MOST_FILES = 4, 100
"""Damaged samples that a process describes in one step, and damaged files that are remembered."""


class Feed:
    """The steps of one stage on one process."""

    def __init__(
        self, recipe: Any, stage: Any, model_config: Any, processor: Any, processes: Processes
    ) -> None:
        self._options: dict[str, Any] = {
            "geometry": model_config.geometry(),
            "ratios": list(model_config.ratios),
            "seed": recipe.seed,
            "rank": processes.rank,
            "world": processes.size,
            "mixture": stage.mixture or recipe.data.mixture,
            "pack": stage.pack,
        }
        self._data, self._tokenizer, self._processes = recipe.data, processor.spans, processes
        self._loader: Loader | None = None
        self._damaged: Counter[str] = Counter()
        self._files: list[str] = []
        self._read = 0

    def go_to(self, state: dict[str, Any] | None) -> None:
        """Go on where `state` (of all processes) says; None is the beginning. Collective.

        Raises ValueError on all processes if any cannot.
        """
        self.close()
        error = None
        try:
            self._loader = Loader(self._data, self._tokenizer, cursor=state, **self._options)
        except (ValueError, OSError) as problem:
            error = str(problem)
        self._processes.agree(error)
        cursors = list(state["cursors"].values()) if state else []
        self._damaged = Counter()
        for cursor in cursors:
            self._damaged.update(damaged_only(cursor.get("dropped", {})))
        self._read = sum(cursor.get("read", 0) for cursor in cursors)

    def next_step(self, clock: Clock) -> Step:
        """The process's micro-batches of the next step; they are empty when the data's epochs are used up.

        An error is in the step's `failure`, so that `Tally` can raise it on all processes together.
        """
        assert self._loader is not None, "go_to comes first"
        clock.start()
        try:
            step = next(self._loader)
        except (Requeue, Lost):
            raise
        except Exception as error:
            step = Step([], failure=error, names=list(self._data.tasks))
        clock.stop("data")
        return step

    def damage(self, tally: Tally, step: Step) -> dict[str, Any] | None:
        """What was damaged in a step if its kind is new: {"found": {"source: reason": samples}, "files"}.

        Raises ValueError, on all processes, when more is damaged than `data.reading` allows. Collective where
        a sample was damaged.
        """
        self._read += int(tally.totals["read"])
        if not tally.totals["damaged"]:
            return None
        known = set(self._damaged)
        for counts, notes in self._processes.gather((damaged_only(step.dropped), step.damage[:NOTES])):
            self._damaged.update(counts)
            self._files = list(dict.fromkeys(self._files + notes))[:MOST_FILES]
        check(self._data.reading, self._damaged, self._read, self._files)
        new = {name: count for name, count in self._damaged.items() if name not in known}
        return {"found": new, "files": self._files[:NOTES]} if new else None

    def state(self) -> dict[str, Any]:
        """Where all lanes stand after the last step. Collective."""
        assert self._loader is not None
        return merge_states(self._processes.gather(self._loader.state()))

    def dropped(self) -> dict[str, int]:
        """Samples left out or shortened since the run began, by "task: reason", all lanes. Collective."""
        assert self._loader is not None
        own, total = Counter[str](), Counter[str]()
        for cursor in self._loader.state()["cursors"].values():
            own.update(cursor.get("dropped", {}))
        for part in self._processes.gather(dict(own)):
            total.update(part)
        return dict(total)

    def heldout(self, steps: int) -> list[Batch]:
        """This process's micro-batches of the first `steps` steps of held-out data: the same every time, and
        over all processes the same for any number of them."""
        data = self._data.for_heldout()
        mixture = {name: share for name, share in self._options["mixture"].items() if name in data.tasks}
        if not any(share > 0 for share in mixture.values()):
            return []
        data = replace(data, workers=0, mixture=mixture)
        error, batches = None, []
        try:
            with Loader(data, self._tokenizer, **(self._options | {"mixture": mixture})) as loader:
                batches = [batch for step in itertools.islice(loader, steps) for batch in step]
        except (ValueError, OSError) as problem:
            error = f"held-out data: {problem}"
        self._processes.agree(error)
        damaged: Counter[str] = Counter()
        read, own = 0, Step(batches)
        files: list[str] = []
        for counts, count, notes in self._processes.gather((own.dropped, own.read, own.damage[:NOTES])):
            damaged.update(damaged_only(counts))
            read, files = read + count, files + notes
        check(self._data.reading, damaged, read, files)
        return batches

    def close(self) -> None:
        """End the background processes."""
        if self._loader is not None:
            self._loader.close()


def check(settings: ReadingSettings, damaged: Counter[str], read: int, files: list[str]) -> None:
    """Raise ValueError if more of the samples read were damaged than the settings allow."""
    if not settings.allows(damaged.total(), read):
        raise ValueError(too_many(damaged, read, files, settings))


def inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """What the model's forward takes, but for the loss's divisor."""
    return batch.to(device).arrays | {"num_latents": batch.num_latents}


class Tally:
    """What a step has, summed over all processes: one collective at its start, one per micro-batch."""

    def __init__(
        self,
        step: Step,
        processes: Processes,
        save: bool = False,
        stop: bool = False,
        unsaved: bool = False,
    ) -> None:
        """`save`, `stop`: whether this process asks for a checkpoint, or the run's end, after the step.

        `unsaved`: whether a checkpoint that it was writing in the background failed.
        """
        self._processes = processes
        self.names = step.task_names
        self._step = step
        self._bad: list[str] = []
        self.not_finite = self.skipped = False
        self.spike: dict[str, Any] | None = None
        self.damage: dict[str, Any] | None = None
        self._outputs: list[tuple[Batch, torch.Tensor | None]] = []
        tasks = torch.cat([batch.task_ids for batch in step] or [torch.zeros(0, dtype=torch.int64)])
        own = [float(value) for value in [*self._own(step, save, stop), unsaved]]
        own += [step.read, count_damaged(step.dropped), step.failure is not None]
        own += torch.bincount(tasks, minlength=len(self.names)).tolist()
        reduced = processes.sum(torch.tensor(own, dtype=torch.float64, device=processes.device)).tolist()
        self.totals = dict(zip(TOTALS, reduced, strict=False))
        self.task_tokens = reduced[len(TOTALS) :]
        self._sums = [0.0] * (len(self.names) + 1)
        if self.totals["failed"]:
            self._fail(step.failure)

    def _fail(self, own: Exception | None) -> NoReturn:
        """Raise, on all processes, what the data of one or more of them ended with."""
        told = None
        if own is not None:
            kind = "user" if isinstance(own, ValueError) else "other"
            kind = "lost" if "DataLoader worker" in str(own) else kind
            told = kind, str(own) if kind == "user" else f"{type(own).__name__}: {own}"
        found = [(rank, told) for rank, told in enumerate(self._processes.gather(told)) if told]
        rank, (_, message) = found[0]
        kinds = {kind for _, (kind, _) in found}
        message += f" ({len(found)} processes met errors of their data)" if len(found) > 1 else ""
        if "other" in kinds:
            raise RuntimeError(f"process {rank}: its data loader failed: {message}") from own
        if "lost" in kinds:
            raise Lost(f"process {rank}: a background process of its data loader died: {message}") from own
        raise ValueError(message) from own

    @staticmethod
    def _own(step: Step, save: bool, stop: bool) -> list[float]:
        batches = list(step)
        capacity = [sum(batch.capacity[i] for batch in batches) for i in range(3)]
        return [
            step.loss_tokens,
            step.source_tokens,
            sum(batch.positions for batch in batches),
            sum(batch.row_tokens for batch in batches),
            sum(batch.latents_used for batch in batches),
            *capacity,
            len(step.keys),
            save,
            stop,
        ]

    @property
    def loss_tokens(self) -> float:
        """Loss-bearing tokens of the global batch."""
        return self.totals["loss_tokens"]

    @property
    def source_tokens(self) -> int:
        """Source tokens of the global batch, before compression."""
        return int(self.totals["source_tokens"])

    @property
    def save(self) -> bool:
        """Whether any process asks for a checkpoint."""
        return self.totals["save"] > 0

    @property
    def stop(self) -> bool:
        """Whether any process wants to stop after the step."""
        return self.totals["stop"] > 0

    @property
    def unsaved(self) -> bool:
        """Whether any process's checkpoint in the background failed."""
        return self.totals["unsaved"] > 0

    @property
    def empty(self) -> bool:
        """Whether no process has a sample: the data's epochs are used up."""
        return self.totals["samples"] == 0

    @property
    def reason(self) -> str:
        """Why the step was left out, if it was: "loss", "spike" or "gradient"."""
        return "loss" if self.not_finite else "spike" if self.spike else "gradient"

    @property
    def suspects(self) -> list[tuple[float, str]]:
        """Losses and keys of the samples to be blamed on this process.

        Those with a loss that is not finite (their losses are given as 0); after a spike those of its task,
        with what they cost a token; else all.
        """
        if self.spike and not self.not_finite:
            task = self.spike["task"]
            number = self.names.index(task) if task in self.names else None
            return [
                pair for batch, losses in self._outputs for pair in _example_losses(batch, losses, number)
            ]
        return [(0.0, key) for key in (self._bad if self.not_finite else self._step.keys)]

    @property
    def task_losses(self) -> dict[str, tuple[float, float]]:
        """{task: (nats, loss-bearing tokens)} of the global batch; "" where the kernel gives only a sum."""
        if self._sums[-1]:
            return {"": (self._sums[-1], self.loss_tokens)}
        pairs = zip(self._sums, self.task_tokens, strict=False)
        return {name: pair for name, pair in zip(self.names, pairs, strict=True) if pair[1]}

    def add_losses(self, batch: Batch, output: Any, items: float) -> bool:
        """Count a micro-batch's losses (its loss is a sum over `items`); whether all are finite."""
        vector = torch.zeros(len(self.names) + 2, dtype=torch.float64, device=self._processes.device)
        loss = output.loss.detach()
        if output.token_losses is None:
            vector[-2] = loss.double() * items
        elif len(batch.task_ids):
            vector[:-2].index_add_(
                0, batch.task_ids.to(vector.device), output.token_losses.to(vector.device).double()
            )
        vector[-1] = ~torch.isfinite(loss)
        own_fault = bool(vector[-1])
        self._outputs.append((batch, output.token_losses))
        *sums, faults = self._processes.sum(vector).tolist()
        if own_fault:
            self._bad += _keys_of_rows(batch, output.token_losses)
        if faults:
            self.not_finite = True
        self._sums = [before + value for before, value in zip(self._sums, sums, strict=True)]
        return not faults


def _keys_of_rows(batch: Batch, token_losses: torch.Tensor | None) -> list[str]:
    """Keys of the rows that have a loss that is not finite; of all rows if that cannot be told."""
    counts = (batch.arrays["labels"] != -100).sum(1)
    if token_losses is None or len(token_losses) != int(counts.sum()):
        return [key for row in batch.keys for key in row]
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts.cpu())
    bad = set(rows[~torch.isfinite(token_losses.cpu())].tolist())
    return [key for row in sorted(bad) for key in batch.keys[row]]


def _example_losses(
    batch: Batch, token_losses: torch.Tensor | None, task: int | None
) -> list[tuple[float, str]]:
    """Mean loss and key of every example with loss-bearing tokens of a task (None: of any)."""
    labels = batch.arrays["labels"].cpu()
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    keys = [key for row in batch.keys for key in row]
    if token_losses is None or len(token_losses) != len(rows) or not keys:
        return [(0.0, key) for key in keys]
    first = torch.tensor([0, *(len(row) for row in batch.keys)]).cumsum(0)
    begun = (batch.arrays["position_ids"].cpu() == 0).cumsum(1) - 1
    examples = first[rows] + begun[rows, columns + 1]
    if task is not None:
        chosen = batch.task_ids.cpu() == task
        examples, token_losses = examples[chosen], token_losses.cpu()[chosen]
    tokens = torch.bincount(examples, minlength=len(keys))
    nats = torch.bincount(examples, weights=token_losses.cpu().double(), minlength=len(keys))
    return [(float(nats[i] / tokens[i]), keys[i]) for i in tokens.nonzero().flatten().tolist()]
