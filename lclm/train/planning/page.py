"""A plan as a page: tables and sentences, for the terminal and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lclm.train.planning.hardware import GIB
from lclm.train.planning.plan import Plan, StagePlan
from lclm.train.planning.rehearsal import PARTS

CHOICES = {"none": "none", "decoder": "decoder", "encoder": "encoder", "both": "encoder and decoder"}


@dataclass(frozen=True)
class Table:
    """A table of strings; the first column names the rows."""

    title: str
    head: list[str]
    rows: list[list[str]]


Block = Table | str


def page(plan: Plan) -> list[Block]:
    """The plan's tables and paragraphs in reading order."""
    return [
        summary(plan),
        _parameters(plan),
        _time(plan),
        _memory(plan),
        _choices(plan),
        _flops(plan),
        _network(plan),
        _storage(plan),
        *_to_do(plan),
        "Reckoned with:\n\n" + "\n".join(f"- {line}" for line in [*_assumptions(plan), *plan.notes]),
    ]


def markdown(plan: Plan) -> str:
    """The page as Markdown."""
    parts = [f"# Plan of {plan.recipe.name}"]
    for block in page(plan):
        if isinstance(block, str):
            parts.append(block)
            continue
        lines = [f"## {block.title}", "", "| " + " | ".join(block.head) + " |"]
        lines.append("|---" + "|---:" * (len(block.head) - 1) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in block.rows]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def show(plan: Plan, console: Any) -> None:
    """Print the page to a rich console."""
    from rich.table import Table as RichTable

    console.print(f"[bold]Plan of {plan.recipe.name}[/bold]\n")
    for block in page(plan):
        if isinstance(block, str):
            console.print(block, markup=False, highlight=False)
        else:
            table = RichTable(title=block.title, title_justify="left", title_style="bold")
            for number, name in enumerate(block.head):
                table.add_column(name, justify="right" if number else "left")
            for row in block.rows:
                table.add_row(*row)
            console.print(table)
        console.print()


def write(plan: Plan, path: Path) -> None:
    """Write the page as Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(plan), encoding="utf-8")


def summary(plan: Plan) -> str:
    """The answer in a few sentences."""
    cluster, machine = plan.cluster, plan.cluster.machine
    tokens = sum(stage.steps * stage.tokens for stage in plan.stages)
    text = (
        f"{cluster.nodes} x {cluster.per_node} {machine.name} ({cluster.processes} processes): "
        f"{sum(stage.steps for stage in plan.stages):,} steps over {number(tokens)} source tokens take "
        f"{duration(plan.hours)}, {plan.machine_hours:,.0f} GPU-hours"
    )
    if cluster.price is not None:
        text += f", {plan.machine_hours * cluster.price:,.0f} at {cluster.price:g} an hour"
    worst = max(plan.stages, key=lambda stage: stage.memory.total)
    verdict = "It fits" if plan.fits else "It does not fit"
    return (
        f"{text}. {verdict}: stage {worst.name} takes {gib(worst.memory.total)} of "
        f"{gib(machine.usable)} usable. Validation, probes, saving and restarts come on top."
    )


def _parameters(plan: Plan) -> Table:
    counts = plan.counts | {"total": sum(plan.counts.values())}
    rows = [
        [
            part,
            f"{count:,}",
            ", ".join(s.name for s in plan.stages if part in plan.recipe.stages[s.name].learn),
        ]
        for part, count in counts.items()
    ]
    return Table("Parameters", ["component", "parameters", "learns in"], rows)


def _time(plan: Plan) -> Table:
    rows = []
    for stage in plan.stages:
        peak = plan.cluster.machine.peak(plan.recipe.engine.precision)
        rows.append(
            [
                stage.name,
                f"{stage.steps:,}",
                number(stage.tokens),
                f"{stage.filling.source_tokens:,.0f}",
                f"{stage.seconds:.3g} s",
                f"{sum(stage.flops.values()) / stage.seconds / peak:.0%}",
                number(stage.tokens / stage.seconds),
                duration(stage.hours),
                f"{stage.hours * plan.cluster.processes:,.0f}",
            ]
        )
    head = [
        *("stage", "steps", "source tokens a step", "tokens a pack", "step", "MFU", "tokens/s", "time"),
        "GPU-hours",
    ]
    return Table("Time", head, rows)


def _memory(plan: Plan) -> Table:
    names = list(dict.fromkeys(part for stage in plan.stages for part in stage.memory.parts))
    usable = plan.cluster.machine.usable
    rows = [
        [
            f"{stage.name} (ZeRO {stage.zero})",
            *(gib(stage.memory.parts.get(name, 0.0)) for name in names),
            gib(stage.memory.total),
            f"{stage.memory.total / usable:.0%}" + ("" if stage.memory.total <= usable else " !"),
            gib(stage.memory.host),
        ]
        for stage in plan.stages
    ]
    return Table(
        f"Memory per GPU at the worst moment of a step, {gib(usable)} usable",
        ["stage", *names, "total", "used", "host"],
        rows,
    )


def _choices(plan: Plan) -> Table:
    rows = [
        [stage.name, *(gib(stage.choices[key]) if key in stage.choices else "same" for key in CHOICES)]
        for stage in plan.stages
    ]
    return Table(
        "Memory per GPU by activation checkpointing", ["stage", *(f"of {v}" for v in CHOICES.values())], rows
    )


def _flops(plan: Plan) -> Table:
    rows = [
        [
            stage.name,
            *(number(stage.flops[part]) for part in PARTS),
            number(sum(stage.flops.values())),
            number(sum(stage.recomputed.values())),
        ]
        for stage in plan.stages
    ]
    return Table(
        "FLOPs per step and GPU, attention included",
        ["stage", *PARTS, "model", "recomputed on top"],
        rows,
    )


def _network(plan: Plan) -> Table:
    rows = [
        [
            stage.name,
            gib(stage.traffic.reduced),
            gib(stage.traffic.gathered),
            f"{stage.traffic.seconds:.3g} s",
            f"{stage.compute:.3g} s",
            f"{stage.seconds - stage.compute:.3g} s",
        ]
        for stage in plan.stages
    ]
    return Table(
        f"Network per step and GPU, at {plan.cluster.bandwidth / 1e9:.3g} GB/s",
        ["stage", "gradients sent", "parameters sent", "takes", "passes take", "added to the step"],
        rows,
    )


def _storage(plan: Plan) -> Table:
    train, speed = plan.recipe.train, plan.cluster.storage
    rows = []
    for stage in plan.stages:
        every = (train.save_every_steps or 0) * stage.seconds
        if train.save_every_minutes:
            every = min(every or float("inf"), train.save_every_minutes * 60)
        seconds = stage.checkpoint / speed
        share = f"{seconds / every:.2%}" if every else "-"
        rows.append([stage.name, gib(stage.checkpoint), f"{seconds:.3g} s", share])
    return Table(
        f"Checkpoints, at {speed / 1e9:.3g} GB/s for all processes",
        ["stage", "size", "takes", "of the time, if steps waited"],
        rows,
    )


def _to_do(plan: Plan) -> list[str]:
    lines = [f"Change: {problem}." for problem in plan.problems]
    for stage in plan.stages:
        lines += _proposal(stage, plan.cluster.machine.usable)
    lines += _lighter(plan)
    lines.append(
        f"Disk: {gib(plan.disk)} for checkpoints (train.keep={plan.recipe.train.keep} and the one being "
        f"written) and exports. Data: at least {plan.shards:,} shards of each source, so that no two "
        f"lanes or background processes wait for one; {_sources(plan)}. Lanes: {plan.lanes}, "
        f"{plan.accumulation} micro-batches a step and process."
    )
    if not plan.recipe.model.init_from:
        host = 4.0 * sum(plan.counts.values()) * plan.cluster.per_node
        lines.append(
            f"Host memory: a node's processes build the model in fp32 first, {gib(host)} together, and twice "
            "that for what learns in bf16."
        )
    return lines


def _proposal(stage: StagePlan, usable: float) -> list[str]:
    proposal = stage.proposal
    if proposal is None:
        return []
    if not proposal.fits:
        return [
            f"Change: stage {stage.name} does not fit whatever is set: {', '.join(proposal.settings)} still "
            f"take {gib(proposal.memory)} of {gib(usable)}; use more or larger GPUs."
        ]
    return [
        f"Change: stage {stage.name} takes {gib(stage.memory.total)} of {gib(usable)}. Set "
        f"{' '.join(proposal.settings)}: it then takes {gib(proposal.memory)} (planned again)."
    ]


def _lighter(plan: Plan) -> list[str]:
    """Less recomputation that fits in every stage, where the recipe recomputes more."""
    chosen, usable = plan.recipe.engine.activation_checkpointing, plan.cluster.machine.usable
    for key, encoder, decoder in (("none", False, False), ("encoder", True, False), ("decoder", False, True)):
        fewer = (encoder, decoder) != (chosen.encoder, chosen.decoder)
        if encoder > chosen.encoder or decoder > chosen.decoder or not fewer:
            continue
        most = max(
            stage.choices.get(key, stage.choices["decoder" if decoder else "none"]) for stage in plan.stages
        )
        if most <= usable:
            changes = [
                f"engine.activation_checkpointing.{part}=false"
                for part, kept in (("encoder", encoder), ("decoder", decoder))
                if getattr(chosen, part) and not kept
            ]
            saved = sum(_saved(stage, encoder, decoder) * stage.steps for stage in plan.stages)
            spent = sum((sum(s.flops.values()) + sum(s.recomputed.values())) * s.steps for s in plan.stages)
            return [
                f"Room: {' '.join(changes)} fits every stage ({gib(most)} at most) and saves "
                f"{saved / spent:.0%} of the FLOPs."
            ]
    return []


def _saved(stage: StagePlan, encoder: bool, decoder: bool) -> float:
    kept = {"encoder": encoder, "decoder": decoder}
    return sum(stage.recomputed[part] for part, keeps in kept.items() if not keeps)


def _sources(plan: Plan) -> str:
    """Source tokens that the stages read of each source."""
    read: dict[str, float] = {}
    for stage in plan.stages:
        mixture = plan.recipe.stage_data(stage.name).mixture
        for name, share in mixture.items():
            source = plan.recipe.data.tasks[name].source
            part = share / sum(mixture.values()) * stage.steps * stage.tokens
            read[source] = read.get(source, 0.0) + part
    return "the run reads " + ", ".join(f"{number(n)} tokens of {name}" for name, n in read.items())


def _assumptions(plan: Plan) -> list[str]:
    cluster, machine = plan.cluster, plan.cluster.machine
    return [
        f"{cluster.efficiency:.0%} of {number(machine.peak(plan.recipe.engine.precision))}FLOP/s, "
        "recomputation included",
        f"{gib(machine.memory)} a GPU, of which {gib(machine.reserve)} go to driver and libraries and "
        f"{machine.spare:.0%} of the rest cannot be filled",
        "gradients of ZeRO 2 and 3 travel behind the passes, all else after them",
    ]


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 20 else f"{size / 2**20:,.0f} MiB" if size else "-"


def number(value: float) -> str:
    """With a prefix: 1.2 T."""
    for size, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g} "


def duration(hours: float) -> str:
    """Days, hours or minutes."""
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
