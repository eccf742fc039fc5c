"""Shards: what is written is read back, by anyone; what is damaged is said to be."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lclm.data.shards import DataSet, Sample, ShardWriter, check_messages, write_manifest
from lclm.data.verify import verify

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300)
META = st.dictionaries(
    st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.text(max_size=8), max_size=3
)


def make(
    folder: str | Path, samples: list[Sample], kind: str = "documents", max_bytes: int = 1 << 20
) -> DataSet:
    with ShardWriter(str(folder), kind=kind, max_bytes=max_bytes) as writer:
        for sample in samples:
            writer.write(sample)
    write_manifest(str(folder), name="x", kind=kind, split="train", shards=writer.shards)
    return DataSet.open(str(folder))


def documents(count: int) -> list[Sample]:
    return [Sample(f"d/{i:04d}", text=f"text {i} é日\n" * (i % 7 + 1), meta={"i": i}) for i in range(count)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(TEXT, META), min_size=1, max_size=12), st.sampled_from([4096, 1 << 20]))
def test_documents_round_trip(
    tmp_path_factory: pytest.TempPathFactory, content: list, max_bytes: int
) -> None:
    samples = [Sample(f"k{i}", text=text, meta=meta) for i, (text, meta) in enumerate(content)]
    found = make(tmp_path_factory.mktemp("d"), samples, max_bytes=max_bytes)
    assert list(found) == samples
    assert found.num_samples == len(samples)
    sizes = [size for shard in range(len(found.shards)) for size in found.text_bytes(shard)]
    assert sizes == [len(sample.text.encode()) for sample in samples]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=6))
def test_conversations_round_trip(tmp_path_factory: pytest.TempPathFactory, content: list) -> None:
    samples = [
        Sample(
            f"c{i}",
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "memory", "text": a, "ratio": 4}, {"type": "text", "text": b}],
                },
                {"role": "assistant", "content": c},
            ],
            meta={"n": i},
        )
        for i, (a, b, c) in enumerate(content)
    ]
    found = make(tmp_path_factory.mktemp("c"), samples, kind="conversations")
    assert list(found) == samples


def test_every_run_once_and_any_range(tmp_path: Path) -> None:
    samples = documents(100)
    found = make(tmp_path, samples, max_bytes=20_000)
    assert len(found.shards) > 2
    seen = [s for n in range(found.runs(7)) for s in found.read(*found.run(n, 7))]
    assert seen == samples
    assert [
        found.read(shard, place, place + 1)[0] for shard, place in map(found.locate, range(100))
    ] == samples
    assert pickle.loads(pickle.dumps(found)).read(1, 2, 4) == found.read(1, 2, 4)
    with pytest.raises(ValueError, match="no run"):
        found.run(found.runs(7), 7)


def test_webdataset_reads_them(tmp_path: Path) -> None:
    import webdataset

    samples = documents(30)
    found = make(tmp_path, samples, max_bytes=20_000)
    urls = [str(tmp_path / shard.file) for shard in found.shards]
    rows = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [(row["__key__"], row["txt"], row["json"]) for row in rows] == [
        (s.key, s.text, s.meta) for s in samples
    ]


def test_same_bytes_again(tmp_path: Path) -> None:
    first, second = (make(tmp_path / name, documents(20)) for name in "ab")
    assert first.fingerprint == second.fingerprint
    assert (tmp_path / "a/shard-00000.tar").read_bytes() == (tmp_path / "b/shard-00000.tar").read_bytes()
    assert make(tmp_path / "c", documents(19)).fingerprint != first.fingerprint


def test_over_another_file_system() -> None:
    url = "memory://shards/train"
    found = make(url, documents(10))
    assert found.read(0, 3, 5) == documents(10)[3:5]
    assert "are whole" in str(verify("memory://shards"))
    fsspec.filesystem("memory").rm("/shards", recursive=True)


@pytest.mark.parametrize(
    "sample",
    [
        Sample("a.b", text="x"),
        Sample("", text="x"),
        Sample("a", text=""),
        Sample("a", text=None),
        Sample("a", text="\ud800"),
        Sample("a", text="x", meta={"n": float("nan")}),
    ],
)
def test_bad_samples_are_refused(tmp_path: Path, sample: Sample) -> None:
    with pytest.raises(ValueError, match="sample"), ShardWriter(str(tmp_path), kind="documents") as writer:
        writer.write(Sample("good", text="x"))
        writer.write(sample)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        ["x"],
        [{"role": 1, "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image", "text": "x"}]}],
        [{"role": "user", "content": [{"type": "memory", "text": ""}]}],
    ],
)
def test_what_is_no_conversation(messages: object) -> None:
    with pytest.raises(ValueError, match="message"):
        check_messages(messages)


def test_a_missing_or_foreign_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a data set"):
        DataSet.open(str(tmp_path))
    make(tmp_path / "documents/train", documents(3))
    with pytest.raises(ValueError, match=r"name one of .*documents/train"):
        DataSet.open(str(tmp_path))
    manifest = tmp_path / "documents/train/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": 9}))
    with pytest.raises(ValueError, match="schema 9"):
        DataSet.open(str(tmp_path / "documents/train"))
    manifest.write_text('{"schema": 1}')
    with pytest.raises(ValueError, match="incomplete"):
        DataSet.open(str(tmp_path / "documents/train"))
    manifest.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        DataSet.open(str(tmp_path / "documents/train"))


def test_a_truncated_tar(tmp_path: Path) -> None:
    found = make(tmp_path, documents(20))
    tar = tmp_path / "shard-00000.tar"
    tar.write_bytes(tar.read_bytes()[: int(found.index(0)[10, 0]) + 100])
    assert found.read(0, 0, 10) == documents(10)
    with pytest.raises(
        ValueError, match=r"shard-00000.tar is damaged: cut short at sample 10.*lclm data verify"
    ):
        found.read(0, 8, 12)
    with pytest.raises(ValueError, match=r"shard-00000\.tar: .* bytes, the manifest says"):
        verify(str(tmp_path))


@pytest.mark.parametrize("place", [0, 600, 1200])
def test_a_flipped_bit(tmp_path: Path, place: int) -> None:
    found = make(tmp_path, documents(20))
    tar = tmp_path / "shard-00000.tar"
    data = bytearray(tar.read_bytes())
    data[int(found.index(0)[5, 0]) + place] ^= 4
    tar.write_bytes(data)
    with pytest.raises(ValueError, match="wrong CRC-32 of sample 5"):
        found.read(0, 4, 8)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        verify(str(tmp_path))


def test_a_missing_shard_and_a_damaged_index(tmp_path: Path) -> None:
    found = make(tmp_path, documents(5))
    (tmp_path / "shard-00000.npy").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"shard-00000\.npy is damaged"):
        found.read(0, 0, 1)
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((3, 4), np.int64))
    (tmp_path / "shard-00000.npy").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="not int64"):
        DataSet.open(str(tmp_path)).read(0, 0, 1)
    (tmp_path / "shard-00000.tar").unlink()
    (tmp_path / "shard-00000.npy").unlink()
    with pytest.raises(ValueError, match=r"shard-00000\.npy is missing"):
        DataSet.open(str(tmp_path)).read(0, 0, 1)
    with pytest.raises(ValueError, match="2 problems"):
        verify(str(tmp_path))


def test_a_sample_of_another_kind(tmp_path: Path) -> None:
    make(tmp_path, documents(2))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"kind": "conversations"}))
    with pytest.raises(ValueError, match="is not a conversations sample"):
        DataSet.open(str(tmp_path)).read(0, 0, 1)


FULL_DISK = """
import resource, signal, sys
from lclm.data.shards import Sample, ShardWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with ShardWriter(sys.argv[1], kind="documents", max_bytes=60_000) as writer:
        writer.write(Sample("small", text="x" * 50_000))
        writer.write(Sample("large", text="x" * 200_000))
except ValueError as error:
    print(error)
"""


def test_a_full_disk_leaves_no_half_shard(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "no space left while writing" in done.stdout
    assert "Free space" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-00000.npy", "shard-00000.tar"]
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        assert tar.getnames() == ["small.json", "small.txt"]
