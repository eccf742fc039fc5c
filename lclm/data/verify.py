"""`lclm data verify`: every file of a data set against its manifest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import fsspec

from .shards import MANIFEST, DataSet, Shard, fingerprint

SHOWN = 12
PIECE = 1 << 24


@dataclass
class Verified:
    """What was checked and found whole, by the folder of each data set."""

    url: str
    data_sets: dict[str, DataSet]

    def __str__(self) -> str:
        lines = [f"{self.url}: all {len(self.data_sets)} data sets are whole"]
        for url, found in self.data_sets.items():
            size = sum(shard.bytes for shard in found.shards) / 1e6
            lines.append(f"  {url}: {found.num_samples:,} samples, {len(found.shards)} shards, {size:.1f} MB")
        return "\n".join(lines)


def verify(url: str) -> Verified:
    """Check a data set, or all below a folder: checksums, indexes, counts, and that every sample reads.

    :param url: folder or fsspec URL.
    :raises ValueError: nothing there, or a list of what differs from the manifests.
    """
    url = str(url).rstrip("/")
    fs, path = fsspec.url_to_fs(url)
    own = f"{path}/{MANIFEST}"
    found = [own] if fs.exists(own) else fs.glob(f"{path}/**/{MANIFEST}")
    places = sorted(url + name[len(path) : -len(MANIFEST) - 1] for name in found)
    if not places:
        DataSet.open(url)
    data_sets = {place: DataSet.open(place) for place in places}
    problems = [problem for found in data_sets.values() for problem in problems_of(found)]
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "".join(f"\n  {problem}" for problem in problems[:SHOWN])
        raise ValueError(
            f"{url}: {len(problems)} problems{listed}{more}\n"
            "Copy the files named from a good place, or build the data set again."
        )
    return Verified(url, data_sets)


def problems_of(data_set: DataSet) -> list[str]:
    """What differs from the manifest, one line each."""
    problems = []
    if fingerprint(data_set.kind, data_set.shards) != data_set.fingerprint:
        problems.append(f"{data_set.url}/{MANIFEST}: its fingerprint is not that of its shards")
    for name in ("samples", "bytes", "text_bytes"):
        total = sum(getattr(shard, name) for shard in data_set.shards)
        if total != data_set.manifest.get(name):
            problems += [f"{data_set.url}/{MANIFEST}: {name} is not {total}, the sum over its shards"]
    for number, shard in enumerate(data_set.shards):
        problems += _file_problems(data_set, shard) or _sample_problems(data_set, number, shard)
    return problems


def _file_problems(data_set: DataSet, shard: Shard) -> list[str]:
    fs, path = fsspec.url_to_fs(data_set.url)
    problems = []
    expectations = ((shard.file, shard.sha256, shard.bytes), (shard.index, shard.index_sha256, None))
    for name, expected, size in expectations:
        try:
            digest, length = hashlib.sha256(), 0
            with fs.open(f"{path}/{name}", "rb") as file:
                while piece := file.read(PIECE):
                    digest.update(piece)
                    length += len(piece)
        except FileNotFoundError:
            problems.append(f"{data_set.url}/{name}: missing")
            continue
        if size is not None and length != size:
            problems.append(f"{data_set.url}/{name}: {length:,} bytes, the manifest says {size:,}")
        elif digest.hexdigest() != expected:
            problems.append(f"{data_set.url}/{name}: its SHA-256 differs from the manifest's")
    return problems


def _sample_problems(data_set: DataSet, number: int, shard: Shard) -> list[str]:
    """Read every sample, so that index and shard are known to belong together."""
    try:
        for start in range(0, shard.samples, 256):
            data_set.read(number, start, start + 256)
        if int(data_set.text_bytes(number).sum()) != shard.text_bytes:
            return [f"{data_set.url}/{shard.index}: bytes of text differ from the manifest's"]
    except ValueError as error:
        return [str(error)]
    return []
