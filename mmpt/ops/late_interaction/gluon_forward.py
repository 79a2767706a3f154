# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false
"""Late interaction's forward for Hopper, in Gluon: while tensor cores multiply a tile, the others reduce the last one.

As triton_forward.py, which is its reference, for 16-bit features and images of one tile. The image stays in shared
memory, two tiles of texts alternate there, and two of products in registers. What Triton leaves to its compiler, which
does not overlap them, is written out.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def place_of(n, start, end, tile, L: gl.constexpr, NT: gl.constexpr):
    """Where in the bucket the text of a tile's n-th token stands; past the bucket's end, the last."""
    return gl.maximum(gl.minimum(start + tile * NT + n // L, end - 1), 0)


@gluon.jit
def load_texts(
    T, ROWS, LENGTHS, start, end, tile, into, D: gl.constexpr, L: gl.constexpr, NT: gl.constexpr, COPY: gl.constexpr
):
    """Begin to copy a tile of tokens into shared memory."""
    n = gl.arange(0, NT * L, gl.SliceLayout(1, COPY))
    at = place_of(n, start, end, tile, L, NT)
    row = gl.load(ROWS + at) + gl.minimum(n % L, gl.load(LENGTHS + at) - 1)
    width = gl.arange(0, D, gl.SliceLayout(0, COPY))
    async_copy.async_load(into, T + row[:, None] * D + width[None, :])
    async_copy.commit_group()


@gluon.jit
def reduce_tile(
    s, tile, start, end, image, image_row, patches, ORDER, ROWS, LENGTHS, I2T, T2I, WORD, PATCH, texts, image_rows,
    text_rows,
    BM: gl.constexpr, L: gl.constexpr, NT: gl.constexpr, KEEP: gl.constexpr, PRODUCTS: gl.constexpr,
    PAIRS: gl.constexpr, TEXTS: gl.constexpr,
):  # fmt: skip
    """Both maxima of a tile of products [BM, NT * L], their means, and where they are."""
    here = gl.arange(0, BM, gl.SliceLayout(1, PRODUCTS))
    n = gl.arange(0, NT * L, gl.SliceLayout(0, PRODUCTS))
    at = place_of(n, start, end, tile, L, NT)
    length = gl.load(LENGTHS + at)
    real = (n % L < length) & (start + tile * NT + n // L < end)
    best_patch = gl.max(s, axis=0)  # [NT * L]
    over_words = gl.sum(gl.reshape(gl.where(real, best_patch, 0.0), [NT, L]), axis=1)
    over_words = gl.convert_layout(over_words, TEXTS)
    if KEEP:
        place = gl.min(gl.where(s == best_patch[None, :], here[:, None], BM), axis=0)
        column = gl.load(ROWS + at) + n % L
        place = gl.minimum(place, patches - 1).to(PATCH.dtype.element_ty)
        gl.store(PATCH + image * text_rows + column, place, mask=real)
    best_word = gl.max(gl.reshape(s, [BM, NT, L]), axis=2)  # [BM, NT]
    if KEEP:
        spread = gl.broadcast(gl.expand_dims(best_word, 2), gl.reshape(s, [BM, NT, L]))[0]
        spread = gl.convert_layout(gl.reshape(spread, [BM, NT * L]), PRODUCTS, assert_trivial=True)  # moves nothing
        word = gl.where(s == spread, (n % L)[None, :], L)
        word = gl.convert_layout(gl.min(gl.reshape(word, [BM, NT, L]), axis=2), PAIRS)  # [BM, NT]
        patch = gl.arange(0, BM, gl.SliceLayout(1, PAIRS))
        slot = start + tile * NT + gl.arange(0, NT, gl.SliceLayout(0, PAIRS))
        of = gl.maximum(gl.minimum(slot, end - 1), 0)
        word = gl.minimum(word, gl.load(LENGTHS + of)[None, :] - 1).to(WORD.dtype.element_ty)
        word_at = gl.load(ORDER + of).to(gl.int64) * image_rows + image_row
        there = (patch < patches)[:, None] & (slot < end)[None, :]
        gl.store(WORD + word_at[None, :] + patch[:, None], word, mask=there)
    best_word = gl.convert_layout(best_word, PAIRS)
    own = gl.arange(0, BM, gl.SliceLayout(1, PAIRS)) < patches
    over_patches = gl.convert_layout(gl.sum(gl.where(own[:, None], best_word, 0.0), axis=0), TEXTS)  # [NT]
    slot = start + tile * NT + gl.arange(0, NT, TEXTS)
    of = gl.maximum(gl.minimum(slot, end - 1), 0)
    to = image * texts + gl.load(ORDER + of)
    gl.store(I2T + to, over_patches / patches, mask=slot < end)
    gl.store(T2I + to, over_words / gl.load(LENGTHS + of), mask=slot < end)


@gluon.jit
def forward_kernel(
    V, T, IMAGE_OFFSETS, ORDER, ROWS, LENGTHS, BOUNDS, I2T, T2I, WORD, PATCH, texts, image_rows, text_rows, bucket,
    D: gl.constexpr, BM: gl.constexpr, L: gl.constexpr, NT: gl.constexpr, KEEP: gl.constexpr,
):  # fmt: skip
    """Scores of one image with a share of one bucket's texts. Arguments: triton_forward.forward_kernel."""
    BN: gl.constexpr = NT * L
    WARPS: gl.constexpr = gl.num_warps()
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PRODUCTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    PAIRS: gl.constexpr = gl.BlockedLayout([1, NT], [32, 1], [WARPS, 1], [1, 0])
    TEXTS: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    image = gl.program_id(0).to(gl.int64)
    start, end = gl.load(BOUNDS + bucket), gl.load(BOUNDS + bucket + 1)
    tiles = gl.cdiv(end - start, NT)
    each = gl.cdiv(tiles, gl.num_programs(1))
    begin = gl.program_id(1) * each
    stop = gl.minimum(begin + each, tiles)
    if begin < stop:
        image_row = gl.load(IMAGE_OFFSETS + image)
        patches = (gl.load(IMAGE_OFFSETS + image + 1) - image_row).to(gl.int32)
        image_row = gl.minimum(image_row, image_rows - 1)
        v = gl.allocate_shared_memory(V.dtype.element_ty, [BM, D], SHARED)
        t = gl.allocate_shared_memory(V.dtype.element_ty, [2, BN, D], SHARED)
        own = gl.arange(0, BM, gl.SliceLayout(1, COPY))
        own = image_row + gl.maximum(gl.minimum(own, patches - 1), 0)
        async_copy.async_load(v, V + own[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, COPY))[None, :])
        load_texts(T, ROWS, LENGTHS, start, end, begin, t.index(0), D, L, NT, COPY)
        load_texts(T, ROWS, LENGTHS, start, end, begin + 1, t.index(1), D, L, NT, COPY)
        async_copy.wait_group(1)
        fence_async_shared()
        gl.barrier()
        zero = gl.zeros([BM, BN], gl.float32, PRODUCTS)
        s = warpgroup_mma(v, t.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        for tile in range(begin + 1, stop):
            at = (tile - begin) % 2
            async_copy.wait_group(0)
            fence_async_shared()
            gl.barrier()
            after = warpgroup_mma(v, t.index(at).permute((1, 0)), zero, use_acc=False, is_async=True)
            load_texts(T, ROWS, LENGTHS, start, end, tile + 1, t.index(1 - at), D, L, NT, COPY)
            reduce_tile(
                s, tile - 1, start, end, image, image_row, patches, ORDER, ROWS, LENGTHS, I2T, T2I, WORD, PATCH, texts,
                image_rows, text_rows, BM, L, NT, KEEP, PRODUCTS, PAIRS, TEXTS,
            )  # fmt: skip
            s = warpgroup_mma_wait(0, deps=[after])
        reduce_tile(
            s, stop - 1, start, end, image, image_row, patches, ORDER, ROWS, LENGTHS, I2T, T2I, WORD, PATCH, texts,
            image_rows, text_rows, BM, L, NT, KEEP, PRODUCTS, PAIRS, TEXTS,
        )  # fmt: skip
        async_copy.wait_group(0)
