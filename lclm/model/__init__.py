"""The model, its configuration and its processor. Importing this registers them with transformers' Auto
classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from .configuration import LCLMConfig
from .modeling import LCLMForConditionalGeneration
from .processing import LCLMProcessor

AutoConfig.register(LCLMConfig.model_type, LCLMConfig, exist_ok=True)
AutoModel.register(LCLMConfig, LCLMForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(LCLMConfig, LCLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(LCLMConfig, LCLMProcessor, exist_ok=True)

__all__ = ["LCLMConfig", "LCLMForConditionalGeneration", "LCLMProcessor"]
