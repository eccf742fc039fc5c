"""The same pipeline under SLURM's executor, with an `sbatch` that runs each array job at once."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from pathlib import Path

import pytest
import yaml

from data_pipelines.build import build
from lclm.data.shards import DataSet

ROOT = Path(__file__).resolve().parents[2]

SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
exports = [a.split("=", 1)[1] for a in sys.argv[1:-1] if a.startswith("--export=")]
offset = re.search(r"RUN_OFFSET=(\\d+)", exports[0] if exports else "")
array = re.search(r"--array=(\\d+)-(\\d+)", script)
first, last = (int(array[1]), int(array[2])) if array else (0, 0)
for task in range(first, last + 1):
    env = os.environ | {{"SLURM_NODELIST": "here", "RUN_OFFSET": offset[1] if offset else "0"}}
    if array and "merge_stats" not in script:
        env["SLURM_ARRAY_TASK_ID"] = str(task)
    log = open({log!r}, "a")
    subprocess.run(["bash", sys.argv[-1]], env=env, check=True, stdout=log, stderr=log)
print("Submitted batch job 7")
"""
SRUN = '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n'


@pytest.mark.slow
def test_slurm_gives_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    scripts = {
        "sbatch": SBATCH.format(python=sys.executable, log=str(tmp_path / "log")),
        "srun": SRUN,
        "scontrol": "#!/bin/bash\necho here\n",
    }
    for name, content in scripts.items():
        (commands / name).write_text(content)
        (commands / name).chmod(stat.S_IRWXU)
    here = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{here}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for i in range(8):
        (tmp_path / "text").mkdir(exist_ok=True)
        lines = (hashlib.sha256(f"{i} {j}".encode()).hexdigest() for j in range(30))
        (tmp_path / "text" / f"{i}.txt").write_text("\n".join(line.replace("0", " ") for line in lines))
    recipe = {
        "out": str(tmp_path / "local"),
        "sources": {"text": {"kind": "text", "path": str(tmp_path / "text")}},
        "dedup": {"kind": "minhash", "buckets": 2},
        "split": {"heldout": 0.3},
        "executor": {"tasks": 2, "workers": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    build(path)
    slurm = [
        "executor.kind=slurm",
        'executor.options={time: "1:00:00", partition: cpu}',
        f"out={tmp_path}/slurm",
    ]
    assert build(path, slurm).status == "submitted", (tmp_path / "log").read_text()[-2000:]
    assert build(path, slurm).status == "up to date", (tmp_path / "log").read_text()[-2000:]
    for split in ("train", "heldout"):
        local, remote = (
            DataSet.open(str(tmp_path / name / "documents" / split)) for name in ("local", "slurm")
        )
        assert remote.fingerprint == local.fingerprint
