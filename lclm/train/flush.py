"""A process beside each training process that writes its snapshots to disk: `python -m lclm.train.flush`.

A snapshot is a folder in memory. Copying, syncing and adding up its files happens here, at low priority, so
that training waits for memory only. Every process's writer copies its own part into the checkpoint's
temporary folder; the main process's writer waits for all parts and then renames the folder. Orders and
answers are lines of JSON on the standard input and output. The writer ends with the process that started it.
It needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lclm.checkpoint import (
    StageFolder,
    finish_checkpoint,
    list_files,
    sync,
    temporary,
)
from lclm.train.ends import end_with_parent

NICENESS = 10
CHUNK = 4 * 2**20  # bytes
PAUSE = 0.05  # seconds between looks for the other processes' parts


@dataclass(frozen=True)
class Order:
    """Write the snapshot `source` of process `rank` of `size` as its part of the checkpoint `final`.

    state: what becomes state.json; for the main process only, whose writer ends the checkpoint and keeps
    `keep` of its stage (`stage` is that folder).
    """

    source: str
    final: str
    rank: int
    size: int
    stage: str
    keep: int
    state: dict[str, Any] | None = None


def carry_out(order: Order) -> None:
    """Copy the order's part and, on the main process, end the checkpoint. OSError or ValueError if not."""
    source, final = Path(order.source), Path(order.final)
    beside = temporary(final)
    written: list[Path] = []
    try:
        sums = {}
        for path in list_files(source):
            name = path.relative_to(source)
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            written.append(beside / name)
            sums[str(name)] = copy(path, beside / name)
        _tell(beside, order.rank, {"files": sums})
    except (OSError, ValueError) as error:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            _tell(beside, order.rank, {"error": str(error)})
        raise
    finally:
        shutil.rmtree(source, ignore_errors=True)
    if order.state is not None:
        finish_checkpoint(final, order.state, _all_parts(beside, order.size))
        with contextlib.suppress(OSError):
            StageFolder(Path(order.stage)).prune(order.keep)


def copy(source: Path, target: Path) -> dict[str, Any]:
    """Copy a file to the disk, for good; {"bytes", "sha256"} of it."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader, target.open("wb") as writer:
        while part := reader.read(CHUNK):
            digest.update(part)
            writer.write(part)
            size += len(part)
    sync(target)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _part(beside: Path, rank: int) -> Path:
    return beside / f"part-{rank:05d}.json"


def _tell(beside: Path, rank: int, part: dict[str, Any]) -> None:
    """Tell the main process's writer. Nothing may follow: it may rename the folder at once."""
    path = temporary(_part(beside, rank))
    path.write_text(json.dumps(part), encoding="utf-8")
    path.replace(_part(beside, rank))


def _all_parts(beside: Path, size: int) -> dict[str, Any]:
    """Checksums of all processes' files. Waits without a limit: who started the writer has one."""
    sums: dict[str, Any] = {}
    for rank in range(size):
        path = _part(beside, rank)
        while not path.is_file():
            time.sleep(PAUSE)
        part = json.loads(path.read_text(encoding="utf-8"))
        if "error" in part:
            raise OSError(part["error"])
        sums |= part["files"]
    for rank in range(size):
        _part(beside, rank).unlink()
    return sums


def serve(parent: int) -> None:
    """Carry out orders until there are no more, or the process `parent` is gone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # a scheduler sends them to every process; the training decides
    end_with_parent()
    if os.getppid() != parent:
        return
    os.nice(NICENESS)
    for line in sys.stdin:
        begin, error = time.monotonic(), None
        try:
            carry_out(Order(**json.loads(line)))
        except (OSError, ValueError) as problem:
            error = str(problem) or type(problem).__name__
        print(json.dumps({"error": error, "seconds": time.monotonic() - begin}), flush=True)


class Writer:
    """The training process's hold on its writer, which is started with the first order."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._answer = b""
        self.busy = False

    def send(self, order: Order) -> None:
        """Begin to carry out an order. OSError if no process can be started."""
        assert not self.busy
        if self._process is None:
            root = str(Path(__file__).resolve().parents[2])
            path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lclm.train.flush", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
        self._process.stdin.flush()
        self.busy, self._answer = True, b""

    def look(self, seconds: float = 0.0) -> dict[str, Any] | None:
        """{"error": text or None, "seconds"} of the order when it ends within `seconds`, None before."""
        assert self._process is not None and self._process.stdout is not None and self.busy
        until = time.monotonic() + seconds
        file = self._process.stdout.fileno()
        while select.select([file], [], [], max(0.0, until - time.monotonic()))[0]:
            read = os.read(file, 65536)
            self._answer += read
            if self._answer.endswith(b"\n"):
                self.busy = False
                return json.loads(self._answer)
            if not read:
                code = self._process.wait()
                self._process, self.busy = None, False
                return {
                    "error": f"the process that writes checkpoints ended with code {code}",
                    "seconds": 0.0,
                }
        return None

    def end(self) -> None:
        """End the writer, whatever it does."""
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._process, self.busy = None, False


if __name__ == "__main__":
    serve(int(sys.argv[1]))
