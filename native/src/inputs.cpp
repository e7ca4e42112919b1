#include "inputs.h"

#include <math.h>
#include <string.h>

#include "unpack.h"

namespace griffin {

Inputs::Inputs(const griffin_io& io, int d, void* memory)
    : kernels_(kernels()), io_(io), d_(d), bf16_(io.x_type == GRIFFIN_BF16 && kernels_.dot_bf16) {
  const int64_t pad = d_padded(d);
  char* at = static_cast<char*>(memory);
  for (int r = 0; r < io.rows; r++) {
    Input& in = input_[r];
    in.f32 = reinterpret_cast<float*>(at), at += 4 * pad;
    in.bf16 = reinterpret_cast<uint16_t*>(at), at += 2 * pad;
    for (int i = 0; i < 2; i++) {
      const int64_t groups = pad / (i ? 32 : 16);
      in.grouped[i].q = reinterpret_cast<int8_t*>(at), at += 2 * pad;
      in.grouped[i].scale = reinterpret_cast<float*>(at), at += 4 * groups;
      in.grouped[i].sum = reinterpret_cast<float*>(at), at += 4 * groups;
      in.grouped[i].high_sum = reinterpret_cast<float*>(at), at += 4 * groups;
      in.grouped[i].high = in.grouped[i].q;
      if (kernels_.grouped->high_apart) in.grouped[i].high = reinterpret_cast<int8_t*>(at), at += pad;
    }
  }
}

void Inputs::meet(const griffin_matrix& matrix) {
  if (in_integers(matrix))
    wants_grouped_[matrix.grouped.group == 32] = true;
  else if (matrix.format == GRIFFIN_BF16 && bf16_)
    wants_bf16_ = true;
  else
    wants_f32_ = true;
}

void Inputs::prepare(int thread, int threads) {
  const int64_t pad = d_padded(d_);
  for (int r = thread; r < io_.rows; r += threads) {
    const Input& in = input_[r];
    const char* x = static_cast<const char*>(io_.x) + r * io_.x_stride;
    if (wants_bf16_) {
      uint16_t* const to = const_cast<uint16_t*>(in.bf16);
      memcpy(to, x, sizeof(uint16_t) * d_);
      memset(to + d_, 0, sizeof(uint16_t) * (pad - d_));
    }
    if (!wants_f32_ && !wants_grouped_[0] && !wants_grouped_[1]) continue;
    float* const row = const_cast<float*>(in.f32);
    if (io_.x_type == GRIFFIN_BF16)
      kernels_.widen(reinterpret_cast<const uint16_t*>(x), row, d_);
    else
      memcpy(row, x, sizeof(float) * d_);
    memset(row + d_, 0, sizeof(float) * (pad - d_));
    for (int i = 0; i < 2; i++) {
      const GroupedInput& to = in.grouped[i];
      const int group = i ? 32 : 16;
      if (wants_grouped_[i]) kernels_.grouped->quantise(row, static_cast<int>(round_up(d_, group)), group, to);
    }
  }
}

Rows::Rows(const griffin_matrix& matrix, const Inputs& inputs, int planes)
    : matrix_(matrix), inputs_(inputs), row_bytes_(griffin::row_bytes(matrix)) {
  const Kernels& set = kernels();
  const bool wide = matrix.grouped.group == 32;
  if (in_integers(matrix))
    plan_ = first_planes(row_plan(matrix.grouped, matrix.d_in), planes ? planes : plane_count(matrix.grouped.bits)),
    row_bytes_ = plan_.bytes,
    grouped_ = plan_.left ? set.grouped->dot_first[wide][plan_.format.bits - 2]
                          : set.grouped->dot[wide][plan_.format.bits - 2];
  else if (matrix.format == GRIFFIN_GROUPED)
    dot_ = set.dot[GRIFFIN_F32], room_.reset(new float[2 * round_up(matrix.d_in, kPad)]);
  else
    dot_ = matrix.format == GRIFFIN_BF16 && inputs.bf16() ? set.dot_bf16 : set.dot[matrix.format];
}

const uint8_t* Rows::unpacked(int64_t o, int i) const {
  float* const to = room_.get() + i * round_up(matrix_.d_in, kPad);
  if (held_[i] != o) unpack_row(matrix_, o, to), held_[i] = o;
  return reinterpret_cast<const uint8_t*>(to);
}

void Rows::dot(const int64_t* o, int m, const int* rows, int n, float* out, const int64_t* next) const {
  const Input* x[kMaxRows];
  for (int i = 0; i < n; i++) x[i] = &inputs_[rows[i]];
  const uint8_t *w[2], *ahead[2];
  for (int i = 0; i < m; i++) w[i] = room_ ? unpacked(o[i], i) : row(o[i]), ahead[i] = room_ ? w[i] : row(next[i]);
  dot_(w, m, x, n, matrix_.d_in, out, ahead);
}

void Rows::dot(const RowAt* at, int m, int next, const int* rows, int n, float* out, int64_t stride) const {
  const bool wide = matrix_.grouped.group == 32;
  const GroupedInput* x[kManyInputs];
  for (int i = 0; i < n; i++) x[i] = &inputs_[rows[i]].grouped[wide];
  if (n < kMany || m == 1 || plan_.left) {
    grouped_(plan_, at, m, next, x, n, out, stride);
    return;
  }
  const GroupedKernels& set = *kernels().grouped;
  const auto many = set.rows[wide][matrix_.grouped.bits - 2];
  for (int i = 0; i < m; i += set.tile) {
    const int after = m + next - i - set.tile;
    many(plan_, at + i, m - i < set.tile ? m - i : set.tile, x, n, out + i, stride, at + i + set.tile,
         after < 0          ? 0
         : after < set.tile ? after
                            : set.tile);
  }
}

void Rows::dot_both(const Rows& a, const Rows& b, int64_t o, const int* rows, int n, float* out, int64_t next) {
  if (a.room_ || b.room_ || a.dot_ != b.dot_) {
    a.dot(&o, 1, rows, n, out, &next), b.dot(&o, 1, rows, n, out + n, &next);
    return;
  }
  const Input* x[kMaxRows];  // one pass over the inputs for both
  for (int i = 0; i < n; i++) x[i] = &a.inputs_[rows[i]];
  const uint8_t *const w[2] = {a.row(o), b.row(o)}, *const ahead[2] = {a.row(next), b.row(next)};
  a.dot_(w, 2, x, n, a.matrix_.d_in, out, ahead);
}

float quantise_z(const float* z, int n, int32_t* quads, int* total) {
  float largest = 0, poison = 0;
  for (int i = 0; i < n; i++) largest = fmaxf(largest, fabsf(z[i])), poison += z[i] * 0.f;
  const float inverse = largest > 1e-30f && poison == 0.f ? 127.f / largest : 0.f;
  int8_t q[32] = {};
  *total = 0;
  for (int i = 0; i < n; i++) {
    const int value = static_cast<int>(lrintf(z[i] * inverse));
    q[i] = static_cast<int8_t>(value), *total += value;
  }
  memcpy(quads, q, static_cast<size_t>((n + 3) / 4 * 4));
  return largest / 127.f + poison;
}

int64_t row_bytes(const griffin_matrix& matrix) {
  if (matrix.format != GRIFFIN_GROUPED) {
    const int64_t values = matrix.neuron_major ? matrix.d_out : matrix.d_in;
    return values * element_size(matrix.format);
  }
  if (!matrix.neuron_major) return row_plan(matrix.grouped, matrix.d_in).bytes;
  return neuron_plan(matrix.grouped, matrix.d_out, matrix.d_in).bytes;
}

}  // namespace griffin
