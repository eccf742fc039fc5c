"""LCLMForConditionalGeneration: encoder, adapter and decoder as one transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .adapter import Adapter
from .attention import attention_arguments, segments
from .configuration import LCLMConfig
from .encoder import RowEncoder
from .fingerprint import fingerprints
from .generation import MemoryGeneration
from .layouts import from_released, released_config, released_folder, save_released
from .loss import next_token_loss, scale_logits
from .native import complete
from .pooling import place_in_block


@dataclass
class LCLMOutput(ModelOutput):
    """loss: scalar fp32. logits: [B, D, V], None with labels. token_losses: fp32 [n], one per loss-bearing
    position in row-major order of the labels, detached; None where the fused kernel cannot give them."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    token_losses: Tensor | None = None


class Brackets(nn.Module):
    """Learned embeddings of `<|memory_start|>` and `<|memory_end|>`, put in at the decoder's input."""

    def __init__(self, start_id: int | None, end_id: int | None, width: int) -> None:
        super().__init__()
        self.ids = (start_id, end_id)
        self.weight = nn.Parameter(torch.empty(2, width))

    def forward(
        self, input_ids: Tensor, latent_index: Tensor | None, latents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What replaces token embeddings: (index [B, D] into the table, -1 for none; table [M + 2, K])."""
        table = self.weight if latents is None else torch.cat([latents, self.weight.to(latents.dtype)])
        index = torch.full_like(input_ids, -1) if latents is None or latent_index is None else latent_index
        start, end = len(table) - 2, len(table) - 1
        index = torch.where(input_ids == self.ids[0], start, index)
        return torch.where(input_ids == self.ids[1], end, index), table


class BlockPosition(nn.Module):
    """A learned embedding of a token's place in its block."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(places, width))

    def forward(self, block_index: Tensor) -> Tensor:
        """block_index: int64 [E, R] -> [E, R, H]; zero for tokens that are not pooled."""
        places = len(self.weight)
        place = torch.where(block_index >= 0, place_in_block(block_index).clamp_(max=places - 1), places)
        return functional.embedding(place, functional.pad(self.weight, (0, 0, 0, 1)))


def _encoder(config: LCLMConfig) -> nn.Module:
    encoder = AutoModel.from_config(config.encoder_config)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder


def _adapter(config: LCLMConfig) -> Adapter:
    width = config.decoder_config.hidden_size
    hidden = config.adapter_hidden or width * (2 if config.adapter_init == "identity" else 1)
    inputs = config.encoder_config.hidden_size * (config.ratio if config.pooling == "concat" else 1)
    return Adapter(config.adapter, inputs, width, hidden, config.adapter_layers)


def _block_position(config: LCLMConfig) -> BlockPosition | None:
    if not config.position_in_block:
        return None
    return BlockPosition(max(config.ratios), config.encoder_config.hidden_size)


class LCLMForConditionalGeneration(MemoryGeneration, PreTrainedModel, GenerationMixin):
    """An encoder turns blocks of memory tokens into latents; the decoder reads them in place of the tokens.

    Encoder and decoder are whole transformers models (`encoder`, `decoder`); `adapter` and `brackets` join
    them. With encoder=False there are neither encoder nor adapter: it reads latents that were made before.
    """

    config_class = LCLMConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LCLMConfig, encoder: bool = True) -> None:
        super().__init__(config)
        config.check()
        self.encoder: Any = _encoder(config) if encoder else None
        self.decoder = AutoModelForCausalLM.from_config(config.decoder_config)
        self.adapter: Any = _adapter(config) if encoder else None
        self.brackets = Brackets(
            config.memory_start_id, config.memory_end_id, config.decoder_config.hidden_size
        )
        self.block_position = _block_position(config) if encoder else None
        self._rows: Any = RowEncoder(self.encoder, config) if encoder else None
        if not encoder:
            self._keys_to_ignore_on_load_unexpected = {r"^(encoder|adapter|block_position)\."}
        elif config.tie_word_embeddings:
            self._tied_weights_keys = {self._embedding_name("encoder"): self._embedding_name("decoder")}
        self.post_init()

    def _embedding_name(self, part: str) -> str:
        model = getattr(self, part)
        weight = model.get_input_embeddings().weight
        name = next(name for name, value in model.named_parameters(remove_duplicate=False) if value is weight)
        return f"{part}.{name}"

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (Brackets, BlockPosition)):
            part = self.config.decoder_config if isinstance(module, Brackets) else self.config.encoder_config
            init.normal_(module.weight, std=getattr(part, "initializer_range", 0.02))

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.decoder.set_output_embeddings(new_embeddings)

    def encode(
        self,
        encoder_input_ids: Tensor,
        encoder_position_ids: Tensor,
        encoder_window_ids: Tensor,
        block_index: Tensor,
        memory_sizes: Tensor | None = None,
        num_latents: int | None = None,
    ) -> Tensor:
        """Latents [M, K] of encoder rows (int64 [E, R]).

        num_latents: M; None: the sum of memory_sizes, at least 1. ValueError if loaded with encoder=False.
        """
        if self.encoder is None:
            raise ValueError(
                "this model was loaded with encoder=False and cannot compress text: give it latents made "
                "before, or load it without encoder=False"
            )
        if num_latents is None:
            known = memory_sizes.sum() if memory_sizes is not None else block_index.max() + 1
            num_latents = max(int(known), 1)
        if encoder_input_ids.shape[0] == 0:
            return self.adapter.fc2.weight.new_zeros(num_latents, self.config.decoder_config.hidden_size)
        pooled = self._rows(
            self.encoder,
            self.block_position,
            encoder_input_ids,
            encoder_position_ids,
            encoder_window_ids,
            block_index,
            num_latents,
        )
        return self.adapter(pooled, memory_sizes)

    @torch.no_grad()
    def encode_memories(
        self,
        encoder_input_ids: Tensor,
        encoder_position_ids: Tensor,
        encoder_window_ids: Tensor,
        block_index: Tensor,
        memory_sizes: Tensor,
        **_: Any,
    ) -> list[Tensor]:
        """Latents of each memory, a list of [M, K] in order of appearance. Other inputs are ignored."""
        sizes = [size for size in memory_sizes.tolist() if size]
        arrays = (encoder_input_ids, encoder_position_ids, encoder_window_ids, block_index)
        return list(self.encode(*arrays, memory_sizes)[: sum(sizes)].split(sizes)) if sizes else []

    def embed(self, input_ids: Tensor, latent_index: Tensor | None, latents: Tensor | None) -> Tensor:
        """The decoder's input [B, D, K]: token embeddings, brackets, and latents in their slots."""
        embeddings = self.decoder.get_input_embeddings()(input_ids)
        index, table = self.brackets(input_ids, latent_index, latents)
        gathered = functional.embedding(index.clamp(min=0), table).to(embeddings.dtype)
        return torch.where((index >= 0).unsqueeze(-1), gathered, embeddings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        latent_index: Tensor | None = None,
        encoder_input_ids: Tensor | None = None,
        encoder_position_ids: Tensor | None = None,
        encoder_window_ids: Tensor | None = None,
        block_index: Tensor | None = None,
        memory_sizes: Tensor | None = None,
        num_latents: int | None = None,
        latents: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | float | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LCLMOutput:
        """One pass over a batch. Arrays are those of `spans.lay_out`; `latents` [M, K] takes the encoder's
        place.

        Without a cache, each run of positions that counts on by one is an example of its own, so packed rows
        and padding on either side need no attention_mask. With labels: loss = sum / num_items_in_batch (the
        mean over loss-bearing positions if None), and no logits. use_cache is off unless asked for.
        """
        self._check_length(input_ids)
        if latents is None and kwargs.get("memory_ready") is not None:
            raise ValueError("memories of artifacts need `latents`; generate(memories=...) sees to it")
        if latents is None and encoder_input_ids is not None:
            latents = self.encode(
                encoder_input_ids,
                encoder_position_ids,
                encoder_window_ids,
                block_index,
                memory_sizes,
                num_latents,
            )
        embeddings = self.embed(input_ids, latent_index, latents)
        if use_cache or past_key_values is not None:
            output = self.decoder.base_model(
                inputs_embeds=embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=True,
            )
        else:
            output = self._packed(embeddings, attention_mask, position_ids)
        hidden = output.last_hidden_state
        if labels is not None:
            total, losses = next_token_loss(hidden, labels, self.get_output_embeddings(), self.decoder.config)
            count = (
                num_items_in_batch
                if num_items_in_batch is not None
                else (labels[:, 1:] >= 0).sum().clamp(min=1)
            )
            return LCLMOutput(loss=total / count, token_losses=losses)
        keep = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = scale_logits(self.get_output_embeddings()(hidden[:, keep]), self.decoder.config)
        return LCLMOutput(logits=logits, past_key_values=getattr(output, "past_key_values", None))

    def _packed(self, embeddings: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Any:
        """The decoder without cache, each example of a row on its own."""
        if position_ids is None:
            if attention_mask is None:
                return self.decoder.base_model(inputs_embeds=embeddings, use_cache=False)
            position_ids = (attention_mask.cumsum(1) - 1) * attention_mask
        groups = segments(position_ids)
        attention = attention_arguments(self.decoder.config, groups, True, embeddings.dtype)
        return self.decoder.base_model(
            inputs_embeds=embeddings, position_ids=position_ids, use_cache=False, **attention
        )

    def _check_length(self, input_ids: Tensor) -> None:
        limit = getattr(self.decoder.config, "max_position_embeddings", None)
        if limit is not None and input_ids.shape[1] > limit:
            raise ValueError(
                f"{input_ids.shape[1]} decoder positions exceed the {limit} of the decoder "
                f"({self.decoder.config.model_type}); use a higher ratio, a shorter prompt or a smaller pack"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a native or released checkpoint from a folder or the Hub.

        encoder=False: neither encoder nor adapter are built or read, for latents that were made before. All
        other arguments as in transformers.
        """
        if folder := released_folder(pretrained_model_name_or_path, **kwargs):
            return from_released(cls, folder, *args, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def read_config(cls, name_or_path: Any) -> LCLMConfig:
        """The configuration of a native or released checkpoint, without its weights."""
        folder = released_folder(name_or_path, weights=("adapter",))
        return released_config(folder) if folder else LCLMConfig.from_pretrained(name_or_path)

    def save_pretrained(
        self,
        save_directory: Any,
        *args: Any,
        layout: str = "native",
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as one transformers checkpoint ("native") or in three folders ("released").

        A native one carries the code that loads it, and fingerprints of its weights. state_dict: the weights
        if they are not in the model (gathered from a sharded engine).
        """
        if self.encoder is None:
            raise ValueError("this model was loaded with encoder=False; load it whole to save it")
        if layout == "native":
            complete(self.config, fingerprints(self, state_dict))
            return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        if layout != "released":
            raise ValueError(f"layout is {layout!r}; it must be 'native' or 'released'")
        return save_released(self, save_directory, *args, state_dict=state_dict, **kwargs)
