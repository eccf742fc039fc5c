"""Memory of the host that a process takes until a stage's engine stands at ZeRO 3: shares, or whole models.

    python benchmarks/start_memory.py RECIPE [KEY=VALUE ...] [--processes 2]

`spread`: the main process reads the weights and the others get their shares, as training does. `whole`: every
process reads all of them. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
from common import save

GIB = 2**20  # of ru_maxrss, which counts KiB


def measure(way: str, path: str, overrides: list[str]) -> dict[str, object]:
    """What this process took for the recipe's first stage."""
    from lclm.model.build import components
    from lclm.recipe import load_recipe
    from lclm.train.engine import Engine, import_deepspeed
    from lclm.train.optim import embedding_ids, parameter_groups
    from lclm.train.processes import leave_processes, start_processes
    from lclm.train.stages import build_engine, prepare, start_model

    recipe = load_recipe(path, [*overrides, "engine.zero=3"])
    stage = next(iter(recipe.stages.values()))
    processes = start_processes(recipe.engine)
    import_deepspeed()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if way == "spread":
        engine, _ = build_engine(recipe, stage, None, processes)
    else:
        model = start_model(recipe, None)
        prepare(model, stage, recipe.engine.activation_checkpointing)
        groups = parameter_groups(components(model), stage.learn, embedding_ids(model))
        engine = Engine(
            model, groups, recipe.engine, processes, zero=3, clip=stage.clip, micro_batch=1, accumulation=1
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    count = sum(weight.ds_numel for weight in engine.model.parameters())
    found = {
        "way": way, "precision": recipe.engine.precision, "process": processes.rank,
        "processes": processes.size, "learns": ", ".join(stage.learn), "parameters": count,
        "fp32 GiB": count * 4 / 2**30, "peak GiB above start": peak / GIB,
    }  # fmt: skip
    every = processes.gather(found)
    processes.barrier()
    leave_processes()
    return {"rows": every}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--name", default="start_memory", help="name of the result files")
    parser.add_argument("--way", choices=["spread", "whole"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        found = measure(options.way, options.recipe, options.overrides)
        if os.environ["RANK"] == "0":
            Path(options.name).write_text(json.dumps(found))
        return
    rows = []
    for precision in options.precision:
        for way in ("whole", "spread"):
            out = Path(f"{options.name}.part.json").absolute()
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc-per-node={options.processes}", __file__, options.recipe, *options.overrides,
                f"engine.precision={precision}", "--way", way, "--name", str(out),
            ]  # fmt: skip
            subprocess.run(command, check=True)
            rows += json.loads(out.read_text())["rows"]
            out.unlink()
    notes = [
        "Largest resident memory of each process until the first stage's engine stands, less what it was "
        "with all libraries loaded. On a CPU the shares themselves are part of it.",
        "whole: every process reads the model. spread: the main process does, the others get their shares.",
    ]
    save(options.name, torch.device("cpu"), rows, notes)


if __name__ == "__main__":
    main()
