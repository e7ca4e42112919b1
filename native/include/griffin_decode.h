/* One generation step of a decoder of the common shape, in one parallel region: RMSNorm, rotary attention with grouped
 * key/value heads over a cache, gated or ungated feedforward over experts, language-model head.
 *
 * Words as in griffin_native.h; H query heads, K key/value heads (H a multiple of K), E values a head. */
#ifndef GRIFFIN_DECODE_H
#define GRIFFIN_DECODE_H
#include "griffin_native.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y = x / sqrt(mean(x^2) + eps) * weight; weight NULL: the norm is left out (y = x). */
typedef struct {
  const float* weight;
  float eps;
  int32_t reserved;
} griffin_norm;

typedef struct {
  griffin_norm attention, query, key, after_attention, feedforward, after_feedforward; /* query and key: a head each */
  griffin_matrix q, k, v, o;
  griffin_ff_block ff;
  int32_t rope;   /* which of the decoder's rotary tables; -1: none */
  int32_t window; /* keys that a token sees, itself included; 0: all */
} griffin_layer;

typedef struct {
  int32_t n_layers, d_model, heads, kv_heads, head_size, vocabulary;
  int32_t rotary;        /* values of a head that are rotated, pairs (i, i + rotary / 2) */
  int32_t positions;     /* rows of the rotary tables; more than length - start of every sequence */
  float attention_scale; /* of q . k */
  float embedding_scale, residual_scale, logits_scale;
  float attention_softcap, logits_softcap; /* 0: none */
  const griffin_layer* layers;
  griffin_matrix embedding; /* (V, D) */
  griffin_norm final;
  griffin_matrix head;
  const float *cosines[2], *sines[2]; /* rotary tables, (positions, rotary / 2) */
} griffin_decoder;

/* Keys and values of every sequence, wherever they lie: each sequence of a batch has a length and a capacity of its
 * own. A layer's keys of a sequence are (K, capacity, E), with room for this step's tokens. */
typedef struct {
  void *const *keys, *const *values; /* (n_layers, rows) */
  const int64_t* head_stride;        /* (rows,) bytes */
  const int32_t* length;             /* (rows,) tokens before the row's own, which is written behind them */
  const int32_t* start;              /* (rows,) first token that is no padding, or NULL: 0 */
  int32_t type;                      /* GRIFFIN_F32 or GRIFFIN_BF16 */
  int32_t reserved;
} griffin_cache;

/* One layer's experts, as in griffin_io. */
typedef struct {
  const void* experts;
  int64_t n_experts;
  const uint16_t* row_mask;
  int32_t index_bytes, reserved;
  const griffin_dynamic* dynamic;
  const griffin_ff_block* compact;
} griffin_experts;

/* Run `rows` tokens, a row for each: one of each sequence, or several of one, which follow each other in its rows with
 * the same keys and values and ascending lengths; each sees those before it. experts: (n_layers,). logits: (rows, V),
 * float32. */
GRIFFIN_API int griffin_decode(const griffin_decoder* decoder, const griffin_cache* cache,
                               const griffin_experts* experts, const int64_t* tokens, int rows, float* logits,
                               int threads);

#ifdef __cplusplus
}
#endif
#endif
