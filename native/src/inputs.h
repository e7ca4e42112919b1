// Rows of input, prepared once a call for the weight formats that they meet, and the products of weight rows with them.
#pragma once
#include <memory>

#include "griffin_native.h"
#include "kernels.h"

namespace griffin {

constexpr int element_size(int type) { return type == GRIFFIN_F32 ? 4 : 2; }

// Whether rows are multiplied in integers.
inline bool in_integers(const griffin_matrix& m) { return m.format == GRIFFIN_GROUPED && !m.table; }

constexpr int kMaxInputs = 64;  // rows of input of a product that has more than one call's

class Inputs {
 public:
  static int64_t bytes(int d, int rows) { return round_up(rows * d_padded(d) * 14, 64); }
  Inputs(const griffin_io& io, int d, void* memory);
  // That rows of this matrix will meet the inputs.
  void meet(const griffin_matrix& matrix);
  void prepare(int thread, int threads);  // this thread's share of the rows; after a barrier they may be used
  const Input& operator[](int r) const { return input_[r]; }
  bool bf16() const { return bf16_; }  // bf16 weights meet x in bf16

 private:
  static int64_t d_padded(int d) { return round_up(d, kPad); }

  const Kernels& kernels_;
  const griffin_io& io_;
  const int d_;
  const bool bf16_;
  bool wants_f32_ = false, wants_bf16_ = false, wants_grouped_[2] = {};
  Input input_[kMaxInputs];
};

constexpr int kMany = 5;       // inputs from which on unpacked rows are kept for all of them
constexpr int kManyRows = 48;  // rows of a matrix that many inputs meet before the next

// The rows of a matrix, for products with prepared inputs.
class Rows {
 public:
  // planes: of a grouped matrix, the first that are read of every row; 0: all.
  Rows(const griffin_matrix& matrix, const Inputs& inputs, int planes = 0);
  // Of a matrix that is not grouped: out[i * n + at] = <row o[i], input rows[at]> for i < m (1 or 2), n (1..kMaxRows);
  // without the bias. `next`: rows that will be wanted soon.
  void dot(const int64_t* o, int m, const int* rows, int n, float* out, const int64_t* next) const;
  // A grouped matrix's rows at[0] .. at[m] with n input rows: out[r * stride + i], r < n. Behind them in `at` are so many
  // rows, of another matrix too, that come next.
  void dot(const RowAt* at, int m, int next, const int* rows, int n, float* out, int64_t stride) const;
  // The same for row o of two matrices: out[at] is a's product, out[n + at] b's.
  static void dot_both(const Rows& a, const Rows& b, int64_t o, const int* rows, int n, float* out, int64_t next);
  bool grouped() const { return grouped_ != nullptr; }
  RowFinder finder() const { return plan_.finder(matrix_.weight); }  // of a grouped matrix's rows
  int64_t row_bytes() const { return row_bytes_; }                   // of weights and scales
  float bias(int64_t o) const { return matrix_.bias ? matrix_.bias[o] : 0.f; }

 private:
  const uint8_t* row(int64_t o) const { return static_cast<const uint8_t*>(matrix_.weight) + o * matrix_.stride; }
  // Row o of a table format as float32, in the room's half i; it stays there until another is asked for.
  const uint8_t* unpacked(int64_t o, int i) const;

  const griffin_matrix& matrix_;
  const Inputs& inputs_;
  std::unique_ptr<float[]> room_;  // of a table format: two rows
  mutable int64_t held_[2] = {-1, -1};
  RowPlan plan_ = {};
  DotFn dot_ = nullptr;
  GroupedDotFn grouped_ = nullptr;
  int64_t row_bytes_;
};

// n values (at most 32) as int8, value = result * q, four in an int32, zero behind the last; total: their sum. NaN where a
// value is not finite, which integers cannot say.
float quantise_z(const float* z, int n, int32_t* quads, int* total);

// Bytes that one row (of a neuron-major matrix, one neuron) is, its share of the scales of a group included.
int64_t row_bytes(const griffin_matrix& matrix);

}  // namespace griffin
