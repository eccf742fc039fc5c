from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lclm.data.boundaries import MARGIN, PIECE, Boundaries
from tests.data import material

TEXT = "\n".join(material.stdlib_texts(4)) + "héllo 🎉🎉 日本語 " * 400 + material.stdlib_texts(6)[5]


def true_boundaries(content, text: str) -> set[int]:
    starts = content.encode_with_offsets(text)[1]
    return {int(start) for start in starts if start > 0} | {len(text)}


def test_boundaries_are_those_of_the_whole_text():
    for name in ("bpe", "bytes"):
        content = material.span_tokenizer(name).content
        found, counts = Boundaries(TEXT, content.encode_with_offsets).after(0, 10**9)
        assert set(found.tolist()) == true_boundaries(content, TEXT)
        assert counts[-1] == len(content.encode(TEXT))
        assert (np.diff(found) > 0).all() and (np.diff(counts) > 0).all()


@given(start=st.integers(0, len(TEXT) - 1), tokens=st.integers(1, 5000))
@settings(max_examples=40, deadline=None)
def test_counts_are_tokens_and_never_too_many(start, tokens):
    content = material.span_tokenizer("bpe").content
    whole, _ = Boundaries(TEXT, content.encode_with_offsets).after(0, 10**9)
    begin = int(whole[np.searchsorted(whole, start)])
    if begin == len(TEXT):
        return
    found, counts = Boundaries(TEXT, content.encode_with_offsets).after(begin, tokens)
    assert len(found) and found[0] > begin
    assert counts[-1] <= tokens or len(counts) == 1
    assert set(found.tolist()) <= set(whole.tolist())
    assert abs(len(content.encode(TEXT[begin : int(found[-1])])) - int(counts[-1])) <= 2


def test_a_long_document_costs_its_length_once():
    content = material.span_tokenizer("bytes").content
    text = TEXT * 40
    read = 0

    def counting(piece: str):
        nonlocal read
        read += len(piece)
        return content.encode_with_offsets(piece)

    boundaries, at = Boundaries(text, counting), 0
    while at < len(text):
        at = int(boundaries.after(at, 3000)[0][-1])
    assert read <= len(text) * (1 + 2.5 * MARGIN / PIECE) + PIECE

    read = 0
    Boundaries(text, counting).after(len(text) // 2, 100)
    assert read <= 2 * (PIECE + 2 * MARGIN)


def test_rest_and_a_character_of_many_tokens():
    content = material.span_tokenizer("bytes").content
    boundaries = Boundaries("🎉🎉ab", content.encode_with_offsets)
    assert boundaries.rest(0, 100) == 10 and boundaries.rest(1, 100) == 6 and boundaries.rest(0, 5) == 6
    found, counts = boundaries.after(0, 2)
    assert found.tolist() == [1] and counts.tolist() == [4]
