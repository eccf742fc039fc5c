"""Answer a prompt about documents that are read as latents: what `lclm generate` does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_document(path: Path) -> str:
    """The text of a UTF-8 file, or of standard input for `-`. ValueError when it is empty or not UTF-8."""
    name = "standard input" if str(path) == "-" else str(path)
    content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: is not UTF-8 text (byte {error.start}); convert it, for example with iconv -t UTF-8"
        ) from None
    if not text.strip():
        raise ValueError(f"{name}: holds no text; give a document that has some")
    return text


def conversation(prompt: str, documents: Sequence[str], ratio: int | None = None) -> list[dict[str, Any]]:
    """One user turn: the documents as memory parts, then the prompt."""
    parts: list[dict[str, Any]] = [{"type": "memory", "text": text} for text in documents]
    if ratio is not None:
        parts = [{**part, "ratio": ratio} for part in parts]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def answer(
    checkpoint: str,
    prompt: str,
    memory: Sequence[Path],
    *,
    ratio: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    compare: bool = False,
) -> None:
    """Stream the answer to standard output, and what was read to standard error.

    `compare` answers a second time, without the documents. Raises ValueError or OSError for a document that
    cannot be read, a checkpoint that is none, and a ratio or length that the model cannot take.
    """
    documents = [read_document(path) for path in memory]
    model, processor = _load(checkpoint)
    _answer_once(model, processor, conversation(prompt, documents, ratio), max_new_tokens, temperature, seed)
    if compare:
        print("\nwithout the documents:", file=sys.stderr, flush=True)
        _answer_once(model, processor, conversation(prompt, []), max_new_tokens, temperature, seed)


def ask(checkpoint: str, data_set: str, count: int = 3, max_new_tokens: int = 64) -> None:
    """Ask `count` questions of a conversations data set, spread over it, at every ratio of the model.

    Prints each document, question, answer and true answer. Raises ValueError or OSError as `answer` does, and
    when the data set holds no conversation with memory.
    """
    from lclm.data.shards import DataSet

    data = DataSet.open(data_set)
    if data.kind != "conversations":
        raise ValueError(f"{data_set}: holds {data.kind}; name a split of conversations")
    model, processor = _load(checkpoint)
    asked = 0
    for number in range(count):
        shard, start = data.locate(number * data.num_samples // count)
        messages = data.read(shard, start, start + 1)[0].messages or []
        documents, question = _document_and_question(messages)
        if len(messages) < 2 or not documents:
            continue
        asked += 1
        print("\n" + "\n".join(f"  | {line}" for text in documents for line in text.splitlines()))
        print(f"question: {question}\n    true: {messages[1]['content']}")
        for ratio in model.config.ratios:
            turn = conversation(question, documents, ratio)
            inputs = _inputs(model, processor, turn)
            latents = int(inputs["memory_sizes"].sum())
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            text = processor.tokenizer.decode(
                ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            print(f"{ratio:>7}x: {text}   (from {latents} latents)", flush=True)
    if not asked:
        raise ValueError(f"{data_set}: none of {count} conversations has memory; nothing to ask")


def _document_and_question(messages: list[dict[str, Any]]) -> tuple[list[str], str]:
    parts = _parts(messages[0]) if messages else []
    documents = [part["text"] for part in parts if part["type"] == "memory"]
    return documents, "".join(part["text"] for part in parts if part["type"] == "text")


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _inputs(model: Any, processor: Any, messages: list[dict]) -> Any:
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)


def _load(checkpoint: str) -> tuple[Any, Any]:
    import torch

    from lclm.model import LCLMForConditionalGeneration, LCLMProcessor

    on_gpu = torch.cuda.is_available()
    processor = LCLMProcessor.from_pretrained(checkpoint)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = LCLMForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
    return model.to("cuda" if on_gpu else "cpu").eval(), processor


def _answer_once(
    model: Any, processor: Any, messages: list[dict], max_new_tokens: int, temperature: float, seed: int
) -> None:
    import torch
    from transformers import TextStreamer

    inputs = _inputs(model, processor, messages)
    _say_what_is_read(inputs)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)


def _say_what_is_read(inputs: Any) -> None:
    latents = int(inputs["memory_sizes"].sum()) if "memory_sizes" in inputs else 0
    compressed = int((inputs["block_index"] >= 0).sum()) if latents else 0
    positions = inputs["input_ids"].shape[1]
    if latents:
        line = f"read {compressed:,} tokens as {latents:,} latents and {positions - latents:,} as they are"
    else:
        line = f"read {positions:,} tokens as they are"
    print(line, file=sys.stderr, flush=True)
