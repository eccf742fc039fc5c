"""`lclm data build`: a pipeline recipe becomes shards. Run again, it says that they are up to date."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import multiprocess
from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lclm.data.shards import MANIFEST

from .assemble import put_in_place
from .plan import BUILD, Plan, make_plan, state_of
from .stages import Stage, completed, make_executor, make_stages, training_texts
from .tokenizers import make_tokenizer


@dataclass
class Built:
    """What `build` did: `status` is built | up to date | submitted, `path` the folder of the data sets."""

    status: str
    path: Path
    seconds: float
    data_sets: dict[str, dict]

    def __str__(self) -> str:
        if self.status == "submitted":
            return f"submitted; {self.path} appears when the last job is done"
        lines = [f"{self.path}: {self.status}"]
        lines += [describe(name, manifest) for name, manifest in self.data_sets.items()]
        dropped = next(iter(self.data_sets.values()))["dropped"]
        if dropped:
            lines.append(
                "  left out: " + ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
            )
        if self.status == "up to date":
            lines.append("  nothing to do; FRESH=1 (or --fresh) would build it again")
        return "\n".join(lines)


def describe(name: str, manifest: dict) -> str:
    """One line about a data set."""
    tokens = "".join(f", {count:,} tokens" for count in manifest["tokens"].values())
    sizes = f"{manifest['samples']:,} samples in {len(manifest['shards'])} shards"
    return f"  {name}: {sizes}, {manifest['text_bytes'] / 1e6:.1f} MB of text{tokens}"


def build(recipe_path: str | Path, overrides: Sequence[str] = (), fresh: bool = False) -> Built:
    """Build the data sets of a pipeline recipe; nothing is done if they are there and up to date.

    The result grows in a folder beside `out` and is renamed when complete. A build that was killed goes on
    where it stopped; one whose recipe or inputs have changed starts anew, and the old result stays until the
    new one is complete. The bytes do not depend on the number of workers.

    :param fresh: build again even if up to date, from the beginning.
    :raises ValueError: what is wrong, where, and how to put it right.
    """
    started = time.monotonic()
    plan = make_plan(recipe_path, overrides)
    state = state_of(plan)
    if state == "current" and not fresh:
        shutil.rmtree(plan.work, ignore_errors=True)
        return Built("up to date", plan.out, 0.0, read_manifests(plan.out))
    if state == "unknown":
        raise ValueError(
            f"{plan.out} exists and was not made by `lclm data build` (it has no {BUILD}): move it away or "
            "set another `out`"
        )
    console = Console(stderr=True)
    reason = {"other": "the recipe or its inputs have changed", "damaged": "files are missing or cut short"}
    if state in reason:
        console.print(f"{plan.out}: {reason[state]}; building it again")
    with _only_one(plan), _plain_errors(plan):
        _wait_for_tasks(plan, console)
        _clear(plan, fresh)
        status = _run(plan, console)
        if status == "built":
            shutil.rmtree(plan.work, ignore_errors=True)
    if status == "submitted":
        return Built(status, plan.out, 0.0, {})
    return Built(status, plan.out, time.monotonic() - started, read_manifests(plan.out))


def build_tokenizer(recipe_path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Make the tokenizer of a pipeline recipe alone, from its filtered training documents.

    It is written beside the recipe's `out`, as ``OUT-tokenizer``. Returns a line that says so.

    :raises ValueError: no `tokenizer:` in the recipe, or too few documents.
    """
    plan = make_plan(recipe_path, overrides)
    settings = plan.settings.tokenizer
    if settings is None:
        raise ValueError(f"{recipe_path} has no `tokenizer:`; add one, such as tokenizer.kind=bytes")
    with tempfile.TemporaryDirectory(prefix="lclm-tokenizer-") as lists:
        texts = training_texts(plan, lists) if settings.trained else iter(())
        out = plan.out.with_name(f"{plan.out.name}-tokenizer")
        staging = out.with_name(f".{out.name}.building")
        shutil.rmtree(staging, ignore_errors=True)
        logger.disable("datatrove")
        try:
            tokens = make_tokenizer(settings, texts, staging)
        finally:
            logger.enable("datatrove")
    put_in_place(staging, out)
    return f"{out}: a tokenizer of kind {settings.kind}, {tokens:,} tokens"


def read_manifests(out: Path) -> dict[str, dict]:
    """The manifest of every data set of a build, by its folder relative to `out`."""
    places = json.loads((out / BUILD).read_text())["data_sets"]
    return {place: json.loads((out / place / MANIFEST).read_text()) for place in places}


def _wait_for_tasks(plan: Plan, console: Console, seconds: float = 600) -> None:
    """Wait until no process of a killed build works here any more: each ends after the task it is at."""
    for file in plan.out.parent.glob(f".{plan.out.name}.building-*/logs/presence"):
        started = time.monotonic()
        with open(file, "a") as presence:
            while True:
                try:
                    fcntl.lockf(presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if time.monotonic() - started > seconds:
                        raise ValueError(
                            f"a process of another build still works in {file.parent}"
                        ) from error
                    if time.monotonic() - started < 1:
                        console.print("waiting for a task of the interrupted build to end")
                    time.sleep(1)


def _clear(plan: Plan, fresh: bool) -> None:
    """Remove the work of builds that were given up; go on with this one's unless `fresh`."""
    pattern = f".{plan.out.name}.building-*"
    for folder in plan.out.parent.glob(pattern):
        if fresh or folder != plan.work:
            shutil.rmtree(folder)
    finished = plan.staging / BUILD
    if finished.exists():
        put_in_place(plan.staging, plan.out)


def _run(plan: Plan, console: Console) -> str:
    executor = plan.settings.executor
    logs = plan.folder("logs")
    stages = make_stages(plan)
    if executor.kind == "slurm":
        last = None
        for stage in stages:
            last = make_executor(stage, executor, logs, depends=last)
        assert last is not None
        last.run()
        return "submitted"
    # what every worker process imports, imported once in the process that they are forked from
    multiprocess.set_forkserver_preload(["webdataset", "data_pipelines.stages"])
    with _console_of(plan, console) as own, _progress(own, stages, logs):
        for stage in stages:
            made = make_executor(stage, executor, logs)
            made.run()
            left = made.get_incomplete_ranks(skip_completed=True)
            if left:
                raise ValueError(f"stage {stage.name}: {len(left)} of {stage.tasks} tasks failed; see {logs}")
    return "built"


@contextlib.contextmanager
def _console_of(plan: Plan, console: Console) -> Iterator[Console]:
    """Send what datatrove's tasks print to a file; yields a console that still writes where stderr did."""
    plan.work.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    kept = os.dup(2)
    with open(plan.work / "console.log", "ab") as log, os.fdopen(kept, "w") as screen:
        os.dup2(log.fileno(), 2)
        try:
            yield Console(file=screen, force_terminal=console.is_terminal or None)
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)


@contextlib.contextmanager
def _progress(console: Console, stages: list[Stage], logs: str) -> Iterator[None]:
    """A bar over the tasks of all stages, from datatrove's completion marks."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stop = threading.Event()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("data", total=sum(stage.tasks for stage in stages))

        def watch() -> None:
            while not stop.wait(0.25):
                done = [completed(logs, stage) for stage in stages]
                current = next((s.name for s, n in zip(stages, done, strict=True) if n < s.tasks), "data")
                progress.update(bar, completed=sum(done), description=f"data: {current}")

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextlib.contextmanager
def _only_one(plan: Plan) -> Iterator[None]:
    """Hold the lock of this output folder."""
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    with open(plan.out.with_name(f".{plan.out.name}.lock"), "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another build is writing {plan.out}; wait for it or set another `out`"
            ) from error
        yield


@contextlib.contextmanager
def _plain_errors(plan: Plan) -> Iterator[None]:
    """Turn a full disk into an error that says what to do; the work done stays, for the next try."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ValueError(
            f"no space left below {plan.work}: {error.strerror}. Nothing was put in place. Free space or set "
            "another `out`, then run the same command again; it goes on where it stopped."
        ) from error
