"""Compiled blocks train as plain ones do, recomputed and at ZeRO 3 too."""

from __future__ import annotations

import pytest

from tests.end_to_end.small_run import build_data, losses, recipe, run, stage, write


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
def test_compiled_blocks_give_the_losses_of_plain_ones(zero, tmp_path):
    data, found = build_data(tmp_path / "data"), []
    for compiled in (False, True):
        content = recipe(data, tmp_path / f"compiled-{compiled}", only=stage(steps=3))
        both = {"encoder": compiled, "decoder": compiled}
        content["engine"] |= {"zero": zero, "compile": both}
        content["engine"]["activation_checkpointing"] = dict.fromkeys(both, True)
        content["train"] |= {"validate_every": None, "validate_batches": 0}
        content["probes"] |= {"samples": 1, "texts": 0}
        run(write(tmp_path, content))
        found.append(losses(tmp_path / f"compiled-{compiled}"))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
