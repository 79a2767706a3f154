"""What the momentum copy is asked, against asking it by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmpt.batch import pack
from mmpt.data.loader import DataConfig
from mmpt.data.text import load_tokenizer
from mmpt.evals.explain import believed_texts, believed_words, check_copy
from mmpt.evals.suite import EvalConfig, Rank
from mmpt.methods.albef import ALBEF
from mmpt.recipe import load


@pytest.fixture
def asked(folder: Path) -> tuple[Rank, ALBEF]:
    torch.manual_seed(0)
    config = load("albef.tiny").method
    method = config.build().eval()
    assert isinstance(method, ALBEF) and method.teacher is not None
    with torch.no_grad():  # a copy that would answer otherwise than its student
        for parameter in method.teacher.parameters():
            parameter.mul_(1.3)
    data = DataConfig(shards="", tokenizer=str(folder / "tokenizer"), workers=0)
    inputs = replace(config.inputs(), image_size=64)
    return Rank(EvalConfig(batch=4), data, inputs, method, "cpu", load_tokenizer(data.tokenizer)), check_copy(method)


@torch.no_grad()
def test_words_are_those_of_the_copy_with_the_word_masked(asked: tuple[Rank, ALBEF], folder: Path) -> None:
    rank, method = asked
    shards = str(folder / "scenes/held_out")
    found = list(believed_words(rank, method, shards, samples=2, top=3))
    batch, known = next(rank.batches(shards))
    first = batch.part(0, 1)
    ids = first.text.x.clone()
    words = [answer for answer in found if answer.caption == known[0]["captions"][0]]
    assert len(words) == len(ids) - 2 and words[1].of == rank.tokenizer.convert_ids_to_tokens(int(ids[2]))
    ids[2] = rank.tokenizer.mask_token_id
    copy = method.teacher
    logits = copy.guess(copy.text(pack([ids])), copy.image(first.pictures), torch.tensor([2]))[0]  # type: ignore[operator, union-attr]
    expected = logits[: len(rank.tokenizer)].softmax(0)
    best = expected.topk(3)
    assert [text for text, _ in words[1].answers] == rank.tokenizer.convert_ids_to_tokens(best.indices.tolist())
    assert [value for _, value in words[1].answers] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert words[1].own == int((expected > expected[first.text.x[2]]).sum()) + 1


@torch.no_grad()
def test_texts_are_those_closest_to_the_image_for_the_copy(asked: tuple[Rank, ALBEF], folder: Path) -> None:
    rank, method = asked
    found = list(believed_texts(rank, method, str(folder / "scenes/held_out"), samples=3, top=2))
    assert len(found) == 3 and all(len(answer.answers) == 2 for answer in found)
    assert all(1 <= answer.own <= 21 and 0 < answer.answers[0][1] <= 1 for answer in found)
    assert all(answer.answers[0][1] >= answer.answers[1][1] for answer in found)


def test_only_albef_has_a_copy_to_ask() -> None:
    with pytest.raises(ValueError, match="this run is of FILIP"):
        check_copy(load("filip.tiny").method.build())
