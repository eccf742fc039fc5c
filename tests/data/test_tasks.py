from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lclm.data.room import Room
from lclm.data.settings import PackSettings, TaskSettings
from lclm.data.shards import Sample
from lclm.data.stream import Held, Place
from lclm.data.tasks import Document, make_task
from lclm.model.spans import lay_out
from tests.data import material


def held(text: str | None = None, messages=None) -> Held:
    return Held(Sample("key", text=text, messages=messages), Place(0, 0), 0, 0, 0)


def all_cuts(task, text: str, pack: PackSettings, seed: int = 0):
    """Cut a document to its end, each example into an empty pack."""
    document = Document(held(text), task.tokenizer)
    draws, cuts = random.Random(seed), []
    while True:
        room = Room(pack, task.geometry)
        cut = task.cut(document, room, draws, pack.positions)
        assert cut is not None and room.fits(cut.size)
        assert cut.size == task.geometry.size(cut.example)
        lay_out(
            [[cut.example]],
            task.geometry,
            positions=pack.positions,
            encoder_rows=pack.rows,
            latents=pack.latents,
        )
        cuts.append(cut)
        if cut.offset is None:
            return cuts
        assert cut.offset > document.held.offset
        document.held.offset = cut.offset


def read_back(tokenizer, spans) -> str:
    parts = []
    for span in spans:
        content = tokenizer.encoder_content if span.kind == "memory" else tokenizer.content
        parts.append(content.decode([i for i in span.ids.tolist() if i != tokenizer.end_of_text_id]))
    return "".join(parts)


def make(name: str, tokenizer, ratios=(4, 8), window=64, **options):
    geometry = material.geometry(tokenizer, ratio=4, window=window)
    return make_task("t", TaskSettings(name, "documents", **options), tokenizer, geometry, ratios)


PACK = PackSettings(256, 6, 100)


@given(
    text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=900),
    name=st.sampled_from(["interleave", "plain"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_spans_of_a_document_are_its_text(text, name, seed):
    tokenizer = material.span_tokenizer("bytes")
    options = {"min_span": 16, "max_span": 64} if name == "interleave" else {}
    cuts = all_cuts(make(name, tokenizer, **options), text, PACK, seed)
    assert "".join(read_back(tokenizer, cut.example.spans) for cut in cuts) == text
    assert sum(cut.source_tokens for cut in cuts) == len(text.encode())
    ends = [span.ids[-1] == tokenizer.end_of_text_id for cut in cuts for span in cut.example.spans]
    assert ends[-1] and sum(ends) == 1


@pytest.mark.parametrize("encoder", [None, "bpe-small"])
def test_interleave_alternates_whole_blocks(encoder):
    tokenizer = material.span_tokenizer("bpe", encoder)
    task = make("interleave", tokenizer, window=256, min_span=16, max_span=400)
    text = "".join(material.stdlib_texts(5)[2:])
    cuts = all_cuts(task, text, PackSettings(2048, 8, 600))
    assert "".join(read_back(tokenizer, cut.example.spans) for cut in cuts) == text
    ratios, memory = set(), 0
    for cut in cuts:
        kinds = [span.kind for span in cut.example.spans]
        assert all(a != b for a, b in pairwise(kinds)) and kinds[-1] == "text"
        assert all(span.loss == (span.kind == "text") for span in cut.example.spans)
        for span in cut.example.spans:
            if span.kind == "memory":
                ratios.add(span.ratio)
                memory += len(span.ids)
                assert len(span.ids) % span.ratio == 0 or encoder
    assert ratios == {4, 8}
    assert 0.2 < memory / sum(cut.source_tokens for cut in cuts) < 0.8


def test_spans_are_tokenised_as_at_inference():
    tokenizer = material.span_tokenizer("bpe", "bpe-small")
    task = make("interleave", tokenizer, window=256, min_span=16, max_span=200)
    for cut in all_cuts(task, material.stdlib_texts(5)[4], PackSettings(1024, 6, 300)):
        for span in cut.example.spans:
            content = tokenizer.encoder_content if span.kind == "memory" else tokenizer.content
            ids = [i for i in span.ids.tolist() if span.kind == "memory" or i != tokenizer.end_of_text_id]
            assert content.encode(content.decode(ids)).tolist() == ids


def test_reconstruct_repeats_the_memory():
    tokenizer = material.span_tokenizer("bytes")
    task = make("reconstruct", tokenizer, min_span=64, max_span=64, prompt="Again:")
    text = material.stdlib_texts(2)[1][:1000]
    cuts = all_cuts(task, text, PACK)
    assert "".join(read_back(tokenizer, cut.example.spans[:1]) for cut in cuts) == text
    for cut in cuts:
        memory, prompt, repeated = cut.example.spans
        assert (memory.kind, prompt.loss, repeated.loss) == ("memory", False, True)
        assert tokenizer.content.decode(prompt.ids) == "Again:"
        assert repeated.ids.tolist() == [*memory.ids.tolist(), tokenizer.end_of_text_id]
        assert cut.source_tokens == len(memory.ids)
    assert {len(cut.example.spans[0].ids) for cut in cuts[:-1]} == {64}


def test_reconstruct_an_excerpt():
    tokenizer = material.span_tokenizer("bpe", "bpe-small")
    task = make(
        "reconstruct", tokenizer, min_span=64, max_span=64, prompt="Quote:", excerpt=16, end_of_text=False
    )
    places = set()
    for cut in all_cuts(task, material.stdlib_texts(2)[1][:4000], PACK)[:-1]:
        memory, _, quoted = cut.example.spans
        whole, part = tokenizer.encoder_content.decode(memory.ids), tokenizer.content.decode(quoted.ids)
        assert part in whole and abs(len(quoted.ids) - 16) <= 2
        places.add(whole.index(part))
    assert len(places) > 4


def chat_messages(words: int):
    memory = {"type": "memory", "text": "fact " * words}
    parts = [dict(memory), {"type": "text", "text": "and"}, dict(memory), {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": "It says so."}]


def test_a_conversation_over_budget_is_skipped_or_shortened_first_memory_first():
    tokenizer = material.span_tokenizer("bytes")
    geometry = material.geometry(tokenizer, ratio=4, window=64)
    empty, draws = Room(PACK, geometry), random.Random(0)
    tasks = {
        way: make_task("t", TaskSettings("chat", "c", over_budget=way), tokenizer, geometry)
        for way in ("skip", "shorten")
    }
    for task in tasks.values():
        cut, done = task.conversation(held(messages=chat_messages(10)), empty, draws)
        assert done is None and [len(s.ids) for s in cut.example.spans if s.kind == "memory"] == [50, 50]
    long = held(messages=chat_messages(50))
    assert tasks["skip"].conversation(long, empty, draws) == (None, "over budget")
    cut, done = tasks["shorten"].conversation(long, empty, draws)
    first, second = (len(span.ids) for span in cut.example.spans if span.kind == "memory")
    assert done == "shortened" and second == 250 and 0 < first < 250 and first % 4 == 0
    assert empty.fits(cut.size)
    silent = [{"role": "user", "content": "Hello"}]
    assert tasks["skip"].conversation(held(messages=silent), empty, draws) == (None, "no assistant text")


def test_a_conversation_that_no_shortening_helps_is_dropped():
    tokenizer = material.span_tokenizer("bytes")
    geometry = material.geometry(tokenizer, ratio=4, window=64)
    task = make_task("t", TaskSettings("chat", "c", over_budget="shorten"), tokenizer, geometry)
    messages = [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "y"}]
    room = Room(PACK, geometry)
    assert task.conversation(held(messages=messages), room, random.Random(0))[0] is None


def test_hostile_text_stays_text():
    tokenizer = material.span_tokenizer("bytes")
    text = "".join(material.CONTROLS) * 6
    for name in ("interleave", "plain", "reconstruct"):
        options = {} if name == "plain" else {"min_span": 16, "max_span": 64}
        ids = {
            int(i)
            for cut in all_cuts(make(name, tokenizer, **options), text, PACK)
            for span in cut.example.spans
            for i in span.ids
        }
        controls = {tokenizer.tokenizer.convert_tokens_to_ids(token) for token in material.CONTROLS}
        assert ids & controls <= {tokenizer.end_of_text_id}


def test_a_ratio_that_does_not_divide_the_window_names_the_task():
    tokenizer = material.span_tokenizer("bytes")
    with pytest.raises(ValueError, match=r"data\.tasks\.t\.ratios: ratio 7"):
        make("interleave", tokenizer, ratios=(4, 7))


def test_room_fills_gaps_exactly():
    tokenizer = material.span_tokenizer("bytes")
    room = Room(PackSettings(10_000, 3, 10_000), material.geometry(tokenizer, ratio=4, window=64))
    room.take_memory(40, 4)
    assert room.gaps == [64, 64, 24] and room.row_tokens == 152
    assert room.memory_length(80, 16, 10_000, 4) == 88  # a whole window and the gap of 24
    assert room.memory_length(26, 16, 10_000, 4) == 24
    assert room.memory_length(30, 30, 30, 4) == 30  # the rest of a document is taken as it is
    room.take_memory(152, 4)
    assert room.gaps == [] and room.memory_length(8, 1, 100, 4) == 0
