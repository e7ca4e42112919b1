#include <immintrin.h>
#include <string.h>

#include "grouped_kernels.h"
#include "half.h"

namespace griffin {
namespace {

struct B256 {
  using I = __m256i;
  using F = __m256;
  static constexpr int kBytes = 32, kLanes = 8, kTile = 4;
  static I load(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static I once(I v) { return v; }
  static I none() { return _mm256_setzero_si256(); }
  static I set1(uint8_t v) { return _mm256_set1_epi8((char)v); }
  static I set1_int(int32_t v) { return _mm256_set1_epi32(v); }
  static I both(I a, I b) { return _mm256_and_si256(a, b); }
  template <int n> static I left(I v) { return _mm256_slli_epi16(v, n); }
  template <int n> static I right(I v) { return _mm256_srli_epi16(v, n); }
  // the bits of a where mask has ones, of b elsewhere
  template <int mask> static I select(I a, I b) {
    return _mm256_or_si256(both(a, set1((uint8_t)mask)), _mm256_andnot_si256(set1((uint8_t)mask), b));
  }
  static I twice_and_bit(I code, const uint8_t* bits) {
    int32_t word;
    memcpy(&word, bits, 4);
    const I bytes =
        _mm256_shuffle_epi8(_mm256_set1_epi32(word), _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2,
                                                                      2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3));
    const I bit = _mm256_set1_epi64x((long long)0x8040201008040201ULL);
    const I set = _mm256_cmpeq_epi8(both(bytes, bit), bit);  // -1 where the bit is 1
    return _mm256_sub_epi8(_mm256_add_epi8(code, code), set);
  }
  // Products with int8: up to 4 bits the sums of 8 products of 4 fit 16 bits, and are widened once.
  template <int bits> static I dot(I acc, I codes, I q) {
    if constexpr (bits <= 4) return _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, q));
    if constexpr (bits <= 6)
      return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, q), _mm256_set1_epi16(1)));
    acc = dot_x<bits>(acc, first_operand(codes), _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8));
    return dot_x<bits>(acc, second_operand(codes), _mm256_srai_epi16(q, 8));
  }
  template <int bits> static I whole(I acc) { return bits <= 4 ? _mm256_madd_epi16(acc, _mm256_set1_epi16(1)) : acc; }
  static I add8(I a, I b) { return _mm256_add_epi8(a, b); }
  static I subtract(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  // Inputs of 16 bits, which meet every other code as 16 bits: half of the multiplications that bytes would take.
  static constexpr bool kByteInputs = false;
  static constexpr int kOperands = 2;
  static I first_operand(I codes) { return both(codes, _mm256_set1_epi16(255)); }
  static I second_operand(I codes) { return _mm256_srli_epi16(codes, 8); }
  template <int bits> static I dot_x(I acc, I operand, I x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(operand, x));
  }
  template <int bits> static void add_dot(I& acc, I codes, I q) { acc = dot<bits>(acc, codes, q); }
  template <int bits> static void add_x(I& acc, I operand, I x) { acc = dot_x<bits>(acc, operand, x); }
  static I after_first(I sum) { return sum; }
  static I low8(I a, I b) { return _mm256_unpacklo_epi8(a, b); }
  static I high8(I a, I b) { return _mm256_unpackhi_epi8(a, b); }
  static I low16(I a, I b) { return _mm256_unpacklo_epi16(a, b); }
  static I high16(I a, I b) { return _mm256_unpackhi_epi16(a, b); }
  static void store_int(int32_t* p, I v) { _mm256_storeu_si256((__m256i*)p, v); }
  static F zero() { return _mm256_setzero_ps(); }
  static F set1_float(float v) { return _mm256_set1_ps(v); }
  static F load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F minus_product(F c, F a, F b) { return _mm256_fnmadd_ps(a, b, c); }
  static float sum(F v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
  }
  static void sum_each(const F* v, int n, float* out) {
    for (int i = 0; i < n; i++) out[i] = sum(v[i]);
  }
  static F halves(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static F unsigned_bytes(const uint8_t* p) {
    return to_float(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  static F signed_bytes(const int8_t* p) { return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
  // float16 super-scales of the groups g .. g + 7, each for kEach groups; g is a multiple of 8
  template <int kEach> static F supers(const uint8_t* halves, int g, int) {
    uint16_t own;
    memcpy(&own, halves + 2 * (g / kEach), 2);
    return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(own)));
  }
  static F first(F v, int n) {
    const I places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(set1_int(n), places)));
  }
  static void prefetch(const uint8_t* p) { GRIFFIN_PREFETCH("prefetcht0", p, _MM_HINT_T0); }
  static void prefetch_far(const uint8_t* p) { GRIFFIN_PREFETCH("prefetcht1", p, _MM_HINT_T1); }
};

#include "grouped_kernels.inl"

}  // namespace

const GroupedKernels kGroupedAvx2 = grouped_kernels<B256>();

}  // namespace griffin
