"""A run as a folder on disk: opening it fresh or again, what may change in between, where it came from."""

from __future__ import annotations

import copy
import difflib
import fcntl
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lclm.checkpoint import RunFolder, provenance, read_json, write_json
from lclm.train.processes import Processes

MAY_CHANGE = (
    *("train.save_every_steps", "train.save_every_minutes", "train.keep", "train.log_every"),
    *("train.validate_every", "train.validate_batches", "train.probe_every", "train.peak_tflops"),
    *("train.preflight",),
    *("train.stop_after_steps", "train.stop_after_minutes", "train.stop_before_limit_minutes"),
    *("train.save", "train.snapshot_folder", "train.max_failed_saves"),
    *(
        "probes",
        "run_dir",
        "name",
        "engine.timeout_minutes",
        "engine.alone_minutes",
        "data.workers",
        "data.prefetch",
        "data.reading",
    ),
    *("engine.zero", "stages.*.zero", "engine.bucket_elements", "engine.activation_checkpointing"),
    *("engine.offload_optimizer", "data.micro_batch"),
)
"""Settings that a run may go on with changed: logging, retention, wall time, launcher, and how a step is
shared out over processes, which changes no batch and a loss by rounding only. No others."""
LOCK, LOCK_SECONDS = ".lock", 10.0


@dataclass
class Run:
    """An opened run: its folder, its recipe with fitted budgets, an identity that its checkpoints carry."""

    folder: RunFolder
    recipe: Any
    id: str
    lock: IO[str] | None


def open_run(recipe: Any, processes: Processes, fit: Callable[[Any], Any]) -> Run:
    """Make the run's folder, or check that the one that is there is this recipe's. Collective.

    `fit(recipe)` gives the recipe with its budgets fitted to a time; it is asked once in a run's life.
    Raises ValueError, with a diff, when a setting changed that may not.
    """
    folder = RunFolder(Path(recipe.run_dir))
    error = lock = None
    fingerprints: dict[str, str] = {}
    try:
        lock = lock_run(folder) if processes.main else None
        fingerprints = data_fingerprints(recipe)
        fresh = not folder.recipe.is_file()
        if not fresh:
            _check_unchanged(recipe, folder)
    except ValueError as problem:
        error = str(problem)
    try:
        processes.agree(error)
        if fresh:
            _begin(recipe, folder, processes, fit, fingerprints)
        known = read_json(folder.provenance)
        processes.agree(_changed_data(known["data"], fingerprints, folder))
        return Run(folder, _with_budgets(recipe, folder), known["run"], lock)
    except BaseException:
        if lock is not None:
            lock.close()
        raise


def _begin(
    recipe: Any,
    folder: RunFolder,
    processes: Processes,
    fit: Callable[[Any], Any],
    fingerprints: dict[str, str],
) -> None:
    fitted = fit(with_kernel(recipe, processes))
    if processes.main:
        origin = provenance(recipe.seed, fingerprints)
        write_json(folder.provenance, {"run": uuid.uuid4().hex, **origin})
        recipe.save(folder.requested)
        fitted.save(folder.recipe)
    processes.barrier()


def with_kernel(recipe: Any, processes: Processes) -> Any:
    """The recipe with `model.attention: auto` replaced by the kernel that training will use. Collective."""
    from lclm.model.attention import best
    from lclm.model.build import build_config

    if recipe.model.attention != "auto":
        return recipe
    config = build_config(recipe.model)
    own = best(recipe.engine.precision, config.encoder_config, config.decoder_config)
    recipe = copy.deepcopy(recipe)
    recipe.model.attention = processes.gather(own)[0]
    if processes.main:
        print(f"attention: auto is {recipe.model.attention} here", flush=True)
    return recipe


def lock_run(folder: RunFolder) -> IO[str]:
    """Hold the run's folder for as long as the returned file is open; any end of the process frees it.

    Waits a little for a process that is just being ended; then raises ValueError.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    file = (folder.path / LOCK).open("w")
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() > until:
                file.close()
                raise ValueError(
                    f"{folder.path} is being trained by another process; wait for it, end it, or give this "
                    "run another run_dir"
                ) from None
            time.sleep(0.2)


def data_fingerprints(recipe: Any) -> dict[str, str]:
    """{"sources.NAME" or "heldout.NAME": fingerprint} of every data set of the recipe."""
    from lclm.data.shards import DataSet

    found = {}
    for group in ("sources", "heldout"):
        for name, source in getattr(recipe.data, group).items():
            found[f"{group}.{name}"] = DataSet.open(source.path, recipe.data.reading).fingerprint
    return found


def _changed_data(before: dict[str, str], now: dict[str, str], folder: RunFolder) -> str | None:
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if not changed:
        return None
    return (
        f"{folder.path}: the data changed since this run began (data.{', data.'.join(changed)}); restore "
        "them, or start a new run with another run_dir"
    )


def _check_unchanged(recipe: Any, folder: RunFolder) -> None:
    if not folder.requested.is_file():
        raise ValueError(f"{folder.path} has a recipe.yaml but no requested.yaml; remove it and start again")
    before = _comparable(recipe.read(folder.requested))
    now = _comparable(recipe)
    if now not in (before, _comparable(recipe.read(folder.recipe))):
        changes = "\n".join(difflib.unified_diff(before, now, "the run", "this recipe", lineterm="", n=0))
        raise ValueError(
            f"{folder.path} holds a run of another recipe; give this one another run_dir, or undo:\n{changes}"
        )


def _comparable(recipe: Any) -> list[str]:
    from lclm.settings import to_yaml

    plain = recipe.to_dict()
    for name in MAY_CHANGE:
        *path, last = name.split(".")
        places = [plain]
        for part in path:
            found = [place.values() if part == "*" else [place.get(part)] for place in places]
            places = [inner for values in found for inner in values if isinstance(inner, dict)]
        for place in places:
            place.pop(last, None)
    return to_yaml(plain).splitlines()


def _with_budgets(recipe: Any, folder: RunFolder) -> Any:
    """The recipe as now given, with the step counts and the attention kernel that the run began with."""
    written, recipe = recipe.read(folder.recipe), copy.deepcopy(recipe)
    recipe.model.attention = written.model.attention
    for name, stage in recipe.stages.items():
        kept = written.stages[name]
        stage.steps, stage.tokens, stage.schedule = kept.steps, kept.tokens, kept.schedule
    return recipe
