// softmax(q k^T / sqrt(d)) v for heads of few channels, where a matrix product has too little to multiply.
// One lane of a register is one query; keys and values are broadcast to all lanes. Scores are never
// stored: they cost so little that they are computed twice, for their maximum and for the sums.
// Compiled when it is first used, by nn/attention.py, with the instructions of the processor at hand.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

struct Place {  // Where the rows of a tensor "b h n d" are, in elements; channels lie side by side.
    int64_t batch, head, row;
};

static inline float read(const float* at) { return *at; }
static inline float read(const uint16_t* at) {  // bfloat16: the upper half of a float32.
    const uint32_t bits = static_cast<uint32_t>(*at) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline void write(float* at, float value) { *at = value; }
static inline void write(uint16_t* at, float value) {  // To the nearest, halves to the even one.
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    *at = is_nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// 2^x for x <= 0, to two units in the last place; below 2^-126 it is 2^-126; NaN stays NaN.
static inline Floats exp2_of_negative(Floats x) {
    x = x < -126.f ? Floats{} - 126.f : x;
    const Ints whole = __builtin_convertvector(x - 0.5f, Ints);  // Towards 0: to the nearest.
    const Floats r = x - __builtin_convertvector(whole, Floats);
    Floats p = Floats{} + 1.5353362e-4f;  // 2^r on [-1/2, 1/2], of least relative error.
    p = p * r + 1.3398874e-3f;
    p = p * r + 9.6184373e-3f;
    p = p * r + 5.5503324e-2f;
    p = p * r + 2.4022648e-1f;
    p = p * r + 6.9314720e-1f;
    p = p * r + 1.f;
    const Ints bits = (whole + 127) << 23;
    Floats power;
    std::memcpy(&power, &bits, sizeof(power));
    return p * power;
}

template <int D>
static inline Floats score(const Floats* query, const float* key) {
    Floats even = query[0] * key[0], odd = query[1] * key[1];
    for (int d = 2; d < D; d += 2) {
        even += query[d] * key[d];
        odd += query[d + 1] * key[d + 1];
    }
    return even + odd;
}

template <typename T, int D>
static void attend(const T* q, const T* k, const T* v, T* out, int64_t batch, int64_t heads,
                   int64_t queries, int64_t keys, const Place* place, float scale, int threads) {
    const float in_bits = scale * 1.44269504f;  // Powers of 2, not of e.
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t one = 0; one < batch * heads; ++one) {
        const int64_t b = one / heads, h = one % heads;
        std::vector<float> key(keys * D), value(keys * D);
        for (int64_t m = 0; m < keys; ++m)
            for (int d = 0; d < D; ++d) {
                key[m * D + d] = read(k + b * place[1].batch + h * place[1].head + m * place[1].row + d);
                value[m * D + d] = read(v + b * place[2].batch + h * place[2].head + m * place[2].row + d);
            }
        for (int64_t first = 0; first < queries; first += LANES) {
            const int lanes = queries - first < LANES ? queries - first : LANES;
            Floats query[D] = {}, sum[D] = {}, total = {};
            for (int lane = 0; lane < lanes; ++lane)
                for (int d = 0; d < D; ++d)
                    query[d][lane] = in_bits * read(q + b * place[0].batch + h * place[0].head +
                                                    (first + lane) * place[0].row + d);
            Floats most = score<D>(query, key.data());
            for (int64_t m = 1; m < keys; ++m) {
                const Floats s = score<D>(query, &key[m * D]);
                most = s > most ? s : most;
            }
            for (int64_t m = 0; m < keys; ++m) {
                const Floats weight = exp2_of_negative(score<D>(query, &key[m * D]) - most);
                total += weight;
                for (int d = 0; d < D; ++d) sum[d] += weight * value[m * D + d];
            }
            for (int d = 0; d < D; ++d) {
                const Floats mean = sum[d] / total;
                for (int lane = 0; lane < lanes; ++lane)
                    write(out + b * place[3].batch + h * place[3].head + (first + lane) * place[3].row + d,
                          mean[lane]);
            }
        }
    }
}

template <typename T>
static void attend_by(int64_t channels, const void* q, const void* k, const void* v, void* out,
                      const int64_t* sizes, const Place* place, float scale, int threads) {
    auto kernel = channels == 4 ? attend<T, 4> : channels == 8 ? attend<T, 8> : attend<T, 16>;
    kernel(static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v),
           static_cast<T*>(out), sizes[0], sizes[1], sizes[2], sizes[3], place, scale, threads);
}

// sizes: batch, heads, queries, keys, channels: 4, 8 or 16. place: of q, k, v and out.
extern "C" void attention(const void* q, const void* k, const void* v, void* out, const int64_t* sizes,
                          const Place* place, float scale, int threads, int is_bfloat16) {
    auto by = is_bfloat16 ? attend_by<uint16_t> : attend_by<float>;
    by(sizes[4], q, k, v, out, sizes, place, scale, threads);
}
