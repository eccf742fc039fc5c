"""What it costs a rank to open data sets, to go on from a checkpoint and to run: time, reads, memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from simulated import Texts, write

from lclm.data.batch import Loader
from lclm.data.settings import DataSettings, SourceSettings
from lclm.data.shards import DataSet, Shard, write_manifest

COUNTED = "counted"
SHARD_SAMPLES = 1024
PLACES = (0.0, 0.01, 0.5, 0.99)


class CountedFiles(LocalFileSystem):
    """Local files as `counted://`, with the reads and bytes of every kind of file counted."""

    protocol = COUNTED
    counts: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix(f"{COUNTED}://"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        data = super().cat_file(path, start=start, end=end, **more)
        kind = Path(path).suffix[1:]
        self.counts.update({f"{kind} reads": 1, f"{kind} bytes": len(data)})
        return data


fsspec.register_implementation(COUNTED, CountedFiles, clobber=True)


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """What is read of `counted://` files meanwhile."""
    CountedFiles.counts.clear()
    yield CountedFiles.counts


def stretched(folder: Path, name: str, items: Any, kind: Any, shards: int) -> SourceSettings:
    """A data set of `shards` shards of 1,024 samples, all of them the one file that there is."""
    source = write(folder / name, kind, items, max_bytes=1 << 40)
    (shard,) = DataSet.open(source.path).shards
    assert shard.samples == SHARD_SAMPLES
    many = [Shard(**(asdict(shard) | {"sha256": f"{n:064x}"})) for n in range(shards)]
    write_manifest(source.path, name=name, kind=kind, split="train", shards=many)
    return SourceSettings(f"{COUNTED}://{source.path}")


def stretch(folder: Path, shards: int) -> dict[str, SourceSettings]:
    texts = Texts(2)
    return {
        "documents": stretched(folder, f"web{shards}", texts.documents(SHARD_SAMPLES), "documents", shards),
        "conversations": stretched(
            folder, f"talks{shards}", texts.conversations(SHARD_SAMPLES), "conversations", shards
        ),
    }


def moved(state: Mapping[str, Any], runs: int) -> dict[str, Any]:
    """The same state so many of each lane's runs further on in every source."""
    cursors = {}
    for lane, cursor in state["cursors"].items():
        places = {name: [turn + runs, index] for name, (turn, index) in cursor["sources"].items()}
        held = {
            name: [[task, turn + runs, index, offset] for task, turn, index, offset in records]
            for name, records in cursor["held"].items()
        }
        cursors[lane] = cursor | {"sources": places, "held": held}
    return {**state, "cursors": cursors}


def measure_resume(
    data: DataSettings, tokenizer: Any, geometry: Any, world: int, places: tuple[float, ...] = PLACES
) -> list[dict[str, Any]]:
    """A rank that goes on from a checkpoint at these parts of an epoch, up to its first step."""
    data = replace(data, workers=0, micro_batch=1)
    with Loader(data, tokenizer, geometry, seed=0, world=world) as loader:
        for _ in range(6):
            next(loader)
        state = loader.state()
    sets = {name: DataSet.open(source.path) for name, source in data.sources.items()}
    turns = min(found.runs(data.run_samples) for found in sets.values()) // data.lanes
    furthest = max(turn for c in state["cursors"].values() for turn, _ in c["sources"].values())
    rows = []
    for place in places:
        runs = min(int(place * turns), turns - furthest - 2)
        cursor = moved(json.loads(json.dumps(state)), runs) if place else None
        with counting() as counts:
            begin = time.perf_counter()
            loader = Loader(data, tokenizer, geometry, seed=0, world=world, cursor=cursor)
            opened = time.perf_counter()
            next(loader)
            done = time.perf_counter()
            loader.close()
        rows.append(
            {
                "samples": sum(found.num_samples for found in sets.values()),
                "shards": sum(len(found.shards) for found in sets.values()),
                "lanes a rank": data.lanes // world,
                "at": f"{place:.0%} of the epoch" if place else "the beginning, no checkpoint",
                "open, s": opened - begin,
                "first step, s": done - opened,
                "manifest MB": counts["json bytes"] / 1e6,
                "reads of indexes": counts["npy reads"], "bytes of indexes": counts["npy bytes"],
                "reads of shards": counts["tar reads"], "bytes of shards": counts["tar bytes"],
            }
        )  # fmt: skip
    return rows


_OPEN = """
import json, sys, time
sys.path.insert(0, "benchmarks")
import numpy, fsspec
from pathlib import Path
from resuming import CountedFiles, counting, rss
from lclm.data.shards import DataSet
with counting():
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = rss(), time.process_time()
    data = DataSet.open(sys.argv[1])
    data.run(data.runs(32) - 1, 32)
    seconds, after = time.process_time() - begin, rss()
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
print(json.dumps({"shards": len(data.shards), "samples": data.num_samples, "open, CPU s": seconds,
                  "kept, MB": (after - before) / 1e6, "at most meanwhile, MB": (peak - before) / 1e6}))
"""


def measure_manifest(source: SourceSettings) -> dict[str, Any]:
    """Time and memory to open a data set, in a process of its own."""
    command = [sys.executable, "-c", _OPEN, source.path]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def rss(pid: int | str = "self", what: str = "Rss") -> int:
    """Bytes of memory of a process, as the kernel counts them: Rss, Private_Dirty and so on."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def measure_rank(
    data: DataSettings, tokenizer: Any, geometry: Any, workers: int, steps: int
) -> dict[str, Any]:
    """Memory of one rank's loader: this process, and its background processes after some steps."""
    data = replace(data, lanes=max(1, workers), workers=workers, micro_batch=1)
    before = rss()
    with Loader(data, tokenizer, geometry, seed=0) as loader:
        for _ in range(steps):
            next(loader)
        children = [worker.pid for worker in getattr(loader._iterator, "_workers", [])]
        assert len(children) == workers
        private = [rss(pid, "Private_Dirty") for pid in children]
        return {
            "workers": workers, "lanes a rank": data.lanes, "steps": steps,
            "main process, MB": rss(os.getpid()) / 1e6, "of it the loader's, MB": (rss() - before) / 1e6,
            "a background process's own, MB": sum(private) / max(1, len(private)) / 1e6,
            "all background processes' own, MB": sum(private) / 1e6,
        }  # fmt: skip
