"""Builds: from files to data sets, the same bytes for any number of workers, whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data_pipelines.build import Built, build, build_tokenizer
from lclm.data.shards import DataSet
from lclm.data.verify import verify

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma",
    "tau",
]


def text_of(number: int) -> str:
    """A document of its own for each number."""
    words = [WORDS[int(c, 16)] + c for c in hashlib.sha256(str(number).encode()).hexdigest()]
    return "\n".join(" ".join(words[i : i + 8]) for i in range(0, 64, 8)) + "\n"


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder of texts, one of JSON lines, one of Parquet, each with things that cannot be documents."""
    import pyarrow
    import pyarrow.parquet

    for i in range(20):
        write(tmp_path / f"text/{i % 3}/{i}.txt", text_of(i))
    write(tmp_path / "text/bad.txt", b"\xff\xfe broken")
    write(tmp_path / "text/empty.txt", " \n")
    write(tmp_path / "text/copy.txt", text_of(1))
    rows = [json.dumps({"text": text_of(100 + i), "id": f"row {i}", "stars": i}) for i in range(10)]
    rows += ["{broken", '"a string"', '{"text": 5}', '{"other": "x"}', ""]
    write(tmp_path / "lines/a.jsonl", "\n".join(rows).encode() + b'\n{"text": "\xff"}\n')
    chats = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(9)
    ]
    write(tmp_path / "chats/a.jsonl", "\n".join(map(json.dumps, [*chats, {"messages": []}])))
    table = pyarrow.table({"body": [text_of(200 + i) for i in range(6)], "when": [float("nan")] * 6})
    (tmp_path / "tables").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "tables/a.parquet")
    return tmp_path


def recipe(folder: Path, **more: object) -> Path:
    content = {
        "name": "mixed",
        "out": str(folder / "out"),
        "sources": {
            "text": {"kind": "text", "path": str(folder / "text"), "licence": "CC0-1.0"},
            "lines": {"kind": "jsonl", "path": str(folder / "lines")},
            "chats": {"kind": "jsonl", "path": str(folder / "chats"), "messages_key": "messages"},
            "tables": {"kind": "parquet", "path": str(folder / "tables"), "text_key": "body"},
        },
        "filters": {"length": {"kind": "length", "options": {"min_bytes": 8}}},
        "split": {"heldout": 0.2},
        "conversations": {"next_line": {"kind": "next_line", "context": [80, 200]}},
        "executor": {"tasks": 3, "workers": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | more))
    return path


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_build(sources: Path) -> None:
    result = build(recipe(sources))
    assert result.status == "built"
    assert "4 data sets are whole" in str(verify(str(sources / "out")))
    train, heldout = (DataSet.open(str(sources / "out/documents" / split)) for split in ("train", "heldout"))
    texts = [sample.text for data_set in (train, heldout) for sample in data_set]
    expected = [text_of(i) for i in (*range(20), 1, *range(100, 110), *range(200, 206))]
    assert sorted(texts) == sorted(expected)
    assert {s.text for s in train} & {s.text for s in heldout} == set()
    dropped = train.manifest["dropped"]
    assert dropped == {
        "chats: not a conversation": 1,
        "filters.length: too short": 9,
        "lines: empty": 1,
        "lines: invalid UTF-8": 1,
        "lines: not a JSON object": 1,
        "lines: text is not a string": 1,
        "lines: wrong JSON": 1,
        "text: empty": 1,
        "text: invalid UTF-8": 1,
    }
    assert {s["name"]: s["licence"] for s in train.manifest["sources"]}["text"] == "CC0-1.0"
    row = next(s for s in [*train, *heldout] if s.meta["source"] == "lines")
    assert row.meta["id"].startswith("row ") and "stars" in row.meta
    for split, documents in (("train", train), ("heldout", heldout)):
        paths = {(s.meta["source"], s.meta["path"]) for s in documents}
        chats = list(DataSet.open(str(sources / "out/conversations" / split)))
        assert chats and {(s.meta["source"], s.meta["path"]) for s in chats} <= paths

    again = build(recipe(sources))
    assert again.status == "up to date" and "FRESH=1" in str(again)
    before = digests(sources / "out")
    assert build(recipe(sources), fresh=True).status == "built"
    assert digests(sources / "out") == before
    assert sorted(p.name for p in sources.iterdir() if p.name.startswith(".")) == [".out.lock"]


def test_any_number_of_workers_gives_the_same_bytes(sources: Path) -> None:
    options = {"dedup": {"kind": "minhash", "buckets": 4}, "filters": {}}
    build(recipe(sources, **options))
    first = digests(sources / "out")
    build(recipe(sources, **options), ["executor.workers=2", f"out={sources / 'other'}"])
    assert digests(sources / "other") == first


@pytest.mark.parametrize("kind", ["exact", "minhash"])
def test_duplicates(sources: Path, kind: str) -> None:
    write(sources / "text/near.txt", text_of(2).replace("\n", " !\n"))
    result = build(
        recipe(sources, dedup={"kind": kind}, conversations={}), ["executor.tasks=2", "split.heldout=0"]
    )
    manifest = result.data_sets["documents/train"]
    found = {reason: n for reason, n in manifest["dropped"].items() if "duplicates" in reason}
    assert found == ({"exact duplicates": 1} if kind == "exact" else {"near duplicates (minhash)": 2})
    assert manifest["samples"] == 37 if kind == "exact" else 36


def test_decontamination(sources: Path) -> None:
    write(sources / "eval/questions.jsonl", json.dumps({"text": "x " + text_of(3)[20:300]}))
    evaluations = {"quiz": {"kind": "jsonl", "path": str(sources / "eval")}}
    more = {"decontamination": {"ngrams": 8, "evaluations": evaluations}, "split": {"heldout": 0}}
    result = build(recipe(sources, **more))
    manifest = result.data_sets["documents/train"]
    assert manifest["dropped"]["decontamination: contaminated"] == 1
    texts = [sample.text for sample in DataSet.open(str(sources / "out/documents/train"))]
    assert text_of(3) not in texts and text_of(4) in texts


def test_changed_recipe_or_input_builds_again(sources: Path) -> None:
    small = {
        "conversations": {},
        "sources": {"text": {"kind": "text", "path": str(sources / "text")}},
        "filters": {},
    }
    path = recipe(sources, **small)
    first = build(path).data_sets["documents/train"]["fingerprint"]
    assert build(path, ["split.salt=other"]).data_sets["documents/train"]["fingerprint"] != first
    assert build(path).data_sets["documents/train"]["fingerprint"] == first
    write(sources / "text/new.txt", text_of(77))
    assert build(path).status == "built"
    shard = next((sources / "out/documents/train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:1000])
    assert build(path).status == "built"
    verify(str(sources / "out"))


def test_huggingface_by_name_streaming(sources: Path) -> None:
    source = {
        "kind": "huggingface",
        "path": str(sources / "tables"),
        "text_key": "body",
        "options": {"split": "train"},
    }
    result = build(recipe(sources, sources={"hub": source}, conversations={}, split={"heldout": 0}))
    assert result.data_sets["documents/train"]["samples"] == 6
    assert (
        build(recipe(sources, sources={"hub": source}, conversations={}, split={"heldout": 0})).status
        == "up to date"
    )
    with pytest.raises(ValueError, match="source hub: name the split"):
        build(recipe(sources, sources={"hub": source | {"options": {}}}))
    with pytest.raises(ValueError, match="source hub: datasets cannot load"):
        build(recipe(sources, sources={"hub": source | {"path": str(sources / "nowhere")}}))


def test_tokens_are_counted_and_the_tokenizer_is_made(sources: Path) -> None:
    small = {"sources": {"text": {"kind": "text", "path": str(sources / "text")}}, "conversations": {}}
    result = build(recipe(sources, **small, tokenizer={"kind": "bytes", "words": [" alpha"]}))
    for manifest in result.data_sets.values():
        assert list(manifest["tokens"].values()) == [manifest["text_bytes"]]
    assert (sources / "out/tokenizer/tokenizer.json").is_file()
    line = build_tokenizer(recipe(sources, **small, tokenizer={"kind": "bpe", "vocabulary": 300}))
    assert "308 tokens" in line and (sources / "out-tokenizer/tokenizer.json").is_file()
    counted = build(recipe(sources, **small, count_tokens_with=str(sources / "out-tokenizer")))
    assert (
        0 < next(iter(counted.data_sets["documents/train"]["tokens"].values())) < manifest["text_bytes"] * 10
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"surces": {}}, "did you mean 'sources'"),
        ({"sources": {"a": {"kind": "txt", "path": "x"}}}, "did you mean 'text'"),
        (
            {"sources": {"a": {"kind": "text", "path": "/no/such/place"}}},
            "source a: cannot read /no/such/place",
        ),
        ({"sources": {"a": {"kind": "stdlib", "path": "x"}}}, "finds its own path"),
        ({"sources": {"a": {"kind": "text", "path": "x", "text_key": "t"}}}, "text_key has no effect"),
        ({"filters": {"f": {"kind": "gopher"}}}, "did you mean 'gopher_"),
        (
            {"filters": {"f": {"kind": "length", "options": {"least": 3}}}},
            "filters.f.options: unknown option 'least'",
        ),
        ({"executor": {"kind": "slurm"}}, "executor.options .slurm.*time"),
        ({"executor": {"options": {"start": 1}}}, "unknown option 'start'"),
        ({"out": "s3://bucket/x"}, "local or shared file system"),
        ({"sources": {}}, "needs `sources:`"),
    ],
)
def test_mistakes_are_named(sources: Path, more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(recipe(sources, **more))


def test_nothing_left_and_foreign_folders(sources: Path) -> None:
    options = {"filters": {"length": {"kind": "length", "options": {"min_bytes": 10**9}}}}
    with pytest.raises(ValueError, match=r"no documents left \(.*too short"):
        build(recipe(sources, **options))
    assert not (sources / "out").exists()
    write(sources / "out/precious.txt", "x")
    with pytest.raises(ValueError, match="was not made by"):
        build(recipe(sources))
    assert (sources / "out/precious.txt").read_text() == "x"


def test_a_damaged_parquet_file(sources: Path) -> None:
    table = sources / "tables/a.parquet"
    table.write_bytes(table.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"source tables: a\.parquet is no readable Parquet file"):
        build(recipe(sources))
    assert not (sources / "out").exists()


RUN = """
import sys
if __name__ == "__main__":
    from data_pipelines.build import build
    build(sys.argv[1], sys.argv[2:])
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    script = folder / "run.py"
    script.write_text(RUN)
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    return subprocess.Popen(
        [sys.executable, str(script), *arguments], env=environment, start_new_session=True
    )


def test_killed_and_started_again(sources: Path) -> None:
    path = recipe(sources, dedup={"kind": "minhash", "buckets": 2})
    expected = digests(build(path).path)
    shutil.rmtree(sources / "out")
    process = start(sources, str(path), "executor.workers=2")
    deadline = time.monotonic() + 120
    while not list(sources.glob(".out.building-*/logs/read/completions/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (sources / "out").exists()
    try:
        assert build(path).status == "built"
        assert digests(sources / "out") == expected
    finally:  # datatrove's manager process outlives a killed parent
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_full_disk(sources: Path) -> None:
    script = sources / "full.py"
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))\n"
    body = RUN.replace("    build(", f"    {limit.replace(chr(10), chr(10) + '    ')}build(")
    script.write_text(body)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, str(script), str(recipe(sources))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode and "no space left" in done.stderr, done.stderr[-3000:]
    assert not (sources / "out").exists()
    assert not list(sources.glob(".out.building-*/out/**/*.tmp"))
    assert isinstance(build(recipe(sources)), Built)
    verify(str(sources / "out"))
