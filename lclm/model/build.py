"""One function builds the model for training, resuming, export and inference."""

from __future__ import annotations

from .settings import DecoderSettings, EncoderSettings, ModelSettings

__all__ = ["DecoderSettings", "EncoderSettings", "ModelSettings"]
