// bf16 weights with bf16 input in the AVX-512 BF16 instruction: pairs of products, summed in float32.
#include <immintrin.h>

#include <math.h>
#include <string.h>

#include "half.h"
#include "kernels.h"

namespace griffin {
namespace {

struct V {  // what kernels_generic.inl's other functions need here; only its dispatch is used
  using F = __m512;
  static constexpr int kWidth = 16, kMaxN = 8;
};

#include "kernels_generic.inl"

struct Bf16Dot {
  static constexpr int kMaxN = 8;
  template <int M, int N>
  static void run(const uint8_t* const* w, const Input* const* x, int d, float* out, const uint8_t* const* next) {
    constexpr int U = kChains;
    __m512 acc[U][M][N];
    for (int u = 0; u < U; u++)
      for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) acc[u][m][n] = _mm512_setzero_ps();
    int i = 0;
    for (; i + 32 * U <= d; i += 32 * U) {
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) {
        const int at = i + 32 * u;
        __m512bh wv[M];
#pragma GCC unroll 2
        for (int m = 0; m < M; m++) {
          _mm_prefetch((const char*)(next[m] + 2 * at), _MM_HINT_T0);
          wv[m] = (__m512bh)_mm512_loadu_si512(w[m] + 2 * at);
        }
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
          const __m512bh xv = (__m512bh)_mm512_loadu_si512(x[n]->bf16 + at);
#pragma GCC unroll 2
          for (int m = 0; m < M; m++) acc[u][m][n] = _mm512_dpbf16_ps(acc[u][m][n], wv[m], xv);
        }
      }
    }
    for (; i < d; i += 32) {
      const __mmask32 mask = d - i >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << (d - i)) - 1;
      for (int m = 0; m < M; m++) {
        const __m512bh wv = (__m512bh)_mm512_maskz_loadu_epi16(mask, w[m] + 2 * i);
        for (int n = 0; n < N; n++)
          acc[0][m][n] = _mm512_dpbf16_ps(acc[0][m][n], wv, (__m512bh)_mm512_loadu_si512(x[n]->bf16 + i));
      }
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) {
        for (int u = 1; u < U; u++) acc[0][m][n] = _mm512_add_ps(acc[0][m][n], acc[u][m][n]);
        out[m * N + n] = _mm512_reduce_add_ps(acc[0][m][n]);
      }
  }
};

}  // namespace

void dot_bf16_avx512(const uint8_t* const* w, int m, const Input* const* x, int n, int d, float* out,
                     const uint8_t* const* next) {
  dot_rows<Bf16Dot>(w, m, x, n, d, out, next);
}

}  // namespace griffin
