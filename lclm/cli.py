"""The `lclm` command. Each verb imports its own part when called, so that `--help` is instant."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, context_settings=HELP)
recipe = typer.Typer(no_args_is_help=True, rich_markup_mode=None, context_settings=HELP)
app.add_typer(data, name="data", help="Build, check and look at data sets.")
app.add_typer(recipe, name="recipe", help="Show and check recipes.")

RecipePath = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change, as in train.log_every=5."),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder (the recipe's run_dir).")]


@app.callback()
def lclm(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Latent Context Language Models: from raw text to a model that reads long contexts as latents.

    \b
      lclm data build recipes/data/stdlib.yaml       raw text -> shards
      lclm data inspect recipes/tiny.yaml            a sample as the model will read it
      lclm recipe show recipes/tiny.yaml             everything a run will do
      lclm plan recipes/0.6b-4b/16x.yaml --nodes 32  what a run will take
      lclm train recipes/tiny.yaml                   train, or go on where it stopped
      lclm report runs/tiny                          a page with plots
      lclm export runs/tiny -o my-model              a checkpoint that from_pretrained reads
      lclm generate my-model --memory book.txt --prompt "Who dies first?"
    """


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


@app.command(short_help="Write a checkpoint of a run.")
def export(
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; must not exist yet.")],
    stage: Annotated[str | None, typer.Option(help="The stage to export; the last that is complete.")] = None,
    layout: Annotated[str, typer.Option(help="native, or released (three folders).")] = "native",
) -> None:
    """Write a checkpoint of a run that `from_pretrained` reads: safetensors, configuration, tokenizers.

    \b
      lclm export runs/tiny -o my-model
      lclm export runs/tiny --stage joint -o my-model
      lclm export runs/0.6b-4b-16x --layout released -o my-model
    """
    from lclm.hub.export import export_run

    no_loading_bars(str(run))
    folder = export_run(run, output, stage=stage, layout=layout)
    typer.echo(
        f"exported: {folder}\ntry it:   lclm generate {folder} --memory README.md --prompt 'What is this?'"
    )


@app.command(short_help="Answer a prompt about documents read as latents.")
def generate(
    checkpoint: Annotated[str, typer.Argument(help="An exported folder, a released checkpoint or a Hub id.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The question; text after the documents.")
    ] = None,
    memory: Annotated[
        list[Path] | None,
        typer.Option(
            "--memory", "-m", help="A text file to be read as latents; - is standard input; repeatable."
        ),
    ] = None,
    ratio: Annotated[int | None, typer.Option(help="Tokens per latent; the checkpoint's default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more varied.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    no_memory: Annotated[
        bool, typer.Option("--no-memory", help="Also answer without the documents.")
    ] = False,
    questions: Annotated[
        str | None,
        typer.Option(
            help="Instead of a prompt: ask what this conversations data set asks, and show the truth."
        ),
    ] = None,
) -> None:
    """Answer a prompt about documents that the model reads as latents only. The answer streams to standard
    output; what was read goes to standard error.

    \b
      lclm generate my-model --memory report.txt --prompt "What was the profit?"
      lclm generate my-model -m a.txt -m b.txt --ratio 8 -p "How do they differ?"
      man ls | lclm generate my-model -m - -p "Which option sorts by size?"
      lclm generate runs/tiny/export --questions data/stdlib/conversations/heldout
    """
    from lclm.answer import answer, ask

    no_loading_bars(checkpoint)
    if questions is not None and prompt is None:
        ask(checkpoint, questions)
    elif prompt is not None and questions is None:
        answer(
            checkpoint,
            prompt,
            memory or [],
            ratio=ratio,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            compare=no_memory,
        )
    else:
        raise ValueError("give one of --prompt and --questions")


@recipe.command("show", short_help="Print the resolved recipe and count parameters.")
def recipe_show(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    parameters: Annotated[bool, typer.Option(help="Also count parameters, on meta tensors.")] = True,
) -> None:
    """Print the resolved recipe, every setting written out, and the parameters of each component.

    \b
      lclm recipe show recipes/0.6b-4b/16x.yaml
      lclm recipe show recipes/tiny.yaml model.ratios=[4] --no-parameters
    """
    from lclm.recipe import load_recipe

    loaded = load_recipe(recipe_path, overrides or [])
    typer.echo(loaded.to_yaml(), nl=False)
    if parameters:
        typer.echo("\n# parameters")
        try:
            counts = count_parameters(loaded.model)
        except ValueError as error:
            typer.echo(f"# not counted: {error}")
            return
        for name, count in {**counts, "total": sum(counts.values())}.items():
            typer.echo(f"# {name:<10}{count:>16,}")


def count_parameters(settings: Any) -> dict[str, int]:
    """Parameters of each component of a recipe's model, from meta tensors."""
    from lclm.model.build import build_model, components

    model = build_model(settings, device="meta")
    return {name: sum(p.numel() for _, p in found) for name, found in components(model).items()}


@recipe.command("validate", short_help="Check recipes without running them.")
def recipe_validate(
    recipe_paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE", help="Recipes; all shipped ones if none is named."),
    ] = None,
) -> None:
    """Check recipes without running them: keys, values, and what must hold between parts.

    \b
      lclm recipe validate my-recipe.yaml
      lclm recipe validate
    """
    from lclm.recipe import load_recipe, shipped

    for path in recipe_paths or [str(p) for p in shipped()]:
        load_recipe(path)
        typer.echo(f"valid: {path}")


@data.command("build", short_help="Raw text to shards.")
def data_build(
    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE", help="A pipeline recipe, see recipes/data.")],
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Build again although it is up to date.")] = False,
) -> None:
    """Build data sets: read the sources, filter, deduplicate, split, and write webdataset shards.

    Interrupted, the same command goes on; complete and up to date, it says so and changes nothing.

    \b
      lclm data build recipes/data/stdlib.yaml
      lclm data build recipes/data/stdlib.yaml out=/scratch/stdlib executor.workers=8
    """
    from data_pipelines.build import build

    typer.echo(build(pipeline, overrides or [], fresh=fresh))


@data.command("verify", short_help="Check a data set against its checksums.")
def data_verify(
    path: Annotated[str, typer.Argument(help="A built data set, or one split of it; folder or fsspec URL.")],
) -> None:
    """Check every shard and index of a data set against its manifest's checksums.

    Example: lclm data verify data/stdlib
    """
    from lclm.data.verify import verify

    typer.echo(verify(path))


@data.command("inspect", short_help="Show samples as the model will read them.")
def data_inspect(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    task: Annotated[
        str | None, typer.Option(help="One task of the recipe; all in the mixture if left out.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="How many examples of each task.")] = 1,
) -> None:
    """Show samples the way the model will read them: what is compressed, the slots, and where loss falls.

    \b
      lclm data inspect recipes/tiny.yaml
      lclm data inspect recipes/tiny.yaml --task chat -n 3
    """
    from rich.console import Console

    from lclm.data.inspect import inspect
    from lclm.recipe import load_recipe

    loaded = load_recipe(recipe_path, overrides or [])
    console = Console(highlight=False)
    for shown in inspect(loaded.data, **reading(loaded), task=task, samples=samples):
        console.print(shown)


@data.command("budget", short_help="Propose the shape of a pack.")
def data_budget(
    recipe_path: RecipePath,
    overrides: Overrides = None,
) -> None:
    """Measure how full packs get in each stage, and propose encoder rows and latents for their positions.

    \b
      lclm data budget recipes/tiny.yaml
      lclm data budget recipes/smollm2.yaml data.pack.positions=8192
    """
    from lclm.data.budget import budget
    from lclm.recipe import load_recipe

    loaded = load_recipe(recipe_path, overrides or [])
    stages = {name: loaded.stage_data(name) for name in loaded.stages}
    typer.echo(budget(loaded.data, **reading(loaded), stages=stages))


def reading(loaded: Any) -> dict[str, Any]:
    """How a recipe's model reads text: its tokenizers, geometry, ratios and the seed of the data's order."""
    from lclm.model.build import build_config, build_processor

    config = build_config(loaded.model)
    return {
        "tokenizer": build_processor(loaded.model).spans,
        "geometry": config.geometry(),
        "ratios": config.ratios,
        "seed": loaded.seed,
    }


@data.command("tokenizer", short_help="Train a tokenizer on documents.")
def data_tokenizer(
    documents: Annotated[
        str, typer.Argument(help="A split of documents to learn from; folder or fsspec URL.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; must not exist yet.")],
    overrides: Overrides = None,
) -> None:
    """Train a tokenizer for a model from scratch: kind=bpe, sentencepiece or bytes, with the memory marks and
    chat controls. (`lclm data build` makes one too, where the pipeline recipe has `tokenizer:`.)

    \b
      lclm data tokenizer data/stdlib/documents/train -o my-tokenizer kind=bpe vocabulary=8192
      lclm data tokenizer data/stdlib/documents/train -o my-tokenizer kind=sentencepiece vocabulary=8192
    """
    from data_pipelines.tokenizers import TokenizerSettings, make_tokenizer
    from lclm.data.shards import DataSet
    from lclm.settings import build_settings, parse_overrides

    settings = build_settings(TokenizerSettings, [("command line", parse_overrides(overrides or []))])
    if output.exists():
        raise ValueError(f"{output}: exists already; name a folder that does not, or remove it")
    found = DataSet.open(documents)
    tokens = make_tokenizer(settings, (sample.text for sample in found if sample.text), output)
    typer.echo(f"{output}: {tokens:,} tokens")


def no_loading_bars(*sources: str | None) -> None:
    """Switch off bars for loading and saving weights, unless some are to be fetched from the hub."""
    if all(source is None or source.startswith("package:") or Path(source).exists() for source in sources):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def show_error(error: BaseException) -> None:
    """One screen that says what went wrong, without a traceback; a line on processes other than the first."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        print(f"[process {rank}] {error}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    text = str(error)
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        text = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else text
    Console(stderr=True).print(
        Panel(
            Text(text or type(error).__name__),
            title="error",
            title_align="left",
            subtitle="--debug shows the traceback",
            subtitle_align="right",
            border_style="red",
        )
    )


def main(arguments: list[str] | None = None) -> Any:
    """Run the command. A user's or the machine's error ends it with exit code 2 and without a traceback.

    Codes of `lclm train` are those of lclm.train.ends.
    """
    from lclm.train import ends

    end = cast("Callable[[int], NoReturn]", ends.end if arguments is None else sys.exit)
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        return app(args=[argument for argument in arguments if argument != "--debug"], prog_name="lclm")
    except ends.Requeue as stopped:
        reason = str(stopped).partition("\n")[0]  # a library in which a signal was met may have added lines
        typer.echo(f"stopped: {reason}; the same command goes on")
        end(ends.REQUEUE)
    except ends.Lost as lost:
        show_error(lost)
        end(ends.LOST)
    except (ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
            end(1)
        show_error(error)
        end(ends.WRONG)
    except KeyboardInterrupt:
        end(130)
    except Exception:
        traceback.print_exc()
        end(1)
