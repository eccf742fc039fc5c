"""`lclm export`: a checkpoint of a run, in a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from lclm.checkpoint import RunFolder, write_folder
from lclm.settings import unknown_name

LAYOUTS = ("native", "released")


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
        raise ValueError(f"{run}: no stage is complete yet, so there is nothing to export; train it further")
    if stage is None:
        return list(done.values())[-1]
    if stage not in done:
        raise ValueError(f"{run}: {unknown_name('complete stage', stage, done)}")
    return done[stage]


def export_run(run: Path, output: Path, *, stage: str | None = None, layout: str = "native") -> Path:
    """Write the model and processor of a run into the new folder `output`; whole or not at all.

    layout: native (one folder that `from_pretrained` reads) | released (encoder, decoder, adapter). Raises
    ValueError when the run has no such export, `output` exists, or the layout cannot hold the model.
    """
    if layout not in LAYOUTS:
        raise ValueError(unknown_name("layout", layout, LAYOUTS))
    if output.exists():
        raise ValueError(f"{output}: exists already; name a folder that does not, or remove it")
    source = find_export(run, stage)
    if layout == "native":
        write_folder(output, lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True))
    else:
        from lclm.model import LCLMForConditionalGeneration, LCLMProcessor

        model = LCLMForConditionalGeneration.from_pretrained(source, dtype="auto")
        processor = LCLMProcessor.from_pretrained(source)

        def write(folder: Path) -> None:
            model.save_pretrained(folder, layout=layout)
            processor.save_pretrained(folder, layout=layout)

        write_folder(output, write)
    return output
