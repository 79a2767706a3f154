"""Single changes to a recipe that save memory, each planned like the recipe itself."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

from mmpt.methods.filip import FILIPConfig
from mmpt.plan import Setting, memory, work


class Knob(NamedTuple):
    flags: str
    bytes: float
    """Per device, with it."""
    flops: float


def knobs(setting: Setting) -> list[Knob]:
    """Single changes that save memory, most first."""
    now, found = sum(part.bytes for part in memory(setting)), []
    for flags, changed in _changes(setting):
        total = sum(part.bytes for part in memory(changed))
        if total < 0.99 * now:
            found.append(Knob(flags, total, sum(part.flops for part in work(changed))))
    return sorted(found, key=lambda knob: knob.bytes)


def _changes(setting: Setting) -> Iterator[tuple[str, Setting]]:
    recipe = setting.recipe
    config: Any = recipe.method

    def changed(**parts: Any) -> Setting:
        return replace(setting, recipe=replace(recipe, **parts))

    share, budget = setting.pairs // setting.micro_batches // 2, recipe.engine.max_micro_batch_tokens // 2
    if budget:
        yield (
            f"--engine.max_micro_batch_tokens {budget}",
            changed(engine=replace(recipe.engine, max_micro_batch_tokens=budget)),
        )
    elif share and not setting.pairs % share:
        yield f"--engine.max_micro_batch {share}", changed(engine=replace(recipe.engine, max_micro_batch=share))
    if recipe.engine.zero_stage < 3:
        stage = recipe.engine.zero_stage + 1
        yield f"--engine.zero_stage {stage}", changed(engine=replace(recipe.engine, zero_stage=stage))
    for flag, method in _checkpointed(config, "--method"):
        yield f"{flag} true", changed(method=method)
    if hasattr(config, "contrast"):
        ring = replace(config.contrast, exchange="ring")
        yield "--method.contrast.exchange ring", changed(method=replace(config, contrast=ring))
    if isinstance(config, FILIPConfig):
        yield "--method.winners recompute", changed(method=replace(config, winners="recompute"))


def _checkpointed(config: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(flag, the configuration with it) for each part of a configuration that can save activations and does not."""
    for field in fields(config):
        value, flag = getattr(config, field.name), f"{path}.{field.name}"
        if field.name == "checkpoint_activations" and not value:
            yield flag, replace(config, checkpoint_activations=True)
        elif is_dataclass(value):
            for deeper, part in _checkpointed(value, flag):
                yield deeper, replace(config, **{field.name: part})
