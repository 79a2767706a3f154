"""ALBEF: Align before Fuse: Vision and Language Representation Learning with Momentum Distillation.
Li, Selvaraju, Gotmare, Joty, Xiong, Hoi. NeurIPS 2021, arXiv 2107.07651.

New: image and text are aligned by a contrastive loss (ITC) before they meet in a fusion encoder, whose matching (ITM)
gets its hard negatives from that loss; and a momentum copy of the model gives soft targets to ITC and to masked words
(MLM), because pairs from the web match only in part (section 3).

As in the released code: the copy computes features first (it has followed all updates so far), then similarities with
[this batch | queue] of the copy's features, then the queue takes this batch. Targets are alpha * softmax(copy) + (1 -
alpha) * own, alpha growing from 0 over the first epoch. One hard image per text, one hard text per image: 3 B pairs.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmpt import dist
from mmpt.batch import Batch, Pictures, Tokens, concatenate
from mmpt.inputs import InputSpec, WordMasking, combined
from mmpt.methods.method import Method, Term
from mmpt.methods.tasks import chosen_rows, matching_terms
from mmpt.models.albef_encoders import Encoders
from mmpt.models.bert import BertConfig
from mmpt.models.fusion import FusionConfig
from mmpt.models.image import ViTConfig
from mmpt.models.logit_scale import Temperature
from mmpt.models.pooling import first_token
from mmpt.models.transformer import BERT_DEVIATION, initialise_linear
from mmpt.objectives.distillation import distilled_contrast, distilled_guesses
from mmpt.objectives.matching import hard_negatives, matching_score
from mmpt.ops.bounded import bounded
from mmpt.ops.features import gather
from mmpt.ops.packing import take


@dataclass(frozen=True)
class ALBEFConfig:
    image: ViTConfig
    text: BertConfig
    """The lower half of BERT, which sees the text alone."""
    fusion: FusionConfig
    """The upper half, which looks at the image."""
    embed_dim: int = 256
    """Width of the space in which image and text are aligned."""
    masking: WordMasking = field(default_factory=lambda: WordMasking(last_token=True))
    initial_temperature: float = 0.07
    """Similarities start divided by this; it is learned, within [0.001, 0.5]."""
    queue: int = 65536
    """Features of the copy that are kept from earlier batches, of images and of texts."""
    momentum: float = 0.995
    """The copy follows the model by t <- momentum * t + (1 - momentum) * s after every applied step."""
    alpha: float = 0.4
    """Share of the copy's answers in the targets; 0 is training without distillation."""
    alpha_ramp_steps: int = 10_000
    """Steps over which alpha grows from 0: one epoch as published."""
    scope: Literal["local", "global"] = "local"
    """Whose pairs of this step are negatives, and hard negatives: this worker's, as published, or all workers'."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or not 0 <= self.momentum <= 1 or self.alpha_ramp_steps < 1 or self.queue < 0:
            raise ValueError(
                f"alpha ({self.alpha}) and momentum ({self.momentum}) are shares in [0, 1], alpha_ramp_steps "
                f"({self.alpha_ramp_steps}) is 1 or more, queue ({self.queue}) 0 or more"
            )
        if self.fusion.context_width != self.image.width or self.fusion.trunk.width != self.text.width:
            raise ValueError(
                f"fusion takes texts {self.fusion.trunk.width} wide and images {self.fusion.context_width} wide; "
                f"the text encoder makes {self.text.width} and the image encoder {self.image.width}"
            )

    def inputs(self) -> InputSpec:
        return replace(combined(self.image.inputs(), self.text.inputs()), masked_words=self.masking, draws=2)

    def build(self) -> "ALBEF":
        return ALBEF(self)


class ALBEF(Method):
    couples_pairs = True
    fuses = True
    student = "encoders"

    def __init__(self, config: ALBEFConfig):
        super().__init__()
        self.config, self.momentum = config, config.momentum
        self.encoders = Encoders(config.image, config.text, config.fusion, config.embed_dim)
        self.match_head = nn.Linear(config.fusion.trunk.width, 2)
        initialise_linear(self.match_head, BERT_DEVIATION)
        self.temperature = Temperature(config.initial_temperature, 0.001, 0.5, bounded)
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, normalize(torch.randn(config.queue, config.embed_dim), dim=-1))
        self.register_buffer("queue_next", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros(1))
        self._arrived: tuple[Tensor, Tensor] | None = None
        self.make_teacher()

    def encode_image(self, pictures: Pictures) -> Tokens:
        """[T, D], [CLS] first."""
        return self.encoders.image(pictures)

    def encode_text(self, ids: Tokens) -> Tokens:
        """[T, D], [CLS] first, from the lower half of BERT."""
        return self.encoders.text(ids)

    def encode(self, batch: Batch) -> tuple[Any, ...]:
        """What the objective needs of each pair: tokens of both sides, the copy's vectors, the loss of its masked words
        and how many were guessed, and two numbers to draw negatives by."""
        assert batch.masked_words is not None and batch.draws is not None
        image, text = self.encode_image(batch.pictures), self.encode_text(batch.text)
        masked, chosen = batch.text.with_x(batch.masked_words.ids), chosen_rows(batch.masked_words)
        guesses = self.encoders.guess(self.encode_text(masked), image, chosen)  # [M, V]
        with self.teaching() as copy:
            image_m = copy.image(batch.pictures)
            vectors = copy.image_vector(image_m), copy.text_vector(copy.text(batch.text))
            answers = copy.guess(copy.text(masked), image_m, chosen).float().softmax(1)
        words = batch.text.x[chosen]
        each = distilled_guesses(guesses, words, answers, self.alpha())  # [M]
        pair = batch.text.sequence_index()[chosen]
        sums = torch.stack([each, (guesses.argmax(1) == words).to(each)], 1)  # [M, 2]
        of_pairs = sums.new_zeros(len(batch), 2).index_add(0, pair, sums)
        return image, text, *vectors, of_pairs, pair_counts(pair, len(batch)), batch.draws

    def objective(
        self, image: Tokens, text: Tokens, image_m: Tensor, text_m: Tensor, words: Tensor, guessed: Tensor,
        draws: Tensor,
    ) -> dict[str, Term]:  # fmt: skip
        self._arrived = (image_m.detach(), text_m.detach())
        i2t, t2i, own, terms = self.contrast(image, text, image_m, text_m)
        count = torch.full((), float(len(image_m)), device=image_m.device)
        return {
            **terms,
            **self.matching(image, text, i2t, t2i, own, draws),
            "words": Term(words[:, 0].sum(), guessed.sum()),
            "accuracy_words": Term(words[:, 1].sum().detach(), guessed.sum(), 0.0),
            "alpha": Term(self.alpha() * count, count, 0.0),
        }

    def contrast(
        self, image: Tokens, text: Tokens, image_m: Tensor, text_m: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Term]]:
        """Logits [B, C + queue] of our images with texts of the copy, and of our texts with images of the copy; [B, C]
        which of these C pairs is ours; and the contrastive terms (equation 6)."""
        ours = self.encoders.image_vector(image), self.encoders.text_vector(text)
        images, texts = (gather(x.detach()) if self.config.scope == "global" else x.detach() for x in (image_m, text_m))
        first = dist.rank() * len(image_m) if self.config.scope == "global" else 0
        own = torch.zeros(len(image_m), len(images), dtype=torch.bool, device=image_m.device)
        own[:, first : first + len(image_m)].fill_diagonal_(True)
        candidates = torch.cat([images, self.image_queue]), torch.cat([texts, self.text_queue])  # type: ignore[list-item]
        among_all, scale = nn.functional.pad(own, (0, len(self.image_queue))), self.temperature()  # type: ignore[arg-type]
        found = distilled_contrast(ours, (image_m, text_m), candidates, among_all, scale, self.alpha())
        count = torch.full((), float(len(image_m)), device=image_m.device)
        terms = {
            "contrastive": Term(found.loss, count),
            "accuracy_i2t": Term(found.right_i2t, count, 0.0),
            "accuracy_t2i": Term(found.right_t2i, count, 0.0),
            "logit_scale": Term(scale.detach().sum(), torch.ones_like(count), 0.0),
        }
        return found.i2t, found.t2i, own, terms

    def matching(
        self, image: Tokens, text: Tokens, i2t: Tensor, t2i: Tensor, own: Tensor, draws: Tensor
    ) -> dict[str, Term]:
        """Our pairs, each text with a hard image, each image with a hard text."""
        others = own.shape[1]
        hard_image = hard_negatives(t2i[:, :others], own, draws[:, 0])
        hard_text = hard_negatives(i2t[:, :others], own, draws[:, 1])
        everywhere = self.config.scope == "global"
        images, texts = (gather(x) if everywhere else x for x in (image, text))
        assert isinstance(images, Tokens) and isinstance(texts, Tokens)
        pairs = self.encoders.fusion(
            concatenate([text, text, take(texts, hard_text)]), concatenate([image, take(images, hard_image), image])
        )
        matches = torch.arange(3 * len(own), device=own.device) < len(own)
        return matching_terms(self.match_head(first_token(pairs)), matches)

    def alpha(self) -> Tensor:
        """A scalar, the share of the copy's answers at this step."""
        return self.config.alpha * (self.steps / self.config.alpha_ramp_steps).clamp(max=1.0)[0]  # type: ignore[operator]

    @torch.no_grad()
    def after_step(self) -> None:
        """The queue takes all ranks' features of this step, in place of the oldest."""
        super().after_step()
        assert self._arrived is not None
        for queue, arrived in zip((self.image_queue, self.text_queue), self._arrived, strict=True):
            new = dist.gather(arrived.float())[: len(queue)]  # type: ignore[arg-type]
            places = (self.queue_next + torch.arange(len(new), device=new.device)) % max(1, len(queue))  # type: ignore[operator, arg-type]
            queue.index_copy_(0, places, new)  # type: ignore[operator]
        self.queue_next.add_(len(new)).remainder_(max(1, self.config.queue))  # type: ignore[operator]
        self.steps.add_(1)  # type: ignore[operator]

    def counts(self, batch: Batch) -> dict[str, float]:
        assert batch.masked_words is not None
        return {"contrastive": len(batch), "matching": 3 * len(batch), "words": batch.masked_words.count}

    def score_pairs(self, image: Tokens, text: Tokens) -> Tensor:
        """[B], the log odds that each image and its text belong together."""
        return matching_score(self.match_head(first_token(self.encoders.fusion(text, image))))

    def vectors(self, image: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
        """[A, embed_dim] and [C, embed_dim], what ITC aligns: for shortlists, without the fusion encoder."""
        return self.encoders.image_vector(image), self.encoders.text_vector(text)


def pair_counts(pair: Tensor, pairs: int) -> Tensor:
    """[pairs] fp32, how often each pair is named in `pair` [M]."""
    return torch.zeros(pairs, device=pair.device).index_add(0, pair, torch.ones(len(pair), device=pair.device))
