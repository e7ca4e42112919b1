// AVX-512 F/BW/DQ/VL, with or without VNNI (GRIFFIN_VNNI): included by one unit for each.
#include <immintrin.h>
#include <string.h>

#include "grouped_kernels.h"
#include "half.h"

namespace griffin {
namespace {

struct B512 {
  using I = __m512i;
  using F = __m512;
  static constexpr int kBytes = 64, kLanes = 16, kTile = 6;
  static I load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static I once(I v) {  // in a register: compilers would load it for each use
#if defined(__GNUC__)
    __asm__("" : "+v"(v));
#endif
    return v;
  }
  static I none() { return _mm512_setzero_si512(); }
  static I set1(uint8_t v) { return _mm512_set1_epi8((char)v); }
  static I set1_int(int32_t v) { return _mm512_set1_epi32(v); }
  static I both(I a, I b) { return _mm512_and_si512(a, b); }
  template <int n> static I left(I v) { return _mm512_slli_epi16(v, n); }
  template <int n> static I right(I v) { return _mm512_srli_epi16(v, n); }
  // the bits of a where mask has ones, of b elsewhere
  template <int mask> static I select(I a, I b) { return _mm512_ternarylogic_epi32(set1((uint8_t)mask), a, b, 0xCA); }
  static I twice_and_bit(I code, const uint8_t* bits) {
    __mmask64 mask;
    memcpy(&mask, bits, 8);
    const I twice = _mm512_add_epi8(code, code);
    return _mm512_mask_add_epi8(twice, mask, twice, set1(1));
  }
  template <int bits> static I dot(I acc, I codes, I q) {
#if defined(GRIFFIN_VNNI)
    return _mm512_dpbusd_epi32(acc, codes, q);
#else
    const I ones = _mm512_set1_epi16(1);
    if constexpr (bits <= 6) {
      return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, q), ones));
    } else {  // by nibbles, whose sums of two products fit 16 bits
      const I low = _mm512_maddubs_epi16(both(codes, set1(15)), q);
      const I high = _mm512_maddubs_epi16(both(right<4>(codes), set1(15)), q);
      acc = _mm512_add_epi32(acc, _mm512_madd_epi16(low, ones));
      return _mm512_add_epi32(acc, _mm512_madd_epi16(high, _mm512_set1_epi16(16)));
    }
#endif
  }
  template <int bits> static I whole(I acc) { return acc; }  // sums of up to 8 `dot`
  template <int n> static I left32(I v) { return _mm512_slli_epi32(v, n); }
  static I add8(I a, I b) { return _mm512_add_epi8(a, b); }
  static I subtract(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  // Inputs of two bytes, 128 high + low: the products of the high ones first, then shifted.
  static constexpr bool kByteInputs = true;
  static constexpr int kOperands = 1;
  static I first_operand(I codes) { return codes; }
  static I second_operand(I codes) { return codes; }
  template <int bits> static I dot_x(I acc, I operand, I x) { return dot<bits>(acc, operand, x); }
  // acc += the products, in its register: compilers copy the sums of an expression back and forth in a loop.
  template <int bits> static void add_dot(I& acc, I codes, I q) {
#if defined(GRIFFIN_VNNI) && defined(__GNUC__)
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "vm"(q));
#else
    acc = dot<bits>(acc, codes, q);
#endif
  }
  template <int bits> static void add_x(I& acc, I operand, I x) { add_dot<bits>(acc, operand, x); }
  static I after_first(I high) { return left32<7>(high); }
  static I low8(I a, I b) { return _mm512_unpacklo_epi8(a, b); }
  static I high8(I a, I b) { return _mm512_unpackhi_epi8(a, b); }
  static I low16(I a, I b) { return _mm512_unpacklo_epi16(a, b); }
  static I high16(I a, I b) { return _mm512_unpackhi_epi16(a, b); }
  static void store_int(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static F zero() { return _mm512_setzero_ps(); }
  static F set1_float(float v) { return _mm512_set1_ps(v); }
  static F load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F minus_product(F c, F a, F b) { return _mm512_fnmadd_ps(a, b, c); }
  static float sum(F v) { return _mm512_reduce_add_ps(v); }
  // out[i] = sum(v[i]), in the order that `sum` has
  static void sum_each(const F* v, int n, float* out) {
    int i = 0;
    for (; i + 4 <= n; i += 4) {
      const F ab = add_halves(v[i], v[i + 1]), cd = add_halves(v[i + 2], v[i + 3]);
      F all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
      all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4E));
      all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xB1));
      const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
      _mm_storeu_ps(out + i, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, all)));
    }
    for (; i < n; i++) out[i] = sum(v[i]);
  }
  // the sums of a's two halves, and of b's
  static F add_halves(F a, F b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  }
  static F halves(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static F unsigned_bytes(const uint8_t* p) {
    return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  static F signed_bytes(const int8_t* p) { return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
  // float16 super-scales of the groups g .. g + 15, each for kEach groups, zero behind the last of `lanes`; g is a multiple
  // of 16
  template <int kEach> static F supers(const uint8_t* halves, int g, int lanes) {
    const __m128i own = _mm_maskz_loadu_epi16(kEach == 16 || lanes <= 8 ? 1 : 3, halves + 2 * (g / kEach));
    const __m512 both = _mm512_castps128_ps512(_mm_cvtph_ps(own));
    if constexpr (kEach == 16) return _mm512_broadcastss_ps(_mm512_castps512_ps128(both));
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), both);
  }
  static F first(F v, int n) { return _mm512_maskz_mov_ps((__mmask16)((1u << n) - 1), v); }
  static void prefetch(const uint8_t* p) { GRIFFIN_PREFETCH("prefetcht0", p, _MM_HINT_T0); }
  static void prefetch_far(const uint8_t* p) { GRIFFIN_PREFETCH("prefetcht1", p, _MM_HINT_T1); }
};

#include "grouped_kernels.inl"

}  // namespace

#if defined(GRIFFIN_VNNI)
const GroupedKernels kGroupedAvx512Vnni = grouped_kernels<B512>();
#else
const GroupedKernels kGroupedAvx512 = grouped_kernels<B512>();
#endif

}  // namespace griffin
