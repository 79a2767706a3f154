"""Blocks that look at another modality: ALBEF's multimodal encoder, and two of them side by side as co-attention."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmpt.batch import Tokens
from mmpt.models.transformer import BERT_DEVIATION, Block, TransformerConfig, initialise_linear
from mmpt.ops.attention import attention


@dataclass(frozen=True)
class FusionConfig:
    trunk: TransformerConfig
    """Of the blocks; BERT's, with their norms after the sums."""
    context_width: int
    """Width of the tokens of the other modality."""

    def __post_init__(self) -> None:
        if self.trunk.norm != "post":
            raise ValueError(f"fusion blocks have their layer norms after the sums, not {self.trunk.norm!r}")


class CrossBlock(Block):
    """norm(x + attention(x)), then norm(x + attention(x, context)), then norm(x + mlp(x))."""

    def __init__(self, config: FusionConfig):
        super().__init__(config.trunk, causal=False, drop_path=0.0)
        width = config.trunk.width
        self.norm_cross = nn.LayerNorm(width, config.trunk.norm_eps)
        self.cross_q, self.cross_out = nn.Linear(width, width), nn.Linear(width, width)
        self.cross_kv = nn.Linear(config.context_width, 2 * width)
        for linear in (self.qkv, self.out, self.mlp_in, self.mlp_out, self.cross_q, self.cross_kv, self.cross_out):
            initialise_linear(linear, BERT_DEVIATION)

    def forward(self, x: Tensor, sequences: Tokens, context: Tensor, context_sequences: Tokens) -> Tensor:  # type: ignore[override]
        """x [T, D] -> [T, D]; context [T_c, D_c], as many sequences. The Tokens say where each sequence lies."""
        x = self.norm_1(x + self.dropout(self._attend(x, sequences)))
        x = self.norm_cross(x + self.dropout(self._look(x, sequences, context, context_sequences)))
        return self.norm_2(x + self.dropout(self._mlp(x)))

    def _look(self, x: Tensor, sequences: Tokens, context: Tensor, context_sequences: Tokens) -> Tensor:
        query = self.cross_q(x).unflatten(1, (self.config.heads, -1))  # [T, H, Dh]
        key, value = self.cross_kv(context).unflatten(1, (2, self.config.heads, -1)).unbind(1)  # [T_c, H, Dh] each
        dropout = self.config.attention_dropout if self.training else 0.0
        found = attention(query, key, value, sequences, dropout=dropout, key_sequences=context_sequences)
        return self.cross_out(found.flatten(1))


class Fusion(nn.Module):
    """text Tokens [T, D] and image Tokens [T_i, D_i] of the same pairs -> text Tokens [T, D] that have seen the image.

    Li et al. 2021, ALBEF, section 3.1: the upper half of BERT, with cross-attention in every block.
    """

    def __init__(self, config: FusionConfig):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(CrossBlock(config) for _ in range(config.trunk.depth))

    def forward(self, text: Tokens, image: Tokens) -> Tokens:
        x = text.x
        for block in self.blocks:
            x = run_block(block, self.config.trunk, x, text, image.x, image)
        return text.with_x(x)


class CoAttention(nn.Module):
    """Two streams that look at each other in every block: (text, image) Tokens -> (text, image) Tokens, both [T, D].

    Lu et al. 2019 (ViLBERT), Tan and Bansal 2019 (LXMERT), Dou et al. 2022 (METER, section 2.2): each block of a stream
    sees what the other stream was before that block. Both streams have the width of the trunk.
    """

    def __init__(self, trunk: TransformerConfig):
        super().__init__()
        self.config = FusionConfig(trunk, context_width=trunk.width)
        self.text_blocks = nn.ModuleList(CrossBlock(self.config) for _ in range(trunk.depth))
        self.image_blocks = nn.ModuleList(CrossBlock(self.config) for _ in range(trunk.depth))

    def forward(self, text: Tokens, image: Tokens) -> tuple[Tokens, Tokens]:
        t, v = text.x, image.x
        for for_text, for_image in zip(self.text_blocks, self.image_blocks, strict=True):
            t, v = (
                run_block(for_text, self.config.trunk, t, text, v, image),
                run_block(for_image, self.config.trunk, v, image, t, text),
            )
        return text.with_x(t), image.with_x(v)


def run_block(
    block: nn.Module, trunk: TransformerConfig, x: Tensor, sequences: Tokens, context: Tensor, others: Tokens
) -> Tensor:
    """The block's output, computed again in the backward where the configuration wants to save its activations."""
    if trunk.checkpoint_activations and torch.is_grad_enabled():
        return checkpoint(block, x, sequences, context, others, use_reentrant=False)  # type: ignore[return-value]
    return block(x, sequences, context, others)
