/* griffin_native: feedforward experts read in place, and matrix-vector products, on a CPU.
 *
 * Plain C interface, no dependency but the C++ runtime. Every function is safe to call from several threads at once.
 * Words: D model width, D_ff feedforward width, B rows of input (1..16), neuron j owns row j of W_g (gate), row j of
 * W_1 (up) and column j of W_2, stored here as row j of `down` ("neuron-major"). All accumulation is in float32.
 *
 * Formats of a weight row of length D
 *   f32, bf16, f16   D values.
 *   int8             D signed bytes in -127..127 and one float32 scale a row, in a separate array.
 *   int4             P = D rounded up to 64. P/2 bytes of nibbles, then P/32 float16 scales, one for 32 weights: weight
 *                    = (nibble - 8) * scale. Weights come in blocks of 128: the low nibbles of the block's 64 bytes are
 *                    its weights 0..63, the high nibbles its weights 64..127. If P is an odd multiple of 64 the last
 *                    block has 64 weights in 32 bytes: low nibbles 0..31, high nibbles 32..63. The padding beyond D
 *                    has nibble 8 (weight 0). 4.5 bits a weight, as Q4_0, but vectors load whole and scales load 16 at
 *                    once.
 *   A neuron's record is gate row, up row, down row, one after the other, when the caller lays them out so (int4,
 *   int8); the functions only see three base pointers with a stride in bytes each.
 *
 * int8 and int4 rows are multiplied in integers where they meet the input (gate, up, matvec): x is quantised to int8 in
 * groups of 32 with scale max|x| / 127, as in Q8_0, the products of a group are summed exactly, and groups are summed
 * in float32. Down rows are converted to float32 and never meet a quantised operand. bf16 rows meet a bf16 x in the
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

enum { GRIFFIN_ABI = 5, GRIFFIN_MAX_ROWS = 16 };
enum griffin_format { GRIFFIN_F32, GRIFFIN_BF16, GRIFFIN_F16, GRIFFIN_INT8, GRIFFIN_INT4 };
enum griffin_activation { GRIFFIN_SILU, GRIFFIN_GELU, GRIFFIN_GELU_TANH, GRIFFIN_RELU, GRIFFIN_RELU2 };
enum griffin_status {
  GRIFFIN_OK,
  GRIFFIN_BAD_ARGUMENT, /* null pointer, unknown format or activation, size out of range */
  GRIFFIN_BAD_EXPERT,   /* an expert outside 0..D_ff-1 (only griffin_union checks) */
  GRIFFIN_NO_MEMORY,
  GRIFFIN_NO_ISA /* instruction set unknown, not built, or not on this machine */
};

/* One feedforward block, read only. `gate` NULL: ungated. Strides are the bytes from one neuron to the next. */
typedef struct {
  int32_t d_model, d_ff, format, activation;
  const void *gate, *up, *down;
  int64_t gate_stride, up_stride, down_stride;
  const float *gate_scale, *up_scale, *down_scale; /* int8 only */
  int64_t scale_stride;                            /* bytes from one neuron's scale to the next, in all three */
  const float *gate_bias, *up_bias;                /* (D_ff,) or NULL */
  const float* out_bias;                           /* (D,) or NULL */
} griffin_ff_block;

/* One matrix W (out, in), row-major, for y = W x + bias. */
typedef struct {
  int32_t d_in, d_out, format, reserved;
  const void* weight;
  int64_t stride;     /* bytes from one row to the next */
  const float* scale; /* (out,), int8 only */
  const float* bias;  /* (out,) or NULL */
} griffin_matrix;

/* Dynamic neuron selection: for each token, the gate is computed for all experts, and up and down only for the k of
 * them with the largest scores |act(gate)| * weight. In a block without a gate, up takes its place: it is computed for
 * all experts, and down for the k. Relatives are TEAL and CATS, which threshold activations; here the k largest gate
 * scores of a token are chosen. */
typedef struct {
  griffin_matrix gate;   /* (D_ff, D): the gate in another format, read in place of the block's; weight NULL: none */
  const float* weight;   /* (1 or rows, D_ff), none of them negative */
  int64_t weight_stride; /* floats from one row's to the next; 0: one for all rows */
  int64_t k;             /* 1..n_experts */
} griffin_dynamic;

/* Rows in, rows out. Types are GRIFFIN_F32 or GRIFFIN_BF16, strides the bytes from one row to the next. y is written
 * whole and never read; x and y must not overlap. */
typedef struct {
  const void* x;
  void* y;
  int64_t x_stride, y_stride;
  int32_t x_type, y_type, rows;
  int32_t index_bytes; /* 4 or 8: the type of `experts` */
  const void* experts; /* (n_experts,) each in 0..D_ff-1, or NULL: all neurons. Ignored by matvec. */
  int64_t n_experts;
  const uint16_t* row_mask;       /* (n_experts,) or NULL: bit r of entry i says that row r wants expert i */
  const griffin_dynamic* dynamic; /* or NULL: every expert is computed. Ignored by matvec. */
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
GRIFFIN_API int griffin_matvec(const griffin_matrix* matrix, const griffin_io* io, int threads);

/* -- data --------------------------------------------------------------------------------------------------------- */
/* Union of one expert set a row: experts (rows, k). Fills union_out (ascending, room for min(rows * k, d_ff)) and
 * mask_out (as long); returns the union's length, or minus a griffin_status. */
GRIFFIN_API int64_t griffin_union(const void* experts, int index_bytes, int rows, int64_t k, int64_t d_ff,
                                  int32_t* union_out, uint16_t* mask_out);
GRIFFIN_API int64_t griffin_row_bytes(int format, int64_t d);
/* Quantise n float32 rows of length d (row stride in floats) into rows of `stride` bytes. int8 also fills
 * scale[i * scale_stride_bytes]; int4 ignores it. */
GRIFFIN_API int griffin_pack(int format, const float* source, int64_t n, int64_t d, int64_t source_stride,
                             void* rows_out, int64_t stride, float* scale, int64_t scale_stride);
/* The inverse, for tests and for a prompt phase through dequantised blocks; any format. */
GRIFFIN_API int griffin_unpack(int format, const void* rows_in, int64_t n, int64_t d, int64_t stride,
                               const float* scale, int64_t scale_stride, float* out, int64_t out_stride);
/* Columns begin..end (begin a multiple of 128) of n int8 or int4 rows as bf16 or float32, rounded to nearest even, for
 * a GEMM. out_stride in values. Multi-threaded, and much faster than griffin_unpack. */
GRIFFIN_API int griffin_unpack_block(int format, const void* rows_in, int64_t n, int64_t d, int64_t stride,
                                     const float* scale, int64_t scale_stride, int64_t begin, int64_t end, void* out,
                                     int out_type, int64_t out_stride, int threads);
/* Ask for huge pages under [address, address + bytes); 0 if the system took the advice. */
GRIFFIN_API int griffin_advise_huge(void* address, int64_t bytes);
/* Bytes per second of a plain float sum over the buffer with `threads` threads: the yardstick for everything above. */
GRIFFIN_API double griffin_read_bandwidth(const void* buffer, int64_t bytes, int threads);

#ifdef __cplusplus
}
#endif
#endif
