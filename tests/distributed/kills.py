"""Kill a training run again and again, and see that nothing is lost: `python -m tests.distributed.kills`.

For every pair of processes and ZeRO stage: an uninterrupted run of one epoch, then the same run killed with
SIGKILL (one of its processes, or its launcher; at any moment, half of the times while something is saved)
and started again until it is complete. Prints a table; ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from lclm.checkpoint import RunFolder, damage
from lclm.data.batch import Loader
from lclm.data.shards import DataSet
from lclm.model.build import build_config, build_processor
from lclm.recipe import load_recipe
from tests.end_to_end import small_run as small

PAIRS = [(processes, zero) for processes in (1, 2, 4) for zero in (1, 2, 3)]
LIMIT = 240.0
"""Seconds after which a start that has not ended counts as hung."""
FIRST, SAVE_EVERY, SOURCES = 10, 2, ("documents", "conversations")


@dataclass
class Outcome:
    """What became of the run of one pair."""

    processes: int
    zero: int
    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    steps: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def recipe(data: Path, run: Path, processes: int, zero: int) -> dict[str, Any]:
    """Two stages over one epoch: everything learns, then without the decoder until the data is used up."""
    stages = {"first": small.stage(FIRST), "second": small.stage(1000, learn=("encoder", "adapter"))}
    content = small.recipe(data, run, **stages)
    content["engine"]["zero"] = zero
    content["data"] |= {"epochs": 1, "micro_batch": 4 // processes // (2 if processes < 4 else 1)}
    content["data"]["pack"] = {"positions": 128, "rows": 6, "latents": 48}
    content["train"] |= {"save_every_steps": SAVE_EVERY, "validate_batches": 0, "validate_every": None}
    content["probes"] = {"context_tokens": [], "reconstruct_tokens": [], "max_needle_tokens": 0}
    return content


def workers(process: subprocess.Popen[str], processes: int) -> list[psutil.Process]:
    """The training processes of a launch, by rank."""
    if processes == 1:
        return [psutil.Process(process.pid)]
    found = {}
    for child in psutil.Process(process.pid).children():
        rank = child.environ().get("RANK")
        if rank is not None:
            found[int(rank)] = child
    return [found[rank] for rank in sorted(found)]


def saving(run: Path) -> bool:
    """Whether a checkpoint or an export is being written now."""
    return any(run.glob("stages/*/checkpoints/*.tmp")) or any(run.glob("stages/*/*.tmp"))


def wait_for_moment(process: subprocess.Popen[str], run: Path, chance: random.Random, kind: str) -> None:
    """Wait until the chosen moment: a save, a number of steps from now, or some time after the start."""
    until = time.monotonic() + LIMIT
    if kind == "starting":
        until = time.monotonic() + chance.uniform(0.2, 12)
    target = len(small.lines(run)) + chance.randint(1, 12) if (run / "metrics.jsonl").exists() else 1
    skip = chance.randint(0, 3)
    while process.poll() is None and time.monotonic() < until:
        if kind == "saving" and saving(run):
            if skip == 0:
                time.sleep(chance.uniform(0, 0.03))
                return
            skip -= 1
            while process.poll() is None and saving(run):
                time.sleep(0.001)
        elif kind == "stepping" and read_steps(run) >= target:
            time.sleep(chance.uniform(0, 0.1))
            return
        time.sleep(0.001 if kind == "saving" else 0.01)


def read_steps(run: Path) -> int:
    """Lines of steps in the metrics, a half-written one left out."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0


def kill_once(
    process: subprocess.Popen[str], processes: int, chance: random.Random, outcome: Outcome, kind: str
) -> bool:
    """Kill one process of a launch; False if the run was over before."""
    try:
        victims = workers(process, processes)
        launcher = processes > 1 and (not victims or chance.random() < 0.2)
        victim = psutil.Process(process.pid) if launcher else chance.choice(victims)
        if process.poll() is not None:
            return False
        victim.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    outcome.kills[kind] += 1
    return True


def end(process: subprocess.Popen[str], outcome: Outcome) -> str:
    """Wait for a launch to end; what it printed. One that does not end is a fault."""
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        outcome.faults.append("hung")
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return output


def half_written(run: Path) -> list[str]:
    """Checkpoints and exports that have their final name but are not whole."""
    found = []
    for stage in (run / "stages").glob("*"):
        folder = RunFolder(run).stage(int(stage.name[:2]) - 1, stage.name[3:])
        found += [text for path in folder.candidates() if (text := damage(path))]
        if folder.export.is_dir():
            try:
                small.weights(folder.export)
            except Exception as error:
                found.append(f"{folder.export}: {error}")
    return found


def train_killed(path: Path, run: Path, outcome: Outcome, kills: int, chance: random.Random) -> None:
    """Train a recipe to its end, killed `kills` times on the way."""
    others = ["stepping", "stepping", "starting"]
    kinds = ["saving" if i % 2 == 0 else chance.choice(others) for i in range(kills)]
    while outcome.starts < 4 * kills + 4:
        process = small.start(path, outcome.processes)
        outcome.starts += 1
        kind = kinds[-1] if kinds else ""
        if kind:
            wait_for_moment(process, run, chance, kind)
            if kill_once(process, outcome.processes, chance, outcome, kind):
                kinds.pop()
        output = end(process, outcome)
        outcome.faults += half_written(run)
        if process.returncode == 0 and not kinds:
            return
        if process.returncode == 0:
            outcome.faults.append(f"complete with {len(kinds)} kills to go: make the run longer")
            return
        if process.returncode == 2:
            outcome.faults.append(f"refused to go on: {output[-1500:]}")
            return
    outcome.faults.append(f"not complete after {outcome.starts} starts: {output[-1500:]}")


def steps_of_data(recipe_path: Path) -> tuple[list[tuple[int, int]], Counter[str]]:
    """(loss tokens, source tokens) of every step of the recipe's data, and how often each example came."""
    loaded = load_recipe(recipe_path)
    config = build_config(loaded.model)
    settings = [config.geometry(), loaded.seed, config.ratios]
    cursor, steps, keys = None, [], Counter[str]()
    tokenizer = build_processor(loaded.model).spans
    budgets = [FIRST, 10**9]
    for name, budget in zip(loaded.stages, budgets, strict=True):
        mixture = loaded.stages[name].mixture or loaded.data.mixture
        loader = Loader(
            loaded.data,
            tokenizer,
            settings[0],
            seed=settings[1],
            ratios=list(settings[2]),
            mixture=mixture,
            cursor=cursor,
        )
        with loader:
            for _ in range(budget):
                step = next(loader)
                if not step.keys:
                    break
                steps.append((step.loss_tokens, step.source_tokens))
                keys.update(step.keys)
            cursor = loader.state()
    return steps, keys


def compare(whole: Path, killed: Path, path: Path, outcome: Outcome) -> None:
    """Note what differs between the uninterrupted run and the killed one."""
    first, second = small.lines(whole), small.lines(killed)
    outcome.steps = len(second)
    if [line["step"] for line in second] != list(range(1, len(first) + 1)):
        outcome.faults.append(f"steps {[line['step'] for line in second]} instead of 1 to {len(first)}")
    if [line["loss"] for line in first] != [line["loss"] for line in second]:
        outcome.faults.append("losses differ")
    steps, keys = steps_of_data(path)
    if [(line["loss_tokens"], line["source_tokens"]) for line in second] != accumulated(steps):
        outcome.faults.append("the steps' data is not the epoch's")
    if twice := [key for key, times in keys.items() if times > 1]:
        outcome.faults.append(f"{len(twice)} examples came more than once, for example {twice[0]}")
    seen = {key.partition("@")[0] for key in keys}
    missing = [key for key in all_keys(data_of(path)) if key not in seen]
    dropped = sum(second[-1]["dropped"].values())
    if len(missing) > dropped:
        outcome.faults.append(f"{len(missing)} samples were not seen, {dropped} were dropped")
    for folder in ("stages/01-first/export", "export"):
        before, after = small.weights(whole / folder), small.weights(killed / folder)
        same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
        if not same:
            outcome.faults.append(f"weights of {folder} differ")


def accumulated(steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Source tokens as the metrics count them: all so far."""
    total, result = 0, []
    for loss_tokens, source_tokens in steps:
        total += source_tokens
        result.append((loss_tokens, total))
    return result


def all_keys(data: Path) -> list[str]:
    """Keys of every sample of the training data."""
    return [sample.key for name in SOURCES for sample in DataSet.open(str(data / name / "train"))]


def data_of(path: Path) -> Path:
    """The folder of the recipe's data."""
    return Path(load_recipe(path).data.sources["documents"].path).parent.parent


def try_pair(data: Path, folder: Path, processes: int, zero: int, kills: int, seed: int) -> Outcome:
    """Both runs of a pair, compared."""
    outcome, started = Outcome(processes, zero), time.monotonic()
    name = f"{processes}-zero{zero}"
    whole, killed = folder / f"{name}-whole", folder / f"{name}-killed"
    for run in (whole, killed):
        small.write(folder, recipe(data, run, processes, zero))
    small.run(folder / f"{whole.name}.yaml", processes)
    path = folder / f"{killed.name}.yaml"
    train_killed(path, killed, outcome, kills, random.Random(f"{seed} {name}"))
    if not outcome.faults:
        compare(whole, killed, path, outcome)
    outcome.seconds = time.monotonic() - started
    return outcome


def table(outcomes: list[Outcome], seed: int) -> Table:
    """The outcomes for people."""
    result = Table(title=f"kill -9, seed {seed}", title_justify="left")
    for name in ("processes", "ZeRO", "kills", "while saving", "starts", "steps", "seconds", "outcome"):
        result.add_column(name, justify="left" if name == "outcome" else "right")
    for o in outcomes:
        figures = [
            o.processes,
            o.zero,
            o.kills.total(),
            o.kills["saving"],
            o.starts,
            o.steps,
            f"{o.seconds:.0f}",
        ]
        told = "; ".join(o.faults) or "every sample once, losses and weights equal"
        result.add_row(*map(str, figures), told)
    total: Counter[str] = sum((o.kills for o in outcomes), Counter())
    starts = str(sum(o.starts for o in outcomes))
    failed = sum(bool(o.faults) for o in outcomes)
    result.add_section()
    result.add_row("", "", str(total.total()), str(total["saving"]), starts, "", "", f"{failed} pairs failed")
    return result


def shared(kills: int, pairs: int) -> list[int]:
    """`kills` dealt to the pairs as evenly as can be."""
    return [kills // pairs + (i < kills % pairs) for i in range(pairs)]


def pair(text: str) -> tuple[int, int]:
    """ "2x3" as (2 processes, ZeRO 3)."""
    if not re.fullmatch(r"[124]x[0-3]", text):
        raise argparse.ArgumentTypeError(f"{text}: give processes x ZeRO stage, as in 2x3")
    processes, zero = text.split("x")
    return int(processes), int(zero)


def main(arguments: list[str] | None = None) -> int:
    """Try all pairs; 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="in all, dealt to the pairs (default 50)")
    parser.add_argument("--pairs", type=pair, nargs="+", default=PAIRS, help="as in 2x3: 2 processes, ZeRO 3")
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: the time)")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    asked = parser.parse_args(arguments)
    seed = int(time.time()) if asked.seed is None else asked.seed
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        data = small.build_data(Path(folder) / "data")
        for number, (processes, zero) in zip(shared(asked.kills, len(asked.pairs)), asked.pairs, strict=True):
            outcomes.append(try_pair(data, Path(folder), processes, zero, number, seed))
            told = "; ".join(outcomes[-1].faults) or "as if nothing had happened"
            print(f"{processes} processes, ZeRO {zero}: {number} kills, {told}", flush=True)
    Console(width=120).print(table(outcomes, seed))
    if asked.output:
        with asked.output.open("w") as file:
            Console(file=file, width=110).print(table(outcomes, seed))
    return int(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
