"""Which modality a token is of, as a learned vector."""

import torch
from torch import Tensor, nn

from mmpt.models.transformer import BERT_DEVIATION


class ModalityEmbedding(nn.Module):
    """x [T, D] plus the vector of one modality."""

    def __init__(self, modalities: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(modalities, width))
        nn.init.normal_(self.embedding, std=BERT_DEVIATION)

    def forward(self, x: Tensor, modality: int) -> Tensor:
        return x + self.embedding[modality]
