"""Latent Context Language Models: an encoder turns a long context into latents, a decoder reads them.

Importing this package loads nothing heavy. Touching a public name imports `lclm.model`, which registers the
model with transformers' Auto classes.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lclm.model import LCLMConfig, LCLMForConditionalGeneration, LCLMProcessor

__all__ = ["LCLMConfig", "LCLMForConditionalGeneration", "LCLMProcessor", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lclm")
    if name in __all__:
        import lclm.model

        return getattr(lclm.model, name)
    raise AttributeError(f"module 'lclm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
