from __future__ import annotations

from dataclasses import replace

import pytest

from lclm.data.settings import DataSettings, PackSettings, SourceSettings, TaskSettings

GOOD = DataSettings(
    lanes=8,
    micro_batch=2,
    sources={"documents": SourceSettings("somewhere")},
    heldout={"documents": SourceSettings("elsewhere")},
    tasks={"plain": TaskSettings("plain", "documents")},
    mixture={"plain": 1.0},
)


def task(**options) -> dict[str, TaskSettings]:
    return {"plain": TaskSettings(**{"source": "documents", **options})}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": 0}, "data.lanes is 0"),
        ({"workers": -1}, "data.workers"),
        ({"epochs": 0}, "data.epochs"),
        ({"micro_batch": 3}, "multiple of data.micro_batch"),
        ({"pack": PackSettings(rows=0)}, "data.pack.rows is 0"),
        ({"sources": {"documents": SourceSettings()}}, "data.sources.documents.path is missing"),
        ({"tasks": task(source="other")}, "not in data.sources"),
        ({"tasks": task(source="")}, "data.tasks.plain.source is missing"),
        ({"tasks": task(task="plain", min_span=3)}, "min_span has no effect on task 'plain'"),
        ({"tasks": task(task="chat", prompt="x")}, "prompt has no effect"),
        ({"tasks": task(task="interleave", excerpt=4)}, "excerpt has no effect"),
        ({"tasks": task(task="reconstruct", min_span=9, max_span=8)}, "min_span 9 and max_span 8"),
        ({"tasks": task(task="reconstruct", min_span=9, excerpt=10)}, "excerpt is 10"),
        ({"tasks": task(task="interleave", memory_share=1.0)}, "memory_share is 1.0"),
        ({"tasks": task(task="interleave", ratios=[])}, "ratios"),
        ({"mixture": {}}, "a share above 0"),
        ({"mixture": {"plain": -1.0}}, "cannot be negative"),
        ({"mixture": {"plane": 1.0}}, "names 'plane'"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GOOD, **change).validate()


def test_good_settings():
    GOOD.validate()
    assert [GOOD.accumulation(world) for world in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(ValueError, match=r"3 x 2"):
        GOOD.accumulation(3)
    heldout = GOOD.for_heldout()
    heldout.validate()
    assert heldout.sources["documents"].path == "elsewhere"
