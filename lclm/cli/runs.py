"""Verbs of runs: train, plan, doctor, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lclm.cli.shared import Overrides, RecipePath, Run, app, no_loading_bars


@app.command(short_help="Train a recipe, or go on with it.")
def train(recipe_path: RecipePath, overrides: Overrides = None) -> None:
    """Train a recipe, or go on where it was interrupted: the same command does both.

    \b
    One process:         lclm train recipes/tiny.yaml
    Several on a machine: launch/torchrun.sh 2 recipes/tiny.yaml
    Other settings:      lclm train recipes/tiny.yaml run_dir=runs/mine train.log_every=5

    The run folder then holds the resolved recipe, checkpoints, metrics.jsonl, TensorBoard logs and the export
    of every stage. A run that is complete says so and changes nothing.

    Exit codes: 0 complete, 2 an error that a restart will not help, 75 stopped as asked (SIGTERM, SIGINT,
    SIGUSR1, a time limit), 76 another process was lost: after 75 and 76 the same command goes on.
    """
    from lclm.train.ends import Stop

    with Stop() as stop:
        from lclm.recipe import load_recipe

        loaded = load_recipe(recipe_path, overrides or [])
        from lclm.train.processes import leave_processes
        from lclm.train.trainer import train as run

        no_loading_bars(loaded.model.init_from, loaded.model.encoder.path, loaded.model.decoder.path)
        run(loaded, stop)
        leave_processes()


@app.command(short_help="What a recipe will cost on given machines.")
def plan(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpu: Annotated[
        str, typer.Option(help="h100, h200, a100-80, b200, cpu, or another with both options below.")
    ] = "h100",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs, and so processes, of each.")] = 8,
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of a GPU, in place of its own.")] = None,
    gpu_tflops: Annotated[float | None, typer.Option(help="Its dense peak in TFLOP/s, likewise.")] = None,
    efficiency: Annotated[float, typer.Option(help="Share of the peak that passes reach.")] = 0.4,
    network: Annotated[float, typer.Option(help="Gbit/s of a GPU to other nodes.")] = 400.0,
    storage: Annotated[float, typer.Option(help="GB/s to storage, all processes together.")] = 5.0,
    price: Annotated[float | None, typer.Option(help="Of one GPU-hour, in any currency.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the page as Markdown.")
    ] = None,
) -> None:
    """What a recipe will take on given machines: memory per GPU by part, FLOPs, time and GPU-hours, network,
    checkpoints, data; and which settings to change where it does not fit. Needs no weights, data or GPU.

    \b
      lclm plan recipes/0.6b-4b/16x.yaml --nodes 32 --gpu h100
      lclm plan recipes/0.6b-4b/4x.yaml engine.zero=3 --nodes 1 --gpu a100-80 --price 2.5 -o plan.md
    """
    from rich.console import Console

    from lclm.recipe import load_recipe

    if not 0 < efficiency <= 1 or min(network, storage) <= 0:
        raise ValueError("--efficiency must be in (0, 1], --network and --storage above 0")
    loaded = load_recipe(recipe_path, overrides or [])
    from lclm.train.planning.hardware import find_machine
    from lclm.train.planning.page import show, write
    from lclm.train.planning.plan import Cluster, make_plan

    machine = find_machine(gpu, gpu_memory, gpu_tflops)
    rates = (efficiency, network * 1e9 / 8, storage * 1e9)
    made = make_plan(loaded, Cluster(machine, nodes, gpus_per_node, *rates, price))
    console = Console()
    show(made, console if console.is_terminal else Console(width=150))
    if output is not None:
        write(made, output)
        typer.echo(f"written: {output}")


@app.command(short_help="Try everything that a run needs, on the machines that will run it.")
def doctor(recipe_path: RecipePath, overrides: Overrides = None) -> None:
    """Try what a run needs, on the machines that will run it; started as `lclm train` is, by any launcher.

    All processes have the same code, recipe, data and libraries; disk, host memory, shared memory, open
    files, clocks and GPUs suffice; all-reduce works, and how fast; the largest batch fits. Exit code 2 when
    something is wrong, with what, where and how to fix it. `lclm train` does the quick part: train.preflight.

    \b
      lclm doctor recipes/tiny.yaml
      python -m torch.distributed.run --nproc-per-node 8 -m lclm doctor recipes/0.6b-4b/16x.yaml
    """
    from lclm.recipe import load_recipe

    loaded = load_recipe(recipe_path, overrides or [])
    from lclm.train.doctor import doctor as examine
    from lclm.train.processes import leave_processes, start_processes

    no_loading_bars(loaded.model.init_from, loaded.model.encoder.path, loaded.model.decoder.path)
    processes = start_processes(loaded.engine)
    checked = examine(loaded, processes)
    leave_processes()
    if processes.main:
        for what, figure in checked.figures.items():
            typer.echo(f"{what}: {figure}")
    if checked.problems and processes.main:
        raise ValueError("\n".join(checked.problems))
    if checked.problems:
        raise typer.Exit(2)
    if processes.main:
        typer.echo("all is well")


@app.command(short_help="Write a page with the plots of a run.")
def report(run: Run) -> None:
    """Write a page with tables and plots of a run: report.html and report.md in the run folder.

    Works while a run is still going on. Example: lclm report runs/tiny
    """
    from lclm.eval.report import summary, write_report

    page = write_report(run)
    typer.echo(summary(run))
    typer.echo(f"\nreport: {page}")
