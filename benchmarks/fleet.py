"""Many ranks in one process: their loaders, their part in the collectives, and what each pack costs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lclm.data.batch import Batch, Loader, Step, merge_states
from lclm.data.settings import DataSettings
from lclm.model.spans import Geometry
from lclm.model.text import SpanTokenizer
from lclm.train.feed import Tally
from lclm.train.processes import Processes

CPU = torch.device("cpu")
FIGURES = ("positions", "squares", "row_tokens", "window_squares", "loss_tokens", "latents", "examples")
"""What is counted of a pack: real decoder positions, the sum of its examples' squared lengths, row tokens,
the sum of its windows' squared lengths, labels with loss, latents, examples."""


@dataclass(frozen=True)
class Giving(Processes):
    """A process that keeps what it gives to sums; its collectives return that alone."""

    given: list[torch.Tensor] = field(default_factory=list)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.given.append(values.clone())
        return values


@dataclass(frozen=True)
class Receiving(Processes):
    """A process whose sums have been made: they return the totals of all, one after another."""

    totals: list[torch.Tensor] = field(default_factory=list)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.copy_(self.totals.pop(0))


@dataclass(frozen=True)
class Made:
    """One global step. digests: of each lane's arrays and keys. figures: float64 [lanes, FIGURES].

    decisions: the distinct outcomes of the collectives over the ranks; one, if all decide the same.
    """

    digests: dict[int, str]
    figures: np.ndarray
    decisions: set[str]
    tally: Tally


class Fleet:
    """All ranks of a world (or the first `ranks` of them), each with a loader of its own, in this process.

    state: of another fleet, of any world size. watch: called with every batch.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: SpanTokenizer,
        geometry: Geometry,
        world: int,
        *,
        ranks: int | None = None,
        seed: int = 0,
        state: Mapping[str, Any] | None = None,
        watch: Callable[[Batch], None] | None = None,
    ) -> None:
        settings = replace(settings, workers=0, micro_batch=1)
        self.world, self.ranks, self.settings, self.watch = world, ranks or world, settings, watch
        self.loaders = [
            Loader(settings, tokenizer, geometry, seed=seed, rank=rank, world=world, cursor=state)
            for rank in range(self.ranks)
        ]

    def step(self, saves: Iterable[int] = (), stops: Iterable[int] = ()) -> Made:
        """One step of all ranks. saves, stops: ranks whose clock or signal asks for it."""
        digests: dict[int, str] = {}
        figures = np.zeros((self.settings.lanes * self.ranks // self.world, len(FIGURES)))
        steps = []
        for loader in self.loaders:
            step = next(loader)
            if step.failure is not None:
                raise step.failure
            for batch in step:
                lane = batch.lanes[0]
                digests[lane], figures[lane] = digest(batch), cost(batch)
                if self.watch:
                    self.watch(batch)
            steps.append(replace(step, micro_batches=[replace(batch, arrays={}) for batch in step]))
        tallies = self._collectives(steps, set(saves), set(stops))
        decisions = {json.dumps([t.totals, t.task_tokens, t.save, t.stop, t.empty]) for t in tallies}
        return Made(digests, figures, decisions, tallies[0])

    def _collectives(self, steps: list[Step], saves: set[int], stops: set[int]) -> list[Tally]:
        """The tally of every rank: all give their part, the parts are added up, all receive the totals."""
        given = [Giving(rank, self.world, CPU) for rank in range(self.ranks)]
        wishes = [{"save": rank in saves, "stop": rank in stops} for rank in range(self.ranks)]
        for process, step, wish in zip(given, steps, wishes, strict=True):
            Tally(step, process, **wish)
        totals = [torch.stack(parts).sum(0) for parts in zip(*(p.given for p in given), strict=True)]
        return [
            Tally(step, Receiving(rank, self.world, CPU, totals=list(totals)), **wish)
            for rank, (step, wish) in enumerate(zip(steps, wishes, strict=True))
        ]

    def state(self) -> dict[str, Any]:
        """Of all ranks, as a checkpoint keeps it."""
        return merge_states([loader.state() for loader in self.loaders])


def digest(batch: Batch) -> str:
    """Stands for everything in a batch: arrays, keys, tasks."""
    hashed = hashlib.blake2b(digest_size=8)
    for name in sorted(batch.arrays):
        hashed.update(batch.arrays[name].numpy().tobytes())
    hashed.update(json.dumps([batch.keys, batch.lanes]).encode() + batch.task_ids.numpy().tobytes())
    return hashed.hexdigest()


def cost(batch: Batch) -> list[float]:
    """FIGURES of a batch of one pack."""
    lengths = example_lengths(batch).astype(np.float64)
    windows = batch.arrays["encoder_window_ids"].numpy()
    sizes = np.bincount(windows[windows >= 0].ravel()).astype(np.float64)
    return [
        batch.positions, float((lengths**2).sum()), batch.row_tokens, float((sizes**2).sum()),
        batch.loss_tokens, batch.latents_used, len(lengths),
    ]  # fmt: skip


def example_lengths(batch: Batch) -> np.ndarray:
    """Decoder positions of each example of a batch of one pack; positions begin at 0 in each."""
    places = batch.arrays["position_ids"].numpy()[0, : batch.positions]
    return np.diff(np.append(np.flatnonzero(places == 0), batch.positions))


def example_tokens(batch: Batch, geometry: Geometry) -> list[tuple[str, np.ndarray]]:
    """(key, source tokens in their order) of each example of a batch of one pack, read back from its arrays.

    Slots read as the tokens that they stand for.
    """
    arrays = {name: array.numpy() for name, array in batch.arrays.items()}
    blocks, tokens = arrays["block_index"].ravel(), arrays["encoder_input_ids"].ravel()
    order = np.argsort(blocks, kind="stable")
    blocks, tokens = blocks[order], tokens[order]
    marks = (geometry.memory_start_id, geometry.memory_end_id)
    found, begin = [], 0
    for key, length in zip(batch.keys[0], example_lengths(batch).tolist(), strict=True):
        ids = arrays["input_ids"][0, begin : begin + length]
        slots = arrays["latent_index"][0, begin : begin + length]
        parts = []
        for run in np.split(np.arange(length), np.flatnonzero(np.diff(slots >= 0)) + 1):
            if slots[run[0]] >= 0:
                first, last = np.searchsorted(blocks, [slots[run[0]], slots[run[-1]] + 1])
                parts.append(tokens[first:last])
            else:
                parts.append(ids[run][~np.isin(ids[run], marks)])
        found.append((key, np.concatenate(parts)))
        begin += length
    return found
