"""compress: texts to an artifact; fingerprints: which model it was."""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .artifact import Artifact, Compressed
from .fingerprint import StoredWeights, fingerprints
from .spans import Geometry, Span
from .windows import Window, cut, fill_rows, lay_out_windows

ROW_TOKENS = 1 << 14
"""What compress encodes at once, unless config.max_rows_per_forward says otherwise."""
_SAMPLED = 16


@dataclass
class _Memory:
    """A text on its way into an artifact: where its blocks start, its windows and their digests."""

    made: Compressed
    starts: np.ndarray
    windows: list[Window]
    digests: list[bytes]


class Compression:
    """What a model can do with texts and artifacts alone."""

    config: Any
    device: Any
    encoder: Any
    adapter: Any
    block_position: Any
    _rows: Any
    _known_fingerprints: tuple[Any, dict[str, str]] | None = None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; remembers the fingerprints that the checkpoint states."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if stated := getattr(model.config, "fingerprints", None):
            model._known_fingerprints = model._seen(), dict(stated)
        return loaded

    def fingerprints(self) -> dict[str, str]:
        """{component: SHA-256 of its weights} of encoder, adapter, decoder and brackets.

        What the checkpoint states while no weight has changed since it was loaded; otherwise computed, for
        parts that are not loaded (encoder=False) from the checkpoint's files.
        """
        seen = self._seen()
        if self._known_fingerprints is None or self._known_fingerprints[0] != seen:
            self._known_fingerprints = seen, self._compute_fingerprints()
        return dict(self._known_fingerprints[1])

    def _seen(self) -> tuple[list[tuple[int, int]], bytes]:
        """What changes when a weight does: which tensors there are, how often each was written, and a few of
        its values, for writes through `.data`."""
        weights = list(self.parameters())  # type: ignore[attr-defined]
        held = [weight.detach() for weight in weights if not weight.is_meta]
        some = [
            weight.view(-1)[:: max(weight.numel() // _SAMPLED, 1)]
            for weight in held
            if weight.is_contiguous()
        ]
        values = torch.cat([values.float().cpu() for values in some]) if some else torch.empty(0)
        return [(id(weight), weight._version) for weight in weights], values.numpy().tobytes()

    def _compute_fingerprints(self) -> dict[str, str]:
        model: Any = self
        if self.encoder is not None:
            return fingerprints(model)
        with torch.device("meta"):
            whole = type(model)(self.config)
        source = str(getattr(self, "name_or_path", None) or "")
        stored = StoredWeights(source, set(whole.state_dict()), getattr(self.config, "_commit_hash", None))
        try:
            return fingerprints(whole, ChainMap(model.state_dict(), stored))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(
                f"the fingerprints of {source or 'this model'} are unknown: its configuration states none, "
                f"and {error}; load it without encoder=False"
            ) from None

    def check_artifact(self, artifact: Any, name: str = "the artifact") -> None:
        """ValueError, with the reason, for an artifact that this model cannot read."""
        width = self.config.decoder_config.hidden_size
        if artifact.latents.shape[1] != width:
            raise ValueError(
                f"{name} holds latents of {artifact.latents.shape[1]} numbers, this model's decoder takes "
                f"{width}; compress its sources with this model"
            )
        if reason := artifact.differs(self.fingerprints(), self._stated_geometry()):
            raise ValueError(
                f"{name} cannot be read by this model: {reason}; compress its sources with this model, or "
                "load the model that made it"
            )

    @torch.no_grad()
    def compress(
        self,
        processor: Any,
        texts: str | Sequence[str],
        *,
        ratio: int | None = None,
        names: str | Sequence[str] | None = None,
        licence: str | None = None,
        previous: Artifact | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Artifact:
        """Compress each text into one memory of an artifact, latents [M, K] on the CPU.

        names: what the texts are called. previous: an artifact of this model; windows whose row tokens it
        holds are not encoded again (with an attention adapter, which mixes a memory's latents, all are).
        progress(done, total) counts windows. ValueError for a text without tokens, a ratio that the model
        cannot serve, and a `previous` of another model or precision.
        """
        if self.encoder is None:
            raise ValueError("this model was loaded with encoder=False and cannot compress; load it whole")
        texts = [texts] if isinstance(texts, str) else list(texts)
        names = [names] if isinstance(names, str) else names
        names = [f"memory {number + 1}" for number in range(len(texts))] if names is None else list(names)
        if not texts or len(names) != len(texts):
            raise ValueError(f"compress got {len(texts)} texts and {len(names)} names")
        if previous is not None:
            self.check_artifact(previous, "`previous`")
            if previous.latents.dtype != self.adapter.fc2.weight.dtype:
                raise ValueError(
                    f"`previous` holds {previous.latents.dtype}, this model computes in "
                    f"{self.adapter.fc2.weight.dtype}; load it in that precision, or compress all again"
                )
        geometry = self.config.geometry()
        content = processor.spans.encoder_content
        memories = [
            _memory(content, text, geometry, ratio, name, licence)
            for text, name in zip(texts, names, strict=True)
        ]
        latents = self._latents(memories, geometry, previous, progress or (lambda done, total: None))
        digests = b"".join(digest for memory in memories for digest in memory.digests)
        return Artifact(
            latents,
            tuple(memory.made for memory in memories),
            torch.from_numpy(np.concatenate([memory.starts for memory in memories])),
            torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, 32),
            self.fingerprints(),
            self._stated_geometry(),
        )

    def _stated_geometry(self) -> dict[str, Any]:
        config = self.config
        return {
            "window": config.window,
            "overlap": config.overlap,
            "pooling": config.pooling,
            "attention": config.encoder_attention,
        }

    def _latents(
        self,
        memories: Sequence[_Memory],
        geometry: Geometry,
        previous: Artifact | None,
        progress: Callable[[int, int], None],
    ) -> Tensor:
        """Latents of all memories, [M, K]; windows that `previous` holds are taken from it."""
        alone = self.config.adapter == "mlp"
        known = _known(previous) if previous is not None and alone else {}
        windows = [window for memory in memories for window in memory.windows]
        states = [known.get(digest) for memory in memories for digest in memory.digests]
        wanted = [number for number, state in enumerate(states) if state is None]
        done = len(windows) - len(wanted)
        progress(done, len(windows))
        lengths = [len(windows[number].ids) for number in wanted]
        rows = self.config.max_rows_per_forward or max(ROW_TOKENS // geometry.row_length, 1)
        for group in _groups(lengths, geometry, rows):
            numbers = [wanted[place] for place in group]
            pooled, sizes = self._pool([windows[number] for number in numbers], geometry)
            made = self.adapter(pooled, None).cpu() if alone else pooled
            for number, state in zip(numbers, made.split(sizes), strict=True):
                states[number] = state
            done += len(numbers)
            progress(done, len(windows))
        whole = torch.cat([state for state in states if state is not None])
        if alone:
            return whole
        parts = whole.split([memory.made.latents for memory in memories])
        mixed = [self.adapter(part, torch.tensor([len(part)], device=part.device)) for part in parts]
        return torch.cat(mixed).cpu()

    def _pool(self, windows: Sequence[Window], geometry: Geometry) -> tuple[Tensor, list[int]]:
        """Pooled states of some windows, and how many latents each has."""
        sizes = [int(window.blocks.max()) + 1 for window in windows]
        firsts = accumulate(sizes, initial=0)
        arrays = lay_out_windows(
            [_numbered(window, first) for window, first in zip(windows, firsts, strict=False)], geometry
        )
        rows = [torch.from_numpy(array).to(self.device) for array in arrays.values()]
        return self._rows(self.encoder, self.block_position, *rows, sum(sizes)), sizes


def _memory(
    content: Any, text: str, geometry: Geometry, ratio: int | None, name: str, licence: str | None
) -> _Memory:
    """Tokenise a text and cut it into windows, each of which numbers its blocks from 0."""
    ids, places = content.encode_with_places(text)
    if not len(ids):
        raise ValueError(f"{name}: is empty, there is nothing to compress; leave it out")
    ratio = geometry.span_ratio(Span("memory", ids, ratio=ratio))
    blocks = geometry.window // ratio
    windows = [_numbered(window, -i * blocks) for i, window in enumerate(cut(ids, geometry, ratio))]
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    count = geometry.latents(len(ids), ratio)
    return _Memory(
        Compressed(name, digest, len(text), len(ids), count, ratio, licence),
        places[::ratio],
        windows,
        [_window_digest(window) for window in windows],
    )


def _numbered(window: Window, first: int) -> Window:
    """A window with `first` added to the numbers of its blocks."""
    return Window(window.ids, np.where(window.blocks >= 0, window.blocks + first, -1))


def _window_digest(window: Window) -> bytes:
    """Of all that its latents depend on but the weights: row tokens, and which block each is in."""
    arrays = (window.ids.astype("<i4"), window.blocks.astype("<i4"))
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).digest()


def _known(artifact: Artifact) -> dict[bytes, Tensor]:
    """{window digest: its latents} of an artifact."""
    sizes = []
    for memory in artifact.memories:
        blocks = artifact.geometry["window"] // memory.ratio
        sizes += [min(blocks, memory.latents - first) for first in range(0, memory.latents, blocks)]
    digests = [bytes(digest) for digest in artifact.windows.numpy()]
    return dict(zip(digests, artifact.latents.split(sizes), strict=True))


def _groups(lengths: Sequence[int], geometry: Geometry, rows: int) -> Iterator[list[int]]:
    """Windows (by number) that fill `rows` rows at a time."""
    row_of, _, used = fill_rows(lengths, geometry.row_length)
    groups: list[list[int]] = [[] for _ in range(-(-used // rows))]
    for number, row in enumerate(row_of):
        groups[row // rows].append(number)
    yield from groups
