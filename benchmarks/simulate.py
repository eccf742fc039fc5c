"""A simulation of scale: the data of 1,024 ranks without the model, many ranks in one process.

Every rank has the loader, the part in the collectives and the state that training gives it; only the
collectives are faked, by adding up in this process what the ranks give. Results: NAME_order, NAME_balance,
NAME_resume, NAME_memory. Run from the repository root.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import costs
import numpy as np
import torch
from common import save
from fleet import CPU, FIGURES, Fleet, Made, example_tokens
from resuming import (
    COUNTED,
    SHARD_SAMPLES,
    measure_manifest,
    measure_rank,
    measure_resume,
    rss,
    stretch,
)
from rich.progress import Progress
from simulated import ByteTokenizer, Texts, geometry, write

from lclm.data.batch import Batch, make_lanes
from lclm.data.budget import ROUGH_FILL, demand
from lclm.data.settings import DataSettings, PackSettings, SourceSettings, TaskSettings
from lclm.data.shards import DataSet
from lclm.recipe import load_recipe

RECIPE = "recipes/0.6b-4b/16x.yaml"
SETTLED = 2
"""Steps left out of the balance: the first packs of a lane do not know yet what a usual pack takes."""
ORDER = [
    "One lane a rank in the largest world. Arrays and keys of every pack are hashed: worlds of fewer ranks "
    "with more lanes each must make the same packs in the same steps, from start and checkpoint.",
    "Decisions: sums, save, stop and the data's end, as each rank's Tally holds them after the collectives.",
]
ONCE = [
    "Documents and conversations, one epoch, drained; the world changes twice, through a checkpoint. Tokens "
    "are read back from the batches' arrays (slots as what they stand for) and compared with the samples'.",
]
BALANCE = [
    "Work: FLOPs of a forward pass of the 0.6b-4b models on real tokens: matrices by token, attention by the "
    "sum of squared lengths of windows (encoder) and examples (decoder). Padding costs nothing.",
    "max / mean: the busiest rank's work over the mean rank's in a step; 1 is the floor, all wait for the "
    "busiest. The aim is at most 1.05. least / mean: the idlest rank's.",
    f"The first {SETTLED} steps are left out. Web pages of 900 tokens in the median, conversations about "
    "2,000; a token is a byte. Cases after the first: some of the ranks, one lane each.",
]
RESUME = [
    "One rank: from the checkpoint's cursors to its first step, without background processes; wall clock.",
    f"Second data: {SHARD_SAMPLES} samples in each of many shards; its manifest names one file many times.",
]
MEMORY = [
    "Manifests: opened in a process of their own; what is kept, and the most meanwhile, above the start.",
    "Ranks: the recipe's loader on the largest of these data. A background process's own memory is what it "
    "does not share with the main process, which holds the interpreter with torch.",
]


@dataclass
class Case:
    """A mixture in a shape. steps: how many are simulated."""

    name: str
    data: DataSettings
    steps: int


class Simulation:
    """The settings of the simulated run, its data, and the bar."""

    def __init__(self, folder: Path, options: argparse.Namespace, bar: Progress) -> None:
        self.options, self.bar, self.folder = options, bar, folder
        self.tokenizer = ByteTokenizer(folder / "tokenizer")
        self.geometry = geometry(self.tokenizer)
        self.recipe = load_recipe(RECIPE)
        self.ranks, self.steps = options.ranks, options.steps
        self._base: tuple[list[Made], str, dict[str, float]] | None = None
        self.worlds = [self.ranks, self.ranks // 4, self.ranks // 32]
        texts, large = Texts(), not options.quick
        sources = {
            "documents": write(folder / "web", "documents", texts.documents(16_000 if large else 600)),
            "conversations": write(
                folder / "talks", "conversations", texts.conversations(8_000 if large else 300)
            ),
        }
        tasks = self.recipe.data.tasks | {"plain": TaskSettings("plain", "documents")}
        self.data = replace(
            self.recipe.data, lanes=self.ranks, micro_batch=1, sources=sources, heldout={}, tasks=tasks
        )

    def fleet(self, data: DataSettings, world: int, **more: Any) -> Fleet:
        return Fleet(data, self.tokenizer, self.geometry, world, **more)

    def cases(self) -> list[Case]:
        """What the balance is measured on; the first is the recipe as it is."""
        pack, sft = self.recipe.data.pack, self.recipe.stages["sft"]
        chat, even = sft.mixture, {"chat": 0.5, "interleave": 0.5}
        shapes = [
            ("recipe", self.data, self.steps),
            ("recipe, attention: null", self._with(None, replace(pack, attention=None)), 4),
            ("interleave alone", self._with({"interleave": 1.0}, pack), 2),
            ("chat and interleave by halves, rows as they demand", self._with(even, self._proposed(even)), 2),
            ("sft: chat 0.9, reconstruct 0.1", self._with(chat, sft.pack or pack), 8),
            ("sft in the pack of the other stages", self._with(chat, pack), 2),
        ]
        if self.options.quick:
            shapes = shapes[:2]
        return [Case(name, data, SETTLED + steps) for name, data, steps in shapes]

    def _with(self, mixture: dict[str, float] | None, pack: PackSettings) -> DataSettings:
        return replace(self.data, mixture=mixture or self.data.mixture, pack=pack)

    def _proposed(self, mixture: dict[str, float]) -> PackSettings:
        """Rows for the mixture's own demand at the recipe's positions, as `lclm data budget` does it."""
        data = self._with(mixture, self.recipe.data.pack)
        (lane,) = make_lanes(data, self.tokenizer, self.geometry, [0], seed=0, mixture=data.mixture)
        rows = round(demand(lane, data.pack.positions) / self.geometry.row_length / ROUGH_FILL)
        return replace(
            data.pack, rows=rows, latents=rows * self.geometry.window // self.geometry.ratio * 9 // 8
        )

    def base(self) -> tuple[list[Made], str, dict[str, float]]:
        """The recipe's steps at the largest world, with a checkpoint after the first that one rank asks for.

        Returns the steps, the checkpoint's JSON, and what it and the ranks cost.
        """
        if self._base is None:
            steps = SETTLED + self.steps
            task = self.bar.add_task("the recipe", total=steps)
            before = rss()
            fleet = self.fleet(self.data, self.ranks)
            made: list[Made] = []
            state, seconds = "", 0.0
            for number in range(steps):
                wish = {"saves": [self.ranks - 1]} if number == 0 else {"stops": [3]} if number == 1 else {}
                made.append(fleet.step(**wish))
                self.bar.advance(task)
                if made[-1].tally.save:
                    begin = time.perf_counter()
                    state = json.dumps(fleet.state())
                    seconds = time.perf_counter() - begin
            assert state, "one rank asked for a checkpoint and none was made"
            self._base = made, state, {
                "state, bytes": len(state), "bytes a lane": len(state) / self.ranks,
                "merging and writing it, s": seconds,
                "MB of memory a rank": (rss() - before) / 1e6 / self.ranks,
            }  # fmt: skip
        return self._base

    def order(self) -> list[dict[str, Any]]:
        """A step at each smaller world, and one of each world from the checkpoint, against the largest's."""
        made, state, figures = self.base()
        task = self.bar.add_task("order of data", total=len(self.worlds) * 2 - 1)
        rows = []
        for world in self.worlds:
            row: dict[str, Any] = {"ranks": world, "lanes": self.ranks, "first step equal": ""}
            cursor, some = json.loads(state), -(-world // 8)
            if world < self.ranks:
                found = self.fleet(self.data, world, ranks=some).step()
                row["first step equal"] = str(found.digests.items() <= made[0].digests.items())
                row["first: lanes compared"] = len(found.digests)
                self.bar.advance(task)
            found = self.fleet(self.data, world, ranks=some, state=cursor).step()
            row["resumed step equal"] = str(found.digests.items() <= made[1].digests.items())
            row["resumed: lanes compared"] = len(found.digests)
            self.bar.advance(task)
            rows.append(row)
        rows[0] |= {
            "steps": len(made),
            "packs": sum(len(step.digests) for step in made),
            "all ranks decide the same": str(all(len(step.decisions) == 1 for step in made)),
            "one rank's save and stop reach all": str(made[0].tally.save and made[1].tally.stop),
            **figures,
        }
        return rows

    def once(self) -> dict[str, Any]:
        """An epoch to its end, over two changes of the world size, and what became of every token."""
        texts = Texts(1)
        count = (5 if self.options.quick else 10) * self.ranks
        sources = {
            "documents": write(self.folder / "d1", "documents", texts.documents(count, 5.5, 1.0)),
            "conversations": write(self.folder / "c1", "conversations", texts.conversations(count, 5.5, 0.8)),
        }
        pack = replace(self.data.pack, positions=2048, rows=4, latents=300, attention=400)
        mixture = {"interleave": 0.6, "plain": 0.1, "chat": 0.3}  # reconstruct reads a text twice
        data = replace(
            self.data, sources=sources, mixture=mixture, epochs=1, run_samples=4, lookahead=8, pack=pack
        )
        pieces: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
        repeated: Counter[str] = Counter()

        def watch(batch: Batch) -> None:
            for key, tokens in example_tokens(batch, self.geometry):
                name, _, offset = key.partition("@")
                repeated[key] += int(offset or 0) in pieces[name]
                pieces[name][int(offset or 0)] = tokens

        state, steps, fills, world = None, 0, [], 0
        task = self.bar.add_task("an epoch to its end", total=None)
        for place, world in enumerate(self.worlds):
            fleet = self.fleet(data, world, state=state, watch=watch)
            while place == len(self.worlds) - 1 or steps < 2 * (place + 1):
                made = fleet.step()
                if made.tally.empty:
                    break
                steps += 1
                fills.append(made.figures[:, 0])
                self.bar.advance(task)
            state = json.loads(json.dumps(fleet.state()))
        dropped: Counter[str] = Counter()
        for cursor in state["cursors"].values():
            dropped.update(cursor["dropped"])
        return self._account(sources, pieces, repeated, dropped) | {
            "steps": steps,
            "of them with empty packs": int(sum((fill == 0).any() for fill in fills)),
            "ranks": " -> ".join(map(str, self.worlds)),
        }

    def _account(
        self, sources: dict[str, SourceSettings], pieces: Any, repeated: Counter, dropped: Counter
    ) -> dict[str, Any]:
        """Every sample's tokens against those that the batches held."""
        tokens, wrong, missing, whole = 0, 0, 0, 0
        for name, source in sources.items():
            for sample in DataSet.open(source.path):
                found = pieces.pop(sample.key, None)
                if found is None:
                    missing += 1
                    continue
                ids = np.concatenate([found[offset] for offset in sorted(found)])
                if name == "documents":
                    equal = self.tokenizer.content.decode(ids) == sample.text
                    tokens += len(sample.text or "")
                else:
                    spans = self.tokenizer.conversation(sample.messages)
                    expected = np.concatenate([span.ids for span in spans])
                    equal = np.array_equal(ids, expected)
                    tokens += len(expected)
                whole += equal
                wrong += not equal
        return {
            "samples read whole, once": whole,
            "samples with a token lost, added or out of place": wrong,
            "examples seen twice": sum(repeated.values()),
            "samples left out": missing,
            "counted as dropped": sum(dropped.values()),
            "keys of no sample": len(pieces),
            "source tokens": tokens,
        }

    def balance(self) -> list[dict[str, Any]]:
        """Work of the busiest rank over the mean rank's, step by step, for every case and world size."""
        some = max(32, self.ranks // 16)
        rows = self._balance(self.cases()[0], np.array([step.figures for step in self.base()[0][SETTLED:]]))
        for case in self.cases()[1:]:
            task = self.bar.add_task(f"balance: {case.name}", total=case.steps)
            fleet, figures = self.fleet(case.data, self.ranks, ranks=some), []
            for _ in range(case.steps):
                figures.append(fleet.step().figures)
                self.bar.advance(task)
            rows += self._balance(case, np.array(figures[SETTLED:]))
        return rows

    def _balance(self, case: Case, figures: np.ndarray) -> list[dict[str, Any]]:
        works = costs.works(self.recipe.model, dict(zip(FIGURES, np.moveaxis(figures, -1, 0), strict=True)))
        pack = case.data.pack
        common = {
            "case": case.name,
            "pack": " x ".join(map(str, (pack.positions, pack.rows, pack.latents))),
            "attention": pack.attention or "null",
            "positions filled": float(figures[..., 0].mean() / pack.positions),
            "row tokens filled": float(figures[..., 2].mean() / pack.rows / self.geometry.row_length),
            "mean squares a position": float(figures[..., 1].mean() / pack.positions),
        }
        rows = []
        lanes = figures.shape[1]
        for world in self.worlds if lanes == self.ranks else [lanes]:
            for name, work in works.items():
                shares = work.reshape(len(work), world, -1).sum(2)
                worst = shares.max(1) / shares.mean(1)
                whole = shares.sum(0)
                rows.append(
                    common | {
                        "ranks": world, "lanes a rank": lanes // world, "work": name,
                        "steps": len(work), "max / mean a step: median": float(np.median(worst)),
                        "95th percentile": float(np.percentile(worst, 95)), "largest": float(worst.max()),
                        "over all steps together": float(whole.max() / whole.mean()),
                        "least / mean": float((shares.min(1) / shares.mean(1)).mean()),
                    }
                )  # fmt: skip
        return rows

    def resume(self) -> list[dict[str, Any]]:
        """One rank's way to its first step, from anywhere in real data and in very much of it."""
        task = self.bar.add_task("resuming", total=2)
        counted = {name: SourceSettings(f"{COUNTED}://{s.path}") for name, s in self.data.sources.items()}
        rows = measure_resume(
            replace(self.data, sources=counted, lanes=32), self.tokenizer, self.geometry, 32
        )
        self.bar.advance(task)
        large = replace(self.data, sources=stretch(self.folder, self._many))
        rows += measure_resume(large, self.tokenizer, self.geometry, self.ranks)
        self.bar.advance(task)
        return rows

    @property
    def _many(self) -> int:
        return 2_000 if self.options.quick else 100_000

    def memory(self) -> list[dict[str, Any]]:
        """What manifests and loaders keep in memory."""
        task = self.bar.add_task("memory", total=None)
        rows = []
        for shards in (100, self._many // 10, self._many):
            rows.append(measure_manifest(stretch(self.folder, shards)["documents"]))
            self.bar.advance(task)
        for workers in (1,) if self.options.quick else (1, 8):
            data = replace(self.data, sources=stretch(self.folder, self._many))
            row = measure_rank(data, self.tokenizer, self.geometry, workers, 3 if workers == 1 else 10)
            rows.append({"shards": self._many, "samples": self._many * SHARD_SAMPLES} | row)
            self.bar.advance(task)
        return rows


PARTS: dict[str, Callable[[Simulation], tuple[list[dict[str, Any]], list[str]]]] = {
    "order": lambda simulation: (simulation.order(), ORDER),
    "once": lambda simulation: ([simulation.once()], ONCE),
    "balance": lambda simulation: (simulation.balance(), BALANCE),
    "resume": lambda simulation: (simulation.resume(), RESUME),
    "memory": lambda simulation: (simulation.memory(), MEMORY),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1024, help="a multiple of 32; as many lanes")
    parser.add_argument("--steps", type=int, default=3, help="steps of the recipe's balance, settled")
    parser.add_argument("--quick", action="store_true", help="less data, fewer cases")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--name", default="simulate", help="name of the result files")
    options = parser.parse_args()
    if options.ranks % 32 or options.ranks < 32:
        parser.error(f"--ranks {options.ranks}: give a multiple of 32")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, Progress() as bar:
        simulation = Simulation(Path(folder), options, bar)
        for part in options.parts:
            rows, notes = PARTS[part](simulation)
            save(f"{options.name}_{part}", CPU, rows, notes)


if __name__ == "__main__":
    main()
