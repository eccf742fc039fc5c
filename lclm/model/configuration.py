"""LCLMConfig: two transformers configurations and what joins them."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .spans import Geometry

POOLINGS = ("mean", "concat", "eos")
ENCODER_ATTENTIONS = ("causal", "bidirectional")
ADAPTERS = ("mlp", "attn_mlp", "mlp_attn")
ADAPTER_INITS = ("default", "identity")
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert")


class LCLMConfig(PreTrainedConfig):
    """Configuration of a Latent Context Language Model.

    encoder_config, decoder_config: configurations of an AutoModel and an AutoModelForCausalLM.
    ratio: default tokens per latent. ratios: all ratios it is trained for. window: tokens the encoder pools
    at once, a multiple of every ratio. pooling: mean | concat | eos. encoder_attention: causal |
    bidirectional. overlap: tokens of the neighbouring windows the encoder also sees. adapter: mlp | attn_mlp
    | mlp_attn. adapter_layers: attention layers of the adapter. adapter_hidden: width inside its MLP (None:
    decoder width, or twice that for the identity start). adapter_init: default | identity. position_in_block:
    a learned embedding of a token's place in its block at the encoder's input. tie_word_embeddings: the
    encoder's token embeddings are the decoder's. max_rows_per_forward: encoder rows per forward. *_id: token
    ids, see Geometry.
    """

    model_type = "lclm"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig, "decoder_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        encoder_config: dict[str, Any] | PreTrainedConfig | None = None,
        decoder_config: dict[str, Any] | PreTrainedConfig | None = None,
        ratio: int = 16,
        ratios: list[int] | None = None,
        window: int = 1024,
        pooling: str = "mean",
        encoder_attention: str = "causal",
        overlap: int = 0,
        adapter: str = "mlp",
        adapter_layers: int | None = None,
        adapter_hidden: int | None = None,
        adapter_init: str = "default",
        position_in_block: bool = False,
        tie_word_embeddings: bool = False,
        max_rows_per_forward: int | None = None,
        memory_start_id: int | None = None,
        memory_id: int | None = None,
        memory_end_id: int | None = None,
        pad_id: int | None = None,
        encoder_pad_id: int | None = None,
        encoder_marker_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.encoder_config: Any = _sub_config(encoder_config)
        self.decoder_config: Any = _sub_config(decoder_config)
        self.ratio = ratio
        self.ratios = sorted(set(ratios)) if ratios else [ratio]
        self.window = window
        self.pooling = pooling
        self.encoder_attention = encoder_attention
        self.overlap = overlap
        self.adapter = adapter
        self.adapter_layers = adapter_layers if adapter_layers is not None else int(adapter != "mlp")
        self.adapter_hidden = adapter_hidden
        self.adapter_init = adapter_init
        self.position_in_block = position_in_block
        self.tie_word_embeddings = tie_word_embeddings
        self.max_rows_per_forward = max_rows_per_forward
        self.memory_start_id = memory_start_id
        self.memory_id = memory_id
        self.memory_end_id = memory_end_id
        self.pad_id = pad_id
        self.encoder_pad_id = encoder_pad_id
        self.encoder_marker_id = encoder_marker_id
        if self.encoder_config is not None:
            self.check()
        super().__init__(**kwargs)

    @property
    def bidirectional(self) -> bool:
        """Whether the encoder's tokens see the whole window."""
        return self.encoder_attention == "bidirectional"

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The decoder's configuration (the encoder's when only that is asked for): generation reads it."""
        wanted = self.encoder_config if encoder and not decoder else self.decoder_config
        return wanted if wanted is not None else self

    def geometry(self) -> Geometry:
        """How spans become arrays for this model."""
        ids = {
            name: getattr(self, name)
            for name in (
                "memory_start_id",
                "memory_id",
                "memory_end_id",
                "pad_id",
                "encoder_pad_id",
                "encoder_marker_id",
            )
        }
        if missing := [name for name, number in ids.items() if number is None]:
            raise ValueError(
                f"LCLMConfig has no {', '.join(missing)}; build_config sets them from the tokenizers"
            )
        return Geometry(
            ratio=self.ratio,
            window=self.window,
            overlap=self.overlap,
            pooling=self.pooling,
            bidirectional=self.bidirectional,
            max_ratio=max(self.ratios) if self.position_in_block else None,
            **ids,
        )

    @property
    def encoder_position_offset(self) -> int:
        """What RoBERTa-like encoders add to positions: their padding id and one; 0 for all others."""
        if self.encoder_config.model_type in _OFFSET_POSITIONS:
            return int(self.encoder_config.pad_token_id) + 1
        return 0

    def check(self) -> None:
        """ValueError, with what to change, for settings that do not fit together."""
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("encoder_attention", self.encoder_attention, ENCODER_ATTENTIONS)
        _one_of("adapter", self.adapter, ADAPTERS)
        _one_of("adapter_init", self.adapter_init, ADAPTER_INITS)
        if self.ratio not in self.ratios:
            raise ValueError(
                f"ratio {self.ratio} is not among ratios {self.ratios}; add it or change the default"
            )
        if len(self.ratios) > 1 and self.pooling != "mean":
            raise ValueError(f"several ratios {self.ratios} need pooling 'mean', not {self.pooling!r}")
        for ratio in self.ratios:
            if ratio < 1 or self.window < 1 or self.window % ratio:
                raise ValueError(
                    f"ratio {ratio} does not divide the window of {self.window} tokens; "
                    "choose a window that is a multiple of every ratio"
                )
        if self.overlap < 0:
            raise ValueError(f"overlap is {self.overlap}; it must be 0 or more tokens")
        if (self.adapter == "mlp") != (self.adapter_layers == 0):
            raise ValueError(
                f"adapter {self.adapter!r} with adapter_layers {self.adapter_layers}: "
                "'mlp' has none, the attention adapters at least one"
            )
        if self.position_in_block and self.pooling == "eos":
            raise ValueError("position_in_block has no effect with pooling 'eos'; turn one of them off")
        if self.max_rows_per_forward is not None and self.max_rows_per_forward < 1:
            raise ValueError(
                f"max_rows_per_forward is {self.max_rows_per_forward}; it must be at least 1, or null"
            )
        self._check_adapter_init()
        self._check_tied()
        self._check_encoder_positions()

    def _check_adapter_init(self) -> None:
        if self.adapter_init == "identity" and self.pooling == "concat":
            raise ValueError(
                "adapter_init 'identity' needs pooling 'mean' or 'eos': 'concat' has no identity to start at"
            )
        width = self.decoder_config.hidden_size
        if self.adapter_init == "identity" and self.adapter_hidden not in (None, 2 * width):
            raise ValueError(
                f"adapter_init 'identity' needs adapter_hidden {2 * width} (twice the decoder's width)"
            )

    def _check_tied(self) -> None:
        if not self.tie_word_embeddings:
            return
        encoder = (self.encoder_config.vocab_size, self.encoder_config.hidden_size)
        decoder = (self.decoder_config.vocab_size, self.decoder_config.hidden_size)
        if encoder != decoder:
            raise ValueError(
                "tie_embeddings needs embeddings of one shape: "
                f"the encoder's is {encoder}, the decoder's {decoder}"
            )

    def _check_encoder_positions(self) -> None:
        config = self.encoder_config
        learned = getattr(config, "rope_parameters", None) is None and hasattr(
            config, "max_position_embeddings"
        )
        if not learned:
            return
        places = config.max_position_embeddings - self.encoder_position_offset
        length = _row_length(self)
        if length > places:
            raise ValueError(
                f"encoder rows of {length} tokens (window {self.window}, overlap {self.overlap}) exceed the "
                f"{places} learned positions of the encoder ({config.model_type}); choose a smaller window"
            )


def _row_length(config: LCLMConfig) -> int:
    ids = dict.fromkeys(
        ("memory_start_id", "memory_id", "memory_end_id", "pad_id", "encoder_pad_id", "encoder_marker_id"), 0
    )
    return Geometry(
        ratio=config.ratio,
        window=config.window,
        overlap=config.overlap,
        pooling=config.pooling,
        bidirectional=config.bidirectional,
        **ids,
    ).row_length


def _sub_config(config: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig | None:
    if not isinstance(config, dict):
        return config
    settings = dict(config)
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise ValueError("an encoder or decoder configuration needs its model_type, for example qwen3")
    return AutoConfig.for_model(model_type, **settings)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
