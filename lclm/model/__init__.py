"""The model, its configuration, its processor and its pipeline. Importing this registers them with
transformers: for its Auto classes and `pipeline`, and so that a checkpoint carries their code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration import LCLMConfig
from .modeling import LCLMForConditionalGeneration
from .pipeline import TASK, LCLMPipeline
from .processing import LCLMProcessor

AutoConfig.register(LCLMConfig.model_type, LCLMConfig, exist_ok=True)
AutoModel.register(LCLMConfig, LCLMForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(LCLMConfig, LCLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(LCLMConfig, LCLMProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(TASK, LCLMPipeline, pt_model=AutoModelForCausalLM, type="text")
LCLMConfig.register_for_auto_class("AutoConfig")
LCLMForConditionalGeneration.register_for_auto_class("AutoModelForCausalLM")
LCLMProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["LCLMConfig", "LCLMForConditionalGeneration", "LCLMPipeline", "LCLMProcessor"]
