"""Pictures in the report: every image once as a data URI, referred to wherever it is shown."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image
from torch import Tensor

from mmpt.evals.exhibits import Retrieval, WordMap, veil
from mmpt.evals.retrieval import Truth

LARGEST_SIDE = 160
"""Images are stored no larger than this, in pixels."""
UNIT = 100
"""Side of every picture's coordinate system, whatever its pixels."""


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


class Album:
    """Images of a data set, square, [A, 3, S, S] uint8; those shown are kept as definitions for the page's head."""

    def __init__(self, images: Tensor, name: str):
        """`name` tells the images of several albums on one page apart."""
        self._images, self._name = images, name
        self._shown: dict[int, str] = {}

    def picture(self, index: int, drawing: str = "") -> str:
        """An svg element that shows the image, with a drawing in UNIT coordinates on top."""
        if index not in self._shown:
            self._shown[index] = _encoded(self._images[index])
        return f'<svg viewBox="0 0 {UNIT} {UNIT}" role="img"><use href="#{self._name}-{index}"/>{drawing}</svg>'

    def definitions(self) -> str:
        """The images shown so far."""
        return "".join(
            f'<image id="{self._name}-{index}" width="{UNIT}" height="{UNIT}" href="{uri}"/>'
            for index, uri in sorted(self._shown.items())
        )


def _encoded(image: Tensor) -> str:
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    small = picture.width <= LARGEST_SIDE
    picture = picture if small else picture.resize((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG") if small else picture.save(buffer, "JPEG", quality=85)
    return data_uri(buffer.getvalue(), "png" if small else "jpeg")


def text_query(album: Album, found: Retrieval, caption: str) -> str:
    """A caption and the images it found, the right ones framed."""
    answers = "".join(
        f'<div class="answer{" right" if right else ""}">{album.picture(image)}{place}{" right" if right else ""}</div>'
        for place, (image, right) in enumerate(found.answers, 1)
    )
    return f'<div class="query card"><p class="ask">{escape(caption)}</p><div class="row">{answers}</div></div>'


def image_query(album: Album, found: Retrieval, captions: list[str], truth: Truth) -> str:
    """An image and the captions it found, the right ones marked; a right one is added when none was found."""
    items = "".join(
        f'<li class="right">{escape(captions[text])} &#10003;</li>' if right else f"<li>{escape(captions[text])}</li>"
        for text, right in found.answers
    )
    missed = ""
    if not any(right for _, right in found.answers):
        own = captions[truth.texts_of_image[found.query][0]]
        missed = f'<p class="note">Its own caption, not among them: {escape(own)}</p>'
    base = f'<div class="base">{album.picture(found.query)}</div>'
    return f'<div class="query card"><div class="captions">{base}<div><ol>{items}</ol>{missed}</div></div></div>'


def word_maps_figure(album: Album, index: int, caption: str, words: list[WordMap], known: dict) -> str:
    """An image, and for each word of its caption the image lit where the word's map is high."""
    boxes = [_box(thing["box"], known["width"]) for thing in known.get("objects", [])]
    cells = []
    for word in words:
        drawing = _light(word.heat) + (boxes[word.of] if word.of is not None else "") + _match(word)
        state = " other" if word.of is None else " hit" if word.on == word.of else ""
        mark = " &#10003;" if state == " hit" else ""
        cells.append(
            f'<div class="word{state}">{album.picture(index, drawing)}<span>{escape(word.word)}{mark}</span></div>'
        )
    base = f'<div class="base">{album.picture(index, "".join(boxes))}</div>'
    return (
        f'<div class="query card"><p class="ask">{escape(caption)}</p>'
        f'<div class="two">{base}<div class="words">{"".join(cells)}</div></div></div>'
    )


def _light(heat: Tensor) -> str:
    """A veil of black over all but the highest values of a map [grid, grid]: one pixel per patch."""
    black = np.zeros((*heat.shape, 4), np.uint8)
    black[..., 3] = veil(heat)
    buffer = io.BytesIO()
    Image.fromarray(black).save(buffer, "PNG")
    uri = data_uri(buffer.getvalue(), "png")
    return f'<image class="heat" width="{UNIT}" height="{UNIT}" preserveAspectRatio="none" href="{uri}"/>'


def _match(word: WordMap) -> str:
    side = UNIT / len(word.heat)
    return (
        f'<rect class="match" x="{word.column * side:.2f}" y="{word.row * side:.2f}" '
        f'width="{side:.2f}" height="{side:.2f}"/>'
    )


def _box(box: list[float], image_size: float) -> str:
    left, top, right, bottom = (edge / image_size * UNIT for edge in box)
    return f'<rect class="box" x="{left:.2f}" y="{top:.2f}" width="{right - left:.2f}" height="{bottom - top:.2f}"/>'
