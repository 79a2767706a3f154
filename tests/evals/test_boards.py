"""Pictures for TensorBoard: what they show, and for whom there are none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mmpt.evals import boards as drawing
from mmpt.evals.boards import RIGHT, SIDE, TEXT_HEIGHT, boards
from mmpt.evals.exhibition import exhibit
from mmpt.evals.suite import Rank
from mmpt.inputs import RegionSpec
from mmpt.methods.clip import CLIPConfig
from mmpt.methods.filip import FILIPConfig
from tests.evals.test_suite import TOWERS, WITH_CLS, configured


def test_pictures_show_what_was_found(folder: Path) -> None:
    evals, data = configured(folder)
    torch.manual_seed(0)
    method = FILIPConfig(TOWERS).build().eval()
    found = boards(evals, data, TOWERS.inputs(), method, method, "cpu")
    name = "eval/scenes/held_out/"
    assert list(found) == [name + "caption_to_image", name + "image_to_caption", name + "words_on_patches"]
    rank = Rank(evals, data, TOWERS.inputs(), method, "cpu", drawing.load_tokenizer(data.tokenizer), alone=True)
    shown = exhibit(rank, method, evals.retrieval[0], drawing.SEARCHED_IMAGES, drawing.SHOWN_QUERIES)
    picture, height = found[name + "caption_to_image"], SIDE + TEXT_HEIGHT + drawing.GAP
    assert picture.dtype == np.uint8 and picture.shape == (4 * height, 5 * (SIDE + drawing.GAP), 3)
    for row, query in enumerate(shown.by_text):
        for i, (image, right) in enumerate(query.answers):
            cell = picture[row * height + TEXT_HEIGHT :][:SIDE, i * (SIDE + drawing.GAP) :][:, :SIDE]
            assert (tuple(cell[0, 0]) == RIGHT) == right, "the right ones are framed, and no other"
            middle = np.asarray(drawing._picture(shown.pixels[image], False))
            assert (cell[8:-8, 8:-8] == middle[8:-8, 8:-8]).all(), "it is the image that was found"
    for image, _, words in shown.words:
        for word, (_, lit) in zip(words, drawing._lit(shown.pixels[image], words), strict=True):
            step = SIDE // len(word.heat)
            patch = np.s_[word.row * step : word.row * step + step, word.column * step : word.column * step + step]
            bright = np.asarray(drawing._picture(shown.pixels[image], False))
            assert (np.asarray(lit)[patch] == bright[patch]).all(), "the best patch of a word is not darkened"


def test_no_word_maps_of_single_vectors_and_nothing_of_regions(folder: Path) -> None:
    evals, data = configured(folder)
    method = CLIPConfig(WITH_CLS).build().eval()
    found = boards(evals, data, TOWERS.inputs(), method, method, "cpu")
    assert [name.rpartition("/")[2] for name in found] == ["caption_to_image", "image_to_caption"]
    assert boards(evals, data, replace(TOWERS.inputs(), regions=RegionSpec()), method, method, "cpu") == {}
    assert boards(replace(evals, retrieval=()), data, TOWERS.inputs(), method, method, "cpu") == {}
