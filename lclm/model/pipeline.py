"""A transformers pipeline for conversations with memories: it travels inside a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import GenerationConfig, Pipeline

TASK = "memory-text-generation"
"""The task under which lclm registers the pipeline with transformers."""

CUSTOM_TASK = "lclm"
"""The task in a checkpoint's config.json: the only one, so `pipeline(model=...)` finds it by itself."""


class LCLMPipeline(Pipeline):
    """Answers conversations whose messages have memory and text parts, and prompts that carry their marks.

    Called with a conversation (a list of messages), a prompt (a string), or a list of either; returns what
    transformers' text generation returns for chats: a list of {"generated_text"} for each, one for every
    sequence. Keywords: ratio (of all memories that name none), return_full_text (True: the conversation with
    the answer as its last message; False: the answer's text), template_options (for the chat template), and
    all of `generate`.
    """

    _pipeline_calls_generate = True
    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _default_generation_config: ClassVar[Any] = GenerationConfig(max_new_tokens=256)

    def _sanitize_parameters(
        self,
        ratio: int | None = None,
        template_options: Mapping[str, Any] | None = None,
        return_full_text: bool | None = None,
        **generate_options: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        forward = {"ratio": ratio, "template_options": template_options}
        forward = {name: value for name, value in forward.items() if value is not None}
        after = {} if return_full_text is None else {"return_full_text": return_full_text}
        return {}, {**forward, **generate_options}, after

    def preprocess(self, input_: Any, **_: Any) -> dict[str, Any]:
        """What is asked, as it is: `_forward` lays out a whole batch at once."""
        asked = getattr(input_, "messages", input_)
        if isinstance(asked, str):
            return {"asked": {"prompt": asked}}
        if asked[-1]["role"] == "assistant":
            raise ValueError(
                "the conversation ends with the assistant's message, so there is nothing to answer; end it "
                "with the user's"
            )
        return {"asked": {"messages": list(asked)}}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        ratio: int | None = None,
        template_options: Mapping[str, Any] | None = None,
        **generate_options: Any,
    ) -> dict[str, Any]:
        asked = model_inputs["asked"]
        batch = asked if isinstance(asked, list) else [asked]
        inputs = self._arrays(batch, ratio, template_options or {}).to(self.device)
        if artifacts := [part["artifact"] for part in _parts(batch) if "artifact" in part]:
            generate_options["memories"] = artifacts
        output = self.model.generate(**inputs, **self._settings(generate_options))
        ids: Tensor = output if isinstance(output, Tensor) else output.sequences
        new = ids[:, inputs["input_ids"].shape[1] :].reshape(len(batch), len(ids) // len(batch), -1).tolist()
        return {"answers": new if isinstance(asked, list) else new[0], "asked": asked}

    def _settings(self, generate_options: dict[str, Any]) -> dict[str, Any]:
        """Options of `generate`, with those that are settings inside one configuration."""
        config = copy.deepcopy(generate_options.pop("generation_config", self.generation_config))
        others = config.update(**generate_options)
        if config.max_new_tokens is not None:
            config.max_length = None
        return {"generation_config": config, **others}

    def _arrays(self, batch: list[Any], ratio: int | None, template_options: Mapping[str, Any]) -> Any:
        if all("prompt" in item for item in batch):
            return self.processor(text=[item["prompt"] for item in batch], ratio=ratio)
        if any("prompt" in item for item in batch):
            raise ValueError("a batch holds prompts or conversations, not both; call the pipeline for each")
        conversations = [item["messages"] for item in batch]
        return self.processor.apply_chat_template(
            conversations, add_generation_prompt=True, ratio=ratio, **template_options
        )

    def postprocess(self, model_outputs: dict[str, Any], return_full_text: bool = True, **_: Any) -> Any:
        """[{"generated_text": ...}], one for every sequence."""
        decode, asked = self.processor.tokenizer.decode, model_outputs["asked"]
        texts = [decode(ids, skip_special_tokens=True) for ids in model_outputs["answers"]]
        return [{"generated_text": _with(asked, text) if return_full_text else text} for text in texts]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save the model and its processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def _parts(batch: list[Any]) -> Iterator[Mapping[str, Any]]:
    for item in batch:
        for message in item.get("messages", ()):
            yield from (part for part in message["content"] if isinstance(part, dict))


def _with(asked: Mapping[str, Any], answer: str) -> Any:
    if "prompt" in asked:
        return asked["prompt"] + answer
    return [*asked["messages"], {"role": "assistant", "content": answer}]


def custom_pipelines() -> dict[str, Any]:
    """What config.json says of the pipeline, so that transformers finds it in a checkpoint."""
    return {CUSTOM_TASK: {"impl": "pipeline.LCLMPipeline", "pt": ["AutoModelForCausalLM"], "type": "text"}}
