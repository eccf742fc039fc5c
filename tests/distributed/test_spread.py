"""At ZeRO 3 one process reads the model; the others get their shares and never hold it whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.small_run import build_data, recipe, stage, write


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_spread_out_trains_as_one_that_every_process_read(precision, tmp_path):
    """Bit for bit: tied embeddings, frozen components, LoRA, masters in bf16, activation checkpointing."""
    lora = stage(steps=3, learn=("adapter", "decoder"))
    lora["learn"]["decoder"] = {"lr": 1e-3, "lora": {"rank": 4}}
    stages = {"all": stage(steps=3), "some": stage(steps=3, learn=("encoder", "adapter")), "lora": lora}
    content = recipe(build_data(tmp_path / "data"), tmp_path / "run", **stages)
    content["engine"] = {"zero": 3, "precision": precision}
    content["engine"]["activation_checkpointing"] = {"encoder": True, "decoder": True}
    path = write(tmp_path, content)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*launcher, str(Path(__file__).with_name("spread.py")), str(path), str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"out.{rank}.json").read_text())
        for name in stages:
            assert found[f"{name} whole"][:3] == found[f"{name} spread"][:3], (name, rank)
            assert found[f"{name} spread"][3] == [], "a buffer without values"
            assert len(set(found[f"{name} whole"][1])) > 1
