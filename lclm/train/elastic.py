"""Going on with another number of processes or another ZeRO stage: a checkpoint cut anew, exactly.

ZeRO 1 to 3 cut masters and moments by the number of processes. DeepSpeed's converter puts them together, a
file per weight: STEP.universal/universal/zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt, a "universal checkpoint".
The main process makes it once, and it goes with its checkpoint. Every process takes its share from it.

DeepSpeed's own loader of such folders is not used. A process whose share of a parameter group is padding
only fails in it, and the others hang; at ZeRO 3 it gives all groups the first one's rates, betas and decay;
and it must be chosen before the engine is made. Shares are set with DeepSpeed's `safe_set_...` functions.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lclm.checkpoint import (
    CHECKSUMS,
    SCHEMA,
    STATE,
    changed,
    checksums,
    list_files,
    read_json,
    universal_folder,
    write_folder,
    write_json,
)
from lclm.train.engine import TAG, Engine, set_share
from lclm.train.processes import Processes

CONVERTED, ORIGIN = "universal", "origin.json"
OPTIMIZER = "_optim_states.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")


def restore_moved(engine: Engine, checkpoint: Path, say: Callable[[str], None]) -> None:
    """Put a checkpoint of other processes, or of another ZeRO stage, into an engine at its stage's start.

    Masters, moments and step counts become bit for bit the saved ones. Collective. Raises ValueError when the
    disk is full, or when other weights learn.
    """
    folder = universal(checkpoint, engine.processes, say)
    steps = read_json(folder / ORIGIN)["steps"]
    if steps:  # before the optimizer's first step, all is as the stage's start has it
        put(engine, folder / CONVERTED / "zero", steps)
    engine.apply_settings(1.0)


def universal(checkpoint: Path, processes: Processes, say: Callable[[str], None]) -> Path:
    """The checkpoint's universal form, converted if it is not there or is not whole. Collective."""
    final = universal_folder(checkpoint)
    found = [text for text in processes.gather(_unfit(final, checkpoint, processes)) if text]
    if not found:
        return final
    if processes.main:
        size = sum(path.stat().st_size for path in list_files(checkpoint / TAG)) / 2**20
        origin = read_json(checkpoint / STATE)["identity"]
        say(
            f"{checkpoint.name} was written by {origin['processes']} processes at ZeRO {origin['zero']}; "
            f"cutting its {size:,.1f} MiB anew"
        )
    began, error = time.monotonic(), None
    with processes.alone("cutting a checkpoint anew"):
        if processes.main:
            try:
                write_folder(final, lambda folder: _convert(checkpoint, folder))
            except (OSError, ValueError) as problem:
                error = str(problem)
    processes.agree(error)
    say(f"cut anew in {time.monotonic() - began:,.1f} s")
    return final


def _convert(checkpoint: Path, folder: Path) -> None:
    """Fill `folder` with the universal form, by this process alone; one share is in memory at a time."""
    steps = optimizer_steps(checkpoint / TAG)
    if steps:
        try:
            _put_together(checkpoint / TAG, folder)
        except RuntimeError as error:  # so torch says that a disk is full
            raise OSError(str(error)) from error
    write_json(folder / ORIGIN, {"schema": SCHEMA, "of": _fingerprint(checkpoint), "steps": steps})
    write_json(folder / CHECKSUMS, {"schema": SCHEMA, "files": checksums(folder, list_files(folder))})


def _put_together(engine_folder: Path, folder: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    source = folder / "source"
    link_without_paddings(engine_folder, source)
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(folder / CONVERTED),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    talk = io.StringIO()
    with contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk):
        ds_to_universal.main(options)
    shutil.rmtree(source)


def link_without_paddings(engine_folder: Path, source: Path) -> None:
    """Links to the engine's files in a folder `source`, but the last process's says that nothing is padding.

    At ZeRO 1 and 2 the end of a parameter group is padded. DeepSpeed's converter takes all of that for the
    last process's and fails where a share is shorter; it need not know, having the place of every weight.
    """
    source.mkdir()
    files = sorted(
        engine_folder.glob("*.pt"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)]
    )
    for path in files:
        (source / path.name).symlink_to(path.resolve())
    last = [path for path in files if path.name.endswith(OPTIMIZER)][-1]
    saved = torch.load(last, map_location="cpu", mmap=True, weights_only=False)
    paddings = saved["optimizer_state_dict"].get("group_paddings", [])
    if any(paddings):
        saved["optimizer_state_dict"]["group_paddings"] = [0] * len(paddings)
        (source / last.name).unlink()
        torch.save(saved, source / last.name)


def optimizer_steps(engine_folder: Path) -> int:
    """Steps that the optimizer took, as the state of the first process says. ValueError if groups differ."""
    path = min(engine_folder.glob(f"*{OPTIMIZER}"))
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"]
    state = saved.get("base_optimizer_state") or saved["optimizer_state_dict"]
    counts = {int(entry["step"]) for entry in state["state"].values()}
    if len(counts) > 1:
        raise ValueError(f"{path}: parameter groups took {sorted(counts)} steps; it was not written by lclm")
    return counts.pop() if counts else 0


def _fingerprint(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / CHECKSUMS).read_bytes()).hexdigest()


def _unfit(folder: Path, checkpoint: Path, processes: Processes) -> str | None:
    """Why a universal form cannot be used, None if it can; each process looks at a share of its files."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["files"]
        if json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["of"] != _fingerprint(checkpoint):
            return f"{folder} was made from another checkpoint"
        return changed(folder, expected, processes.rank, processes.size)
    except (OSError, KeyError, TypeError, ValueError) as error:
        return f"{folder} cannot be read ({error})"


@torch.no_grad()
def put(engine: Engine, folder: Path, steps: int) -> None:
    """Put masters, moments and step counts of a universal form's `zero` folder into an engine. Collective."""
    learning = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
    held = {path.parent.name for path in folder.glob(f"*/{MOMENTS[0]}.pt")}
    if held != learning.keys():
        wrong = sorted(held ^ learning.keys())
        raise ValueError(
            f"{folder} does not fit this stage: {len(wrong)} weights differ from those that learn, "
            f"for example {', '.join(wrong[:3])}; was it written by another recipe?"
        )
    optimizer = engine.deepspeed.optimizer
    if engine.zero == 3:
        optimizer.checkpoint_event_prologue()  # parameters that are kept whole are cut, too
    _empty_moments(engine, steps)
    for name, parameter in learning.items():
        set_share(parameter, _read(folder / name / "fp32.pt"))
        for key in MOMENTS:
            set_share(parameter, _read(folder / name / f"{key}.pt"), key)
    if engine.zero == 3:
        from deepspeed.utils import safe_get_local_fp32_param

        for parameter in learning.values():
            share: Any = parameter.ds_tensor
            share.data.copy_(safe_get_local_fp32_param(parameter))
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()


def _empty_moments(engine: Engine, steps: int) -> None:
    """Give each flat share in the optimizer the state of so many steps, its moments still zero."""
    base, optimizer = engine.base, engine.deepspeed.optimizer
    flats = optimizer.fp32_partitioned_groups_flat if engine.zero == 3 else flat_shares(engine)
    for flat in flats:
        count = torch.tensor(float(steps), device=flat.device)
        base.state[flat] = {"step": count} | {key: torch.zeros_like(flat) for key in MOMENTS}
    if engine.zero != 3:
        link_moments(engine)


def flat_shares(engine: Engine) -> list[torch.Tensor]:
    """This process's flat share of each parameter group's masters, at ZeRO 1 and 2."""
    return [flat for group in engine.base.param_groups for flat in group["params"]]


def link_moments(engine: Engine) -> None:
    """Let DeepSpeed's functions for moments of single parameters find them, at ZeRO 1 and 2.

    By itself it does so after the first group's first step, when the other groups have none yet.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for flat, parameters in zip(flat_shares(engine), engine.learning, strict=True):
        lazy_init_hp_params_optimizer_state(parameters, flat, engine.base.state)


def _read(path: Path) -> torch.Tensor:
    """A whole weight or moment, mapped: only what is used is read."""
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return saved["param"] if isinstance(saved, dict) else saved
