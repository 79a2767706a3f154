# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
"""Late interaction's backward in Triton: winners become one-hot matrices in registers and are multiplied.

    dV_i = sum_j W_ij T_j    dT_j = sum_i W_ij^T V_i    W_ij[p, r] = g1_ij / P_i [r = word_ij(p)]
                                                                   + g2_ij / L_j [p = patch_ij(r)]

Each destination belongs to one program, which adds in a fixed order: no atomics, equal runs are equal to the bit.

Pairs without gradient, as a filter of pairs leaves them, are skipped by tiles, but only where SPARSE [1] says that
there are many: the branch keeps the compiler from loading one tile while it multiplies another.
"""

import triton
import triton.language as tl

from mmpt.ops.late_interaction.triton_forward import image_rows_of, spread, text_tile


@triton.jit
def add_texts(
    sums, tile, T, image, image_row, patches, here, width, start, end, ORDER, ROWS, LENGTHS, WORD, PATCH, G1, G2, texts,
    image_rows, text_rows,
    D: tl.constexpr, BM: tl.constexpr, L: tl.constexpr, NT: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """sums [BM, BD] and what a tile of texts gives to the patches `here` [BM] of one image."""
    text, row, length, there = text_tile(ORDER, ROWS, LENGTHS, start, end, tile, NT)
    to_word = tl.load(G1 + image * texts + text, mask=there, other=0.0) / patches  # [NT]
    to_patch = tl.load(G2 + image * texts + text, mask=there, other=0.0) / length
    some = True
    if SKIP:
        some = tl.sum(tl.abs(to_word) + tl.abs(to_patch), axis=0) != 0
    if some:
        own_length, token = spread(length, NT, L), tl.arange(0, NT * L) % L
        column = spread(row, NT, L) + tl.minimum(token, own_length - 1)
        t = tl.load(T + column[:, None] * D + width[None, :])  # [NT * L, BD]
        word_at = WORD + (text * image_rows + image_row)[None, :] + here[:, None]
        word = tl.load(word_at, mask=(here < patches)[:, None], other=0).to(tl.int32)  # [BM, NT]
        patch = tl.load(PATCH + image * text_rows + column).to(tl.int32)  # [NT * L]
        by_patch = tl.where(word[:, :, None] == tl.arange(0, L)[None, None, :], to_word[None, :, None], 0.0)
        by_word = tl.where(token < own_length, spread(to_patch, NT, L), 0.0)
        weights = tl.reshape(by_patch, [BM, NT * L]) + tl.where(patch[None, :] == here[:, None], by_word[None, :], 0.0)
        sums = tl.dot(weights.to(T.dtype.element_ty), t, sums)
    return sums


@triton.jit
def patches_kernel(
    T, IMAGE_OFFSETS, ORDER, ROWS, LENGTHS, BOUNDS, WORD, PATCH, G1, G2, SPARSE, GRAD, texts, image_rows, text_rows,
    bucket,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, NT: tl.constexpr,
):  # fmt: skip
    """Add to GRAD [T_i, D] fp32 what one bucket's texts give to BM patches of an image, BD numbers of width.

    G1, G2 [B_i, B_t] fp32; the others as in forward_kernel.
    """
    image, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BM
    image_row, patches = image_rows_of(IMAGE_OFFSETS, image, image_rows)
    here, width = first + tl.arange(0, BM), tl.program_id(2) * BD + tl.arange(0, BD)
    grad_at, real = GRAD + (image_row + here)[:, None] * D + width[None, :], (here < patches)[:, None]
    sums = tl.load(grad_at, mask=real, other=0.0)  # [BM, BD]
    start, end = tl.load(BOUNDS + bucket), tl.load(BOUNDS + bucket + 1)
    tiles = tl.where(first < patches, tl.cdiv(end - start, NT), 0)
    if tl.load(SPARSE):
        for tile in tl.range(0, tiles):
            sums = add_texts(
                sums, tile, T, image, image_row, patches, here, width, start, end, ORDER, ROWS, LENGTHS, WORD, PATCH,
                G1, G2, texts, image_rows, text_rows, D, BM, L, NT, True,
            )  # fmt: skip
    else:
        for tile in tl.range(0, tiles):
            sums = add_texts(
                sums, tile, T, image, image_row, patches, here, width, start, end, ORDER, ROWS, LENGTHS, WORD, PATCH,
                G1, G2, texts, image_rows, text_rows, D, BM, L, NT, False,
            )  # fmt: skip
    tl.store(grad_at, sums, mask=real)


@triton.jit
def add_image(
    sums, image, V, IMAGE_OFFSETS, text, there, length, column, width, WORD, PATCH, G1, G2, texts, image_rows,
    text_rows,
    D: tl.constexpr, BM: tl.constexpr, L: tl.constexpr, NT: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """sums [NT * L, BD] and what an image gives to the tokens of one tile of texts."""
    image_row, patches = image_rows_of(IMAGE_OFFSETS, image, image_rows)
    to_word = tl.load(G1 + image * texts + text, mask=there, other=0.0) / patches  # [NT]
    to_patch = tl.load(G2 + image * texts + text, mask=there, other=0.0) / length
    some = True
    if SKIP:
        some = tl.sum(tl.abs(to_word) + tl.abs(to_patch), axis=0) != 0
    if some:
        patch = tl.load(PATCH + image * text_rows + column).to(tl.int32)  # [NT * L]
        real = (tl.arange(0, NT * L) % L < spread(length, NT, L)) & spread(there, NT, L)
        by_word = tl.where(real, spread(to_patch, NT, L), 0.0)
        for first in tl.range(0, patches, BM):
            here = first + tl.arange(0, BM)
            rows = image_row + tl.minimum(here, patches - 1)
            v = tl.load(V + rows[:, None] * D + width[None, :])  # [BM, BD]
            word_at = WORD + (text * image_rows)[:, None] + rows[None, :]
            word = tl.load(word_at, mask=(here < patches)[None, :], other=0).to(tl.int32)  # [NT, BM]
            by_patch = tl.where(word[:, None, :] == tl.arange(0, L)[None, :, None], to_word[:, None, None], 0.0)
            by_patch = tl.where((here < patches)[None, None, :], by_patch, 0.0)
            chosen = patch[:, None] == here[None, :]
            weights = tl.reshape(by_patch, [NT * L, BM]) + tl.where(chosen, by_word[:, None], 0.0)
            sums = tl.dot(weights.to(V.dtype.element_ty), v, sums)
    return sums


@triton.jit
def words_kernel(
    V, IMAGE_OFFSETS, ORDER, ROWS, LENGTHS, BOUNDS, WORD, PATCH, G1, G2, SPARSE, GRAD, images, texts, image_rows,
    text_rows, bucket,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, NT: tl.constexpr,
):  # fmt: skip
    """Write to GRAD [T_t, D] fp32 what all images give to one tile of a bucket's texts, BD numbers of width."""
    tile, width = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    start, end = tl.load(BOUNDS + bucket), tl.load(BOUNDS + bucket + 1)
    text, row, length, there = text_tile(ORDER, ROWS, LENGTHS, start, end, tile, NT)
    token, own_length = tl.arange(0, NT * L) % L, spread(length, NT, L)
    column = spread(row, NT, L) + tl.minimum(token, own_length - 1)
    sums = tl.zeros([NT * L, BD], tl.float32)
    count = tl.where(start + tile * NT < end, images, 0).to(tl.int64)
    if tl.load(SPARSE):
        for image in tl.range(0, count):
            sums = add_image(
                sums, image, V, IMAGE_OFFSETS, text, there, length, column, width, WORD, PATCH, G1, G2, texts,
                image_rows, text_rows, D, BM, L, NT, True,
            )  # fmt: skip
    else:
        for image in tl.range(0, count):
            sums = add_image(
                sums, image, V, IMAGE_OFFSETS, text, there, length, column, width, WORD, PATCH, G1, G2, texts,
                image_rows, text_rows, D, BM, L, NT, False,
            )  # fmt: skip
    real = (token < own_length) & spread(there, NT, L)
    tl.store(GRAD + column[:, None] * D + width[None, :], sums, mask=real[:, None])
