"""What the benchmarks share: timing in turns, the machine's matmul rate, results as JSON and as a table."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def now(device: torch.device) -> float:
    """Seconds, after all work on the device is done.

    With one thread on a CPU these are the process's own CPU seconds, so that other work on a shared machine
    counts less; otherwise wall-clock seconds.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if by_cpu_time(device) else time.perf_counter()


def by_cpu_time(device: torch.device) -> bool:
    """Whether `now` counts CPU seconds."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def in_turns(
    work: dict[str, Callable[[], Any]], device: torch.device, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every piece of work in each of `rounds` rounds, one after another in each round.

    Taking turns lets a slow spell of the machine fall on all of them; compare medians, or rounds pairwise.
    """
    gc.collect()
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(warmup + rounds):
        for name, call in work.items():
            begin = now(device)
            call()
            if turn >= warmup:
                times[name].append(now(device) - begin)
    return times


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    low, _, high = statistics.quantiles(seconds, n=4)
    return {"median_ms": statistics.median(seconds) * 1e3, "low_ms": low * 1e3, "high_ms": high * 1e3}


class Matmul:
    """A large square matrix product, to be timed in turns with the rest: its rate is the floor's."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.size = 8192 if device.type == "cuda" else 768
        self.matrix = torch.randn(self.size, self.size, device=device, dtype=dtype)

    def __call__(self) -> torch.Tensor:
        return self.matrix @ self.matrix

    def rate(self, seconds: list[float]) -> float:
        """FLOPs a second, from the median."""
        return 2 * self.size**3 / statistics.median(seconds)


def block_weights(model: torch.nn.Module) -> int:
    """Entries of the matrices that multiply every token: all but embeddings, whose rows are looked up."""
    tables = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in tables)


def attention_flops(config: Any, lengths: list[int]) -> int:
    """FLOPs of scores and mixtures, forward, for causal examples of these lengths (half of the square)."""
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return sum(2 * length * length * width * config.num_hidden_layers for length in lengths)


def machine(device: torch.device) -> dict[str, Any]:
    """The machine's name and what ran on it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} ({name})"
    return {
        "machine": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": str(device),
        "python": platform.python_version(), "torch": torch.__version__,
        "clock": "CPU seconds of the process" if by_cpu_time(device) else "wall clock",
        "transformers": transformers.__version__, "date": date.today().isoformat(),
        "load_average": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def save(
    name: str, device: torch.device, rows: list[dict[str, Any]], notes: list[str], clock: str | None = None
) -> None:
    """Write `results/NAME.json` and the table `results/NAME.md`, and print the table.

    clock: what times were measured by, where it is not `now`.
    """
    facts = machine(device) | ({"clock": clock} if clock else {})
    RESULTS.mkdir(exist_ok=True)
    content = {"benchmark": name, **facts, "notes": notes, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    heads = list(
        dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict))
    )
    lines = [
        f"# {name}", "", f"{facts['machine']}, {facts['threads']} of {facts['cores']} cores, "
        f"device {facts['device']}, Python {facts['python']}, torch {facts['torch']}, "
        f"transformers {facts['transformers']}, {facts['date']}; "
        f"{facts['clock']}; load average {facts['load_average']}.",
        "", *[f"- {note}" for note in notes], "",
        "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads),
    ]  # fmt: skip
    lines += ["| " + " | ".join(_cell(row.get(head, "")) for head in heads) + " |" for row in rows]
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
