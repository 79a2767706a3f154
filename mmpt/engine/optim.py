"""Parameter groups and the optimizer that DeepSpeed steps.

Optimizers are built here and handed to DeepSpeed ready-made ("client optimizers"), so that none is compiled at start-up
and each does what its paper says at every ZeRO stage.
"""

import importlib
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpt.config import at_least
from mmpt.engine.lamb import Lamb
from mmpt.engine.schedule import Decay, lr_factor
from mmpt.models.batch_norm import BatchNorm


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "lamb"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019) or LAMB (You et al. 2020)."""
    backend: Literal["torch", "apex"] = "torch"
    """Who computes the update: torch (fused on CUDA) or NVIDIA apex's fused kernels, where installed."""
    lr: float = 5e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the first and second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.2
    """Decoupled weight decay of matrices; biases, norm gains, temperatures and vectors have none."""
    decay_embeddings: bool = True
    """Whether token and position embeddings decay (CLIP: yes, FILIP: no)."""
    clip_norm: float = 0.0
    """Clip the global gradient norm to this; 0 does not clip."""
    warmup_steps: int = 2000
    """Linear warm-up, in optimizer steps."""
    decay: Decay = "cosine"
    """Shape of the learning rate after the warm-up."""
    final_lr_fraction: float = 0.0
    """Learning rate at the end, as a fraction of the peak."""
    lock: Literal["none", "image", "text", "both"] = "none"
    """Towers that are not trained (LiT locks the image tower); projections and temperature always train."""
    tower_lr: float = 1.0
    """Factor on the learning rate of the towers, beside 1 for what joins them (METER: a fifth)."""
    layer_decay: float = 1.0
    """Factor on the learning rate per block below the top one of each tower; 1 is none."""

    def __post_init__(self) -> None:
        at_least(0, self, "lr", "eps", "weight_decay", "clip_norm", "warmup_steps", "final_lr_fraction", "tower_lr")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas lie from 0 to below 1, got {self.betas}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay lies above 0 and up to 1, got {self.layer_decay}")


def learning_rate(config: OptimConfig, applied_steps: int, total_steps: int) -> float:
    """For the update after `applied_steps` updates."""
    factor = lr_factor(applied_steps, config.warmup_steps, total_steps, config.decay, config.final_lr_fraction)
    return config.lr * factor


TOWER = re.compile(r"(?:^|\.)(image|text)\.")
BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


def freeze(module: nn.Module, lock: str) -> None:
    """Stop the gradients and batch statistics of the locked towers; projections lie beside them. ValueError if nothing
    matches."""
    locked = {"none": (), "image": ("image",), "text": ("text",), "both": ("image", "text")}[lock]
    for tower in locked:
        names = [n for n, _ in module.named_parameters() if tower_of(n) == tower]
        if not names:
            raise ValueError(f"optim.lock={lock!r}, but the model has no {tower} tower")
        for name in names:
            module.get_parameter(name).requires_grad_(False)
        for name, norm in module.named_modules():
            if isinstance(norm, BatchNorm) and tower_of(name) == tower:
                norm.locked = True


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters in groups of equal (weight decay, lr_scale), in an order that depends on names alone."""
    depth = {"image": 0, "text": 0, "": 0}
    for name, _ in module.named_parameters():
        if block := BLOCK.search(name):
            depth[tower_of(name)] = max(depth[tower_of(name)], int(block[1]) + 1)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim == 0:
            raise ValueError(f"parameter {name} has no dimension; give it the shape [1] (DeepSpeed cannot shard it)")
        if parameter.requires_grad:
            decay = config.weight_decay if _decays(name, parameter, config) else 0.0
            scale = config.layer_decay ** _layers_below_top(name, depth)
            if tower_of(name) and "projection" not in name:
                scale *= config.tower_lr
            groups.setdefault((decay, scale), []).append(parameter)
    if not groups:
        raise ValueError("every parameter is locked: there is nothing to train")
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def tower_of(name: str) -> str:
    """The tower that a parameter belongs to; empty for what is beside or above the towers."""
    found = TOWER.search(name)
    return found[1] if found else ""


def _decays(name: str, parameter: Tensor, config: OptimConfig) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1 and (config.decay_embeddings or "embedding" not in name)


def _layers_below_top(name: str, depth: dict[str, int]) -> int:
    """0 for the top block and everything above it, depth for what lies below the first block (the embeddings)."""
    tower = tower_of(name)
    if block := BLOCK.search(name):
        return depth[tower] - 1 - int(block[1])
    below = "embedding" in name or "ln_pre" in name
    return depth[tower] if tower and below else 0


def build_optimizer(groups: list[dict], config: OptimConfig, zero_stage: int, device: torch.device) -> Any:
    """The optimizer for these groups. ValueError where the combination would not do what it says."""
    if config.backend == "apex":
        return _apex_optimizer(groups, config, zero_stage)
    if config.name == "lamb":
        return Lamb(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    fused = True if device.type == "cuda" else None
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused, foreach=None if fused else False
    )


def _apex_optimizer(groups: list[dict], config: OptimConfig, zero_stage: int) -> Any:
    if config.name == "lamb" and zero_stage > 0:
        raise ValueError(
            f"optim.backend=apex with optim.name=lamb at ZeRO stage {zero_stage} would use one trust ratio for all "
            "layers of a partition; use optim.backend=torch, which keeps one per parameter"
        )
    wanted = "FusedLAMB" if config.name == "lamb" else "FusedAdam"
    try:
        optimizers = importlib.import_module("apex.optimizers")
    except ImportError as error:  # the package of that name on PyPI is another one
        raise ValueError(f"optim.backend=apex needs NVIDIA's apex, which does not import here ({error})") from error
    if not hasattr(optimizers, wanted):
        raise ValueError(f"the installed apex has no {wanted}: it is not NVIDIA's, or was built without CUDA")
    return getattr(optimizers, wanted)(groups, lr=config.lr, betas=config.betas, eps=config.eps)
