"""generate: the encoder runs once, before beams and several sequences are expanded, and only at prefill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .artifact import Artifact
from .compression import Compression

_ENCODER_ARRAYS = (
    "encoder_input_ids",
    "encoder_position_ids",
    "encoder_window_ids",
    "block_index",
    "memory_sizes",
    "num_latents",
)


class MemoryGeneration(Compression):
    """What GenerationMixin needs to know about memories."""

    encode: Any
    get_input_embeddings: Any

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, memories: Sequence[Artifact] | None = None, **kwargs: Any
    ) -> Any:
        """transformers' generate over a processor's arrays; returns prompt and new ids as transformers does.

        memories: the artifacts of the prompt's artifact parts, in order of appearance; the encoder does not
        run for them. ValueError before any work for an artifact of another model, one that is missing or
        does not fit its part, and for memory marks in ids without latents.

        To continue a cache, pass `past_key_values` and arrays of the whole text so far (or, as transformers
        allows, of the new text only with the whole attention_mask): only memories in the new text are
        encoded.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        arrays = {name: kwargs.pop(name, None) for name in _ENCODER_ARRAYS}
        ready = kwargs.pop("memory_ready", None)
        kwargs.pop("labels", None)
        kwargs.pop("position_ids", None)
        index = kwargs.get("latent_index")
        if input_ids is not None:
            index = self._new_slots(input_ids, index, kwargs)
        given = self._given(ready, arrays["memory_sizes"], memories)
        if index is not None and bool((index >= 0).any()):
            if kwargs.get("latents") is None:
                kwargs["latents"] = self._latents_of(index, arrays, ready, given)
        else:
            kwargs.pop("latent_index", None)
        return super().generate(input_ids, **kwargs)  # type: ignore[misc]

    def _new_slots(self, input_ids: Tensor, index: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        """Latent index of the positions that are not in the cache yet; ValueError if a slot there has no
        latent."""
        if index is not None and index.shape != input_ids.shape:
            raise ValueError(
                f"latent_index has the shape {tuple(index.shape)}, input_ids {tuple(input_ids.shape)}; "
                "extend it with -1 for text added to the prompt"
            )
        alone = self._marks_alone(input_ids, index)
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if past and (mask is None or mask.shape[1] == input_ids.shape[1]):
            alone = alone[:, past:]
            index = index[:, past:] if index is not None else None
        if bool(alone.any()):
            raise ValueError(
                "the prompt has memory marks or slots without latents; give a prompt with memories to the "
                "processor, and all arrays that it returns to generate: model.generate(**inputs)"
            )
        return index

    def _marks_alone(self, input_ids: Tensor, index: Tensor | None) -> Tensor:
        """Where a slot has no latent, or a mark has no such slot beside it, bool [B, D]."""
        held = torch.zeros_like(input_ids, dtype=torch.bool) if index is None else index >= 0
        start, end = input_ids == self.config.memory_start_id, input_ids == self.config.memory_end_id
        slots = input_ids == self.config.memory_id
        follows, precedes = pad(held[:, 1:], (0, 1)), pad(held[:, :-1], (1, 0))
        return (slots & ~held) | (start & ~follows) | (end & ~precedes)

    def _given(
        self, ready: Tensor | None, sizes: Tensor | None, memories: Sequence[Artifact] | None
    ) -> Tensor | None:
        """Latents of the artifacts, [M, K]; ValueError unless they are the ones that the prompt has parts
        for."""
        artifacts: list[Any] = [memories] if hasattr(memories, "latents") else list(memories or [])
        wanted = [] if ready is None or sizes is None else sizes[ready > 0].tolist()
        found = [size for artifact in artifacts for size in artifact.sizes]
        if found != wanted:
            raise ValueError(
                f"the prompt's artifact parts take {_counted(wanted)}, but `memories` has {_counted(found)}; "
                "give the artifact of every part, in the order in which they appear: memories=[artifact, ...]"
            )
        for number, artifact in enumerate(artifacts):
            self.check_artifact(artifact, f"memories[{number}]")
        return torch.cat([artifact.latents.to(self.device) for artifact in artifacts]) if artifacts else None

    def _latents_of(
        self, index: Tensor, arrays: dict[str, Any], ready: Tensor | None, given: Tensor | None
    ) -> Tensor:
        """Latents of all memories, [M, K]: those given, and those of encoder rows that `index` uses."""
        if ready is None or given is None:
            return self._encode_needed(index, arrays)
        sizes = arrays["memory_sizes"]
        place = torch.repeat_interleave(ready > 0, sizes).to(self.device)
        if bool(place.to(index.device)[index[index >= 0]].all()):
            latents = given.new_zeros(len(place), given.shape[1])
        else:
            latents = self._encode_needed(index, arrays)[: len(place)]
        latents = latents.to(self.get_input_embeddings().weight.dtype, copy=True)
        latents[place] = given.to(latents.dtype)
        return latents

    def _encode_needed(self, index: Tensor, arrays: dict[str, Any]) -> Tensor:
        """Latents of the memories that `index` uses; rows that hold none of these are not encoded."""
        if missing := [name for name in _ENCODER_ARRAYS[:5] if arrays[name] is None]:
            raise ValueError(
                f"the prompt has memories but {missing[0]} is missing; pass all arrays of the processor"
            )
        sizes, blocks = arrays["memory_sizes"], arrays["block_index"]
        total = int(sizes.sum())
        memory = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        used = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
        used[memory[index[index >= 0]]] = True
        wanted = torch.cat([used[memory], used.new_zeros(1)])
        rows = wanted[torch.where(blocks >= 0, blocks, total)].any(1)
        encode = {name: arrays[name][rows].to(self.device) for name in _ENCODER_ARRAYS[:4]}
        return self.encode(**encode, memory_sizes=sizes.to(self.device), num_latents=total)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        latents = kwargs.pop("latents", None)
        input_ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if latents is not None:
            kwargs["latents"] = latents
        return input_ids, kwargs

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Latents go in with the prompt only."""
        latents, index = kwargs.pop("latents", None), kwargs.pop("latent_index", None)
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        first = kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True)
        if first and index is not None:
            length = inputs["input_ids"].shape[1]
            extra = length - index.shape[1]
            index = pad(index, (0, extra), value=-1) if extra > 0 else index[:, -length:]
            inputs.update(latents=latents, latent_index=index)
        return inputs

    def _validate_generated_length(
        self, generation_config: Any, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        super()._validate_generated_length(  # type: ignore[misc]
            generation_config, input_ids_length, has_default_max_length
        )
        limit = getattr(self.config.decoder_config, "max_position_embeddings", None)
        wanted = max(generation_config.max_length or 0, input_ids_length + 1)
        if limit is not None and wanted > limit:
            raise ValueError(
                f"the prompt's {input_ids_length} positions and the new tokens make {wanted}, over the "
                f"{limit} positions of the decoder; use a higher ratio, a shorter prompt or fewer new tokens"
            )


def _counted(sizes: Sequence[int]) -> str:
    latents = ", ".join(map(str, sizes[:8])) + (", …" if len(sizes) > 8 else "")
    return f"{len(sizes)} memories ({latents} latents)" if sizes else "none"
