"""Zero-shot accuracy with both ensembles against plain loops, on one rank and two."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmpt.batch import Batch, Pictures, Tokens, pack, unpack
from mmpt.evals.prompts import DEFAULT_TEMPLATES, Prompts, load_prompts
from mmpt.evals.zero_shot import zero_shot
from mmpt.inputs import InputSpec
from tests.ranks import run

CLASSES, TEMPLATES, IMAGES, WIDTH = 7, 3, 23, 6
INPUTS = InputSpec(image_size=4, max_text_tokens=5, vocab_size=50)


class Vectors:
    """The feature of an image is read off its pixels; that of a text is the mean of its tokens' embeddings."""

    ensemble = "features"

    def __call__(self, name: str, argument: torch.Tensor | Tokens) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        embedding = torch.randn(INPUTS.vocab_size, WIDTH, generator=generator)
        pixels = torch.randn(48, WIDTH, generator=generator) / 1000
        if isinstance(argument, Tokens):
            assert name == "encode_text"
            return torch.stack([embedding[ids].mean(0) for ids in unpack(argument)])
        return argument.pixels.flatten(1).float() @ pixels

    def score(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image @ text.T, -(image @ text.T)  # only the first may be used


class LateInteraction(Vectors):
    ensemble = "similarities"

    def __call__(self, name: str, argument: torch.Tensor | Tokens) -> Tokens:  # type: ignore[override]
        generator = torch.Generator().manual_seed(0)
        embedding = torch.randn(INPUTS.vocab_size, WIDTH, generator=generator)
        pixels = torch.randn(12, WIDTH, generator=generator) / 1000
        if isinstance(argument, Tokens):
            return argument.with_x(embedding[argument.x])
        return pack(list(argument.pixels.float().view(len(argument), 4, 12) @ pixels))

    def score(self, image: Tokens, text: Tokens) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        rows = [[(a @ b.T).amax(1).mean() for b in unpack(text)] for a in unpack(image)]
        scores = torch.tensor(rows).view(len(rows), len(text.offsets) - 1)  # there may be no image
        return scores, -scores


def data() -> tuple[list[tuple[Batch, list[dict]]], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (IMAGES, 3, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES - 1, (IMAGES,), generator=generator).tolist()  # the last class has no image
    text = pack([torch.zeros(1, dtype=torch.int64)])
    batches = [
        (
            Batch(Pictures(images[i : i + 5]), text, torch.zeros(0), ()),
            [{"key": str(i), "label": label} for label in labels[i : i + 5]],
        )
        for i in range(0, IMAGES, 5)
    ]
    lengths = torch.randint(1, 6, (CLASSES * TEMPLATES,), generator=generator).tolist()
    return batches, [torch.randint(0, 50, (length,), generator=generator) for length in lengths]


def evaluate(method: Vectors, rank: int, world_size: int) -> dict[str, float]:
    batches, prompts = data()
    first, last = (r * len(prompts) // world_size for r in (rank, rank + 1))
    ids = (pack(prompts[i : min(i + 4, last)]) for i in range(first, last, 4))
    return dict(zero_shot(method, method, iter(batches[rank::world_size]), ids, TEMPLATES, INPUTS, "cpu"))


def plain(score: Callable[[torch.Tensor, int], float]) -> dict[str, float]:
    top1 = top5 = 0
    per_class: dict[int, list[bool]] = {}
    for batch, known in data()[0]:
        for pixels, label in zip(batch.pictures.pixels, (k["label"] for k in known), strict=True):
            order = sorted(range(CLASSES), key=lambda c: -score(pixels, c))
            top1, top5 = top1 + (order[0] == label), top5 + (label in order[:5])
            per_class.setdefault(label, []).append(order[0] == label)
    means = [sum(hits) / len(hits) for hits in per_class.values()]
    return {"top1": top1 / IMAGES, "top5": top5 / IMAGES, "mean_class_top1": sum(means) / len(means)}


def mean_feature(pixels: torch.Tensor, label: int) -> float:
    prompts = data()[1][label * TEMPLATES : (label + 1) * TEMPLATES]
    image = Vectors()("encode_image", Pictures(pixels[None]))[0]
    units = [v / v.norm() for v in Vectors()("encode_text", pack(prompts))]
    mean = torch.stack(units).mean(0)
    return float(image @ (mean / mean.norm()))


def mean_similarity(pixels: torch.Tensor, label: int) -> float:
    method = LateInteraction()
    image = unpack(method("encode_image", Pictures(pixels[None])))[0]
    prompts = data()[1][label * TEMPLATES : (label + 1) * TEMPLATES]
    texts = [unpack(method("encode_text", pack([ids])))[0] for ids in prompts]
    return sum(float((image @ text.T).amax(1).mean()) for text in texts) / TEMPLATES


@pytest.mark.parametrize(("method", "score"), [(Vectors(), mean_feature), (LateInteraction(), mean_similarity)])
def test_against_a_plain_loop(method: Vectors, score: Callable[[torch.Tensor, int], float]):
    found = evaluate(method, 0, 1)
    assert found == pytest.approx(plain(score))
    assert 0 < found["top1"] < found["top5"] < 1


def on_ranks(rank: int, world_size: int, late: bool) -> dict[str, float]:
    return evaluate(LateInteraction() if late else Vectors(), rank, world_size)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_two_ranks_give_what_one_process_gives(late: bool):
    alone = on_ranks(0, 1, late)
    for found in run(on_ranks, 2, late):  # 5 batches: the ranks hold 3 and 2
        assert found == pytest.approx(alone)


@pytest.mark.parametrize("label", [None, CLASSES, -1])
def test_a_label_that_is_no_class_is_an_error(label: int | None):
    batches, prompts = data()
    batches[2][1][1]["label"] = label
    with pytest.raises(ValueError, match="not one of 7 classes"):
        list(zero_shot(Vectors(), Vectors(), iter(batches), iter([pack(prompts)]), TEMPLATES, INPUTS, "cpu"))


def test_prompts_are_read_as_clip_benchmark_lays_them_out(tmp_path: Path):
    (tmp_path / "classnames.txt").write_text("a cat\na dog\n")
    assert load_prompts(str(tmp_path)) == Prompts(("a cat", "a dog"), DEFAULT_TEMPLATES)
    (tmp_path / "zeroshot_classification_templates.txt").write_text("one {c}.\ntwo {c}.\n")
    assert load_prompts(str(tmp_path)).texts() == ["one a cat.", "two a cat.", "one a dog.", "two a dog."]
    assert all("{c}" in template for template in DEFAULT_TEMPLATES)
