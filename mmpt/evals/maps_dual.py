"""Where an image shows what a text says, for towers that make one vector each.

projected   Each place is read as if it were the whole image: the summary of that token alone, projected. The map is its
            cosine with the text. For a ViT or a mean over places that is the projection of the place's token; for
            attention pooling its value, as in MaskCLIP (Zhou et al. 2022).
grad_cam    relu(sum_d w_d A_pd), w the mean over places of the gradient of the pair's cosine by A (Selvaraju et al.
            2017, eq. 1 and 2). A are the patches as they enter the last block where [CLS] is read (after it they no
            longer count), else the places that the tower gives out.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import relu

from mmpt.batch import Pictures, Tokens, pack_equal
from mmpt.methods.align import ALIGN
from mmpt.methods.clip import CLIP
from mmpt.methods.siglip import SigLIP
from mmpt.models.dual_tower import unit
from mmpt.models.image import ViT
from mmpt.models.resnet import ResNet
from mmpt.models.tower import ImageTower
from mmpt.ops.packing import take
from mmpt.ops.similarity import similarity


class Seeing(NamedTuple):
    """An image tower, and how its method reads what that gives out: tokens of B images -> [B, E], each of length 1."""

    tower: ImageTower
    read: Callable[[Tokens], Tensor]


def seeing(method: CLIP | ALIGN | SigLIP) -> Seeing:
    if isinstance(method, SigLIP):
        pooling = method.image_pooling
        return Seeing(method.image, lambda tokens: unit(pooling(tokens)))
    tower, projection = method.towers.image, method.towers.image_projection
    return Seeing(tower, lambda tokens: unit(projection(tower.summary(tokens))))


@torch.no_grad()
def projected_maps(sees: Seeing, picture: Pictures, texts: Tensor) -> Tensor:
    """[M, P] of one image and M texts [M, E]."""
    places = sees.tower.local(sees.tower(picture)).x  # [P, D]
    pooling = sees.tower.pooling if isinstance(sees.tower, ResNet) else None
    if pooling is None:
        return similarity(texts, sees.read(pack_equal(places[:, None])))
    value = pooling.kv(places + pooling.positions[1:]).chunk(2, 1)[1]  # its positions want the whole grid
    return similarity(texts, unit(pooling.out(value)))


def grad_cam_maps(sees: Seeing, picture: Pictures, texts: Tensor) -> Tensor:
    """[M, P] of one image and M texts [M, E]."""
    with torch.no_grad():
        tokens, rest = _activations(sees.tower, picture)
    copies = take(tokens, torch.zeros(len(texts), dtype=torch.int64, device=tokens.x.device))  # one for each text
    x = copies.x.detach().requires_grad_()
    with torch.enable_grad():
        score = (sees.read(rest(copies.with_x(x))) * texts).sum()
        (gradient,) = torch.autograd.grad(score, x)
    a, g = (sees.tower.local(copies.with_x(y.detach())).x.unflatten(0, (len(texts), -1)) for y in (x, gradient))
    return relu((g.float().mean(1, keepdim=True) * a.float()).sum(2))  # from [M, P, D]


def _activations(tower: ImageTower, picture: Pictures) -> tuple[Tokens, Callable[[Tokens], Tokens]]:
    """The tokens that Grad-CAM looks at, and what the tower still does with them."""
    if not (isinstance(tower, ViT) and tower.config.class_token):
        return tower(picture), lambda tokens: tokens
    last, entered = tower.trunk.blocks[-1], list[Tensor]()
    hook = last.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    try:
        tokens = tower(picture)
    finally:
        hook.remove()
    return tokens.with_x(entered[0]), lambda t: t.with_x(tower.ln_post(last(t.x, t)))
