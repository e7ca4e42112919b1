/* griffin_native: feedforward experts read in place, and matrix-vector products, on a CPU.
 *
 * Plain C interface, no dependency but the C++ runtime. Every function is safe to call from several threads at once.
 * Words: D model width, D_ff feedforward width, B rows of input (1..16), neuron j owns row j of W_g (gate), row j of
 * W_1 (up) and column j of W_2, stored here as row j of `down` ("neuron-major"). All accumulation is in float32.
 *
 * Formats of weights
 *   f32, bf16, f16   values.
 *   grouped          codes of 2 to 8 bits; a scale s and an offset m for every group of 16 or 32 weights along the
 *                    input: weight = s * code - m (griffin_grouped). Codes lie in planes of 2 bits, the highest first,
 *                    so that a weight's highest bits can be read without its lowest; where they lie, in src/grouped.h.
 *                    With a table of 16 or 256 numbers weight = s * table[code] (NF4, FP8).
 *
 * Grouped rows are multiplied in integers: x is quantised in groups of the weights' size with scale max|x| / 16256 (two
 * bytes a value), the products of a group are summed exactly, and groups are summed in float32. Where the output
 * projection is grouped, so is z, over the neurons of a group that are computed. Rows of a
 * table format are unpacked to float32, a few at a time, and meet x in float32. bf16 rows meet a bf16 x in the
 * instruction for it where there is one, and a float32 x in float32. */
#ifndef GRIFFIN_NATIVE_H
#define GRIFFIN_NATIVE_H
#include <stdint.h>

#if defined(_WIN32)
#define GRIFFIN_API __declspec(dllexport)
#else
#define GRIFFIN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { GRIFFIN_ABI = 11, GRIFFIN_MAX_ROWS = 16, GRIFFIN_SLACK = 64 };
enum griffin_format { GRIFFIN_F32, GRIFFIN_BF16, GRIFFIN_F16, GRIFFIN_GROUPED };
/* Where a group's scale s comes from: a float16 for 256 weights times a byte of the group's own, or a value of its own
 * (for `span` weights). */
enum griffin_scale { GRIFFIN_SCALE_SUB_UNSIGNED, GRIFFIN_SCALE_SUB_SIGNED, GRIFFIN_SCALE_F16, GRIFFIN_SCALE_F32 };
/* Where its offset m comes from, weight = s * code - m: s * zero; a float16 for 256 weights times an unsigned byte of
 * the group's own; minus a float16; s times an unsigned byte (both for `span` weights). */
enum griffin_offset { GRIFFIN_OFFSET_NONE, GRIFFIN_OFFSET_SUB, GRIFFIN_OFFSET_F16, GRIFFIN_OFFSET_CODE };
enum griffin_activation { GRIFFIN_SILU, GRIFFIN_GELU, GRIFFIN_GELU_TANH, GRIFFIN_RELU, GRIFFIN_RELU2 };
enum griffin_status {
  GRIFFIN_OK,
  GRIFFIN_BAD_ARGUMENT, /* null pointer, unknown format or activation, size out of range */
  GRIFFIN_BAD_EXPERT,   /* an expert outside 0..D_ff-1 (only griffin_union checks) */
  GRIFFIN_NO_MEMORY,
  GRIFFIN_NO_ISA, /* instruction set unknown, not built, or not on this machine */
  GRIFFIN_READ_ERROR,
  GRIFFIN_FILE_ENDED /* before the bytes that were to be read */
};

/* A format of weights in groups. */
typedef struct {
  uint8_t bits;   /* of a code: 2, 3, 4, 5, 6 or 8 */
  uint8_t group;  /* weights of a group along d_in: 16 or 32 */
  uint8_t scale;  /* enum griffin_scale */
  uint8_t offset; /* enum griffin_offset */
  uint16_t zero;  /* GRIFFIN_OFFSET_NONE: the code that means 0 */
  uint16_t span;  /* weights that share a scale of their own, a power of two from the group's to 256 */
} griffin_grouped;

/* One matrix W (out, in), for y = W x + bias; read only. Row-major: row o of W after the other. Neuron-major (an output
 * projection W_2): row j has what neuron j writes, column j of W. */
typedef struct {
  int32_t d_in, d_out, format, neuron_major;
  griffin_grouped grouped; /* GRIFFIN_GROUPED only */
  const void* weight;
  int64_t stride;     /* bytes from one row to the next; not used of GRIFFIN_GROUPED */
  const void* scales; /* GRIFFIN_GROUPED and neuron-major only: scales and offsets of all groups */
  const float* bias;  /* (out,) or NULL */
  const float* table; /* GRIFFIN_GROUPED only, (2^bits,) or NULL: weight = s * table[code]. Codes of 4 or 8 bits, scales
                         of their own, no offsets */
} griffin_matrix;

/* One feedforward block: gate (weight NULL: ungated) and up (D_ff, D), down (D, D_ff) neuron-major. */
typedef struct {
  griffin_matrix gate, up, down;
  int32_t activation, reserved;
} griffin_ff_block;

/* Dynamic neuron selection: for each token, the gate is computed for all experts, and up and down only for the k of
 * them with the largest scores |act(gate)| * weight. In a block without a gate, up takes its place: it is computed for
 * all experts, and down for the k. Relatives are TEAL and CATS, which threshold activations; here the k largest gate
 * scores of a token are chosen. */
typedef struct {
  griffin_matrix gate;   /* (D_ff, D): the gate in another format, read in place of the block's; weight NULL: none */
  const float* weight;   /* (1 or rows, D_ff), none of them negative */
  int64_t weight_stride; /* floats from one row's to the next; 0: one for all rows */
  int64_t k;             /* 1..n_experts */
  /* Precision by planes, for blocks of grouped weights without a table, and `gate` NULL: the gate of an expert is read
   * whole or to its first `first` planes; up and down of the levels[l - 1] best scores of a token to their first l planes at
   * least (whole, where a matrix has no more). Bits that are not read stand at their mean. */
  const uint16_t* whole; /* (n_experts,): bit r of entry i says that row r reads the gate of expert i whole */
  int64_t levels[4];     /* levels[0] = k, none above the one before it */
  int32_t n_levels;      /* 0: all rows are read whole; else 1..4 */
  int32_t first;         /* 1..4 */
} griffin_dynamic;

/* Rows in, rows out. Types are GRIFFIN_F32 or GRIFFIN_BF16, strides the bytes from one row to the next. y is written
 * whole and never read; x and y must not overlap. */
typedef struct {
  const void* x;
  void* y;
  int64_t x_stride, y_stride;
  int32_t x_type, y_type, rows;
  int32_t index_bytes; /* 4 or 8: the type of `experts` */
  const void* experts; /* (n_experts,) each in 0..D_ff-1, ascending (else a row's bits depend on the rows beside it), or
                          NULL: all neurons. Ignored by matvec. */
  int64_t n_experts;
  const uint16_t* row_mask;       /* (n_experts,) or NULL: bit r of entry i says that row r wants expert i */
  const griffin_dynamic* dynamic; /* or NULL: every expert is computed. Ignored by matvec. */
  /* Or NULL. The block with copies of the experts' rows (griffin_copy_rows) in place of its weights: the rows of
   * experts[i] are the i-th ones, so that they are read like a dense block's. Grouped weights without a table, no
   * dynamic selection. */
  const griffin_ff_block* compact;
} griffin_io;

/* -- set-up ------------------------------------------------------------------------------------------------------- */
GRIFFIN_API int griffin_abi(void);
/* For callers that declare the structs themselves: the size of a struct by its name, such as "griffin_matrix", and the
 * offset of its last field; -1 for an unknown name. */
GRIFFIN_API int64_t griffin_sizeof(const char* name);
GRIFFIN_API int64_t griffin_last_offset(const char* name);
/* Use the process's own GNU OpenMP pool: addresses of GOMP_parallel, omp_get_thread_num, omp_get_num_threads. With NULL
 * the library's own small pool is used (the default until this is called). */
GRIFFIN_API void griffin_use_openmp(void* gomp_parallel, void* thread_num, void* num_threads);
/* "avx512", "avx2", "portable", or NULL for the best one here. Applies to calls that start afterwards. */
GRIFFIN_API int griffin_set_isa(const char* name);
GRIFFIN_API const char* griffin_isa(void);       /* e.g. "avx512 vnni bf16" */
GRIFFIN_API const char* griffin_isas(void);      /* those that this machine can be forced to, separated by spaces */
GRIFFIN_API const char* griffin_threading(void); /* "openmp" or "own pool" */
GRIFFIN_API int64_t griffin_calls(void);         /* ff and matvec calls finished since the library was loaded */
GRIFFIN_API int64_t griffin_ff_bytes(void); /* of weights and scales that feedforward blocks have read since then */

/* -- one parallel region each ------------------------------------------------------------------------------------- */
/* y = W_2[:,E] (act(W_g[E] x + b_g) * (W_1[E] x + b_1)) + b_2, ungated y = W_2[:,E] act(W_1[E] x + b_1) + b_2 */
GRIFFIN_API int griffin_ff(const griffin_ff_block* block, const griffin_io* io, int threads);
/* y = W x + bias. Grouped: any number of rows, and neuron-major too; else at most GRIFFIN_MAX_ROWS, rows of W. */
GRIFFIN_API int griffin_matvec(const griffin_matrix* matrix, const griffin_io* io, int threads);

/* -- data --------------------------------------------------------------------------------------------------------- */
/* Union of one expert set a row: experts (rows, k). Fills union_out (ascending, room for min(rows * k, d_ff)) and
 * mask_out (as long); returns the union's length, or minus a griffin_status. */
GRIFFIN_API int64_t griffin_union(const void* experts, int index_bytes, int rows, int64_t k, int64_t d_ff,
                                  int32_t* union_out, uint16_t* mask_out);
/* Copy rows of a grouped matrix (of a neuron-major one, neurons), rows[i] to the i-th place of a matrix of the same format
 * at `to`, which has room for n rounded up to 32. Neuron-major scales stay where they are. */
GRIFFIN_API int griffin_copy_rows(const griffin_matrix* matrix, const void* rows, int index_bytes, int64_t n, void* to,
                                  int threads);
/* Ask for huge pages under [address, address + bytes); 0 if the system took the advice. */
GRIFFIN_API int griffin_advise_huge(void* address, int64_t bytes);
/* Bytes per second of a plain float sum over the buffer with `threads` threads: the yardstick for everything above. */
GRIFFIN_API double griffin_read_bandwidth(const void* buffer, int64_t bytes, int threads);

#ifdef __cplusplus
}
#endif
#endif
