"""`lclm export`: the model of a run or checkpoint in a folder of its own, in any layout and precision."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lclm.checkpoint import RunFolder, changed, read_json, temporary, write_folder
from lclm.hub.shards import SHARD, Tell, Weight, list_weights, reader, size, write_shards, write_tensors
from lclm.settings import unknown_name
from lclm.stored import Read, StoredModel, aliases, open_stored

LAYOUTS = ("native", "released")
DTYPES = ("float32", "bfloat16")
Progress = Callable[[int, int], None]
"""Hears (bytes of weights written, bytes in all)."""


def stages_done(run: RunFolder) -> dict[str, Path]:
    """The exports of a run's complete stages, in their order: {stage: folder}."""
    folders = sorted((run.path / "stages").glob("[0-9]*-*"))
    return {
        folder.name.partition("-")[2]: folder / "export"
        for folder in folders
        if (folder / "done.json").is_file() and (folder / "export" / "config.json").is_file()
    }


def find_export(run: Path, stage: str | None = None) -> Path:
    """The export of `stage`, or of the last complete stage. ValueError when there is none."""
    if not run.is_dir():
        raise ValueError(f"{run}: there is no such folder; give the run_dir of a recipe that has run")
    done = stages_done(RunFolder(run))
    if not done:
        raise ValueError(
            f"{run}: no stage is complete yet; train it further, or export its newest checkpoint with "
            "`lclm export --step newest`"
        )
    if stage is None:
        return list(done.values())[-1]
    if stage not in done:
        raise ValueError(
            f"{run}: {unknown_name('complete stage', stage, done)}. Of a stage that is not complete, "
            "`--step newest` exports the newest checkpoint"
        )
    return done[stage]


def layout_of(folder: Path) -> str | None:
    """The layout of the checkpoint in a folder; None where there is none (a run, for example)."""
    if (folder / "config.json").is_file():
        return "native"
    return "released" if (folder / "model_config.json").is_file() else None


def export_run(
    run: Path,
    output: Path,
    *,
    stage: str | None = None,
    layout: str = "native",
    dtype: str | None = None,
    shard_size: int | str | None = None,
    weights: StoredModel | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the model and processor of a run, or of a checkpoint, into the new folder `output`; whole or not
    at all.

    run: a run folder, of which `stage` (the last complete one) is taken; or a checkpoint in either layout.
    layout: native (one folder that `from_pretrained` reads) | released (encoder, decoder, adapter). dtype:
    float32 | bfloat16; as stored if None. shard_size: of the files, bytes or as "4GB". weights: what is
    written instead, as lclm.train.weights reads it from a training checkpoint. The weights of one file are in
    memory at a time. Raises ValueError when there is nothing to export, it is damaged, `output` exists, the
    disk is full, or the layout cannot hold the model.
    """
    check_export(output, layout=layout, dtype=dtype, shard_size=shard_size)
    if weights is None:
        source = find_checkpoint(run, stage)
        if layout == layout_of(source) and dtype is None and shard_size is None and _complete(source):
            _whole_or_nothing(output, lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True))
            return output
        weights = open_stored(source)
    if dtype is not None:
        _convert(weights.model, getattr(torch, dtype))
    write = _write_native if layout == "native" else _write_released
    _whole_or_nothing(output, lambda folder: write(folder, weights, shard_size or SHARD, progress))
    return output


def check_export(
    output: Path,
    *,
    layout: str = "native",
    dtype: str | None = None,
    shard_size: int | str | None = None,
) -> None:
    """What can be wrong with `export_run`'s arguments alone. ValueError."""
    if layout not in LAYOUTS:
        raise ValueError(unknown_name("layout", layout, LAYOUTS))
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(unknown_name("dtype", dtype, DTYPES))
    if output.exists():
        raise ValueError(f"{output}: exists already; name a folder that does not, or remove it")
    if shard_size is not None and not _is_size(shard_size):
        raise ValueError(f"shard_size is {shard_size!r}; give a size such as 4GB or 500MB")


def _is_size(value: int | str) -> bool:
    return isinstance(value, int) or re.fullmatch(r"[1-9]\d*(\.\d+)?\s*[KMGT]B", value, re.I) is not None


def find_checkpoint(run: Path, stage: str | None = None) -> Path:
    """`run` itself if it is a checkpoint, else the export of a stage. ValueError when that is not what the
    stage wrote."""
    if layout_of(run) is not None:
        if stage is not None:
            raise ValueError(f"{run} is a checkpoint, not a run, and has no stages: leave --stage out")
        return run
    source = find_export(run, stage)
    damaged = changed(source, read_json(source.parent / "done.json").get("export", {}))
    if damaged:
        raise ValueError(
            f"{source}, the export of a complete stage, is damaged: {damaged}. Put it back "
            "from a copy, or train that stage again"
        )
    return source


def _complete(folder: Path) -> bool:
    """Whether a native checkpoint says what its weights are; those of older versions do not."""
    config = folder / "config.json"
    return not config.is_file() or "fingerprints" in read_json(config)


def _whole_or_nothing(output: Path, write: Callable[[Path], Any]) -> None:
    try:
        write_folder(output, write)
    except BaseException:
        shutil.rmtree(temporary(output), ignore_errors=True)
        raise


def _convert(model: Any, dtype: torch.dtype) -> None:
    """Give a stored model, and its configurations, the dtype in which it is to be written."""
    model.to(dtype)
    config = model.config
    config.dtype = config.encoder_config.dtype = config.decoder_config.dtype = dtype


def _counted(folder: Path, progress: Progress | None, *lists: list[Weight]) -> Tell:
    """What counts the bytes that are written. ValueError when the disk has no room for all of them."""
    total = sum(size(weights) for weights in lists)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OSError(f"the weights take {total / 2**20:,.0f} MiB")
    done = 0

    def tell(written: int) -> None:
        nonlocal done
        done += written
        if progress is not None:
            progress(done, total)

    tell(0)
    return tell


def _write_native(
    folder: Path, stored: StoredModel, shard_size: int | str, progress: Progress | None
) -> None:
    from lclm.model.fingerprint import Fingerprint
    from lclm.model.native import save_without_weights

    model, same, found, known = stored.model, aliases(stored.model), Fingerprint(), set()

    def read(name: str) -> torch.Tensor:
        value = stored.read(name)
        counts = next((other for other in same[name] if other.startswith("decoder.")), same[name][0])
        if counts not in known:
            known.add(counts)
            found.add(counts, value)
        return value

    weights = list_weights(model, read)
    tell = _counted(folder, progress, weights)
    write_shards(folder, weights, shard_size=shard_size, parameters=model.num_parameters(), tell=tell)
    model.config.dtype = model.dtype
    save_without_weights(model, folder, found.digests())
    stored.processor.save_pretrained(folder)


def _write_released(
    folder: Path, stored: StoredModel, shard_size: int | str, progress: Progress | None
) -> None:
    from lclm.model.layouts import ADAPTER, released_settings, write_marks, write_settings

    model = stored.model
    settings = released_settings(model.config)
    read, table = _with_brackets(stored), model.decoder.get_input_embeddings().weight
    parts = {
        name: list_weights(getattr(model, name), partial(_read_part, read, name))
        for name in ("encoder", "decoder")
    }
    adapter = [
        Weight(name, value.shape, value.dtype, reader(partial(_read_part, read, "adapter"), name, value))
        for name, value in model.adapter.state_dict().items()
    ]
    tell = _counted(folder, progress, *parts.values(), adapter)
    model.decoder.generation_config = model.generation_config
    for name, weights in parts.items():
        part = getattr(model, name)
        part.save_pretrained(folder / name, state_dict={})  # all but the weights
        count = part.num_parameters()
        write_shards(folder / name, weights, shard_size=shard_size, parameters=count, tell=tell)
    (folder / ADAPTER).parent.mkdir()
    write_tensors(folder / ADAPTER, adapter, None, tell)
    name = next(name for name, value in model.named_parameters() if value is table)
    own = stored.read(name)[list(model.brackets.ids)].to(table.dtype)
    write_marks(folder, own, stored.read("brackets.weight"))
    write_settings(folder, settings)
    stored.processor.save_pretrained(folder, layout="released")


def _read_part(read: Read, part: str, name: str) -> torch.Tensor:
    return read(f"{part}.{name}")


def _with_brackets(stored: StoredModel) -> Read:
    """Reads a model's weights with the brackets as rows of the decoder's embeddings."""
    model = stored.model
    table = model.decoder.get_input_embeddings().weight
    named = model.decoder.named_parameters(remove_duplicate=False)
    names = {f"decoder.{name}" for name, value in named if value is table}

    def read(name: str) -> torch.Tensor:
        value = stored.read(name)
        if name in names:
            value = value.clone()
            value[list(model.brackets.ids)] = stored.read("brackets.weight").to(value)
        return value

    return read
