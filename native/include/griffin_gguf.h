/* Weights in groups (griffin_grouped) into memory, from the blocks of a GGUF file or from codes, and back. */
#ifndef GRIFFIN_GGUF_H
#define GRIFFIN_GGUF_H
#include "griffin_native.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The file format's own numbers. */
enum griffin_gguf_type {
  GRIFFIN_GGUF_Q4_0 = 2,
  GRIFFIN_GGUF_Q4_1 = 3,
  GRIFFIN_GGUF_Q5_0 = 6,
  GRIFFIN_GGUF_Q5_1 = 7,
  GRIFFIN_GGUF_Q8_0 = 8,
  GRIFFIN_GGUF_Q2_K = 10,
  GRIFFIN_GGUF_Q3_K = 11,
  GRIFFIN_GGUF_Q4_K = 12,
  GRIFFIN_GGUF_Q5_K = 13,
  GRIFFIN_GGUF_Q6_K = 14
};

/* Codes of a matrix and what their scales and offsets are made of, row-major, rows of W. Null where the format has
 * none. */
typedef struct {
  const uint8_t* codes;      /* (out, in) */
  const void* scale;         /* (out, in / span, rounded up), float16 or float32; with sub-scales (out, in / 256) */
  const void* offset;        /* as many: float16, or unsigned bytes (GRIFFIN_OFFSET_CODE) */
  const uint8_t* sub;        /* (out, in / group) */
  const uint8_t* sub_offset; /* (out, in / group) */
} griffin_codes;

/* A matrix, or some rows of one, in a file: where it is, and where it goes. */
typedef struct {
  griffin_matrix matrix;    /* its weight and scales are filled */
  const int64_t* row_order; /* see griffin_pack_gguf */
  int64_t offset, bytes;    /* of the blocks in the file */
  int32_t file;             /* descriptor, open for reading */
  int32_t type;             /* griffin_gguf_type */
} griffin_gguf_tensor;

/* The format of a GGUF type, with its weights and bytes a block. */
GRIFFIN_API int griffin_gguf_format(int type, griffin_grouped* format, int32_t* block_weights, int32_t* block_bytes);
/* How the rows of a matrix lie (src/grouped.h). */
typedef struct {
  int32_t block, planes; /* rows of a block; parts of a row, one for each plane */
  int64_t codes;         /* where the first plane begins in its part: scales and offsets are before it */
  int64_t begin[5];      /* bytes of a row before part i, begin[planes] is all */
  int64_t bytes;         /* of a row */
} griffin_parts;

/* Bytes that a matrix of this format and shape needs: of a row (of W; of a neuron if neuron-major), and as the result
 * those of the scales of a neuron-major one (else 0, they are in the rows); -1: no such format. A matrix has whole blocks
 * of rows, and behind them GRIFFIN_SLACK more bytes must be readable. */
GRIFFIN_API int64_t griffin_grouped_bytes(const griffin_matrix* matrix, griffin_parts* parts);
/* Fill matrix->weight, and matrix->scales if neuron-major. blocks: the rows of W as they are in the file. row_order:
 * (out,) row r of the matrix is row row_order[r] of the file's; null: the same. */
GRIFFIN_API int griffin_pack_gguf(const griffin_matrix* matrix, int type, const void* blocks, const int64_t* row_order,
                                  int threads);
/* Read tensors from files and pack them, one after the other: number *next, which is counted up, until it is n. Several
 * threads share the work if they call with the same `next`. After an error all stop; what was filled is not told. */
GRIFFIN_API int griffin_pack_tensors(const griffin_gguf_tensor* tensors, int64_t n, int64_t* next);
GRIFFIN_API int griffin_pack_codes(const griffin_matrix* matrix, const griffin_codes* from, int threads);
/* Fill `out`'s arrays from float weights (rows, d_in): with sub-scales and -offsets by a search for the least squares,
 * weighted by `importance` (d_in,) if there is one (mean squares of the inputs); or symmetric, by the largest. */
GRIFFIN_API int griffin_quantise(const griffin_grouped* format, const float* weight, int64_t rows, int64_t d_in,
                                 const float* importance, const griffin_codes* out, int threads);
/* The weights as float32 (exactly what the format says) or bf16 (that, rounded to nearest even), any format: n rows, of W
 * or, neuron-major, of neurons, those that `rows` names or all from `first` on. Columns begin..end: of a neuron-major
 * matrix (begin a multiple of 256), of others all. out_stride in values. */
GRIFFIN_API int griffin_unpack(const griffin_matrix* matrix, const int64_t* rows, int64_t first, int64_t n,
                               int64_t begin, int64_t end, void* out, int out_type, int64_t out_stride, int threads);
/* L2 norms of all rows of W (d_out,), or neuron-major of all neurons (d_in,), any format. */
GRIFFIN_API int griffin_row_norms(const griffin_matrix* matrix, float* out, int threads);

#ifdef __cplusplus
}
#endif
#endif
