"""Training steps of the released sizes on one device: attention kernels in turns, against a plain loop.

Random weights and tokens: it needs no network, no data and no checkpoint. `--quick` is the same program at
toy size, for any machine.

    python benchmarks/step_at_size.py --stages adapter encoder                # one H100
    python benchmarks/step_at_size.py --stages joint sft                      # one H200
    python benchmarks/step_at_size.py --stages joint --offload                # one H100, optimizer on the CPU
    python benchmarks/step_at_size.py --quick
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Matmul, attention_flops, in_turns, save, spread
from workload import SPECIAL, Plain, Size, check_equal, make_rows, packed, source_tokens

from lclm.model import LCLMConfig, LCLMForConditionalGeneration
from lclm.model.attention import require
from lclm.model.build import components
from lclm.model.spans import Example, Geometry
from lclm.recipe import load_recipe
from lclm.train.metrics import step_flops
from lclm.train.optim import embedding_ids, parameter_groups
from lclm.train.settings import (
    ActivationCheckpointing,
    CompileSettings,
    EngineSettings,
    StageSettings,
)
from lclm.train.stages import compile_blocks, prepare

ROOT = Path(__file__).resolve().parent.parent
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 FLOPs a second by what the device's name holds (makers' data sheets, SXM)."""
TOY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
       "head_dim": 16, "intermediate_size": 128, "vocab_size": 512}  # fmt: skip


def size_of(recipe: Any, quick: bool) -> Size:
    """The recipe's model and pack, or the same in small."""
    encoder, decoder = dict(recipe.model.encoder.config), dict(recipe.model.decoder.config)
    pack, window = recipe.data.pack, recipe.model.window
    size = Size(
        recipe.name, encoder, (recipe.model.ratio,), window, 1, pack.positions, pack.rows, 64, 4096,
        decoder=decoder,
    )  # fmt: skip
    if not quick:
        return size
    encoder, decoder = encoder | TOY, decoder | TOY
    return replace(
        size, name="toy", layers=encoder, decoder=decoder, window=128, positions=512, encoder_rows=4,
        min_span=16, max_span=256,
    )  # fmt: skip


def make_model(size: Size, device: torch.device, dtype: torch.dtype) -> LCLMForConditionalGeneration:
    """Random weights, made on the device in the dtype they stay in; the same every time."""
    config = LCLMConfig(
        encoder_config=dict(size.layers), decoder_config=dict(size.decoder or size.layers),
        ratio=size.ratios[0], ratios=list(size.ratios), window=size.window, encoder_pad_id=3,
        encoder_marker_id=3, **SPECIAL,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with device:
            return LCLMForConditionalGeneration(config).train()
    finally:
        torch.set_default_dtype(before)


class PlainUpdate:
    """bf16 weights with fp32 masters and AdamW in plain torch: the plain loop's update, and ours without
    DeepSpeed."""

    name = "plain torch"

    def __init__(self, model: torch.nn.Module, groups: list[dict[str, Any]]) -> None:
        self.model = model
        self.weights = [weight for group in groups for weight in group["params"]]
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-6, fused=True)

    def step(self, loss: Callable[[], torch.Tensor]) -> float:
        """One whole step on what `loss()` gives; the loss."""
        value = loss()
        value.backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return value.item()

    def call(self, **batch: Any) -> torch.Tensor:
        """The model's loss."""
        return self.model(**batch).loss

    def close(self) -> None:
        """Free what it holds."""
        self.optimizer.state.clear()


class DeepSpeedUpdate:
    """The trainer's own engine and guard."""

    def __init__(self, model: Any, groups: list[dict[str, Any]], settings: EngineSettings, clip: float):
        from lclm.train.engine import Engine
        from lclm.train.guard import Guard
        from lclm.train.processes import start_processes

        self.name = f"DeepSpeed, ZeRO {settings.zero}" + (", offload" if settings.offload_optimizer else "")
        self.engine = Engine(
            model, groups, settings, start_processes(settings), zero=settings.zero, clip=clip, micro_batch=1,
            accumulation=1,
        )  # fmt: skip
        self.engine.apply_settings({group["name"]: 1e-6 for group in self.engine.settings})
        self.guard, self.model = Guard(self.engine, clip, 3), self.engine.model

    def step(self, loss: Callable[[], torch.Tensor]) -> float:
        """One whole step on what `loss()` gives; the loss."""
        self.guard.start_step(watch_norms=False)
        value = loss()
        self.engine.deepspeed.backward(value)
        self.guard.before_step()
        self.engine.deepspeed.step()
        return value.item()

    def call(self, **batch: Any) -> torch.Tensor:
        """The model's loss, through the engine."""
        return self.engine.deepspeed(**batch).loss

    def close(self) -> None:
        """Free what it holds."""
        self.engine.close()


def useful_flops(model: Any, rows: list[list[Example]], geometry: Geometry, window: int) -> float:
    """FLOPs that a step of this stage needs: real tokens, attention included, nothing recomputed.

    Matrices: two a weight forward, two where gradients pass, two where it learns. Attention's products:
    thrice the forward pass where gradients pass, else once.
    """
    examples = [example for row in rows for example in row]
    memories = [span for e in examples for span in e.spans if span.kind == "memory"]
    windows = [min(window, len(s.ids) - start) for s in memories for start in range(0, len(s.ids), window)]
    sizes = [geometry.size(example) for example in examples]
    counts = {
        "rows": sum(windows),
        "latents": sum(size.latents for size in sizes),
        "positions": sum(size.positions for size in sizes),
        "loss_tokens": sum(len(span.ids) for e in examples for span in e.spans if span.loss),
    }
    per_unit = step_flops(model)
    passes = 3 if any(weight.requires_grad for weight in model.encoder.parameters()) else 1
    attention = passes * attention_flops(model.encoder.config, windows)
    attention += 3 * attention_flops(model.decoder.config, [size.positions for size in sizes])
    return attention + sum(per_unit[name] * count for name, count in counts.items())


def peak_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOPs a second that utilisation is a share of, where the number is from)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for part, rate in PEAK.items():
        if part in name and dtype == torch.bfloat16:
            return rate, f"the data sheet of {part}"
    matmul = Matmul(device, dtype)
    times = in_turns({"matmul": matmul}, device, 5)["matmul"]
    return matmul.rate(times), f"a {matmul.size} x {matmul.size} matrix product, measured"


def peak_gib(device: torch.device, call: Callable[[], Any]) -> float | str:
    """GiB allocated at most during `call`; measured on CUDA only."""
    if device.type != "cuda":
        call()
        return "not on a CPU"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) / 2**30


def prepared(
    size: Size, stage: StageSettings, options: Any, device: torch.device, dtype: torch.dtype
) -> tuple[Any, list[dict[str, Any]]]:
    """(model as the stage trains it, its parameter groups)."""
    model = make_model(size, device, dtype)
    prepare(model, stage, ActivationCheckpointing(*(name in options.recompute for name in PARTS)))
    return model, parameter_groups(components(model), stage.learn, embedding_ids(model))


PARTS = ("encoder", "decoder")


def use(model: Any, attention: str) -> None:
    """Have encoder and decoder compute attention so from now on."""
    for name in PARTS:
        getattr(model, name).set_attn_implementation(attention)


def measure_ours(
    size: Size, stage: StageSettings, options: Any, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A row for each attention kernel; their steps take turns on one model and one batch."""
    model, groups = prepared(size, stage, options, device, dtype)
    compile_blocks(model, CompileSettings(*(name in options.compile for name in PARTS)))
    geometry = model.config.geometry()
    rows = make_rows(size, geometry, np.random.default_rng(0))
    batch = packed(rows, size, geometry, device)
    flops = useful_flops(model, rows, geometry, size.window)
    settings = EngineSettings(
        zero=options.zero, precision="bf16" if dtype == torch.bfloat16 else "fp32",
        offload_optimizer=options.offload,
    )  # fmt: skip
    deepspeed = importlib.util.find_spec("deepspeed") is not None and not options.no_deepspeed
    update: Any = DeepSpeedUpdate(model, groups, settings, 1.0) if deepspeed else PlainUpdate(model, groups)
    losses: dict[str, float] = {}
    memory: dict[str, Any] = {}

    def step(kernel: str) -> None:
        use(model, kernel)
        losses.setdefault(kernel, update.step(lambda: update.call(**batch)))

    work: dict[str, Callable[[], Any]] = {}
    for kernel in options.attention:
        try:
            step(kernel)
            memory[kernel] = peak_gib(device, partial(step, kernel))
            work[kernel] = partial(step, kernel)
        except torch.OutOfMemoryError:  # leaves an engine in the middle of a step: no more with this one
            memory[kernel] = "out of memory"
            work.clear()
            break
    times = in_turns(work, device, options.rounds) if work else {}
    facts = {
        "update": update.name, "positions": int(batch["labels"].shape[1]),
        "source tokens": source_tokens(rows), "TFLOPs": flops / 1e12,
    }  # fmt: skip
    found = [
        {"loop": "lclm", "attention": kernel, **facts, "loss": losses.get(kernel, "none"),
         "peak GiB": memory[kernel], "seconds": times.get(kernel)}
        for kernel in memory
    ]  # fmt: skip
    update.close()
    return found


def measure_plain(
    size: Size, stage: StageSettings, options: Any, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The row of the plain loop: same weights, examples, stage and recomputation; sdpa; plain torch's
    update."""
    model, groups = prepared(size, stage, options, device, dtype)
    geometry = model.config.geometry()
    rows = make_rows(size, geometry, np.random.default_rng(0))
    plain, update = Plain(model, rows, size), PlainUpdate(model, groups)
    row = {
        "loop": "plain", "attention": "sdpa", "update": update.name, "positions": "padded",
        "source tokens": source_tokens(rows),
        "TFLOPs": useful_flops(model, rows, geometry, size.window) / 1e12,
    }  # fmt: skip
    try:
        row["loss"] = update.step(plain.loss)
        row["peak GiB"] = peak_gib(device, lambda: update.step(plain.loss))
        row["seconds"] = in_turns({"plain": lambda: update.step(plain.loss)}, device, options.rounds)["plain"]
    except torch.OutOfMemoryError:
        row |= {"loss": "none", "peak GiB": "out of memory", "seconds": None}
    update.close()
    return row


def finish(row: dict[str, Any], stage: str, size: Size, peak: float) -> dict[str, Any]:
    """A row of the table from what was measured."""
    times = row.pop("seconds")
    row = {"model": size.name, "stage": stage, **row}
    if not times:
        return row
    middle = statistics.median(times)
    row |= {"step ms": middle * 1e3, "tokens/s": row["source tokens"] / middle}
    return row | {"MFU %": 100 * row["TFLOPs"] * 1e12 / middle / peak, "quartiles": spread(times)}


def available(size: Size, quick: bool) -> list[str]:
    """Attention kernels that this machine can train this model with, the most frugal first.

    Without flex_attention, which has no backward pass on a CPU; eager at toy size only, since at 16,384
    positions its scores alone take tens of GiB.
    """
    config = LCLMConfig(encoder_config=dict(size.layers), decoder_config=dict(size.decoder or size.layers))
    found = []
    for name in ("varlen", "flash_attention_2", "sdpa", *(("eager",) if quick else ())):
        try:
            found.append(require(name, config.encoder_config, config.decoder_config))
        except ValueError as problem:
            print(f"left out: {problem}", flush=True)
    return found


def check_mathematics(size: Size, device: torch.device) -> None:
    """Ours and the plain loop have equal losses and gradients; in fp32, at whatever size is given."""
    model = make_model(size, device, torch.float32)
    geometry = model.config.geometry()
    rows = make_rows(size, geometry, np.random.default_rng(0))
    check_equal(model, Plain(model, rows, size), packed(rows, size, geometry, device))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default=str(ROOT / "recipes/0.6b-4b/16x.yaml"))
    parser.add_argument("--stages", nargs="+", default=["adapter", "encoder"])
    parser.add_argument("--attention", nargs="+", help="kernels to compare; all that this machine has")
    parser.add_argument("--zero", type=int, default=2)
    parser.add_argument("--offload", action="store_true", help="optimizer on the CPU, at ZeRO 3")
    parser.add_argument("--no-deepspeed", action="store_true")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain loop out")
    parser.add_argument("--compile", nargs="*", default=[], choices=PARTS)
    parser.add_argument("--recompute", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="toy size, for a test of the program")
    parser.add_argument("--name", default="step_at_size", help="name of the result files")
    options = parser.parse_args()
    options.zero = 3 if options.offload else options.zero
    return options


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    recipe = load_recipe(options.recipe, validate=False)
    size = size_of(recipe, options.quick)
    small = size_of(recipe, True)
    check_mathematics(small, device)
    options.attention = options.attention or available(size, options.quick)
    peak, source = peak_rate(device, dtype)
    found = []
    for name in options.stages:
        rows = measure_ours(size, recipe.stages[name], options, device, dtype)
        free(device)
        if not options.no_plain:
            rows.append(measure_plain(size, recipe.stages[name], options, device, dtype))
            free(device)
        found += [finish(row, name, size, peak) for row in rows]
    notes = [
        "lclm: one packed batch of the recipe's pack, fixed shapes; its kernels take turns on one model.",
        "plain: one encoder call per memory (windows padded), one decoder call over padded examples, all "
        "logits; the same weights and examples, measured after ours. fp32 masters and AdamW in both.",
        f"Random weights and tokens; {str(dtype).removeprefix('torch.')}; recomputed: "
        f"{', '.join(options.recompute) or 'nothing'}; compiled: {', '.join(options.compile) or 'nothing'}. "
        f"Medians of {options.rounds} rounds. Losses and gradients of the two loops are checked equal in "
        "fp32 at toy size first.",
        f"MFU: FLOPs of the real tokens, attention included, recomputation not, over {peak / 1e12:.4g} "
        f"TFLOP/s ({source}).",
    ]
    save(options.name, device, found, notes)


def free(device: torch.device) -> None:
    """Give the device's memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        print(f"{torch.cuda.memory_allocated(device) / 2**30:.1f} GiB still allocated", flush=True)


if __name__ == "__main__":
    main()
