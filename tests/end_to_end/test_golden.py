"""The small run's losses are those that were kept."""

from __future__ import annotations

import json

import pytest
import torch

from tests.end_to_end import golden


def test_losses_are_the_kept_ones(data, tmp_path):
    kept = json.loads(golden.FILE.read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(kept["machine"]["threads"])
    try:
        losses, machine = golden.run_losses(data, tmp_path), golden.machine()
    finally:
        torch.set_num_threads(threads)
    if machine == kept["machine"]:
        assert losses == kept["losses"]
    for name, values in kept["losses"].items():
        assert losses[name] == pytest.approx(values, abs=1e-4), name
