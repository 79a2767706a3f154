# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
"""Late interaction's forward in Triton: an image stays, tiles of texts pass, both maxima come from each tile.

Texts come in buckets of similar length. A tile holds NT texts of up to L tokens; tokens past a text's end repeat its
last one, and patches past an image's end its last, which changes no maximum and lets the first of equals keep the
lower place. Only the means look at what is real.
"""

import triton
import triton.language as tl


@triton.jit
def spread(x, NT: tl.constexpr, L: tl.constexpr):
    """[NT] -> [NT * L], every number L times."""
    return tl.reshape(tl.broadcast_to(x[:, None], [NT, L]), [NT * L])


@triton.jit
def text_tile(ORDER, ROWS, LENGTHS, first, last, tile, NT: tl.constexpr):
    """Which texts are in a tile of a bucket, where they begin, how long they are, and which are there: [NT] each."""
    place = first + tile * NT + tl.arange(0, NT)
    at = tl.maximum(tl.minimum(place, last - 1), 0)
    return tl.load(ORDER + at).to(tl.int64), tl.load(ROWS + at), tl.load(LENGTHS + at), place < last


@triton.jit
def image_rows_of(IMAGE_OFFSETS, image, image_rows):
    """Where an image's patches begin, and how many it has. One without any begins at a row that there is."""
    row = tl.load(IMAGE_OFFSETS + image)
    patches = (tl.load(IMAGE_OFFSETS + image + 1) - row).to(tl.int32)
    return tl.minimum(row, image_rows - 1), patches


@triton.jit
def reduce_tile(
    s, first_patch, patches, length, there, WORD, word_at,
    BM: tl.constexpr, L: tl.constexpr, NT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Of products [BM, NT * L]: each text's sum over patches of the best word, each token's best patch and its place.

    Stores where the best words are. word_at [NT]: where in WORD the image's first patch is for each text.
    """
    here = tl.arange(0, BM)
    best_patch = tl.max(s, axis=0)  # [NT * L]
    by_text = tl.reshape(s, [BM, NT, L])
    best_word = tl.max(by_text, axis=2)  # [BM, NT]
    real = (first_patch + here < patches)[:, None]
    place = tl.zeros([NT * L], tl.int32)
    if KEEP:
        place = tl.min(tl.where(s == best_patch[None, :], here[:, None], BM), axis=0)
        place = tl.minimum(first_patch + place, patches - 1)
        token = tl.arange(0, L)[None, None, :]
        word = tl.min(tl.where(by_text == best_word[:, :, None], token, L), axis=2)
        word = tl.minimum(word, length[None, :] - 1)
        at = word_at[None, :] + (first_patch + here)[:, None]
        tl.store(WORD + at, word.to(WORD.dtype.element_ty), mask=real & there[None, :])
    return tl.sum(tl.where(real, best_word, 0.0), axis=0), best_patch, place


@triton.jit
def forward_kernel(
    V, T, IMAGE_OFFSETS, ORDER, ROWS, LENGTHS, BOUNDS, I2T, T2I, WORD, PATCH, texts, image_rows, text_rows, bucket,
    D: tl.constexpr, BM: tl.constexpr, L: tl.constexpr, NT: tl.constexpr, ONE: tl.constexpr, KEEP: tl.constexpr,

):  # fmt: skip
    """Scores of one image with a share of one bucket's texts.

    V [T_i, D], T [T_t, D]; IMAGE_OFFSETS [B_i + 1] int64. ORDER [B_t] int32, texts by length; ROWS int64, LENGTHS
    int32, where each of these begins and its length; BOUNDS [buckets + 1] int32, into the three. I2T, T2I [B_i, B_t]
    fp32; WORD [B_t, T_i], PATCH [B_i, T_t]. ONE: no image has more than BM patches.
    """
    image = tl.program_id(0).to(tl.int64)
    start, end = tl.load(BOUNDS + bucket), tl.load(BOUNDS + bucket + 1)
    tiles = tl.cdiv(end - start, NT)
    each = tl.cdiv(tiles, tl.num_programs(1))
    begin = tl.program_id(1) * each
    image_row, patches = image_rows_of(IMAGE_OFFSETS, image, image_rows)
    here, width, token = tl.arange(0, BM), tl.arange(0, D), tl.arange(0, NT * L) % L
    own = tl.maximum(tl.minimum(here, patches - 1), 0)
    v = tl.load(V + (image_row + own)[:, None] * D + width[None, :])  # [BM, D]
    for tile in tl.range(begin, tl.minimum(begin + each, tiles)):
        text, row, length, there = text_tile(ORDER, ROWS, LENGTHS, start, end, tile, NT)
        own_length = spread(length, NT, L)
        column = spread(row, NT, L) + tl.minimum(token, own_length - 1)  # [NT * L]
        t = tl.load(T + column[:, None] * D + width[None, :])  # [NT * L, D]
        word_at = text * image_rows + image_row
        if ONE:
            s = tl.dot(v, tl.trans(t))
            total, best, place = reduce_tile(s, 0, patches, length, there, WORD, word_at, BM, L, NT, KEEP)
        else:
            total = tl.zeros([NT], tl.float32)
            best = tl.full([NT * L], float("-inf"), tl.float32)
            place = tl.zeros([NT * L], tl.int32)
            for first in tl.range(0, patches, BM):
                rows = image_row + tl.minimum(first + here, patches - 1)
                part = tl.load(V + rows[:, None] * D + width[None, :])
                s = tl.dot(part, tl.trans(t))
                more, new, new_place = reduce_tile(s, first, patches, length, there, WORD, word_at, BM, L, NT, KEEP)
                total += more
                place = tl.where(new > best, new_place, place)
                best = tl.maximum(best, new)
        real = (token < own_length) & spread(there, NT, L)
        if KEEP:
            tl.store(PATCH + image * text_rows + column, place.to(PATCH.dtype.element_ty), mask=real)
        over_words = tl.sum(tl.reshape(tl.where(real, best, 0.0), [NT, L]), axis=1)
        at = image * texts + text
        tl.store(I2T + at, total / patches, mask=there)
        tl.store(T2I + at, over_words / length, mask=there)
