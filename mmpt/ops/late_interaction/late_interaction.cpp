// Late interaction of images with texts, forward and backward, in the vectors of one kind of CPU.
//
// Compiled once per kind: MMPT_LANES floats to a vector (4, 8 or 16), MMPT_BF16 where the CPU multiplies pairs of bf16.
// Vectors are the compiler's own (vector_size), so that one source serves them all.
//
// Forward. An image's patches are laid out in panels of a few vectors, [width][patches], which stay in the L2 cache
// while all texts pass. A tile of up to 6 tokens with a panel is made in registers and reduced there in both
// directions: over tokens lane by lane, over patches into one vector per token, which is reduced across its lanes at
// the image's end. Lanes past the last patch repeat it: that changes no maximum, and the lowest place wins a tie.
//
// Backward. A patch receives one word from each text and a word one patch from each image: rows are added, by the one
// thread that owns the destination, in a fixed order.

#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>
#ifdef MMPT_BF16
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = MMPT_LANES;
constexpr int MOST_TOKENS = 6;                    // of a tile: with the panel's vectors they fill the registers,
constexpr int MOST_VECTORS = LANES == 16 ? 4 : 2; // of which there are 32 with AVX-512 and 16 without
constexpr int64_t TEXTS_AT_ONCE = 32;             // their rows stay in L2 while images pass, and the other way around

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Places __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Shorts __attribute__((vector_size(LANES * 2)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

template <typename V, typename T> inline V load(const T *from) {
    V out;
    std::memcpy(&out, from, sizeof(V));
    return out;
}

template <typename V, typename T> inline void store(T *to, const V &value) { std::memcpy(to, &value, sizeof(V)); }

// What a step of a product consumes: one number of width in fp32, two neighbours in bf16.
#ifdef MMPT_BF16
typedef uint32_t Step;
typedef uint16_t Input;
inline Floats multiply_add(Floats sum, Step one, const Step *many) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)one), (__m512bh)load<__m512i>(many));
}
#else
typedef float Step;
typedef float Input;
inline Floats multiply_add(Floats sum, Step one, const Step *many) { return sum + one * load<Floats>(many); }
#endif

struct Side { // packed sequences: row r of sequence s is at rows + (offsets[s] + r) * width
    const void *rows;
    const int64_t *offsets;
    int64_t count, width;
    int64_t length(int64_t s) const { return offsets[s + 1] - offsets[s]; }
    int64_t total() const { return offsets[count]; }
};

struct Winners { // [sequences, rows of the other side], 1 or 2 bytes each
    void *places;
    int64_t bytes, rows;
    void *at(int64_t sequence, int64_t row) const {
        return static_cast<char *>(places) + (sequence * rows + row) * bytes;
    }
    int64_t get(int64_t sequence, int64_t row) const {
        const void *where = at(sequence, row);
        return bytes == 1 ? *static_cast<const uint8_t *>(where) : *static_cast<const uint16_t *>(where);
    }
    void put(int64_t sequence, int64_t row, Places values, int64_t count) const {
        if (bytes == 1) {
            Bytes narrow = __builtin_convertvector(values, Bytes);
            std::memcpy(at(sequence, row), &narrow, count);
        } else {
            Shorts narrow = __builtin_convertvector(values, Shorts);
            std::memcpy(at(sequence, row), &narrow, 2 * count);
        }
    }
};

inline Places lanes_from(int64_t first) {
    Places out;
    for (int64_t lane = 0; lane < LANES; lane++) out[lane] = int32_t(first + lane);
    return out;
}

struct Best { // the highest so far in each lane, and where it was first met
    Floats value;
    Places place;
};

const Best NONE = {Floats{} - std::numeric_limits<float>::infinity(), Places{}};

struct Panels { // an image's patches, [panel][width in steps][vectors of the panel][lane]
    std::vector<Step> steps;
    std::vector<int64_t> first, vectors; // of each panel: its first patch, its number of vectors

    void lay_out(const Step *rows, int64_t patches, int64_t width) {
        int64_t all = (patches + LANES - 1) / LANES, panels = (all + MOST_VECTORS - 1) / MOST_VECTORS;
        steps.resize(all * LANES * width);
        first.clear();
        vectors.clear();
        Step *to = steps.data();
        for (int64_t panel = 0, begin = 0; panel < panels; panel++) {
            int64_t count = (all - begin) / (panels - panel); // as even as can be
            first.push_back(begin * LANES);
            vectors.push_back(count);
            for (int64_t lane = 0; lane < count * LANES; lane++) {
                int64_t patch = begin * LANES + lane;
                const Step *row = rows + (patch < patches ? patch : patches - 1) * width;
                for (int64_t k = 0; k < width; k++) to[k * count * LANES + lane] = row[k];
            }
            to += count * LANES * width;
            begin += count;
        }
    }
};

struct Tile { // a panel with a few tokens of one text
    const Step *panel, *tokens;
    int64_t width, first_patch, first_token;
};

// All products of the tile; the best token of each patch into `words`, the best patch of each token into `tokens`.
template <int R, int V, bool KEEP> void reduce_tile(const Tile &tile, Best *words, Best *tokens) {
    Floats sums[R][V] = {};
    const Step *panel = tile.panel;
    for (int64_t k = 0; k < tile.width; k++, panel += V * LANES)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Step one = tile.tokens[r * tile.width + k];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sums[r][v] = multiply_add(sums[r][v], one, panel + v * LANES);
        }
#pragma GCC unroll 8
    for (int v = 0; v < V; v++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) { // what is not a number wins, and nothing is above it
            auto above = (sums[r][v] > words[v].value) | (sums[r][v] != sums[r][v]);
            words[v].value = above ? sums[r][v] : words[v].value;
            if (KEEP) words[v].place = above ? Places{} + int32_t(tile.first_token + r) : words[v].place;
        }
    Places here = lanes_from(tile.first_patch);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        Best best = tokens[r];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            auto above = sums[r][v] > best.value;
            best.value = above ? sums[r][v] : best.value;
            if (KEEP) best.place = above ? here + int32_t(v * LANES) : best.place;
        }
        tokens[r] = best;
    }
}

typedef void (*Reduce)(const Tile &, Best *, Best *);

template <int R, bool KEEP> Reduce of_vectors(int64_t vectors) {
    if constexpr (MOST_VECTORS == 4) {
        if (vectors == 4) return reduce_tile<R, 4, KEEP>;
        if (vectors == 3) return reduce_tile<R, 3, KEEP>;
    }
    return vectors == 2 ? reduce_tile<R, 2, KEEP> : reduce_tile<R, 1, KEEP>;
}

template <bool KEEP> Reduce reducer(int64_t tokens, int64_t vectors) {
    switch (tokens) {
    case 6: return of_vectors<6, KEEP>(vectors);
    case 5: return of_vectors<5, KEEP>(vectors);
    case 4: return of_vectors<4, KEEP>(vectors);
    case 3: return of_vectors<3, KEEP>(vectors);
    case 2: return of_vectors<2, KEEP>(vectors);
    default: return of_vectors<1, KEEP>(vectors);
    }
}

struct Highest {
    float value;
    int32_t place;
};

inline Highest across_lanes(const Best &best) { // of equal ones the lowest place
    Highest out = {best.value[0], best.place[0]};
    for (int64_t lane = 1; lane < LANES; lane++) {
        bool above = best.value[lane] > out.value || (best.value[lane] == out.value && best.place[lane] < out.place);
        if (above) out = {best.value[lane], best.place[lane]};
    }
    return out;
}

struct Sum {
    float total;
    bool number;
};

// The sum over a panel's patches of their best words.
inline Sum sum_of(const Best *words, int64_t vectors, int64_t patches) {
    Sum out = {0, true};
    for (int64_t v = 0; v < vectors; v++)
        for (int64_t lane = 0; lane < LANES && v * LANES + lane < patches; lane++) {
            float value = words[v].value[lane];
            out.total += value;
            out.number &= value == value;
        }
    return out;
}

struct Scores {
    float i2t, t2i;
};

// One image, laid out in panels, with one text.
template <bool KEEP>
Scores meet(const Panels &panels, int64_t patches, int64_t image, int64_t image_row, const Side &texts, int64_t text,
            const Winners &word, const Winners &patch, std::vector<Best> &tokens) {
    int64_t length = texts.length(text), steps = texts.width, groups = (length + MOST_TOKENS - 1) / MOST_TOKENS;
    const Step *rows = static_cast<const Step *>(texts.rows) + texts.offsets[text] * steps, *panel = panels.steps.data();
    for (int64_t r = 0; r < length; r++) tokens[r] = NONE;
    Sum over_patches = {0, true};
    for (size_t p = 0; p < panels.first.size(); p++) {
        int64_t vectors = panels.vectors[p], first = panels.first[p];
        Best words[MOST_VECTORS];
        for (int64_t v = 0; v < vectors; v++) words[v] = NONE;
        for (int64_t group = 0, begin = 0; group < groups; group++) {
            int64_t count = (length - begin) / (groups - group);
            Tile tile = {panel, rows + begin * steps, steps, first, begin};
            reducer<KEEP>(count, vectors)(tile, words, tokens.data() + begin);
            begin += count;
        }
        Sum here = sum_of(words, vectors, patches - first);
        over_patches.total += here.total;
        over_patches.number &= here.number;
        for (int64_t v = 0; KEEP && v < vectors; v++) {
            int64_t left = patches - first - v * LANES;
            word.put(text, image_row + first + v * LANES, words[v].place, left < LANES ? left : LANES);
        }
        panel += vectors * LANES * steps;
    }
    float over_words = 0;
    for (int64_t r = 0; r < length; r++) {
        Highest best = across_lanes(tokens[r]);
        over_words += best.value;
        if (KEEP) patch.put(image, texts.offsets[text] + r, Places{} + best.place, 1);
    }
    if (!over_patches.number) over_words = std::numeric_limits<float>::quiet_NaN();
    return {over_patches.total / float(patches), over_words / float(length)};
}

template <bool KEEP>
void score_images(const Side &images, const Side &texts, int64_t from, int64_t to, float *s_i2t, float *s_t2i,
                  const Winners &word, const Winners &patch) {
    int64_t longest = 0;
    for (int64_t j = 0; j < texts.count; j++) longest = texts.length(j) > longest ? texts.length(j) : longest;
    std::vector<Best> tokens(longest);
    Panels panels;
    for (int64_t i = from; i < to; i++) {
        int64_t row = images.offsets[i], patches = images.length(i);
        panels.lay_out(static_cast<const Step *>(images.rows) + row * images.width, patches, images.width);
        for (int64_t j = 0; j < texts.count; j++) {
            Scores found = meet<KEEP>(panels, patches, i, row, texts, j, word, patch, tokens);
            s_i2t[i * texts.count + j] = found.i2t;
            s_t2i[i * texts.count + j] = found.t2i;
        }
    }
}

inline Floats widen(const float *from) { return load<Floats>(from); }
inline Floats widen(const uint16_t *from) { // bf16
    Words bits = __builtin_convertvector(load<Shorts>(from), Words) << 16;
    return (Floats)bits;
}
inline float widen_one(float x) { return x; }
inline float widen_one(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline void add_row(float *to, float weight, const Input *row, int64_t width) {
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) store(to + k, load<Floats>(to + k) + weight * widen(row + k));
    for (; k < width; k++) to[k] += weight * widen_one(row[k]);
}

struct Addend {
    float weight;
    const Input *row;
};

// Add many rows to one, a stretch of V vectors at a time, which is in registers meanwhile.
template <int V> int64_t add_stretch(float *to, const Addend *addends, int64_t count, int64_t from, int64_t width) {
    for (; from + V * LANES <= width; from += V * LANES) {
        Floats sum[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) sum[v] = load<Floats>(to + from + v * LANES);
        for (int64_t n = 0; n < count; n++)
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) sum[v] += addends[n].weight * widen(addends[n].row + from + v * LANES);
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) store(to + from + v * LANES, sum[v]);
    }
    return from;
}

void add_rows(float *to, const Addend *addends, int64_t count, int64_t width) {
    int64_t k = add_stretch<LANES == 16 ? 16 : 8>(to, addends, count, 0, width);
    k = add_stretch<4>(to, addends, count, k, width);
    k = add_stretch<1>(to, addends, count, k, width);
    for (; k < width; k++)
        for (int64_t n = 0; n < count; n++) to[k] += addends[n].weight * widen_one(addends[n].row[k]);
}

struct Gradients { // of the scores, [images, texts] each
    const float *i2t, *t2i;
    bool nothing(int64_t pair) const { return i2t[pair] == 0 && t2i[pair] == 0; }
};

inline const Input *row_of(const Side &side, int64_t row) {
    return static_cast<const Input *>(side.rows) + row * side.width;
}

// Gradients of the patches of some images: a patch's own best words, then the words whose best patch it is.
void to_patches(const Side &images, const Side &texts, int64_t from, int64_t to, const Gradients &gradients,
                const Winners &word, const Winners &patch, float *grad_v) {
    std::vector<Addend> addends(TEXTS_AT_ONCE);
    int64_t width = images.width;
    for (int64_t i = from; i < to; i++) {
        int64_t first_row = images.offsets[i], patches = images.length(i);
        for (int64_t begin = 0; begin < texts.count; begin += TEXTS_AT_ONCE) {
            int64_t end = begin + TEXTS_AT_ONCE < texts.count ? begin + TEXTS_AT_ONCE : texts.count;
            for (int64_t row = first_row; row < first_row + patches; row++) {
                int64_t count = 0;
                for (int64_t j = begin; j < end; j++) {
                    float weight = gradients.i2t[i * texts.count + j] / float(patches);
                    if (weight != 0) addends[count++] = {weight, row_of(texts, texts.offsets[j] + word.get(j, row))};
                }
                add_rows(grad_v + row * width, addends.data(), count, width);
            }
            for (int64_t j = begin; j < end; j++) {
                float weight = gradients.t2i[i * texts.count + j] / float(texts.length(j));
                for (int64_t r = texts.offsets[j]; weight != 0 && r < texts.offsets[j + 1]; r++)
                    add_row(grad_v + (first_row + patch.get(i, r)) * width, weight, row_of(texts, r), width);
            }
        }
    }
}

// Gradients of the tokens of some texts: the patches whose best word a token is, then the token's own best patches.
void to_words(const Side &images, const Side &texts, int64_t from, int64_t to, const Gradients &gradients,
              const Winners &word, const Winners &patch, float *grad_t) {
    int64_t width = images.width;
    for (int64_t begin = from; begin < to; begin += TEXTS_AT_ONCE) {
        int64_t end = begin + TEXTS_AT_ONCE < to ? begin + TEXTS_AT_ONCE : to;
        for (int64_t i = 0; i < images.count; i++)
            for (int64_t j = begin; j < end; j++) {
                int64_t pair = i * texts.count + j, first_row = texts.offsets[j];
                if (gradients.nothing(pair)) continue;
                float to_word = gradients.i2t[pair] / float(images.length(i));
                for (int64_t row = images.offsets[i]; to_word != 0 && row < images.offsets[i + 1]; row++)
                    add_row(grad_t + (first_row + word.get(j, row)) * width, to_word, row_of(images, row), width);
                float to_patch = gradients.t2i[pair] / float(texts.length(j));
                for (int64_t r = first_row; to_patch != 0 && r < texts.offsets[j + 1]; r++)
                    add_row(grad_t + r * width, to_patch, row_of(images, images.offsets[i] + patch.get(i, r)), width);
            }
    }
}

} // namespace

// Both return 0, or 1 where there is no memory. Offsets count rows, [sequences + 1]; scores and their gradients are
// [images, texts]; winners as in winners.py. `width` counts fp32 numbers, or bf16 numbers, of which there are evenly many.
extern "C" {

int mmpt_forward(const void *v, const void *t, const int64_t *image_offsets, const int64_t *text_offsets,
                 int64_t images, int64_t texts, int64_t width, int64_t from_image, int64_t to_image, int64_t keep,
                 void *word, int64_t word_bytes, void *patch, int64_t patch_bytes, float *s_i2t, float *s_t2i) {
    int64_t steps = width * int64_t(sizeof(Input)) / int64_t(sizeof(Step));
    Side image_side = {v, image_offsets, images, steps}, text_side = {t, text_offsets, texts, steps};
    Winners words = {word, word_bytes, image_side.total()}, patches = {patch, patch_bytes, text_side.total()};
    try {
        auto score = keep ? score_images<true> : score_images<false>;
        score(image_side, text_side, from_image, to_image, s_i2t, s_t2i, words, patches);
    } catch (const std::bad_alloc &) {
        return 1;
    }
    return 0;
}

// Adds to grad_v the rows of images from_image to to_image, to grad_t those of texts from_text to to_text.
int mmpt_backward(const void *v, const void *t, const int64_t *image_offsets, const int64_t *text_offsets,
                  int64_t images, int64_t texts, int64_t width, int64_t from_image, int64_t to_image,
                  int64_t from_text, int64_t to_text, void *word, int64_t word_bytes, void *patch, int64_t patch_bytes,
                  const float *grad_i2t, const float *grad_t2i, float *grad_v, float *grad_t) {
    Side image_side = {v, image_offsets, images, width}, text_side = {t, text_offsets, texts, width};
    Winners words = {word, word_bytes, image_side.total()}, patches = {patch, patch_bytes, text_side.total()};
    Gradients gradients = {grad_i2t, grad_t2i};
    try {
        to_patches(image_side, text_side, from_image, to_image, gradients, words, patches, grad_v);
        to_words(image_side, text_side, from_text, to_text, gradients, words, patches, grad_t);
    } catch (const std::bad_alloc &) {
        return 1;
    }
    return 0;
}
}
