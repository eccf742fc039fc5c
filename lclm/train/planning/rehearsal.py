"""A training step on meta tensors: the bytes it holds at its worst moment, and its floating-point operations.

The model's own code runs, forward and backward, on tensors without storage. Every allocation that autograd,
activation checkpointing and the loss make is counted and forgotten as it would be; products are counted where
they happen, so that what freezing leaves out and what recomputation adds is counted too. Deep models run with
few layers, and what grows with their number is extrapolated.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PARTS = ("encoder", "adapter", "decoder", "loss")
SHORT, LONG = 2, 3
"""Layers of the cut models whose figures are extrapolated."""
LOSS_CHUNKS = 3
"""Chunks of the loss that run; more would hold no more, and their products are known from these."""
KERNEL = "lclm_rehearsal"


@dataclass(frozen=True)
class Work:
    """What one forward and backward pass is over.

    B rows of `positions`, B x `rows` encoder rows of `row_length`, B x `latents`; `loss_tokens` in all.
    segments: mean length of what attends to itself in the encoder and the decoder. kernel: "blocks" (skips
    what the mask hides), "sdpa" (dense mask) or "eager". max_logits: held at once by the loss.
    held: bytes per learning element that a gradient holds from its making on; held_from_start: all of them
    are held from the start (earlier micro-batches); at_first: bytes taken when the first one is made.
    """

    micro_batch: int
    positions: int
    rows: int
    row_length: int
    latents: int
    loss_tokens: int
    dtype: torch.dtype
    kernel: str
    max_logits: int
    segments: tuple[float, float]
    max_rows: int | None = None
    held: float = 0.0
    held_from_start: bool = False
    at_first: float = 0.0


@dataclass(frozen=True)
class Rehearsed:
    """Bytes at the worst moment: activations, held gradients, and `at_first` if one was made by then.

    FLOPs by part, forward and in all.
    """

    activations: float
    gradients: float
    at_first: float
    forward: dict[str, float]
    flops: dict[str, float]


class _Counter(TorchDispatchMode):
    """Counts live bytes and products of everything that runs under it."""

    def __init__(self, weights: Iterator[Tensor]) -> None:
        super().__init__()
        self.live = self.held = self.at_first = 0.0
        self.part, self.place, self.forward = "encoder", "forward", True
        self.flops: dict[tuple[str, bool], float] = defaultdict(float)
        self.peaks: dict[tuple[str, str], tuple[float, float, float]] = {}
        self._sizes = {weight.untyped_storage()._cdata: 0 for weight in weights}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops[self.part, self.forward] += count(*args, **(kwargs or {}), out_val=out)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = size = storage.nbytes()
            self.live += size
            weakref.finalize(storage, self._forget, key)
            self.note()

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def note(self) -> None:
        """Remember the worst moment of the place where the step is now."""
        key = (self.part, self.place)
        found = (self.live, self.held, self.at_first)
        if sum(found) > sum(self.peaks.get(key, (-1.0,))):
            self.peaks[key] = found


class _Mark(torch.autograd.Function):
    """Passes a tensor on; its gradient's coming back says that the step has reached `part` and `place`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, counter: _Counter, part: str, place: str) -> Tensor:
        ctx.said = (counter, part, place)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        counter, counter.part, counter.place = ctx.said
        return gradients[0], None, None, None


class _Attention(torch.autograd.Function):
    """What a fused attention kernel keeps: its inputs, its output, a number per query, and the dense mask."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, count: Any
    ) -> Tensor:
        batch, heads, length, size = query.shape
        out = query.new_empty(batch, length, heads, size)
        extra = [query.new_empty(batch, heads, length, dtype=torch.float32)]
        if mask is not None:  # a boolean mask becomes one of numbers on every call
            extra.append(torch.empty_like(mask, dtype=query.dtype))
        ctx.save_for_backward(query, key, value, out, *extra)
        ctx.count = count
        count(query, 4)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value = ctx.saved_tensors[:3]
        ctx.count(query, 8)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def rehearse(model: nn.Module, prepare: Callable[[nn.Module], None], work: Work) -> Rehearsed:
    """A step of `model` (on meta; left as it is) after `prepare` froze and changed it.

    `prepare` says what learns, adds LoRA, switches activation checkpointing on. Raises ValueError for a model
    whose layers cannot be told.
    """
    full = tuple(getattr(model, part).config.num_hidden_layers for part in ("encoder", "decoder"))
    if max(full) <= LONG:
        return _extrapolated([_run(_cut(model, *full), prepare, work)], (0, 0))
    short, long = [min(SHORT, n) for n in full], [min(LONG, n) for n in full]
    cuts = [(short[0], short[1]), (long[0], short[1]), (short[0], long[1])]
    runs = [_run(_cut(model, *layers), prepare, work) for layers in cuts]
    more = tuple((n - s) / max(1, g - s) for n, s, g in zip(full, short, long, strict=True))
    return _extrapolated(runs, more)


def _extrapolated(runs: list[_Counter], more: tuple[float, ...]) -> Rehearsed:
    """From (short, short), (long, short) and (short, long) layers to `more` times the differences."""

    def at(values: list[float]) -> float:
        changes = zip(more, values[1:], strict=False)
        return values[0] + sum(times * (value - values[0]) for times, value in changes)

    places = set.intersection(*(set(run.peaks) for run in runs))
    peaks = [[max(0.0, at([run.peaks[place][i] for run in runs])) for i in range(3)] for place in places]
    live, held, first = max(peaks, key=sum)
    forward = {part: at([run.flops[part, True] for run in runs]) for part in PARTS}
    both = {part: forward[part] + at([run.flops[part, False] for run in runs]) for part in PARTS}
    return Rehearsed(live, held, first, forward, both)


def _cut(model: Any, encoder_layers: int, decoder_layers: int) -> Any:
    from lclm.model.sources import first_layers

    config = copy.deepcopy(model.config)
    config.encoder_config = first_layers(config.encoder_config, encoder_layers)
    config.decoder_config = first_layers(config.decoder_config, decoder_layers)
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with torch.device("meta"):
            return type(model)(config)
    finally:
        torch.set_default_dtype(before)


def _layers(part: nn.Module) -> list[nn.Module]:
    count = part.config.num_hidden_layers  # type: ignore[union-attr]
    for module in part.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"cannot tell the layers of {type(part).__name__}; the plan knows lists of layers")


def _run(model: Any, prepare: Callable[[Any], None], work: Work) -> _Counter:
    with torch.device("meta"):
        prepare(model)
    model.train()
    model.brackets.ids = (0, 1)
    counter = _Counter(model.parameters())
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    if work.held_from_start:
        counter.held = work.held * sum(weight.numel() for weight in learning)

    def made(weight: Tensor) -> None:
        if not work.held_from_start:
            counter.held += work.held * weight.numel()
        counter.at_first = work.at_first
        counter.note()
        weight.grad = None

    for weight in learning:
        weight.register_post_accumulate_grad_hook(made)
    for part in ("encoder", "decoder"):
        _mark_layers(getattr(model, part), part, counter)
    with counter, torch.device("meta"), _attention(model, work, counter):
        loss = _loss(model, work, counter)
        counter.part, counter.place, counter.forward = "loss", "backward", False
        loss.backward()
    run = min(work.loss_tokens, LOSS_CHUNKS * _chunk(model, work))
    for forward in (True, False):
        counter.flops["loss", forward] *= work.loss_tokens / run
    return counter


def _chunk(model: Any, work: Work) -> int:
    """Tokens whose logits the loss holds at once."""
    return max(1, work.max_logits // model.decoder.config.vocab_size)


def _mark_layers(component: nn.Module, part: str, counter: _Counter) -> None:
    """Say which layer's backward pass runs: the top one and the bottom one are the worst two."""
    layers = _layers(component)

    def before(number: int) -> Callable[..., Any]:
        place = "below" if number == 0 else "bottom" if number == 1 else "middle"

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (_Mark.apply(args[0], counter, part, place), *args[1:]), kwargs

        return hook

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(before(number), with_kwargs=True)


@contextmanager
def _attention(model: Any, work: Work, counter: _Counter) -> Iterator[None]:
    """Attention of encoder and decoder as the kernel would keep it; eager attention runs as it is."""
    if work.kernel == "eager":
        yield
        return
    from transformers import AttentionInterface

    segments = dict(zip(("encoder", "decoder"), work.segments, strict=True))

    def count(query: Tensor, times: int) -> None:
        batch, heads, length, size = query.shape
        seen = length if work.kernel == "sdpa" else segments[counter.part] / 2
        if counter.part == "encoder" and model.config.bidirectional and work.kernel != "sdpa":
            seen *= 2
        counter.flops[counter.part, counter.forward] += times * batch * heads * length * seen * size

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        if work.kernel == "sdpa" and key.shape[1] != query.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        return _Attention.apply(query, key, value, mask, count), None

    AttentionInterface.register(KERNEL, attend)
    for part in (model.encoder, model.decoder):
        part.config._attn_implementation = KERNEL
    yield


def _mask(config: Any, work: Work, groups: Tensor, causal: bool, dtype: torch.dtype) -> Any:
    from lclm.model.attention import block_mask

    if work.kernel == "blocks":
        return None
    mask = block_mask(groups, causal, work.kernel, dtype)
    kinds = set(getattr(config, "layer_types", None) or ())
    return dict.fromkeys(kinds, mask) if "sliding_attention" in kinds else mask


def _loss(model: Any, work: Work, counter: _Counter) -> Tensor:
    """The model's forward pass, with everything that depends on values put in by hand."""
    from lclm.model.loss import label_losses

    latents = _latents(model, work, counter)
    batch = (work.micro_batch, work.positions)
    ids, slots = torch.empty(batch, dtype=torch.long), torch.empty(batch, dtype=torch.long)
    places, labels = torch.empty(batch, dtype=torch.long), torch.empty(batch, dtype=torch.long)
    embedded = model.embed(ids, slots, latents)
    counter.part = "decoder"
    config = model.decoder.config
    mask = _mask(config, work, places, True, embedded.dtype)
    embedded = _Mark.apply(embedded, counter, "adapter", "backward")
    hidden = model.decoder.base_model(
        inputs_embeds=embedded, attention_mask=mask, position_ids=places, use_cache=False
    ).last_hidden_state
    hidden = _Mark.apply(hidden, counter, "decoder", "top")
    counter.part = "loss"
    tokens = torch.empty(work.loss_tokens, dtype=torch.long)
    states, targets = hidden.flatten(0, 1)[tokens], labels.flatten()[tokens]
    chunks = slice(0, LOSS_CHUNKS * _chunk(model, work))
    head = model.get_output_embeddings()
    return label_losses(states[chunks], targets[chunks], head, config, work.max_logits)[0]


def _latents(model: Any, work: Work, counter: _Counter) -> Tensor:
    from lclm.model.pooling import pool

    config, encoder = model.config, model.encoder
    rows, latents = work.rows * work.micro_batch, work.latents * work.micro_batch
    ids, places, windows, blocks = (torch.empty(rows, work.row_length, dtype=torch.long) for _ in range(4))
    embed = encoder.get_input_embeddings()
    pooled: Tensor | None = None
    group = work.max_rows or rows
    for start in range(0, rows, group):
        part = slice(start, start + group)
        inputs: dict[str, Any] = dict(model._rows.extra)
        if model.block_position is None:
            inputs["input_ids"] = ids[part]
        else:
            inputs["inputs_embeds"] = embed(ids[part]) + model.block_position(blocks[part])
        if config.bidirectional or not model._rows.native_causal or work.kernel == "eager":
            mask = _mask(encoder.config, work, windows[part], not config.bidirectional, model.dtype)
            inputs |= {"attention_mask": mask, "position_ids": places[part]}
        hidden = encoder(**inputs).last_hidden_state
        hidden = _Mark.apply(hidden, counter, "encoder", "top")
        states = pool(hidden, blocks[part], latents, config.pooling, config.ratio)
        pooled = states if pooled is None else pooled + states
    assert pooled is not None
    counter.part = "adapter"
    if config.adapter == "mlp":
        return model.adapter(pooled, None)
    return _adapted(model.adapter, pooled, latents)


def _adapted(adapter: Any, pooled: Tensor, latents: int) -> Tensor:
    """An adapter with attention, over one memory of all latents."""
    one, place = torch.zeros(latents, dtype=torch.long), torch.arange(latents)
    if adapter.kind == "mlp_attn":
        pooled = adapter._mlp(pooled)
    for layer in adapter.attention_layers:
        pooled = layer(pooled, one, place)
    return pooled if adapter.kind == "mlp_attn" else adapter._mlp(pooled)
