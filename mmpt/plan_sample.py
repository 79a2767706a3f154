"""What cannot be said by a formula is measured: a few pairs pass through real modules here, on a CPU.

A block of a transformer alone tells what autograd keeps for each of its tokens; a whole method tells bytes and FLOPs of
each pair, whatever its towers are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from mmpt.batch import Batch, Partners, Pictures, Regions, Tokens, pack, pack_equal
from mmpt.engine.optim import freeze
from mmpt.inputs import InputSpec
from mmpt.methods.method import Method, MethodConfig, loss_of
from mmpt.models.transformer import Block, TransformerConfig
from mmpt.synthetic import synthetic_batch

FEW, MORE = 2, 4
"""Pairs that pass; what one more takes is half the difference. One alone has no hard negative."""


class Sample(NamedTuple):
    """Of one pair in a micro-batch. A method with tasks has the highest bytes of any and the mean of their FLOPs."""

    bytes: float
    """What autograd keeps between forward and backward."""
    flops: float
    """Of both, with what checkpointed activations compute again."""
    couples_pairs: bool
    """Several micro-batches run the forward twice."""


class Counter(TorchDispatchMode):
    """Adds up the matrix products, convolutions and attentions that pass, by torch's own formulas."""

    def __init__(self, formulas: dict[Any, Callable[..., Any]] = flop_registry) -> None:
        super().__init__()
        self.flops, self._formulas = 0.0, formulas

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := self._formulas.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _cpu_attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


WITH_ATTENTION = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}
"""With a CPU's attention, which torch leaves out."""


@cache
def sample_of(config: MethodConfig, tokens: int, whole: bool, lock: str, dtype: torch.dtype, casts: bool) -> Sample:
    """Of a method with texts of so many tokens; regions, and patches of a whole image, are as many as there may be.

    whole: encode and objective, or encode alone. lock: towers that are not trained. casts: to bf16, on the fly.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        method = config.build().to(dtype)
        freeze(method, lock)
        for module in method.modules():
            if isinstance(module, Block):  # fused attention keeps no weights; here dropout on them would
                module.config = replace(module.config, attention_dropout=0.0)
        inputs = config.inputs()
        weights = inputs.tasks or (("", 1),)
        found = [_per_pair(method, inputs, tokens, task, whole, casts) for task, _ in weights]
    mean = sum(weight * sample.flops for sample, (_, weight) in zip(found, weights, strict=True))
    return Sample(max(sample.bytes for sample in found), mean / sum(w for _, w in weights), method.couples_pairs)


def _per_pair(method: Method, inputs: InputSpec, tokens: int, task: str, whole: bool, casts: bool) -> Sample:
    few, more = (_passed(method, even_batch(inputs, n, tokens, task), whole, casts) for n in (FEW, MORE))
    kept, flops = ((b - a) / (MORE - FEW) for a, b in zip(few, more, strict=True))
    return Sample(kept, flops, method.couples_pairs)


def _passed(method: Method, batch: Batch, whole: bool, casts: bool) -> tuple[float, float]:
    """Bytes and FLOPs of the whole batch."""
    with Counter(WITH_ATTENTION) as counter:
        with kept_storages() as kept, torch.autocast("cpu", torch.bfloat16, enabled=casts):
            if whole:
                out = loss_of(method.terms(batch), method.counts(batch), 1)
            else:
                out = sum((x.x if isinstance(x, Tokens) else x).float().sum() for x in method.encode(batch))
        for tensor in (*method.parameters(), *method.buffers()):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        assert isinstance(out, Tensor)
        if out.requires_grad:
            out.backward()
    method.zero_grad(set_to_none=True)
    return sum(kept.values()), counter.flops


@contextmanager
def kept_storages() -> Iterator[dict[int, int]]:
    """Address and bytes of all that autograd keeps of what is computed inside. It lives as long as the graph does."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield storages


@cache
def saved_bytes_per_token(trunk: TransformerConfig, length: int, dtype: torch.dtype, casts: bool) -> float:
    """What autograd keeps of one block for each token of sequences of this length, its inputs cast to bf16 or not."""
    with torch.random.fork_rng(devices=[]):
        block = Block(trunk, causal=False, drop_path=0.0).to(dtype)

    def saved(sequences: int) -> int:
        tokens = pack_equal(torch.zeros(sequences, length, trunk.width, dtype=dtype))
        with kept_storages() as storages:
            with torch.autocast("cpu", torch.bfloat16, enabled=casts):
                out = block(tokens.x.requires_grad_(), tokens)
            for parameter in block.parameters():
                storages.pop(parameter.untyped_storage().data_ptr(), None)
            del out
        return sum(storages.values())

    return (saved(2) - saved(1)) / length


def even_batch(inputs: InputSpec, pairs: int, tokens: int, task: str = "") -> Batch:
    """Pairs that are all alike in size: texts of `tokens` tokens, and images as large as they may be."""
    tokens = inputs.max_text_tokens if inputs.text_padding == "max" else min(tokens, inputs.max_text_tokens)
    batch = synthetic_batch(replace(inputs, max_text_tokens=tokens, text_padding="max"), pairs, 0, task)
    if inputs.regions is None and inputs.image_resize == "square":
        return batch
    pictures = _largest(inputs, pairs)
    if batch.masked_regions is not None:
        chosen = torch.arange(pairs * _regions(inputs)) % max(1, round(1 / inputs.masked_regions)) == 0
        batch = replace(batch, masked_regions=batch.masked_regions._replace(chosen=chosen, count=int(chosen.sum())))
    partners = batch.partners and Partners(pictures, batch.partners.matches)
    return replace(batch, pictures=pictures, partners=partners)


def _regions(inputs: InputSpec) -> int:
    assert inputs.regions is not None
    return inputs.regions.most


def _largest(inputs: InputSpec, pairs: int) -> Pictures:
    if inputs.regions is not None:
        count = _regions(inputs)
        features = pack_equal(torch.randn(pairs, count, inputs.regions.width))
        classes = torch.rand(pairs * count, inputs.regions.classes).softmax(1)
        return Pictures(regions=Regions(features, torch.rand(pairs * count, 7), classes))
    across, along = max(1, inputs.image_size // inputs.patch_size), inputs.longest_side // inputs.patch_size
    count = min(across * along, inputs.most_patches or across * along)
    patches = pack([torch.randint(0, 256, (count, 3 * inputs.patch_size**2), dtype=torch.uint8)] * pairs)
    return Pictures(patches=patches, places=patches.position(), grids=torch.tensor([[across, along]] * pairs))
