// One vector of floats, as each instruction set has it: `V` of kLanes floats, and the shape of the microkernel that
// its registers allow. Everything above is written once, in these words.
#pragma once

#include "problem.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace sightline {
namespace {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

INLINE float bits_to_float(uint32_t bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
INLINE uint32_t float_to_bits(float x) { uint32_t bits; __builtin_memcpy(&bits, &x, 4); return bits; }

constexpr float kLeastNormal = -87.33f;  // e to the power of less is no normal number, and slow

#if defined(__AVX512F__)

// 32 registers: 14 x 2 accumulators, 2 for the panel, 1 for the broadcast. Each step of depth is 28 fused
// multiply-adds for 16 loads, so the two load ports never bound the two multiply ports, and the panel streams from
// L2 at 9 bytes a cycle.
constexpr int kLanes = 16, kRows = 14;
typedef __m512 V;
INLINE V zero() { return _mm512_setzero_ps(); }
INLINE V splat(float x) { return _mm512_set1_ps(x); }
INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x); }
INLINE V load_some(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
INLINE void store_some(float* p, V x, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), x); }
INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
INLINE V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
INLINE V abs(V a) { return _mm512_abs_ps(a); }
// Where a < b (false for NaN): yes, else no.
INLINE V where_less(V a, V b, V yes, V no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
INLINE unsigned greater(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
// The halves are added, then their halves: one fixed order.
INLINE float sum_lanes(V x) { return _mm512_reduce_add_ps(x); }
INLINE float max_lanes(V x) { return _mm512_reduce_max_ps(x); }
INLINE V nearest_whole(V x, float factor) { return _mm512_roundscale_ps(mul(x, splat(factor)), 8); }
// e^x is y * 2^n. Below the smallest normal number it loses digits, at the least exponent it is 0.
constexpr float kLeastExponent = -104.0f;
INLINE V scale_by_power(V y, V n, V) { return _mm512_scalef_ps(y, n); }
INLINE V load(const bfloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE V load(const float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
#if defined(__AVX512BF16__)
INLINE void store(bfloat16* p, V x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
INLINE void store(bfloat16* p, V x, V y) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(y, x)); }
#else
INLINE void store(bfloat16* p, V x) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(rounded));
}
#endif
INLINE void store(float16* p, V x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

#if defined(__AVX512BF16__) || defined(SIGHTLINE_EMULATE_DOT)
// The bf16 dot product: one instruction multiplies two neighbours in depth and adds both to a float, so a register
// tile of the same shape does twice the work. SIGHTLINE_EMULATE_DOT computes it in floats, for tests without the CPU.
#define SIGHTLINE_DOT 1
typedef uint32_t Pair;  // two bf16, the first in the low half
typedef __m512i Pairs;
INLINE Pairs splat(Pair x) { return _mm512_set1_epi32((int)x); }
INLINE Pairs load(const Pair* p) { return _mm512_loadu_si512(p); }
INLINE V fma(Pairs a, Pairs b, V c) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#else
  const __m512i high = _mm512_set1_epi32((int)0xffff0000);
  V sum = fma(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), c);
  return fma(_mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)), sum);
#endif
}
// Up to 32 numbers as 16 pairs, zeros behind them.
INLINE V load_pairs(const bfloat16* p, int64_t n) {
  __mmask32 some = n >= 32 ? 0xffffffffu : (1u << n) - 1;
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(some, p));
}
// Two rows of 16 numbers as 16 pairs.
INLINE void store_zipped(Pair* p, const bfloat16* low, const bfloat16* high, int64_t n) {
  __mmask16 some = (__mmask16)(n >= 16 ? 0xffff : (1u << n) - 1);
  __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, low));
  __m512i second = high ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, high)) : _mm512_setzero_si512();
  _mm512_storeu_si512(p, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}
// Up to 32 columns of two rows as pairs, 16 a vector; a row that is not there is zeros.
template <int kVectors>
INLINE void load_zipped(const bfloat16* low, const bfloat16* high, Pairs (&out)[kVectors]) {
  const __m512i left = _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006,
                                         0x270007, 0x280008, 0x290009, 0x2a000a, 0x2b000b, 0x2c000c, 0x2d000d,
                                         0x2e000e, 0x2f000f);
  const __mmask32 some = kVectors == 1 ? 0xffff : 0xffffffff;
  __m512i first = _mm512_maskz_loadu_epi16(low ? some : 0, low);
  __m512i second = _mm512_maskz_loadu_epi16(high ? some : 0, high);
  out[0] = _mm512_permutex2var_epi16(first, left, second);
  if constexpr (kVectors == 2)
    out[1] = _mm512_permutex2var_epi16(first, _mm512_add_epi16(left, _mm512_set1_epi16(16)), second);
}
// Two rows of 16 floats, rounded: the first, and behind it the second.
INLINE Pairs round_two(V first, V second) {
#if defined(__AVX512BF16__)
  return (Pairs)_mm512_cvtne2ps_pbh(second, first);
#else
  bfloat16 rows[32];
  store(rows, first), store(rows + 16, second);
  return _mm512_loadu_si512(rows);
#endif
}
INLINE void store_rows(bfloat16* first, bfloat16* second, Pairs rows) {
  _mm256_storeu_si256((__m256i*)first, _mm512_castsi512_si256(rows));
  _mm256_storeu_si256((__m256i*)second, _mm512_extracti64x4_epi64(rows, 1));
}
// Of the two rows each number of the first beside that of the second.
INLINE void store_zipped(Pair* p, Pairs rows) {
  const __m512i order = _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006,
                                          0x170007, 0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d,
                                          0x1e000e, 0x1f000f);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, rows));
}
#endif

#elif defined(__AVX2__)

// 16 registers: 6 x 2 accumulators, 2 for the panel, 1 for the broadcast.
constexpr int kLanes = 8, kRows = 6;
typedef __m256 V;
INLINE V zero() { return _mm256_setzero_ps(); }
INLINE V splat(float x) { return _mm256_set1_ps(x); }
INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, V x) { _mm256_storeu_ps(p, x); }
INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE V load_some(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
INLINE void store_some(float* p, V x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x); }
INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
INLINE V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
INLINE V abs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE V where_less(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
INLINE unsigned greater(V a, V b) { return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
INLINE float sum_lanes(V x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
INLINE float max_lanes(V x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
constexpr float kLeastExponent = -88.0f;
INLINE V scale_by_power(V y, V n, V x) {
  // n goes to y's exponent, which has room for it; of NaN cvtps makes 2^31, of which nothing is left.
  __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  V scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power));
  return _mm256_and_ps(_mm256_cmp_ps(x, splat(kLeastNormal), _CMP_NLT_UQ), scaled);
}
INLINE V load(const bfloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE V load(const float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store(bfloat16* p, V x) {
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
}
INLINE void store(float16* p, V x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

#else

// Any CPU, in the compiler's own vectors of four: SSE2 has 16 registers, 64-bit Arm 32; 6 x 2 accumulators fit both.
constexpr int kLanes = 4, kRows = 6;
typedef float V __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
INLINE V zero() { return V{0, 0, 0, 0}; }
INLINE V splat(float x) { return V{x, x, x, x}; }
INLINE V load(const float* p) { V x; __builtin_memcpy(&x, p, 16); return x; }
INLINE void store(float* p, V x) { __builtin_memcpy(p, &x, 16); }
INLINE V load_some(const float* p, int n) { V x = zero(); for (int i = 0; i < n; ++i) x[i] = p[i]; return x; }
INLINE void store_some(float* p, V x, int n) { for (int i = 0; i < n; ++i) p[i] = x[i]; }
#if defined(__aarch64__)
INLINE V fma(V a, V b, V c) { return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE V fnma(V a, V b, V c) { return (V)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
INLINE V fma(V a, V b, V c) { return a * b + c; }
INLINE V fnma(V a, V b, V c) { return c - a * b; }
#endif
INLINE V add(V a, V b) { return a + b; }
INLINE V sub(V a, V b) { return a - b; }
INLINE V mul(V a, V b) { return a * b; }
INLINE V div(V a, V b) { return a / b; }
INLINE V where(I mask, V yes, V no) { return (V)((mask & (I)yes) | (~mask & (I)no)); }
INLINE V max(V a, V b) { return where(a > b, a, b); }
INLINE V abs(V a) { return (V)((I)a & 0x7fffffff); }
INLINE V where_less(V a, V b, V yes, V no) { return where(a < b, yes, no); }
INLINE unsigned greater(V a, V b) {
  I mask = a > b;
  return (mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8);
}
INLINE float sum_lanes(V x) { return (x[0] + x[2]) + (x[1] + x[3]); }
INLINE float max_lanes(V x) {
  float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}
constexpr float kLeastExponent = -88.0f;
INLINE V scale_by_power(V y, V n, V x) {
  n = where(x >= splat(kLeastNormal), n, zero());
  I power = (__builtin_convertvector(n, I) + 127) << 23;
  return where(x < splat(kLeastNormal), zero(), y * (V)power);
}
INLINE float widen(bfloat16 x) { return bits_to_float((uint32_t)x.bits << 16); }
INLINE float widen(float16 x) {
  uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Reading the bits as a float of the wrong exponent and multiplying it right serves subnormals too.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * bits_to_float(0x77800000)));
}
INLINE void narrow(bfloat16* p, float x) {
  uint32_t bits = float_to_bits(x);
  p->bits = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE void narrow(float16* p, float x) {
  uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) p->bits = (uint16_t)(sign | 0x7e00);
  else if (rest >= 0x477ff000) p->bits = (uint16_t)(sign | 0x7c00);
  else if (rest < 0x38800000)  // below the smallest normal: adding 0.5 rounds to its last bit
    p->bits = (uint16_t)(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - float_to_bits(0.5f)));
  else p->bits = (uint16_t)(sign | ((rest + 0xfff + (rest >> 13 & 1) - 0x38000000) >> 13));
}
INLINE V load(const bfloat16* p) { return V{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
INLINE V load(const float16* p) { return V{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
INLINE void store(bfloat16* p, V x) { for (int i = 0; i < 4; ++i) narrow(p + i, x[i]); }
INLINE void store(float16* p, V x) { for (int i = 0; i < 4; ++i) narrow(p + i, x[i]); }

#endif

template <typename Number>
constexpr int64_t kDeep = 2;  // numbers in one step of depth: a Pair's
template <>
constexpr int64_t kDeep<float> = 1;

constexpr int kPanel = 2 * kLanes;                                // columns that a microkernel computes at once
constexpr int kRowStride = (kRows + kLanes - 1) / kLanes * kLanes;  // from one depth to the next of interleaved rows

#if !defined(__AVX512BF16__)
INLINE void store(bfloat16* p, V x, V y) { store(p, x), store(p + kLanes, y); }
#endif

template <typename Half>
INLINE V load_some(const Half* p, int n) {
  Half whole[kLanes] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}
template <typename Half>
INLINE void store_some(Half* p, V x, int n) {
  Half whole[kLanes];
  store(whole, x);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

#if !defined(__AVX512F__)
INLINE V nearest_whole(V x, float factor) {
  const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  return sub(fma(x, splat(factor), magic), magic);
}
#endif

// e^x for x up to 88; 0 at kLeastExponent and below; NaN stays. x = n ln 2 + r with |r| <= ln 2 / 2, and e^r is
// a polynomial of least relative error. Within an ulp for n = 0, and one more for every 64 of n: ln 2 is one float,
// because a weight of e^-44 may be wrong in its seventh digit.
INLINE V exp(V x) {
  x = max(splat(kLeastExponent), x);  // in this order NaN stays
  V n = nearest_whole(x, 1.44269504f);
#if defined(__FMA__)
  V r = fnma(n, splat(0.693147182f), x);
#else  // the product is rounded: n times the short first part of ln 2 is exact
  V r = fnma(n, splat(1.42860677e-6f), fnma(n, splat(0.693145752f), x));
#endif
  V y = splat(1.384360675e-3f);
  y = fma(y, r, splat(8.374195644e-3f));
  y = fma(y, r, splat(4.166800473e-2f));
  y = fma(y, r, splat(1.66664308e-1f));
  y = fma(y, r, splat(4.999999419e-1f));
  y = fma(y, r, splat(1.000000032f));
  y = fma(y, r, splat(1.0f));
  return scale_by_power(y, n, x);
}

constexpr float kLog2E = 1.44269504f, kNearShift = 16;

#if defined(SIGHTLINE_DOT)
// 2^x for what is rounded to bf16: within 1.5e-7 of it, 1 for 0. x = n + f with 0 <= f < 1, of which `reduce` and
// `scalef` know n by themselves; of -infinity they make 0, and NaN stays.
INLINE V exp2(V x) {
  V f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  V y = splat(1.86713808e-3f);
  y = fma(y, f, splat(9.01701301e-3f));
  y = fma(y, f, splat(5.57999238e-2f));
  y = fma(y, f, splat(2.40164444e-1f));
  y = fma(y, f, splat(6.93151295e-1f));
  y = fma(y, f, splat(1.0f));
  return _mm512_scalef_ps(y, x);
}

// (x - shift) log2 e. kNear: in one multiply-add, which rounds the shift's part alone: fit for shifts up to kNearShift,
// where that is less than 1e-6; of larger ones it might be more than everything else.
template <bool kNear>
INLINE V exponent_of_two(V x, float shift) {
  if constexpr (kNear) return fma(x, splat(kLog2E), splat(-shift * kLog2E));
  else return mul(sub(x, splat(shift)), splat(kLog2E));
}
#endif

INLINE float exp(float x) {
  float lanes[kLanes];
  store(lanes, exp(splat(x)));
  return lanes[0];
}

// tanh by its odd polynomial near 0 (Cephes' tanhf), where the exponential's form would cancel.
INLINE V tanh(V x) {
  V size = abs(x), square = mul(x, x);
  V y = splat(-5.70498872745e-3f);
  y = fma(y, square, splat(2.06390887954e-2f));
  y = fma(y, square, splat(-5.37397155531e-2f));
  y = fma(y, square, splat(1.33314422036e-1f));
  y = fma(y, square, splat(-3.33332819422e-1f));
  V near = fma(mul(y, square), x, x);
  V capped = where_less(splat(20.0f), size, splat(20.0f), size);  // in this order NaN stays
  V far = sub(splat(1.0f), div(splat(2.0f), add(exp(add(capped, capped)), splat(1.0f))));
  far = where_less(x, zero(), sub(zero(), far), far);
  return where_less(size, splat(0.625f), near, far);
}

}  // namespace
}  // namespace sightline
