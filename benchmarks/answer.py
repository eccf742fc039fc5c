"""Time to the first token and peak memory: a document compressed and asked about, against reading it whole.

Each case is a process of its own on the same checkpoint: `uncompressed` gives the document to the decoder as
text; `compressed` turns it into latents and answers from them; `artifact` reads the latents from a file, with
the encoder never loaded. The three take turns. A way that would become too slow for the next length is left
out from there on. Run from the repository root.

    python benchmarks/answer.py                                      # SmolLM2-135M behind all-MiniLM-L6-v2
    python benchmarks/answer.py recipes/smollm2.yaml --rounds 5
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, now, save

WAYS = ("uncompressed", "compressed", "artifact")
QUESTION = "What is the text above about?"
SIZES = [1024 * 2**power for power in range(8)]
LOADED = "loaded"
MIB = 2**20


def prepare(folder: Path, recipe: str, overrides: list[str], dtype: str, longest: int) -> dict[str, Any]:
    """Write the recipe's model as a checkpoint, and a text of `longest` decoder tokens; returns its facts."""
    from lclm.model.build import build_model, build_processor, components
    from lclm.recipe import load_recipe

    settings = load_recipe(recipe, overrides, validate=False).model
    model, processor = build_model(settings, dtype=dtype), build_processor(settings)
    library = Path(statistics.__file__).parent
    whole = "\n".join(path.read_text() for path in sorted(library.glob("*.py")))
    whole *= 1 + longest * 8 // len(whole)
    (folder / "text").write_text(whole)
    decoder = model.config.decoder_config
    positions, decoder.max_position_embeddings = decoder.max_position_embeddings, 2 * longest
    model.save_pretrained(folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    counts = {name: sum(p.numel() for _, p in part) for name, part in components(model).items()}
    return {"recipe": recipe, "counts": counts, "positions": positions, "window": model.config.window}


def child(way: str, tokens: int, ratio: int, folder: Path, device: torch.device, dtype: str) -> None:
    """One case in this process: prints its figures as JSON."""
    from lclm.model import LCLMForConditionalGeneration, LCLMProcessor

    processor = LCLMProcessor.from_pretrained(folder / "checkpoint")
    model = LCLMForConditionalGeneration.from_pretrained(
        folder / "checkpoint", dtype=getattr(torch, dtype), encoder=way == "compressed"
    ).to(device)
    model.eval()
    content = processor.spans.content
    whole = (folder / "text").read_text()[: tokens * 8]
    text = content.decode(content.encode(whole)[:tokens])
    case = Case(model, processor, way, folder / f"{tokens}.lclm", ratio)
    case.first_token(text[:400], warm=True)
    loaded = reset_peak(device)
    begin = now(device)
    token, compressing, latents = case.first_token(text)
    seconds, peak = now(device) - begin, peak_memory(device)
    found = {
        "seconds": seconds, "compressing": compressing, "peak": peak, LOADED: loaded, "token": token,
        "latents": latents, "tokens": len(content.encode(text)),
    }  # fmt: skip
    print("found " + json.dumps(found), flush=True)
    case.keep()


class Case:
    """A loaded model that answers about a text in one of the WAYS."""

    def __init__(self, model: Any, processor: Any, way: str, artifact: Path, ratio: int) -> None:
        self.model, self.processor, self.way, self.path, self.ratio = model, processor, way, artifact, ratio
        self.artifact: Any = None

    def first_token(self, text: str, warm: bool = False) -> tuple[int, float, int]:
        """The answer's first token, the seconds spent compressing, and how many latents were read."""
        from lclm.model.artifact import Artifact

        device, compressing = self.model.device, 0.0
        if self.way == "uncompressed" or (warm and self.way == "artifact"):
            part = {"type": "text", "text": text + "\n\n"}
        else:
            if self.way == "artifact":
                self.artifact = Artifact.load(self.path)
            else:
                begin = now(device)
                self.artifact = self.model.compress(self.processor, text, ratio=self.ratio)
                compressing = now(device) - begin
            part = {"type": "memory", "artifact": self.artifact}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]
        inputs = self.processor.apply_chat_template(messages, add_generation_prompt=True).to(device)
        memories = {} if self.artifact is None else {"memories": [self.artifact]}
        output = self.model.generate(**inputs, **memories, max_new_tokens=1, do_sample=False)
        return int(output[0, -1]), compressing, 0 if self.artifact is None else sum(self.artifact.sizes)

    def keep(self) -> None:
        """Leave the latents for the artifact's turn."""
        if self.way == "compressed" and not self.path.exists():
            self.artifact.save(self.path)


def reset_peak(device: torch.device) -> int:
    """Bytes held now; the high-water mark begins here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_memory(device: torch.device) -> int:
    """The most bytes held since `reset_peak`: of the process, or on the GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def resident(name: str) -> int:
    """Bytes: VmRSS, or its high-water mark VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def run(way: str, tokens: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One case in a process of its own."""
    command = [
        sys.executable, __file__, "--child", way, "--folder", str(folder), "--tokens", str(tokens),
        "--ratio", str(options.ratio), "--device", options.device, "--dtype", options.dtype,
        "--threads", str(options.threads),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    if done.returncode or len(lines) != 1:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    return json.loads(lines[0].removeprefix("found "))


def measure(folder: Path, options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, after each length."""
    rows: list[dict[str, Any]] = []
    left = list(WAYS)
    for place, tokens in enumerate(options.tokens):
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for _ in range(options.rounds):
            for way in left:
                if not found[way] or found[way][0]["seconds"] <= options.once:
                    found[way].append(run(way, tokens, folder, options))
                    print(tokens, way, json.dumps(found[way][-1]), flush=True)
        answers = {case["token"] for way in WAYS[1:] for case in found[way]}
        if len(answers) > 1:
            raise RuntimeError(f"{tokens} tokens: latents and their artifact answer differently")
        rows.append(row(tokens, found))
        yield rows
        if place + 1 < len(options.tokens):
            left = [way for way in left if expected(rows, way, options.tokens[place + 1]) <= options.most]


def expected(rows: list[dict[str, Any]], way: str, tokens: int) -> float:
    """Seconds at the next length: growing as before, and as the square after the first length."""
    last, before = rows[-1], rows[-2] if len(rows) > 1 else None
    power = 2.0
    if before is not None:
        power = math.log(last[f"{way} s"] / before[f"{way} s"], last["tokens"] / before["tokens"])
    return last[f"{way} s"] * (tokens / last["tokens"]) ** max(1.0, power)


def row(tokens: int, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of the cases of one length."""

    def median(way: str, name: str) -> float:
        return statistics.median(case[name] for case in found[way])

    ways = [way for way in WAYS if found[way]]
    result: dict[str, Any] = {"tokens": tokens}
    result["latents"] = found["compressed"][0]["latents"] if found["compressed"] else ""
    result["rounds"] = ", ".join(str(len(found[way])) for way in ways)
    for way in ways:
        result[f"{way} s"] = median(way, "seconds")
    if found["compressed"]:
        result["of it compressing s"] = median("compressed", "compressing")
    if found["uncompressed"] and found["compressed"]:
        result["speed-up"] = result["uncompressed s"] / result["compressed s"]
    for way in ways:
        result[f"{way} MiB"] = median(way, "peak") / MIB
    result["above the loaded model, MiB"] = {
        way: statistics.median(case["peak"] - case[LOADED] for case in found[way]) / MIB for way in ways
    }
    result["cases"] = {way: found[way] for way in ways}
    return result


def notes(facts: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """What the table says of itself."""
    parts = ", ".join(f"{name} {count:,}" for name, count in facts["counts"].items())
    memory = "allocated on the GPU" if options.device.startswith("cuda") else "resident memory of the process"
    return [
        f"{facts['recipe']} at {options.ratio}x, untrained adapter, {options.dtype}; parameters: {parts}; "
        f"windows of {facts['window']}. tokens: the decoder's, of Python's library files.",
        "s: from the document's text (artifact: from the file) to the first token of an answer, model loaded "
        "and warm. uncompressed: the decoder reads the text. artifact: the encoder is not loaded.",
        f"MiB: peak {memory}, interpreter, libraries and weights included. Above the loaded model: JSON.",
        f"Each case in a process of its own, ways in turns, medians; once only above {options.once:g} s. A "
        f"way that is likely to need more than {options.most:g} s is left out from there.",
        f"The decoder was trained on {facts['positions']:,} positions; beyond them (the limit is "
        "raised for this) only time and memory mean something. The plot: `answer.svg`.",
    ]  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds and memory by tokens, as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from lclm.eval.plots import CYCLE, STYLE

    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        for axes, unit, title in zip(
            figure.subplots(1, 2),
            ("s", "MiB"),
            ("seconds to the first token", "peak memory, MiB"),
            strict=True,
        ):
            for way, colour in zip(WAYS, CYCLE, strict=False):
                points = [(r["tokens"], r[f"{way} {unit}"]) for r in rows if f"{way} {unit}" in r]
                axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=way)
            axes.set(title=title, xlabel="tokens of the document")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks([r["tokens"] for r in rows], [f"{r['tokens'] // 1024}K" for r in rows])
            axes.minorticks_off()
        axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="recipes/smollm2-minilm.yaml")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, as in lclm train")
    parser.add_argument("--tokens", nargs="+", type=int, default=SIZES)
    parser.add_argument("--ratio", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--once", type=float, default=12.0, help="seconds above which one round is enough")
    parser.add_argument("--most", type=float, default=180.0, help="seconds that a case may take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--name", default="answer", help="name of the result files")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.child:
        child(options.child, *options.tokens, options.ratio, options.folder, device, options.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        facts = prepare(Path(folder), options.recipe, options.overrides, options.dtype, max(options.tokens))
        for rows in measure(Path(folder), options):
            save(options.name, device, rows, notes(facts, options))
            draw(rows, RESULTS / f"{options.name}.svg")


if __name__ == "__main__":
    main()
