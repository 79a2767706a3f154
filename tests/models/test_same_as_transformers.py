"""The same outputs per sample as transformers' models with the same weights, captions of mixed length in one batch."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmpt.batch import Pictures, pack, pack_equal
from mmpt.models.image import CLIP_MEAN, CLIP_STD, normalise
from tests.models.weights import END, IMAGE_SIZE, MAX_TOKENS, VOCABULARY, clip_pair, siglip_pair

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def captions() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.cat([torch.tensor([97]), torch.randint(2, 90, (n,), generator=generator), torch.tensor([END])])
        for n in (3, 18, 1, 7, 7, 0)
    ]


def images(count: int) -> Tensor:
    shape = (count, 3, IMAGE_SIZE, IMAGE_SIZE)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def pixels(raw: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """In fp64, as an image processor computes them."""
    return ((raw.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).float()


def test_normalise() -> None:
    raw = images(2)
    torch.testing.assert_close(normalise(raw, CLIP_MEAN, CLIP_STD), pixels(raw, CLIP_MEAN, CLIP_STD), rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_clip(activation: str) -> None:
    theirs, ours = clip_pair(activation)
    texts, raw = captions(), images(6)
    padded = torch.ones(len(texts), MAX_TOKENS, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for i, text in enumerate(texts):
        padded[i, : len(text)], mask[i, : len(text)] = text, 1
    out = theirs(input_ids=padded, attention_mask=mask, pixel_values=pixels(raw, CLIP_MEAN, CLIP_STD), return_loss=True)
    found = ours.towers.text(pack(texts)).x  # every token, not only the pooled one
    expected = torch.cat([out.text_model_output.last_hidden_state[i, : len(text)] for i, text in enumerate(texts)])
    torch.testing.assert_close(found, expected, **TOLERANCE)
    # transformers norms only [CLS]; ours norms every token, for FILIP
    states = theirs.vision_model.post_layernorm(out.vision_model_output.last_hidden_state)
    torch.testing.assert_close(ours.towers.image(Pictures(raw)).x, states.flatten(0, 1), **TOLERANCE)
    image, text = ours.encode_image(Pictures(raw)), ours.encode_text(pack(texts))
    torch.testing.assert_close(image, out.image_embeds, **TOLERANCE)
    torch.testing.assert_close(text, out.text_embeds, **TOLERANCE)
    terms = ours.objective(image, text)
    torch.testing.assert_close(terms["contrastive"].sum / len(raw), out.loss, **TOLERANCE)
    torch.testing.assert_close(ours.score(image, text)[0] * terms["logit_scale"].sum, out.logits_per_image, **TOLERANCE)


@torch.no_grad()
def test_siglip() -> None:
    theirs, ours = siglip_pair()
    raw, half = images(5), (0.5, 0.5, 0.5)
    ids = torch.randint(2, VOCABULARY, (5, MAX_TOKENS), generator=torch.Generator().manual_seed(3))
    ids[1, 5:], ids[3, 11:] = 1, 1  # pads, which are tokens here
    out = theirs(input_ids=ids, pixel_values=pixels(raw, half, half), return_loss=True)
    torch.testing.assert_close(
        ours.text(pack_equal(ids)).x, out.text_model_output.last_hidden_state.flatten(0, 1), **TOLERANCE
    )
    torch.testing.assert_close(
        ours.image(Pictures(raw)).x, out.vision_model_output.last_hidden_state.flatten(0, 1), **TOLERANCE
    )
    image, text = ours.encode_image(Pictures(raw)), ours.encode_text(pack_equal(ids))
    torch.testing.assert_close(image, normalize(out.image_embeds, dim=-1), **TOLERANCE)
    torch.testing.assert_close(text, normalize(out.text_embeds, dim=-1), **TOLERANCE)
    torch.testing.assert_close(ours.objective(image, text)["sigmoid"].sum / 5, out.loss, **TOLERANCE)
