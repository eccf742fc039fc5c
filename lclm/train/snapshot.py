"""Room in memory for snapshots: one folder per process in a memory file system, gone when the process is."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

PREFIX = "lclm-snapshot-"
LOCK = "lock"
SHARE = 0.8
"""The share of the free room that snapshots may take."""


class SnapshotFolder:
    """A folder of this process's own below `parent`. What killed processes left there is removed first."""

    def __init__(self, parent: Path) -> None:
        """OSError where no folder can be made."""
        with (parent / f"{PREFIX}{os.getuid()}.lock").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            remove_left_over(parent)
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            self._lock: IO[str] = (self.path / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.snapshot = self.path / "snapshot"

    def begin(self) -> Path:
        """An empty folder for a snapshot."""
        self.clear()
        self.snapshot.mkdir()
        return self.snapshot

    def clear(self) -> None:
        """Free the snapshot's memory."""
        shutil.rmtree(self.snapshot, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def remove_left_over(parent: Path) -> None:
    """Remove this user's folders whose process is gone: nobody holds their lock."""
    for path in parent.glob(f"{PREFIX}*"):
        if path.is_dir() and path.stat().st_uid == os.getuid():
            try:
                with (path / LOCK).open("w") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            except OSError:
                continue  # it is in use


def room(parent: Path) -> float:
    """Bytes that can be written below `parent`, which is in memory, without harm to this machine's processes.

    The least of what is free there, in the machine's memory, and in the process's control group; times SHARE.
    """
    free = [float(shutil.disk_usage(parent).free)]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().split("::/", 1)[1]
        for folder in (group, *group.parents):
            limit = folder / "memory.max"
            if limit.is_file() and (text := limit.read_text().strip()) != "max":
                used = float((folder / "memory.current").read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cached = float(stat["inactive_file"]) + float(stat["active_file"])  # given up when needed
                free.append(float(text) - used + cached)
    except (OSError, IndexError, KeyError, ValueError):
        pass  # not Linux, or no control groups of the second kind: what is known counts
    return max(0.0, min(free)) * SHARE
