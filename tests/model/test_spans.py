"""lay_out makes what the words mean; property-tested against a plain, slow reading of them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lclm.model.spans import NO_LOSS, Example, Geometry, Span, collate, lay_out
from lclm.model.windows import fill_rows, rows_needed

IDS = {
    "memory_start_id": 97,
    "memory_id": 98,
    "memory_end_id": 99,
    "pad_id": 0,
    "encoder_pad_id": 5,
    "encoder_marker_id": 6,
}
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


def geometry(**options):
    return Geometry(**{"ratio": 4, "window": 8, **IDS, **options})


def text(length, loss=False, first=10):
    return Span("text", np.arange(first, first + length), loss)


def memory(length, ratio=None, first=100):
    return Span("memory", np.arange(first, first + length), ratio=ratio)


@st.composite
def cases(draw):
    pooling = draw(st.sampled_from(["mean", "concat", "eos"]))
    shape = geometry(
        pooling=pooling,
        overlap=draw(st.sampled_from([0, 1, 3, 11])),
        bidirectional=draw(st.booleans()),
        ratio=draw(st.sampled_from([2, 4, 8])),
    )
    ratios = st.sampled_from([None, 1, 2, 4, 8]) if pooling == "mean" else st.none()
    spans = st.one_of(
        st.builds(text, st.integers(1, 6), st.booleans()), st.builds(memory, st.integers(1, 30), ratios)
    )
    example = st.lists(spans, min_size=1, max_size=4).map(lambda found: Example(tuple(found)))
    return shape, draw(st.lists(st.lists(example, max_size=3), min_size=1, max_size=3))


@PROPERTY
@given(cases())
def test_rows_read_as_their_spans(case):
    shape, rows = case
    arrays = lay_out(rows, shape)
    latent, memories = 0, []
    for row, examples in enumerate(rows):
        at = 0
        for example in examples:
            assert arrays["position_ids"][row, at] == 0
            start = at
            for span in example.spans:
                if span.kind == "text":
                    stop = at + len(span.ids)
                    labels = span.ids.copy() if span.loss else np.full(len(span.ids), NO_LOSS)
                    labels[: int(at == start)] = NO_LOSS
                    assert np.array_equal(arrays["input_ids"][row, at:stop], span.ids)
                    assert np.array_equal(arrays["labels"][row, at:stop], labels)
                    assert (arrays["latent_index"][row, at:stop] == -1).all()
                else:
                    count = math.ceil(len(span.ids) / (span.ratio or shape.ratio))
                    stop = at + count + 2
                    expected = [97, *[98] * count, 99]
                    assert arrays["input_ids"][row, at:stop].tolist() == expected
                    index = [-1, *range(latent, latent + count), -1]
                    assert arrays["latent_index"][row, at:stop].tolist() == index
                    assert (arrays["labels"][row, at:stop] == NO_LOSS).all()
                    memories.append((span, latent, count))
                    latent += count
                at = stop
            assert np.array_equal(arrays["position_ids"][row, start:at], np.arange(at - start))
            assert shape.size(example).positions == at - start
        pad = arrays["input_ids"].shape[1] - at
        assert np.array_equal(arrays["position_ids"][row, at:], np.arange(pad))
        assert arrays["attention_mask"][row].sum() == at
        assert (arrays["labels"][row, at:] == NO_LOSS).all()
    assert arrays["memory_sizes"].tolist() == [count for *_, count in memories]
    check_encoder(shape, arrays, memories)


def check_encoder(shape, arrays, memories):
    """Every window, in order, is somewhere in the rows as one run; nothing else is."""
    windows = []
    for span, first, _ in memories:
        ratio = span.ratio or shape.ratio
        for start in range(0, len(span.ids), shape.window):
            stop = min(start + shape.window, len(span.ids))
            low, high = max(0, start - shape.overlap), min(len(span.ids), stop + shape.overlap)
            high = high if shape.bidirectional else stop
            ids = span.ids[low:high].tolist()
            blocks = [first + place // ratio if start <= place < stop else -1 for place in range(low, high)]
            if shape.pooling == "eos":
                found = sorted({first + place // ratio for place in range(start, stop)})
                ids, blocks = ids + [6] * len(found), [-1] * len(ids) + found
            windows.append((ids, blocks))
    lengths = [len(ids) for ids, _ in windows]
    sizes = [shape.windows(len(span.ids), span.ratio).tolist() for span, *_ in memories]
    assert list(itertools.chain(*sizes)) == lengths
    assert len(arrays["encoder_input_ids"]) == rows_needed(lengths, shape.row_length)
    assert arrays["encoder_input_ids"].shape[1] <= shape.row_length
    for number, (ids, blocks) in enumerate(windows):
        rows, places = np.nonzero(arrays["encoder_window_ids"] == number)
        assert len(set(rows)) == 1 and np.array_equal(places, np.arange(places[0], places[0] + len(ids)))
        assert arrays["encoder_input_ids"][rows, places].tolist() == ids
        assert arrays["block_index"][rows, places].tolist() == blocks
        assert arrays["encoder_position_ids"][rows, places].tolist() == list(range(len(ids)))
    padding = arrays["encoder_window_ids"] == -1
    assert (arrays["encoder_input_ids"][padding] == 5).all() and (arrays["block_index"][padding] == -1).all()
    assert padding.sum() == padding.size - sum(lengths)


@PROPERTY
@given(cases(), st.sampled_from(["left", "right"]))
def test_fixed_budgets_pad_and_collating_equals_laying_out_together(case, side):
    shape, rows = case
    free = lay_out(rows, shape)
    width, latents = free["input_ids"].shape[1] + 3, int(free["memory_sizes"].sum()) + 2
    encoder_rows = len(free["encoder_input_ids"]) + 1
    budgets = {"positions": width, "encoder_rows": encoder_rows, "latents": latents, "padding_side": side}
    packs = [lay_out([row], shape, **budgets) for row in rows]
    assert {name: pack.shape for name, pack in packs[0].items()} == {
        **dict.fromkeys(
            ["input_ids", "position_ids", "labels", "latent_index", "attention_mask"], (1, width)
        ),
        **dict.fromkeys(
            ["encoder_input_ids", "encoder_position_ids", "encoder_window_ids", "block_index"],
            (encoder_rows, shape.row_length),
        ),
        "memory_sizes": (latents,),
    }
    whole, batch = lay_out(rows, shape, **budgets), collate(packs)
    for name in ("input_ids", "position_ids", "labels", "latent_index", "attention_mask"):
        assert np.array_equal(whole[name], batch[name]), name
    assert (
        batch["memory_sizes"][batch["memory_sizes"] > 0].tolist()
        == whole["memory_sizes"][whole["memory_sizes"] > 0].tolist()
    )
    assert set(batch["block_index"].ravel()) == set(whole["block_index"].ravel())
    assert all(pack[name].dtype == np.int64 for pack in packs for name in pack)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"positions": 6}, "decoder positions, over the budget of 6"),
        ({"encoder_rows": 1}, "encoder rows, over the budget of 1"),
        ({"latents": 2}, "latents, over the budget of 2"),
    ],
)
def test_over_budget_is_an_error(budget, message):
    with pytest.raises(ValueError, match=message):
        lay_out([[Example((text(2), memory(17)))]], geometry(), **budget)


def test_row_length():
    assert geometry(window=1024, ratio=16).row_length == 1024
    assert geometry(window=1024, ratio=16, pooling="eos").row_length == 1088
    assert geometry(window=1024, ratio=16, overlap=10).row_length == 1088
    assert geometry(window=256, ratio=16, overlap=10, bidirectional=True).row_length == 276
    assert geometry(window=8, overlap=3).row_length == 11


@PROPERTY
@given(st.lists(st.integers(1, 20), max_size=30))
def test_fill_rows(lengths):
    rows, offsets, used = fill_rows(lengths, 20)
    places = {
        (row, offset + i)
        for row, offset, length in zip(rows, offsets, lengths, strict=True)
        for i in range(length)
    }
    assert len(places) == sum(lengths)
    assert all(place < 20 for _, place in places)
    assert used == len(set(rows)) and used <= len(lengths)
    with pytest.raises(ValueError, match="21 tokens does not fit"):
        fill_rows([21], 20)


@PROPERTY
@given(case=cases(), chosen=st.integers(0, 2**16))
def test_ready_memories_take_the_same_places_and_no_rows(case, chosen):
    """A memory compressed before reads as the same one would, were it compressed now."""
    shape, rows = case
    picks = itertools.cycle(bool(chosen >> bit & 1) for bit in range(16))

    def ready(span):
        if span.kind == "text" or not next(picks):
            return span
        return Span.ready(shape.latents(len(span.ids), shape.span_ratio(span)))

    with_ready = [[Example(tuple(map(ready, example.spans))) for example in row] for row in rows]
    plain, arrays = lay_out(rows, shape), lay_out(with_ready, shape)
    for name in ("input_ids", "position_ids", "labels", "latent_index", "attention_mask", "memory_sizes"):
        assert np.array_equal(plain[name], arrays[name]), name
    spans = [span for row in with_ready for example in row for span in example.spans if span.kind == "memory"]
    assert arrays.get("memory_ready", np.zeros(len(spans))).tolist() == [not len(span.ids) for span in spans]
    made = np.repeat([len(span.ids) > 0 for span in spans], arrays["memory_sizes"]).nonzero()[0]
    assert sorted(set(arrays["block_index"][arrays["block_index"] >= 0].tolist())) == made.tolist()
    sizes = [shape.size(example) for row in with_ready for example in row]
    assert sum(size.latents for size in sizes) == arrays["memory_sizes"].sum()
    budget = len(plain["encoder_input_ids"])
    both = collate([lay_out(some, shape, encoder_rows=budget) for some in (with_ready, rows)])
    if "memory_ready" in both:
        expected = [not len(span.ids) for span in spans] + [False] * len(spans)
        assert both["memory_ready"].tolist() == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Span("text", np.zeros(0)), "at least one token"),
        (lambda: Span.ready(0), "at least one latent"),
        (lambda: Span("memory", np.ones(1), latents=1), "without ids"),
        (lambda: Span("text", np.zeros(0), latents=1), "is a memory"),
        (lambda: Span("code", np.ones(1)), "must be 'text' or 'memory'"),
        (lambda: Span("memory", np.ones(1), loss=True), "never bears loss"),
        (lambda: Span("text", np.ones(1), ratio=4), "no ratio"),
        (lambda: Example(()), "no spans"),
        (lambda: geometry(window=10), "does not divide the window of 10"),
        (lambda: geometry(overlap=-1), "overlap is -1"),
        (lambda: geometry().size(Example((memory(3, 3),))), "ratio 3 does not divide"),
        (
            lambda: geometry(pooling="eos").size(Example((memory(3, 8),))),
            "several ratios need pooling 'mean'",
        ),
        (lambda: geometry(max_ratio=4).size(Example((memory(3, 8),))), "ends at ratio 4"),
        (lambda: lay_out([[Example((text(1),))]], geometry(), padding_side="up"), "'left' or 'right'"),
        (lambda: collate([]), "at least one pack"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
