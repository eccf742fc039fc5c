"""A checkpoint that compresses documents and answers about them, with what it has read kept between turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from lclm.ask.documents import Document, printable
from lclm.ask.figures import Figures, Read, Stream, progress_bar
from lclm.model import LCLMForConditionalGeneration, LCLMProcessor
from lclm.model.artifact import Artifact


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError("--max-new-tokens must be at least 1, --temperature at least 0")


@dataclass(frozen=True)
class Answer:
    """stopped: by Ctrl-C; text and figures are then of what came before."""

    text: str
    figures: Figures
    stopped: bool


class Past:
    """The decoder's cache between turns, and what its positions hold.

    A position's key is its token, or -1 - n in the slot of the n-th latent: documents keep their numbers as
    long as they stay in their order.
    """

    def __init__(self) -> None:
        self.cache: Any = None
        self._keys: list[int] = []

    def keep(self, cache: Any, keys: Sequence[int]) -> None:
        self.cache = cache
        self._keys = list(keys[: int(cache.get_seq_length())])

    def clear(self) -> None:
        self.cache, self._keys = None, []

    def begin(self, keys: Sequence[int]) -> int:
        """Cut the cache to what it has in common with a new prompt; returns how many positions that is.

        At least the prompt's last position is left to be read. A cache that cannot be cut (a sliding window
        that has slid, a recurrent state) is given up.
        """
        shared = 0
        for old, new in zip(self._keys, keys[:-1], strict=False):
            if old != new:
                break
            shared += 1
        if self.cache is not None and shared < len(self._keys):
            try:
                self.cache.crop(shared - len(self._keys))
            except RuntimeError:
                shared = 0
        self._keys = self._keys[:shared]
        if not shared:
            self.clear()
        return shared


class Reader:
    """A checkpoint, ready to read documents and to answer.

    The encoder is loaded when there is a text to compress, and not before.
    """

    def __init__(self, checkpoint: str) -> None:
        _check_place(checkpoint)
        LCLMForConditionalGeneration.read_config(checkpoint)  # the first that fails if it is none
        self.processor = LCLMProcessor.from_pretrained(checkpoint)
        self._checkpoint = checkpoint
        self._model: Any = None

    def model(self, encoder: bool = False) -> Any:
        """The model, loaded at the first call; with its encoder if that is or was needed."""
        if self._model is None or (encoder and self._model.encoder is None):
            self._model = None  # two at once might not fit
            on_gpu = torch.cuda.is_available()
            model = LCLMForConditionalGeneration.from_pretrained(
                self._checkpoint, dtype=torch.bfloat16 if on_gpu else torch.float32, encoder=encoder
            )
            self._model = model.to("cuda" if on_gpu else "cpu").eval()
        return self._model

    @property
    def positions(self) -> int | None:
        """How many the decoder has, if it has a limit."""
        return getattr(self.model().config.decoder_config, "max_position_embeddings", None)

    def read(
        self, documents: Sequence[Document], ratio: int | None = None, room: int | None = None
    ) -> list[Artifact]:
        """Documents as artifacts, in their order: texts are compressed, neighbours together.

        ValueError, before any is compressed, for an artifact that is damaged or another model's, for a ratio
        that the model does not have or that has nothing to apply to, and for more latents than `room`.
        """
        if ratio is not None and documents and all(document.text is None for document in documents):
            raise ValueError("--ratio has no effect: what is in an artifact is compressed already")
        loaded = {d.artifact: Artifact.load(d.artifact) for d in documents if d.artifact}
        for path, artifact in loaded.items():
            self.model().check_artifact(artifact, printable(path))
        latents = sum(sum(artifact.sizes) for artifact in loaded.values()) + self._latents(documents, ratio)
        if room is not None and latents > room:
            raise ValueError(
                f"the documents make {latents:,} latents, but there is room for {max(room, 0):,} beside "
                f"--max-new-tokens and other documents: the decoder has {self.positions:,} positions; raise "
                "--ratio, lower --max-new-tokens, or give fewer documents"
            )
        artifacts: list[Artifact] = []
        for path, group in groupby(documents, lambda document: document.artifact):
            artifacts.append(loaded[path] if path else self._compress(list(group), ratio))
        return artifacts

    def _latents(self, documents: Sequence[Document], ratio: int | None) -> int:
        """How many the texts among documents will make."""
        geometry = self.model().config.geometry()
        texts = [document.text for document in documents if document.text is not None]
        ids = self.processor.spans.encoder_content.encode_batch(texts)
        return sum(geometry.latents(len(tokens), ratio) for tokens in ids)

    def _compress(self, documents: Sequence[Document], ratio: int | None) -> Artifact:
        model = self.model(encoder=True)
        with progress_bar("compressing") as progress:
            return model.compress(
                self.processor,
                [document.text for document in documents],
                names=[document.name for document in documents],
                ratio=ratio,
                progress=progress,
            )

    def inputs(self, messages: list[dict[str, Any]]) -> Any:
        """Arrays of a conversation. ValueError if the checkpoint's chat template refuses it."""
        try:
            return self.processor.apply_chat_template(messages, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"the checkpoint's chat template refuses this conversation: {error}") from None

    def answer(
        self,
        inputs: Any,
        artifacts: Sequence[Artifact],
        sampling: Sampling,
        write: Callable[[str], None],
        past: Past,
        begun: float,
    ) -> Answer:
        """Stream the answer to a prompt to `write`. artifacts: those of the prompt, in their order. begun:
        when the question was given, by time.perf_counter."""
        keys = _keys(inputs)
        kept = past.begin(keys)
        model = self.model()
        stream = Stream(self.processor.tokenizer, write, begun)
        options = {"do_sample": True, "temperature": sampling.temperature} if sampling.temperature else {}
        stopped, cache = False, past.cache
        past.clear()
        try:
            output = model.generate(
                **inputs.to(model.device),
                **({"memories": list(artifacts)} if artifacts else {}),
                max_new_tokens=sampling.max_new_tokens,
                past_key_values=cache,
                return_dict_in_generate=True,
                streamer=stream,
                **({"do_sample": False} | options),
            )
            past.keep(output.past_key_values, keys + stream.ids)
        except KeyboardInterrupt:
            stopped = True
            stream.end()
        ended = stream.ids[-1:] and stream.ids[-1] in self.processor.spans.end_ids
        latents = sum(key < 0 for key in keys)
        figures = Figures(
            read=Read.of(memory for artifact in artifacts for memory in artifact.memories)
            if latents
            else None,
            text=len(keys) - latents,
            kept=kept,
            tokens=len(stream.ids),
            first=stream.first,
            last=stream.last,
            cut=not stopped and not ended,
        )
        return Answer(stream.text, figures, stopped)


def _check_place(checkpoint: str) -> None:
    """ValueError for a folder that holds no checkpoint, and for a path where there is none."""
    folder = Path(checkpoint)
    if folder.is_dir():
        if any((folder / name).is_file() for name in ("config.json", "model_config.json")):
            return
        export = folder / "export"
        hint = f"; this run's is {export}" if (export / "config.json").is_file() else ""
        raise ValueError(
            f"{checkpoint}: is no checkpoint, it holds no config.json or model_config.json{hint}"
        )
    if checkpoint.count("/") != 1 or checkpoint.startswith((".", "/", "~")) or checkpoint.endswith("/"):
        raise ValueError(f"{checkpoint}: there is no such folder, and a Hub id is of the form owner/name")


def _keys(inputs: Any) -> list[int]:
    ids: Tensor = inputs["input_ids"][0]
    if "latent_index" not in inputs:
        return ids.tolist()
    index: Tensor = inputs["latent_index"][0]
    return torch.where(index >= 0, -1 - index, ids).tolist()
