"""What a training checkpoint costs: none, at once, and in the background, taking turns in one run.

The recipe's own training steps (`recipes/tiny.yaml` on the data of `make train`, and the same with more
weights), one process. A block is a save and the steps after it up to the next one: what is written meanwhile
slows them too, and counts. Run from the repository root.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import save, spread

from lclm.checkpoint import StageFolder, finish_folder, start_folder
from lclm.recipe import load_recipe
from lclm.train.processes import leave_processes, start_processes
from lclm.train.saver import Saver
from lclm.train.saving import Identity, State
from lclm.train.settings import TrainSettings
from lclm.train.step import Stepper

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny.yaml"
WIDER = [
    *(f"model.{part}.config.{name}={value}" for part in ("encoder", "decoder")
      for name, value in (("hidden_size", 512), ("intermediate_size", 1536), ("num_hidden_layers", 4))),
    *("data.lanes=2", "data.micro_batch=1"),
]  # fmt: skip
SIZES: dict[str, list[str]] = {"tiny": [], "wider, fewer tokens": WIDER}
MODES = ("none", "sync", "async")


class Bench:
    """A stage's steps, and a saver for every way of saving."""

    def __init__(self, size: str, stage: str, folder: Path) -> None:
        recipe = load_recipe(RECIPE, SIZES[size], validate=size == "tiny")
        if not Path(recipe.data.sources["documents"].path).is_dir():
            raise SystemExit("the tiny recipe's data is missing; `make train` builds it first of all")
        self.processes = start_processes(recipe.engine)
        self.stepper = Stepper(recipe, recipe.stages[stage], None, self.processes)
        self.stepper.feed.go_to(None)
        self.state = State()
        identity = Identity("benchmark", "", 0, "fp32", 1)
        self.events: list[dict[str, Any]] = []
        self.folders = {mode: StageFolder(folder / mode) for mode in MODES[1:]}
        self.savers = {
            mode: Saver(
                self.stepper.engine, self.folders[mode], identity,
                TrainSettings(save=mode), 10.0, lambda name, **figures: self.events.append(figures), print,
            )
            for mode in MODES[1:]
        }  # fmt: skip

    def step(self) -> None:
        """One training step."""
        state, stepper = self.state, self.stepper
        batches = stepper.feed.next_step(stepper.clock)
        stepper.step(batches, step=state.step, stage_step=state.stage_step, progress=0.5, norms=False)
        state.step, state.stage_step = state.step + 1, state.stage_step + 1

    def block(self, mode: str, steps: int, saves: int) -> tuple[float, float, float]:
        """Seconds of `saves` times a save and `steps` steps, of the saves alone, and of all in CPU time of
        this process; each for one of them."""
        begin, saved, cpu = time.perf_counter(), 0.0, time.process_time()
        for _ in range(saves):
            before = time.perf_counter()
            if mode in self.savers:
                self.state.data = self.stepper.feed.state()
                self.savers[mode].save(self.state)
            saved += time.perf_counter() - before
            for _ in range(steps):
                self.step()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        if mode in self.savers:
            self.savers[mode].settle()
            assert not self.savers[mode].failed_in_a_row, self.events[-1]
        return seconds / saves, saved / saves, cpu / saves

    def sync_to_disk(self) -> float:
        """Seconds of fsync for a checkpoint's files and folders, just copied."""
        newest = self.folders["sync"].candidates()[0]
        final = newest.with_name("copy")
        shutil.copytree(newest, start_folder(final), dirs_exist_ok=True)
        begin = time.perf_counter()
        finish_folder(final)
        seconds = time.perf_counter() - begin
        shutil.rmtree(final)
        return seconds

    def megabytes(self) -> float:
        """Size of a checkpoint, in 10^6 bytes."""
        newest = self.folders["sync"].candidates()[0]
        return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) / 1e6

    def close(self) -> None:
        for saver in self.savers.values():
            saver.__exit__(None)
        self.stepper.close()


def measure(size: str, stage: str, every: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of one model: a save every `every` steps, and at every step."""
    bench = Bench(size, stage, folder)
    rows = []
    for steps, times in ((every, 1), (1, 5)):
        seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
        saves: dict[str, list[float]] = {mode: [] for mode in MODES}
        cpus: dict[str, list[float]] = {mode: [] for mode in MODES}
        for turn, modes in zip(range(rounds + 1), itertools.cycle((MODES, MODES[::-1])), strict=False):
            for mode in modes:
                block, saved, cpu = bench.block(mode, steps, times)
                if turn:  # the first one warms up
                    seconds[mode].append(block)
                    saves[mode].append(saved)
                    cpus[mode].append(cpu)
        if steps == every:
            writes = [event["write_seconds"] for event in bench.events if "write_seconds" in event][1:]
            disk = [bench.sync_to_disk() for _ in range(rounds)]
        for mode in MODES:
            none = statistics.median(seconds["none"])
            cost = statistics.median(a / b - 1 for a, b in zip(seconds[mode], seconds["none"], strict=True))
            wait = statistics.median(saves[mode])
            row = {"model": size, "MB": round(bench.megabytes(), 1), "steps a save": steps, "save": mode}
            row |= {
                "ms a step": statistics.median(seconds[mode]) / steps * 1e3,
                "blocks": spread(seconds[mode]),
            }
            row["CPU ms a step"] = statistics.median(cpus[mode]) / steps * 1e3
            if mode != "none":
                row |= {"training waits, ms a save": wait * 1e3, "waits, % of steps": 100 * wait / none}
                row |= {"all it costs, % of steps": 100 * cost, "fsync, ms": statistics.median(disk) * 1e3}
            if mode == "async":
                row["in the background, ms"] = statistics.median(writes) * 1e3
            rows.append(row)
    bench.close()
    return rows


def main() -> None:
    """Measure and write benchmarks/results/checkpoint.*."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--stage", default="scratch_text", help="of recipes/tiny.yaml")
    parser.add_argument("--every", type=int, default=20, help="steps from a save to the next")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="on the disk that is measured")
    parser.add_argument("--name", default="checkpoint", help="of the result files")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    torch.set_num_threads(given.threads)
    given.folder.mkdir(exist_ok=True)
    rows = []
    for size in given.sizes:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            rows += measure(size, given.stage, given.every, given.rounds, Path(folder))
    save(
        given.name,
        torch.device("cpu"),
        rows,
        [
            f"Medians of {given.rounds} rounds in which the three take turns, all in one run. A block is a "
            "save and the steps up to the next.",
            "`training waits` is the save itself, against the steps of blocks without one; `all it costs` "
            "compares whole blocks of a round, with what writing in the background takes from the steps and "
            "with the noise of a machine that others use too; CPU time is the training process's own.",
            f"Stage {given.stage} of recipes/tiny.yaml, one process. `wider`: 4 + 4 layers of width 512 and "
            "a third of the tokens a step: a checkpoint that is large for its steps.",
            "`in the background` is what the writing process takes at low priority, checksums and fsync "
            "included; `fsync` is how long a save's files and folders wait for the disk.",
            "Five saves in a row where one follows every step: each waits for the one before.",
        ],
        clock="wall clock",
    )
    leave_processes()


if __name__ == "__main__":
    main()
