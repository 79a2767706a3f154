"""A dual tower small enough to check by hand, with everything an engine can trip over: parameters whose sizes do not
divide by the ranks, a [1] temperature, a frozen layer, a buffer, dropout, and a second term with unequal counts."""

import torch
from torch import Tensor, nn

from mmpt import dist
from mmpt.batch import Batch, Pictures, Tokens, pack
from mmpt.methods.method import Method, Term

VOCABULARY, PIXELS, WIDTH = 23, 3 * 4 * 4, 7
MARK = 0  # words with this id make the second term; the last quarter of every batch has none


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor([1.0]))

    def forward(self) -> Tensor:
        return self.log.exp()


class Toy(Method):
    couples_pairs = True

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(PIXELS, 11), nn.Dropout(dropout), nn.Tanh(), nn.Linear(11, WIDTH))
        self.text = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH))
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.temperature = Temperature()
        self.register_buffer("seen", torch.arange(5.0))

    def encode(self, batch: Batch) -> tuple[Tensor, Tokens, Tokens]:
        image = self.image(batch.pictures.pixels.flatten(1).to(self.image[0].weight.dtype) / 255)
        return self.frozen(image), batch.text.with_x(self.text(batch.text.x)), batch.text

    def objective(self, image: Tensor, words: Tokens, ids: Tokens) -> dict[str, Term]:
        index = words.sequence_index()
        text = torch.zeros_like(image).index_add(0, index, words.x) / words.lengths()[:, None]
        everything = dist.gather(text)  # [N, D]
        logits = (self.temperature() * image @ everything.T).float()
        own = dist.rank() * len(image) + torch.arange(len(image))
        columns = dist.logsumexp_over_ranks(logits.logsumexp(0))
        local = logits[torch.arange(len(image)), own]
        pairs = (logits.logsumexp(1) + columns[own] - 2 * local).sum() / 2
        marked = ids.x == MARK
        return {
            "contrastive": Term(pairs, torch.tensor(float(len(image)))),
            "words": Term((words.x.float().square().mean(1) * marked).sum(), marked.sum().float(), 0.5),
            "temperature": Term(self.temperature().detach().sum(), torch.tensor(1.0), 0.0),
        }

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"contrastive": len(batch), "words": float((batch.text.x == MARK).sum())}


def toy(seed: int = 0, dropout: float = 0.0) -> Toy:
    torch.manual_seed(seed)
    return Toy(dropout)


def batches(pairs: int, steps: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    """`steps` global batches of `pairs`, of which this rank's part."""
    generator = torch.Generator().manual_seed(5)
    out = []
    for _ in range(steps):
        images = torch.randint(0, 256, (pairs, 3, 4, 4), dtype=torch.uint8, generator=generator)
        lengths = torch.randint(1, 9, (pairs,), generator=generator).tolist()
        texts = [torch.randint(0, 4, (n,), generator=generator) for n in lengths]
        texts = [text + 1 if i >= pairs * 3 // 4 else text for i, text in enumerate(texts)]
        own = slice(rank * pairs // world_size, (rank + 1) * pairs // world_size)
        count = len(range(pairs)[own])
        out.append(Batch(Pictures(images[own]), pack(texts[own]), torch.arange(count), ("",) * count))
    return out
