"""Running a model over examples: losses and hits of the tokens that bear loss, and greedy generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lclm.model.spans import Example, Geometry, lay_out


@dataclass(frozen=True)
class Scores:
    """Of one example's loss-bearing tokens, in order: losses in nats (float32), argmax right (bool)."""

    losses: np.ndarray
    hits: np.ndarray


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of every module is put back after, also after an error."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def cost(example: Example, geometry: Geometry) -> int:
    """Decoder positions plus encoder tokens."""
    size = geometry.size(example)
    return size.positions + sum(size.windows)


def batches(examples: Sequence[Example], geometry: Geometry, budget: int) -> Iterator[list[int]]:
    """Indices of examples of similar cost, together within `budget` tokens; at least one at a time."""
    costs = [cost(example, geometry) for example in examples]
    batch: list[int] = []
    for index in sorted(range(len(examples)), key=lambda i: (costs[i], i)):
        if batch and costs[index] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def tensors(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays of `lay_out` as int64 tensors on `device`."""
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def score(model: Any, examples: Sequence[Example], geometry: Geometry, budget: int) -> list[Scores]:
    """Scores of every example, one example per row, several rows per forward."""
    scores: list[Scores | None] = [None] * len(examples)
    for batch in batches(examples, geometry, budget):
        arrays = lay_out([[examples[index]] for index in batch], geometry)
        labels = torch.from_numpy(arrays.pop("labels"))
        rows, columns = (labels != -100).nonzero(as_tuple=True)
        wanted = labels[rows, columns].to(model.device)
        kept, place = torch.unique(columns - 1, return_inverse=True)
        logits = model(**tensors(arrays, model.device), logits_to_keep=kept.to(model.device)).logits
        chosen = logits[rows.to(logits.device), place.to(logits.device)].float()
        losses = torch.nn.functional.cross_entropy(chosen, wanted, reduction="none").cpu().numpy()
        hits = (chosen.argmax(-1) == wanted).cpu().numpy()
        owner = rows.numpy()
        for row, index in enumerate(batch):
            scores[index] = Scores(losses[owner == row], hits[owner == row])
    return [found for found in scores if found is not None]


def generate(
    model: Any, examples: Sequence[Example], geometry: Geometry, tokens: int, end: Sequence[int]
) -> list:
    """The ids (int64 arrays) that greedy generation adds to each example: at most `tokens`, to an `end`."""
    if not examples:
        return []
    arrays = lay_out([[example] for example in examples], geometry, padding_side="left")
    arrays.pop("labels")
    inputs = tensors(arrays, model.device)
    width = inputs["input_ids"].shape[1]
    written = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=list(end), pad_token_id=geometry.pad_id
    )
    found = []
    for row in written[:, width:].cpu().numpy():
        stop = np.flatnonzero(np.isin(row, end))
        found.append(row[: stop[0]] if len(stop) else row)
    return found
