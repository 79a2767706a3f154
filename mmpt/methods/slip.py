"""SLIP: Self-supervision Meets Language-Image Pre-training.
Mu, Kirillov, Wagner, Xie. ECCV 2022, arXiv 2112.12750.

New: CLIP plus SimCLR: the image tower also has to tell two strongly augmented views of an image from those of all
others. The views pass the tower and a projector; the losses are added (section 4, algorithm 1).

Other self-supervised objectives that the paper names (MoCo v3, BYOL) would take the place of objectives/two_views.py.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmpt import dist
from mmpt.batch import Batch, Pictures
from mmpt.inputs import InputSpec
from mmpt.methods.clip import CLIP, CLIPConfig
from mmpt.methods.method import Term, first_pair, reported_terms
from mmpt.models.batch_norm import use_batch_norm
from mmpt.models.dual_tower import DualTowerConfig, unit
from mmpt.models.projector import Projector, ProjectorConfig
from mmpt.objectives.two_views import two_views
from mmpt.ops.augment import augment
from mmpt.ops.batch_norm import batch_norm
from mmpt.ops.contrast.loss import ContrastConfig
from mmpt.ops.similarity import similarity


@dataclass(frozen=True)
class SLIPConfig:
    towers: DualTowerConfig
    initial_temperature: float = 0.07
    """Logits start divided by this."""
    max_logit_scale: float = 100.0
    """Logits are never multiplied by more."""
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    view_temperature: float = 0.1
    """Of the loss between views."""
    view_weight: float = 1.0
    """Of the loss between views, beside 1 for CLIP's."""
    gathered_gradient: bool = True
    """Whether CLIP's loss has its gradient by the features of other ranks too. The released code gathers without it,
    our own among them: from two ranks on, CLIP then weighs about half against the views."""

    def inputs(self) -> InputSpec:
        return replace(self.towers.inputs(), extra_views=2)

    def build(self) -> "SLIP":
        return SLIP(self)


class SLIP(CLIP):
    def __init__(self, config: SLIPConfig):
        super().__init__(CLIPConfig(config.towers, config.initial_temperature, config.max_logit_scale, config.contrast))
        self.config = config
        self.projector = Projector(config.towers.image.summary_width, config.projector)
        use_batch_norm(self, batch_norm)

    def encode_views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The two views of each image, [B, projector.width] each, each row of length 1."""
        assert batch.views is not None and batch.view_parameters is not None
        pixels = augment(batch.views.flatten(0, 1), batch.view_parameters.flatten(0, 1))  # [2 B, 3, H, W]
        tower = self.towers.image
        views = unit(self.projector(tower.summary(tower(Pictures(pixels)))))
        first, second = views.unflatten(0, (-1, 2)).unbind(1)
        return first, second

    def encode(self, batch: Batch) -> tuple[Tensor, ...]:
        return *super().encode(batch), *self.encode_views(batch)

    def objective(self, image: Tensor, text: Tensor, first: Tensor, second: Tensor) -> dict[str, Term]:  # type: ignore[override]
        terms = super().objective(image, text) if self.config.gathered_gradient else self.without_gradient(image, text)
        count, start = terms["contrastive"].count, dist.rank() * len(first)
        found = two_views(first, second, dist.gather(first), dist.gather(second), start, self.config.view_temperature)
        return terms | {
            "views": Term(found.loss, count, self.config.view_weight),
            "accuracy_views": Term(found.correct, count, 0.0),
        }

    def without_gradient(self, image: Tensor, text: Tensor) -> dict[str, Term]:
        """CLIP's loss with no gradient by gathered features, ours among them; alone, a process gathers nothing."""
        scale, alone = self.logit_scale(), dist.world_size() == 1
        images, texts = (x if alone else dist.gather(x.detach()) for x in (image, text))
        i2t, t2i = scale * similarity(image, texts), scale * similarity(text, images)  # [B, N] each
        own = first_pair(i2t) + torch.arange(len(image), device=image.device)
        loss = (cross_entropy(i2t, own, reduction="sum") + cross_entropy(t2i, own, reduction="sum")) / 2
        count = torch.full((), float(len(image)), device=image.device)
        return {"contrastive": Term(loss, count), **reported_terms(i2t.detach(), scale)}

    def counts(self, batch: Batch) -> dict[str, float]:
        return super().counts(batch) | {"views": len(batch)}
