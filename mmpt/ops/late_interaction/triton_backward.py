# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
"""Late interaction's backward in Triton: winners become one-hot matrices in registers and are multiplied.

    dV_i = sum_j W_ij T_j    dT_j = sum_i W_ij^T V_i    W_ij[p, r] = g1_ij / P_i [r = word_ij(p)]
                                                                   + g2_ij / L_j [p = patch_ij(r)]

Each destination belongs to one program, which adds in a fixed order: no atomics, equal runs are equal to the bit.
"""

import triton
import triton.language as tl

from mmpt.ops.late_interaction.triton_forward import spread, text_tile, tiles_of


@triton.jit
def patches_kernel(
    T, IMAGE_OFFSETS, TEXT_OFFSETS, ORDER, BOUNDS, WORD, PATCH, G1, G2, GRAD, texts, image_rows, text_rows, bucket,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, NT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to GRAD [T_i, D] fp32 what one bucket's texts give to BM patches of an image, BD numbers of width.

    G1, G2 [B_i, B_t] fp32; the others as in forward_kernel.
    """
    image, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BM
    image_row = tl.load(IMAGE_OFFSETS + image)
    patches = (tl.load(IMAGE_OFFSETS + image + 1) - image_row).to(tl.int32)
    here, width = first + tl.arange(0, BM), tl.program_id(2) * BD + tl.arange(0, BD)
    token, real = tl.arange(0, NT * L) % L, (here < patches)[:, None]
    grad_at = GRAD + (image_row + here)[:, None] * D + width[None, :]
    sums = tl.load(grad_at, mask=real, other=0.0)  # [BM, BD]
    tiles = tl.where(first < patches, tiles_of(BOUNDS, bucket, NT), 0)
    for tile in tl.range(0, tiles):
        text, row, length, there = text_tile(ORDER, BOUNDS, TEXT_OFFSETS, bucket, tile, NT)
        own_length = spread(length, NT, L)
        column = spread(row, NT, L) + tl.minimum(token, own_length - 1)
        t = tl.load(T + column[:, None] * D + width[None, :])  # [NT * L, BD]
        to_word = tl.load(G1 + image * texts + text, mask=there, other=0.0) / patches  # [NT]
        to_patch = tl.load(G2 + image * texts + text, mask=there, other=0.0) / length
        word_at = WORD + (text * image_rows + image_row)[None, :] + here[:, None]
        word = tl.load(word_at, mask=real, other=0).to(tl.int32)  # [BM, NT]
        patch = tl.load(PATCH + image * text_rows + column).to(tl.int32)  # [NT * L]
        by_patch = tl.where(word[:, :, None] == tl.arange(0, L)[None, None, :], to_word[None, :, None], 0.0)
        by_word = tl.where(token < own_length, spread(to_patch, NT, L), 0.0)
        weights = tl.reshape(by_patch, [BM, NT * L]) + tl.where(patch[None, :] == here[:, None], by_word[None, :], 0.0)
        sums = tl.dot(weights.to(T.dtype.element_ty), t, sums, input_precision=PRECISION)
    tl.store(grad_at, sums, mask=real)


@triton.jit
def words_kernel(
    V, IMAGE_OFFSETS, TEXT_OFFSETS, ORDER, BOUNDS, WORD, PATCH, G1, G2, GRAD, images, texts, image_rows, text_rows,
    bucket,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, NT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write to GRAD [T_t, D] fp32 what all images give to one tile of a bucket's texts, BD numbers of width."""
    tile, width = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    text, row, length, there = text_tile(ORDER, BOUNDS, TEXT_OFFSETS, bucket, tile, NT)
    token, own_length = tl.arange(0, NT * L) % L, spread(length, NT, L)
    column = spread(row, NT, L) + tl.minimum(token, own_length - 1)
    real = (token < own_length) & spread(there, NT, L)
    sums = tl.zeros([NT * L, BD], tl.float32)
    for image in tl.range(0, tl.where(tile < tiles_of(BOUNDS, bucket, NT), images, 0)):
        image_row = tl.load(IMAGE_OFFSETS + image)
        patches = (tl.load(IMAGE_OFFSETS + image + 1) - image_row).to(tl.int32)
        to_word = tl.load(G1 + text, mask=there, other=0.0) / patches  # [NT]
        to_patch = tl.load(G2 + text, mask=there, other=0.0) / length
        patch = tl.load(PATCH + column).to(tl.int32)  # [NT * L]
        by_word = tl.where(real, spread(to_patch, NT, L), 0.0)
        for first in tl.range(0, patches, BM):
            here = first + tl.arange(0, BM)
            rows = image_row + tl.minimum(here, patches - 1)
            v = tl.load(V + rows[:, None] * D + width[None, :])  # [BM, BD]
            word_at = WORD + (text * image_rows)[:, None] + rows[None, :]
            word = tl.load(word_at, mask=(here < patches)[None, :], other=L).to(tl.int32)  # [NT, BM]
            by_patch = tl.where(word[:, None, :] == tl.arange(0, L)[None, :, None], to_word[:, None, None], 0.0)
            by_patch = tl.where((here < patches)[None, None, :], by_patch, 0.0)
            chosen = patch[:, None] == here[None, :]
            weights = tl.reshape(by_patch, [NT * L, BM]) + tl.where(chosen, by_word[:, None], 0.0)
            sums = tl.dot(weights.to(V.dtype.element_ty), v, sums, input_precision=PRECISION)
        G1 += texts  # row by row, so that no product overflows 32 bits
        G2 += texts
        PATCH += text_rows
    tl.store(GRAD + column[:, None] * D + width[None, :], sums, mask=real[:, None])
