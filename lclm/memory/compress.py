"""Documents to an artifact file: what `lclm compress` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import Any

from lclm.ask.documents import Document, printable
from lclm.model.artifact import SUFFIX, Artifact


@dataclass(frozen=True)
class Written:
    """What `compress` wrote. windows: all of them; known: how many were not encoded again."""

    artifact: Artifact
    windows: int
    known: int
    bytes: int

    def __str__(self) -> str:
        memories = self.artifact.memories
        tokens, latents = sum(m.tokens for m in memories), sum(self.artifact.sizes)
        again = f"; {self.known:,} of {self.windows:,} windows were known" if self.known else ""
        return (
            f"{len(memories):,} {'memory' if len(memories) == 1 else 'memories'}, {tokens:,} tokens as "
            f"{latents:,} latents ({tokens / latents:.1f}x), {self.bytes:,} bytes{again}"
        )


def check_output(output: Path, documents: Sequence[Document]) -> None:
    """ValueError, before any work, for an output that cannot be written or is among what is read."""
    name = printable(output)
    if output.suffix != SUFFIX:
        raise ValueError(
            f"{name}: an artifact's name ends in {SUFFIX}; call it {printable(output.stem)}{SUFFIX}"
        )
    if not output.parent.is_dir():
        raise ValueError(f"{name}: there is no folder {printable(output.parent)}; make it first")
    if output.is_dir():
        raise ValueError(f"{name}: is a folder; name a file")
    for document in documents:
        if document.artifact is not None and output.exists() and document.artifact.samefile(output):
            raise ValueError(
                f"{name}: is both read and written; give --output a name outside of what is read"
            )


def compress(
    model: Any,
    processor: Any,
    documents: Sequence[Document],
    output: Path,
    *,
    ratio: int | None = None,
    licence: str | None = None,
    fresh: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the documents' artifact, in their order; artifacts among them are taken as they are.

    Where `output` is an artifact of the same model already, windows that it holds are not encoded again,
    unless `fresh`. ValueError for one of another model or a damaged one, and as `model.compress` raises.
    """
    check_output(output, documents)
    parts: dict[Path, Artifact] = {}
    for document in documents:
        if document.artifact is not None:
            parts[document.artifact] = Artifact.load(document.artifact)
            model.check_artifact(parts[document.artifact], document.name)
    if len(parts) == len(documents) and (ratio, licence) != (None, None):
        raise ValueError("--ratio and --licence have no effect: what is in an artifact is compressed already")
    previous = None if fresh else _previous(model, output)
    texts = [document for document in documents if document.text is not None]
    counted: list[tuple[int, int]] = [(0, 0)]

    def tell(done: int, total: int) -> None:
        counted.append((done, total))
        if progress is not None:
            progress(done, total)

    made = None
    if texts:
        made = model.compress(
            processor,
            [document.text for document in texts],
            names=[document.name for document in texts],
            ratio=ratio,
            licence=licence,
            previous=previous,
            progress=tell,
        )
    artifact = _in_order(documents, made, parts)
    artifact.save(output)
    known, windows = counted[min(1, len(counted) - 1)]
    return Written(artifact, windows, known, output.stat().st_size)


def _in_order(documents: Sequence[Document], made: Artifact | None, parts: dict[Path, Artifact]) -> Artifact:
    """The memories `made` of texts and those of the artifacts among the documents, in their order."""
    numbers = count()
    found = []
    for path, group in groupby(documents, lambda document: document.artifact):
        if path is not None:
            found += [parts[path] for _ in group]
        elif made is not None:
            found.append(made.select([next(numbers) for _ in group]))
    return Artifact.concatenate(found)


def _previous(model: Any, output: Path) -> Artifact | None:
    if not output.exists():
        return None
    try:
        previous = Artifact.load(output)
        model.check_artifact(previous, printable(output))
        if previous.latents.dtype != model.dtype:
            raise ValueError(
                f"{printable(output)} holds {previous.latents.dtype}, the model is in {model.dtype}"
            )
    except ValueError as error:
        raise ValueError(f"{error}. To write it anew: --fresh") from None
    return previous
