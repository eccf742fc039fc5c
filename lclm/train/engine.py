"""The DeepSpeed engine: configuration, construction, saving, loading, full-precision weights."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lclm.train.optim import Group, build_optimizer
from lclm.train.processes import Processes
from lclm.train.scatter import scatter
from lclm.train.settings import EngineSettings

TAG = "engine"
"""The folder of the engine's own files inside a checkpoint."""


def import_deepspeed() -> Any:
    """DeepSpeed, told to keep quiet and, on a CPU, to compile nothing."""
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="deepspeed")
    import deepspeed

    if not cuda:
        _use_plain_cpu()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _use_plain_cpu() -> None:
    """Set DeepSpeed's CPU accelerator without its shared-memory all-reduce, which training does not use.

    It is compiled at the start: minutes of g++, and a lock that a process killed meanwhile leaves behind, at
    which all later ones wait for ever.
    """
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class PlainCPU(CPU_Accelerator):
        def create_op_builder(self, op_name: str) -> Any:
            return None if op_name == "ShareMemCommBuilder" else super().create_op_builder(op_name)

    set_accelerator(PlainCPU())


def deepspeed_config(
    settings: EngineSettings,
    *,
    zero: int,
    clip: float,
    micro_batch: int,
    accumulation: int,
    elements: int,
    world: int,
) -> dict[str, Any]:
    """DeepSpeed's configuration. `elements` bounds the buckets: the number of parameters that learn.

    At ZeRO 0 in fp32 the engine neither clips nor looks for non-finite gradients: the guard does both.
    """
    bucket = max(1024, min(settings.bucket_elements, elements))
    bucket += bucket % 2  # an odd one is refused
    bf16 = settings.precision == "bf16"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world,
        "gradient_clipping": 0.0 if zero == 0 and not bf16 else clip,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": torch.cuda.is_available(),
            "round_robin_gradients": False,
        },
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
    }
    if bf16 and zero:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    if settings.offload_optimizer:
        # The engine's own CPU optimizer would have to be compiled; torch's fused AdamW has its mathematics.
        config["zero_force_ds_cpu_optimizer"] = False
        config["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": torch.cuda.is_available(),
        }
    if zero == 3:
        config["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": min(100_000, elements // 10),
        }
    return config


def spread_out(
    model: torch.nn.Module, settings: EngineSettings, processes: Processes, config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Partition a model that only the main process has, for an engine at ZeRO 3; see `scatter`."""
    deepspeed = import_deepspeed()
    backend = deepspeed.get_accelerator().communication_backend_name()
    deepspeed.init_distributed(
        backend, dist_init_required=False
    )  # it has to know how many processes there are
    elements = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    whole = deepspeed_config(settings, elements=elements, world=processes.size, **config)
    return scatter(model, whole, torch.bfloat16 if settings.precision == "bf16" else torch.float32, processes)


class Engine:
    """A model on DeepSpeed, with the optimizer's groups within reach at every ZeRO stage."""

    def __init__(
        self,
        model: torch.nn.Module,
        groups: list[Group],
        settings: EngineSettings,
        processes: Processes,
        masters: dict[str, torch.Tensor] | None = None,
        **config: Any,
    ) -> None:
        """`config` is what `deepspeed_config` takes beside the settings. ValueError where Muon meets ZeRO.

        masters: of a model that was spread out, what that gave; None where every process has all weights.
        """
        deepspeed = import_deepspeed()
        self.zero, self.bf16 = config["zero"], settings.precision == "bf16"
        if self.zero and any(group["kind"] == "muon" for group in groups):
            raise ValueError(
                f"Muon needs whole matrices and ZeRO {self.zero} cuts them; set engine.zero=0 (or the "
                "stage's `zero: 0`), or leave `muon` out of the stage's components"
            )
        if settings.offload_optimizer and self.zero != 3:
            raise ValueError(
                f"engine.offload_optimizer works at ZeRO 3, not at ZeRO {self.zero}: at 0 nothing is shared "
                "out, and at 1 and 2 DeepSpeed sums micro-batches in bf16 and cannot go on after a step that "
                "was left out; set engine.zero=3 (or the stage's `zero: 3`; one process will do)"
            )
        self.settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self.learning = [list(group["params"]) for group in groups]
        elements = sum(getattr(p, "ds_numel", p.numel()) for group in groups for p in group["params"])
        start = self._learning(model) if self.bf16 and masters is None else {}
        self.base = build_optimizer([{**group, "lr": 0.0} for group in groups])
        self.deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.base,
            config=deepspeed_config(settings, elements=elements, world=processes.size, **config),
            dist_init_required=False,
        )
        self.processes = processes
        self.base.state.clear()  # at ZeRO 0 in bf16 the engine takes a first step with gradients of zero
        self.apply_settings(1.0)
        if masters is None:
            self._set_masters(start)
        elif self.bf16:
            self._share_masters(masters)

    @staticmethod
    def _learning(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _set_masters(self, start: dict[str, torch.Tensor]) -> None:
        """In bf16 the engine makes its fp32 masters from rounded weights; give them what was rounded off."""
        for name, parameter in self.model.named_parameters():
            if name in start and self.zero:
                set_share(parameter, start[name])
            elif name in start:
                self._master(parameter).copy_(start[name])

    @torch.no_grad()
    def _share_masters(self, masters: dict[str, torch.Tensor]) -> None:
        """The same where the main process alone has them: one at a time, to all, and each keeps its share."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                device = self.processes.device
                if self.processes.main:
                    whole = masters.pop(name).float().to(device)
                else:
                    whole = torch.empty(parameter.ds_shape, device=device)
                dist.broadcast(whole, 0)
                set_share(parameter, whole)

    @property
    def model(self) -> Any:
        """The model, in the engine's precision; at ZeRO 3 its parameters are partitioned."""
        return self.deepspeed.module

    def apply_settings(self, rates: dict[str, float] | float) -> None:
        """Write every setting of every group again: {group: rate}, or one factor on all base rates."""
        for group, settings in zip(self.base.param_groups, self.settings, strict=True):
            rate = rates[settings["name"]] if isinstance(rates, dict) else settings["base_lr"] * rates
            group.update(settings | {"lr": rate})

    def save(self, folder: Path, state: dict[str, Any]) -> str | None:
        """Write weights that learn and the optimizer's state below `folder`; the error's text if it failed.

        Frozen weights are left out under every name they have.
        """
        frozen = frozen_names(self.model)
        hook = self.model.register_state_dict_post_hook(
            lambda module, state, prefix, meta: drop(state, frozen)
        )
        try:
            self.deepspeed.save_checkpoint(
                str(folder), tag=TAG, client_state=state, save_latest=False, exclude_frozen_parameters=True
            )
        except (OSError, RuntimeError) as error:
            self.processes.barrier()  # the one that the engine's other processes wait at
            text = f"{type(error).__name__}: {error}"
            if "inline_container" in text:  # torch's way to say it, without the system's reason
                text = f"a file could not be written in full (no space, a quota, a limit?): {text}"
            return text
        finally:
            hook.remove()
        return None

    def state_bytes(self) -> int:
        """Bytes that `save` writes on this process, about: weights that learn, masters and moments."""
        if not self.zero and not self.processes.main:
            return 0
        tensors = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        tensors += [tensor.ds_tensor for tensor in tensors if hasattr(tensor, "ds_tensor")]
        tensors += [tensor for group in self.base.param_groups for tensor in group["params"]]
        tensors += [v for state in self.base.state.values() for v in state.values() if torch.is_tensor(v)]
        return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())

    def load(self, folder: Path) -> dict[str, Any]:
        """Read what `save` wrote into a model built from the stage's start; returns the saved state.

        Raises ValueError unless the checkpoint holds exactly the weights that learn.
        """
        frozen = frozen_names(self.model)

        def load_weights(src: dict[str, Any], dst: torch.nn.Module) -> None:
            missing, unexpected = dst.load_state_dict(src, strict=False)
            if set(missing) != frozen or unexpected:
                wrong = sorted((set(missing) ^ frozen) | set(unexpected))
                raise ValueError(
                    f"{folder} does not fit this stage: {len(wrong)} weights differ from those that learn, "
                    f"for example {', '.join(wrong[:3])}; was it written by another recipe?"
                )

        path, state = self.deepspeed.load_checkpoint(
            str(folder), tag=TAG, load_module_strict=False, custom_load_fn=load_weights
        )
        if path is None:
            raise ValueError(f"{folder}: the engine found no checkpoint there")
        self.apply_settings(1.0)
        return state

    def learned_weights(self) -> dict[str, torch.Tensor]:
        """{name: whole fp32 tensor on the CPU} of what learns; {} but on the main process. Collective."""
        masters: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                value = self._master(parameter)
                if self.processes.main:
                    masters[name] = value.detach().float().cpu().clone()
        return masters

    def _master(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if self.zero:
            value = safe_get_full_fp32_param(parameter)
            assert value is not None, "the engine lost a parameter's master weights"
            return value.reshape(getattr(parameter, "ds_shape", parameter.shape))
        if not self.bf16:
            return parameter
        if not hasattr(self, "_pairs"):
            optimizer = self.deepspeed.optimizer
            self._pairs = {
                id(low): high
                for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
                for low, high in zip(lows, highs, strict=True)
            }
        return self._pairs[id(parameter)]

    def close(self) -> None:
        """Free what the engine holds; the model cannot be used after it."""
        self.deepspeed.destroy()


def set_share(parameter: torch.nn.Parameter, whole: torch.Tensor, key: str | None = None) -> None:
    """Set this process's share of a parameter's masters, or of its optimizer state `key`, at ZeRO 1 to 3.

    `whole`: all of it, in any shape. The parameter itself, in the engine's precision, stays as it is.
    """
    from deepspeed import utils

    cut: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    if cut is None:
        if key is None:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, key)
        return
    size, rank = cut.numel(), dist.get_rank()  # the functions for whole tensors fail where a share is padded
    share = whole.reshape(-1)[size * rank : size * (rank + 1)]
    share = torch.nn.functional.pad(share, (0, size - share.numel()))
    if key is None:
        utils.safe_set_local_fp32_param(parameter, share)
    else:
        utils.safe_set_local_optimizer_state(parameter, share, key)


def frozen_names(model: torch.nn.Module) -> set[str]:
    """Names in the state dict, tied ones included, of parameters that do not learn."""
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }


def drop(state: dict[str, Any], names: set[str]) -> None:
    """Remove `names` from a state dict, in place."""
    for name in names:
        state.pop(name, None)
