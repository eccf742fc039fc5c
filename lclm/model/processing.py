"""LCLMProcessor: prompts and messages with memories, as the arrays that the model takes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .layouts import released_folder, released_tokenizers, token_ids
from .released import read_settings
from .spans import Example, Geometry, Span, lay_out
from .text import SpanTokenizer


class LCLMProcessor(ProcessorMixin):
    """Two tokenizers and a geometry.

    tokenizer: the decoder's, with the memory marks. encoder_tokenizer: the encoder's. geometry: settings of
    `Geometry` as a dict.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        encoder_tokenizer: Any = None,
        geometry: dict[str, Any] | Geometry | None = None,
        chat_template: str | None = None,
    ) -> None:
        if tokenizer is None or encoder_tokenizer is None or geometry is None:
            raise ValueError("LCLMProcessor needs tokenizer, encoder_tokenizer and geometry")
        if encoder_tokenizer is tokenizer:  # transformers takes its notes off each when it saves them
            encoder_tokenizer = copy.deepcopy(tokenizer)
        super().__init__(tokenizer, encoder_tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.geometry = asdict(geometry) if isinstance(geometry, Geometry) else dict(geometry)
        self._geometry = Geometry(**self.geometry)
        self._spans: SpanTokenizer | None = None

    @property
    def spans(self) -> SpanTokenizer:
        """What turns text into spans."""
        if self._spans is None:
            if self.chat_template and not self.tokenizer.chat_template:
                self.tokenizer.chat_template = self.chat_template
            self._spans = SpanTokenizer(self.tokenizer, self.encoder_tokenizer)
        return self._spans

    @property
    def model_input_names(self) -> list[str]:
        return [
            "input_ids",
            "attention_mask",
            "position_ids",
            "latent_index",
            "encoder_input_ids",
            "encoder_position_ids",
            "encoder_window_ids",
            "block_index",
            "memory_sizes",
        ]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        ratio: int | None = None,
        return_tensors: str | None = "pt",
        return_labels: bool = False,
        padding_side: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Arrays of prompts that carry their marks: `<|memory_start|>document<|memory_end|> question`.

        text: one prompt or several (padded on the left). ratio: for all memories, instead of the model's own.
        ValueError for unbalanced, nested or empty marks.
        """
        kwargs.pop("padding", None)
        if kwargs:
            raise ValueError(
                f"LCLMProcessor does not know {sorted(kwargs)[0]!r}; it takes text, ratio, return_tensors, "
                "return_labels and padding_side"
            )
        if text is None:
            raise ValueError("LCLMProcessor needs text: a prompt or a list of prompts")
        prompts = [text] if isinstance(text, str) else list(text)
        rows = [self.spans.prompt(prompt, ratio) for prompt in prompts]
        return self.arrays(rows, return_tensors, return_labels, padding_side)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        ratio: int | None = None,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        return_labels: bool = False,
        padding_side: str | None = None,
        **template_options: Any,
    ) -> BatchFeature:
        """Arrays of a conversation, or of several, with memory and text parts; see
        SpanTokenizer.conversation.

        Text in a part never becomes a control or memory token, whatever it contains. With return_labels,
        assistant content and its end-of-turn token are labelled. Artifacts go to
        `model.generate(**arrays, memories=[artifact, ...])` in their order.
        """
        if not tokenize or not return_dict:
            raise ValueError(
                "memories have no text form: apply_chat_template returns arrays (tokenize, return_dict)"
            )
        if chat_template is not None:
            template_options["chat_template"] = chat_template
        template_options.pop("padding", None)
        many = bool(conversation) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if many else [conversation]
        rows = [
            self.spans.conversation(messages, add_generation_prompt, ratio, **template_options)
            for messages in conversations
        ]
        return self.arrays(rows, return_tensors, return_labels, padding_side)

    def arrays(
        self,
        rows: Sequence[Sequence[Span]],
        return_tensors: str | None = "pt",
        return_labels: bool = False,
        padding_side: str | None = None,
    ) -> BatchFeature:
        """Arrays of spans, one example a row, padded on the left unless told otherwise (right with
        labels)."""
        side = padding_side or ("right" if return_labels else "left")
        arrays = lay_out([[Example(tuple(spans))] for spans in rows], self._geometry, padding_side=side)
        if not return_labels:
            del arrays["labels"]
        if return_tensors == "pt":
            return BatchFeature({name: torch.from_numpy(value) for name, value in arrays.items()})
        return BatchFeature(arrays, tensor_type=return_tensors)

    def save_pretrained(self, save_directory: Any, *args: Any, layout: str = "native", **kwargs: Any) -> Any:
        """Save beside the model, in its "native" or "released" layout."""
        if layout == "native":
            return super().save_pretrained(str(save_directory), *args, **kwargs)
        if layout != "released":
            raise ValueError(f"layout is {layout!r}; it must be 'native' or 'released'")
        folder = Path(save_directory)
        self.tokenizer.save_pretrained(folder / "decoder")
        self.encoder_tokenizer.save_pretrained(folder / "encoder")
        return [str(folder / "decoder"), str(folder / "encoder")]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load from a native or released checkpoint, a folder or on the Hub."""
        if folder := released_folder(pretrained_model_name_or_path, weights=(), **kwargs):
            tokenizer, encoder_tokenizer = released_tokenizers(folder)
            settings = read_settings(folder)
            geometry = Geometry(
                ratio=settings["ratio"],
                window=settings["window"],
                overlap=settings["overlap"],
                pooling=settings["pooling"],
                bidirectional=settings["encoder_attention"] == "bidirectional",
                **token_ids(tokenizer, encoder_tokenizer),
            )
            return cls(tokenizer, encoder_tokenizer, geometry)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
