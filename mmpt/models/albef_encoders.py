"""The encoders of ALBEF (Li et al. 2021, section 3.1): all that has a momentum copy."""

from torch import Tensor, nn

from mmpt.batch import Tokens
from mmpt.models.bert import BertConfig
from mmpt.models.dual_tower import unit
from mmpt.models.fusion import Fusion, FusionConfig
from mmpt.models.heads import MaskedWordHead
from mmpt.models.image import ViTConfig
from mmpt.models.pooling import first_token
from mmpt.models.transformer import BERT_DEVIATION, initialise_linear


class Encoders(nn.Module):
    """`image` and `text`, projections of their [CLS], `fusion`, and a head for masked words tied to the embedding."""

    def __init__(self, image: ViTConfig, text: BertConfig, fusion: FusionConfig, embed_dim: int):
        super().__init__()
        self.image, self.text, self.fusion = image.build(), text.build(), Fusion(fusion)
        self.image_projection, self.text_projection = (
            nn.Linear(width, embed_dim) for width in (image.width, text.width)
        )
        for linear in (self.image_projection, self.text_projection):
            initialise_linear(linear, BERT_DEVIATION)
        words = self.text.embedding.token_embedding
        self.word_head = MaskedWordHead(fusion.trunk.width, text.embedding.vocab_size, words)

    def image_vector(self, image: Tokens) -> Tensor:
        """[B, embed_dim], each row of length 1, of what `image` returned."""
        return unit(self.image_projection(first_token(image)))

    def text_vector(self, text: Tokens) -> Tensor:
        """[B, embed_dim], each row of length 1, of what `text` returned."""
        return unit(self.text_projection(first_token(text)))

    def guess(self, text: Tokens, image: Tokens, chosen: Tensor) -> Tensor:
        """Logits over the vocabulary, [M, V], for the words at these rows [M], having seen the image."""
        return self.word_head(self.fusion(text, image).x[chosen])
