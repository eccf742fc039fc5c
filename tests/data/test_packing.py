from __future__ import annotations

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lclm.data.batch import make_lanes
from lclm.data.packing import carried
from lclm.data.settings import DataSettings, PackSettings, SourceSettings, TaskSettings
from lclm.data.shards import DataSet
from lclm.model.spans import lay_out
from tests.data import material

TASKS = {
    "interleave": TaskSettings("interleave", "documents", ratios=[4, 8], min_span=64, max_span=256),
    "plain": TaskSettings("plain", "documents"),
    "reconstruct": TaskSettings(
        "reconstruct", "documents", ratios=[4, 8], min_span=64, max_span=64, prompt="R:"
    ),
    "chat": TaskSettings("chat", "conversations", ratios=[4, 8]),
}
MIXTURE = {"interleave": 0.5, "plain": 0.1, "reconstruct": 0.2, "chat": 0.2}
SHAPE = PackSettings(512, 7, 130)


def make(documents, conversations, mixture=MIXTURE, *, numbers=None, cursors=None, geometry=None, **changes):
    tokenizer = material.span_tokenizer(changes.pop("tokenizer", "bytes"))
    geometry = geometry or material.geometry(tokenizer, ratio=4, window=64)
    data = DataSettings(
        **{
            "lanes": 3,
            "pack": SHAPE,
            "run_samples": 4,
            "lookahead": 16,
            "sources": {
                "documents": SourceSettings(documents),
                "conversations": SourceSettings(conversations),
            },
            "tasks": TASKS,
            "mixture": mixture,
        }
        | changes
    )
    data.validate()
    numbers = range(data.lanes) if numbers is None else numbers
    lanes = make_lanes(data, tokenizer, geometry, numbers, seed=7, mixture=mixture, cursors=cursors)
    return lanes, tokenizer, geometry


def same(packs, others) -> bool:
    def plain(pack):
        spans = [
            (example.key, example.task, [(s.kind, s.loss, s.ratio, s.ids.tolist()) for s in example.spans])
            for example in pack.examples
        ]
        return spans, pack.used, pack.cursor, pack.source_tokens, pack.dropped

    return [plain(pack) for pack in packs] == [plain(pack) for pack in others]


@pytest.mark.parametrize("mixture", [{"interleave": 1}, {"plain": 1}, {"interleave": 0.6, "plain": 0.4}])
@pytest.mark.parametrize("lanes", [1, 5])
def test_every_documents_text_exactly_once_per_epoch(tmp_path, mixture, lanes):
    texts = [text[:9000] for text in material.stdlib_texts(24)]
    documents = material.write_documents(tmp_path / "d", texts, 60_000)
    made, tokenizer, _ = make(documents, "none", mixture, lanes=lanes, epochs=1)
    found = defaultdict(dict)
    for lane in made:
        while (pack := lane.next_pack()).examples:
            for example in pack.examples:
                key, offset = example.key.split("@")
                parts = [
                    tokenizer.content.decode([i for i in span.ids.tolist() if i != tokenizer.end_of_text_id])
                    for span in example.spans
                ]
                assert int(offset) not in found[key]
                found[key][int(offset)] = "".join(parts)
        assert lane.next_pack().examples == [] and lane.dropped == {}
    read = {key: "".join(parts[at] for at in sorted(parts)) for key, parts in found.items()}
    assert read == {f"d{number:05d}": text for number, text in enumerate(texts)}


def test_every_conversation_once_per_epoch_and_drops_are_counted(tmp_path):
    items = material.conversations(60, mean=3.0, spread=0.9)
    conversations = material.write_conversations(tmp_path / "c", items, 20_000)
    made, _, _ = make("none", conversations, {"chat": 1}, epochs=1)
    keys, dropped = Counter(), Counter()
    for lane in made:
        while (pack := lane.next_pack()).examples:
            keys.update(example.key for example in pack.examples)
            dropped.update(pack.dropped)
        assert lane.cursor()["dropped"] == dict(lane.dropped)
    assert set(keys.values()) == {1}
    assert dropped["chat: over budget"] == 60 - len(keys) > 0


@given(
    window=st.sampled_from([16, 48, 64]),
    more=st.sampled_from([{}, {"overlap": 5}, {"pooling": "eos"}, {"overlap": 3, "bidirectional": True}]),
    positions=st.integers(150, 700),
    rows=st.integers(3, 12),
    latents=st.integers(40, 200),
    shares=st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 4).filter(any),
)
@settings(max_examples=25, deadline=None)
def test_budgets_are_never_exceeded(stdlib, needles, window, more, positions, rows, latents, shares):
    tokenizer = material.span_tokenizer("bytes")
    geometry = material.geometry(tokenizer, ratio=4, window=window, **more)
    ratios = [4] if "pooling" in more else [4, 8]
    tasks = {
        "interleave": TaskSettings("interleave", "documents", ratios=ratios, min_span=16, max_span=128),
        "plain": TaskSettings("plain", "documents"),
        "reconstruct": TaskSettings("reconstruct", "documents", ratios=ratios, min_span=16, max_span=64),
        "chat": TaskSettings("chat", "conversations", ratios=ratios, over_budget="shorten"),
    }
    tasks["reconstruct"].prompt = "R:"
    mixture = dict(zip(tasks, shares, strict=True))
    shape = PackSettings(positions, rows, latents)
    made, _, _ = make(
        stdlib, needles, mixture, numbers=[0], geometry=geometry, pack=shape, tasks=tasks, lookahead=6
    )
    for _ in range(5):
        pack = made[0].next_pack()
        arrays = lay_out([pack.examples], geometry, positions=positions, encoder_rows=rows, latents=latents)
        used = (
            int(arrays["attention_mask"].sum()),
            int((arrays["encoder_window_ids"] >= 0).sum()),
            int(arrays["memory_sizes"].sum()),
        )
        assert used == pack.used


def test_the_same_lane_whatever_others_there_are_and_from_any_cursor(stdlib, needles):
    made, _, _ = make(stdlib, needles)
    packs = [[lane.next_pack() for _ in range(24)] for lane in made]
    alone, _, _ = make(stdlib, needles, numbers=[1])
    assert same([alone[0].next_pack() for _ in range(24)], packs[1])
    for stop in (1, 2, 7, 15, 23):
        cursor = json.loads(json.dumps(packs[1][stop - 1].cursor))
        again, _, _ = make(stdlib, needles, numbers=[1], cursors={"1": cursor})
        assert same([again[0].next_pack() for _ in range(24 - stop)], packs[1][stop:])


def test_cursors_stay_small(stdlib, needles):
    (lane,), _, _ = make(stdlib, needles, numbers=[0])
    sizes = [len(json.dumps(lane.next_pack().cursor)) for _ in range(60)]
    assert max(sizes) < 2500


def test_shares_of_source_tokens_are_kept(stdlib, needles):
    (lane,), _, _ = make(stdlib, needles, numbers=[0])
    tokens = Counter()
    for _ in range(120):
        tokens.update(lane.next_pack().source_tokens)
    for name, share in MIXTURE.items():
        assert tokens[name] / tokens.total() == pytest.approx(share, abs=0.03)


def test_another_mixture_and_shape_lose_nothing(tmp_path, needles):
    """Held documents go to other tasks of their source; what a stage does not use waits in the cursor."""
    texts = material.stdlib_texts(12)
    documents = material.write_documents(tmp_path / "d", texts, 60_000)
    stages = [
        ({"interleave": 0.5, "chat": 0.5}, SHAPE, 6),
        ({"chat": 1.0}, PackSettings(300, 5, 90), 4),
        ({"plain": 1.0}, PackSettings(700, 2, 90), 10_000),
    ]
    cursor, read, epochs = None, defaultdict(str), {}
    for mixture, shape, packs in stages:
        cursors = {"0": carried(cursor)} if cursor else None
        made, tokenizer, _ = make(
            documents, needles, mixture, lanes=1, pack=shape, cursors=cursors, epochs=1, lookahead=8
        )
        for _ in range(packs):
            pack = made[0].next_pack()
            if not pack.examples:
                break
            cursor = json.loads(json.dumps(pack.cursor))
            for example in pack.examples:
                if example.task != "chat":
                    key, offset = example.key.split("@")
                    assert int(offset) == len(read[key])
                    read[key] += "".join(
                        tokenizer.content.decode([i for i in s.ids.tolist() if i != tokenizer.end_of_text_id])
                        for s in example.spans
                    )
        epochs[tuple(mixture)] = cursor["sources"]
    assert dict(read) == {f"d{number:05d}": text for number, text in enumerate(texts)}
    assert cursor["held"]["conversations"]


def fill(lane, packs: int, geometry) -> np.ndarray:
    shape = lane.pack
    for _ in range(2):
        lane.next_pack()
    used = np.array([lane.next_pack().used for _ in range(packs)])
    return used.mean(0) / [shape.positions, shape.rows * geometry.row_length, shape.latents]


@pytest.mark.parametrize(
    ("mixture", "shape", "least"),
    [
        ({"interleave": 1.0}, PackSettings(512, 6, 112), (0.97, 0.97)),
        (MIXTURE, PackSettings(512, 6, 112), (0.97, 0.93)),
        ({"interleave": 0.2, "chat": 0.6, "reconstruct": 0.2}, PackSettings(512, 7, 130), (0.97, 0.93)),
    ],
)
def test_packs_of_the_embedded_data_are_full(stdlib, needles, mixture, shape, least):
    (lane,), _, geometry = make(stdlib, needles, mixture, numbers=[0], pack=shape)
    positions, rows, _ = fill(lane, 80, geometry)
    assert positions >= least[0] and rows >= least[1], (positions, rows)


@pytest.mark.parametrize(
    ("mixture", "shape", "least"),
    [
        ({"interleave": 1.0}, PackSettings(16384, 15, 1080), (0.97, 0.97)),
        ({"interleave": 0.6, "plain": 0.1, "chat": 0.3}, PackSettings(16384, 22, 1584), (0.97, 0.93)),
    ],
)
def test_packs_of_web_documents_and_conversations_are_full(web, long_conversations, mixture, shape, least):
    tasks = {
        "interleave": TaskSettings("interleave", "documents"),
        "plain": TaskSettings("plain", "documents"),
        "chat": TaskSettings("chat", "conversations"),
    }
    geometry = material.geometry(material.span_tokenizer("bpe"), ratio=16, window=1024)
    (lane,), _, _ = make(
        web,
        long_conversations,
        mixture,
        numbers=[0],
        pack=shape,
        tasks=tasks,
        tokenizer="bpe",
        geometry=geometry,
        lookahead=32,
        lanes=1,
    )
    positions, rows, _ = fill(lane, 16, geometry)
    assert positions >= least[0] and rows >= least[1], (positions, rows)


def test_a_pack_too_small_for_a_task_says_so(stdlib, needles):
    made, _, _ = make(stdlib, needles, {"reconstruct": 1.0}, pack=PackSettings(60, 4, 64))
    with pytest.raises(ValueError, match="cannot hold a single example of reconstruct"):
        made[0].next_pack()


def test_conversations_that_all_are_too_long_say_so(stdlib, needles):
    made, _, _ = make(stdlib, needles, {"chat": 1.0}, pack=PackSettings(24, 1, 8))
    with pytest.raises(ValueError, match="over_budget: shorten"):
        made[0].next_pack()


def test_a_cursor_of_other_data_says_so(stdlib, needles, tmp_path):
    made, _, _ = make(stdlib, needles, {"plain": 1.0}, lanes=1)
    cursor = made[0].next_pack().cursor
    small = material.write_documents(tmp_path / "small", material.stdlib_texts(2))
    assert DataSet.open(small).num_samples == 2
    with pytest.raises(ValueError, match="belongs to other data"):
        make(small, needles, {"plain": 1.0}, lanes=1, epochs=1, cursors={"0": cursor})
