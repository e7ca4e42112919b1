// y = W x + b: each thread takes a contiguous share of W's rows.
#include <string.h>

#include <memory>

#include "checks.h"
#include "parallel.h"
#include "parts.h"
#include "unpack.h"

namespace griffin {
namespace {

constexpr int kFloatsAhead = 2;  // rows of W to the one that is prefetched, of floats

void store(void* y, bool bf16, int64_t at, float value) {
  if (!bf16) {
    static_cast<float*>(y)[at] = value;
    return;
  }
  kernels().reduce(&value, 0, 1, nullptr, static_cast<uint16_t*>(y) + at, true, 1);
}

struct Call {
  const griffin_matrix* matrix;
  const griffin_io* io;
  Inputs inputs;
  Barrier barrier;
};

// Rows begin..end of one matrix, two at a time.
void multiply_floats(const Product& product, const Rows& w, int rows, int64_t begin, int64_t end) {
  int all[kMaxInputs];
  for (int r = 0; r < rows; r++) all[r] = r;
  for (int64_t o = begin; o < end; o += 2) {
    const int m = end - o >= 2 ? 2 : 1;
    const int64_t ahead = o + kFloatsAhead + 2 <= end ? o + kFloatsAhead : o;
    const int64_t own[2] = {o, o + m - 1}, next[2] = {ahead, ahead + m - 1};
    for (int first = 0; first < rows; first += kMaxRows) {  // inputs beyond the first ones find the rows in the cache
      const int n = rows - first < kMaxRows ? rows - first : kMaxRows;
      float out[2 * kMaxRows];
      w.dot(own, m, all + first, n, out, next);
      for (int i = 0; i < m; i++)
        for (int r = 0; r < n; r++)
          store(static_cast<char*>(product.y) + (first + r) * product.y_stride, product.bf16, o + i,
                out[i * n + r] + w.bias(o + i));
    }
  }
}

// The same for a grouped matrix: a block of its rows stays in the second-level cache for all inputs.
void multiply_grouped(const Product& product, const Rows& w, int rows, int64_t begin, int64_t end) {
  float out[kManyInputs * kManyRows];
  RowAt at[kManyRows + kRowsAhead];
  int all[kMaxInputs];
  for (int r = 0; r < rows; r++) all[r] = r;
  const float* const bias = product.matrix->bias;
  RowFinder find = w.finder();
  int held = 0;  // of `at`
  for (int64_t from = begin; from < end; from += kManyRows) {
    const int m = static_cast<int>(end - from < kManyRows ? end - from : kManyRows);
    const int next = static_cast<int>(end - from - m < kRowsAhead ? end - from - m : kRowsAhead);
    for (int i = held; i < m + next; i++) at[i] = find(from + i);
    for (int first = 0; first < rows; first += kManyInputs) {
      const int n = rows - first < kManyInputs ? rows - first : kManyInputs;
      w.dot(at, m, first ? 0 : next, all + first, n, out, kManyRows);
      for (int r = 0; r < n; r++) {
        char* const y = static_cast<char*>(product.y) + (first + r) * product.y_stride;
        kernels().reduce(out + r * kManyRows, 0, 1, bias ? bias + from : nullptr, y + from * (product.bf16 ? 2 : 4),
                         product.bf16, m);
      }
    }
    memmove(at, at + m, sizeof(RowAt) * static_cast<size_t>(next));
    held = next;
  }
}

void multiply(const Product& product, const Inputs& x, int rows, int64_t begin, int64_t end) {
  const Rows w(*product.matrix, x);
  (w.grouped() ? multiply_grouped : multiply_floats)(product, w, rows, begin, end);
}

}  // namespace

void multiply_part(const Product* products, int count, const Inputs& x, int rows, int thread, int threads) {
  // Shares begin at multiples of 32 rows, so that no two threads write to one cache line of y.
  int64_t blocks = 0;
  for (int i = 0; i < count; i++) blocks += round_up(products[i].matrix->d_out, 32) / 32;
  const int64_t begin = blocks * thread / threads * 32, end = blocks * (thread + 1) / threads * 32;
  int64_t at = 0;  // of this matrix's first row in all
  for (int i = 0; i < count; i++) {
    const int64_t d_out = products[i].matrix->d_out;
    const int64_t from = begin > at ? begin - at : 0, to = end - at < d_out ? end - at : d_out;
    if (from < to) multiply(products[i], x, rows, from, to);
    at += round_up(d_out, 32);
  }
}

}  // namespace griffin

namespace griffin {
namespace {

// y = W_2 z over all neurons: rows of z in integers, in groups of neurons, each thread its own columns.
class NeuronProduct {
 public:
  static int64_t bytes(const griffin_matrix& m, int rows) {
    const NeuronPlan p = neuron_plan(m.grouped, m.d_out, m.d_in);
    return rows * (int64_t{p.groups} * (4 + 4 + kGroupQuads * 4) + p.d * 4) + 64;
  }
  NeuronProduct(const griffin_matrix& m, const griffin_io& io, void* memory)
      : m_(m), io_(io), plan_(neuron_plan(m.grouped, m.d_out, m.d_in)) {
    y_ = static_cast<float*>(memory);
    factor_ = y_ + int64_t{io.rows} * plan_.d;
    total_ = reinterpret_cast<int32_t*>(factor_ + int64_t{io.rows} * plan_.groups);
    quads_ = total_ + int64_t{io.rows} * plan_.groups;
  }

  // This thread's share of the rows; a barrier, then `multiply`.
  void prepare(int thread, int threads) {
    if (m_.table) return;
    const int group = m_.grouped.group;
    for (int r = thread; r < io_.rows; r += threads) {
      const char* const z = static_cast<const char*>(io_.x) + r * io_.x_stride;
      for (int g = 0; g < plan_.groups; g++) {
        const int begin = g * group, n = m_.d_in - begin < group ? m_.d_in - begin : group;
        float own[32];
        if (io_.x_type == GRIFFIN_BF16)
          kernels().widen(reinterpret_cast<const uint16_t*>(z) + begin, own, n);
        else
          memcpy(own, reinterpret_cast<const float*>(z) + begin, sizeof(float) * n);
        const int64_t at = int64_t{r} * plan_.groups + g;
        if (n < group) memset(quads_ + at * kGroupQuads, 0, sizeof(int32_t) * kGroupQuads);
        factor_[at] = quantise_z(own, n, quads_ + at * kGroupQuads, total_ + at);
      }
    }
  }

  void multiply(int thread, int threads) {
    const int chunks = (plan_.d + 255) / 256;
    const int begin = chunks * thread / threads * 256;
    int end = chunks * (thread + 1) / threads * 256;
    if (end > plan_.d) end = plan_.d;
    if (begin >= end) return;
    for (int r = 0; r < io_.rows; r++) memset(y_ + int64_t{r} * plan_.d + begin, 0, sizeof(float) * (end - begin));
    if (m_.table)
      add_unpacked(begin, end < m_.d_out ? end : m_.d_out);
    else
      add_groups(begin, end);
    const int stop = end < m_.d_out ? end : m_.d_out;
    for (int r = 0; r < io_.rows; r++)
      kernels().reduce(y_ + int64_t{r} * plan_.d + begin, 0, 1, m_.bias ? m_.bias + begin : nullptr,
                       static_cast<char*>(io_.y) + r * io_.y_stride + begin * element_size(io_.y_type),
                       io_.y_type == GRIFFIN_BF16, stop - begin);
  }

 private:
  void add_groups(int begin, int end) {
    constexpr int kGroups = 8;  // at a time
    const int group = m_.grouped.group, quads = group / 4;
    const GroupedKernels& set = *kernels().grouped;
    const uint8_t* const scales = static_cast<const uint8_t*>(m_.scales);
    RowFinder find = plan_.finder(m_.weight);
    for (int from = 0; from < plan_.groups; from += kGroups) {
      const int count = plan_.groups - from < kGroups ? plan_.groups - from : kGroups;
      const uint8_t* rows[kMaxPlanes][kGroups * 32];
      for (int j = 0; j < count * group; j++) {
        const RowAt row = find(int64_t{from} * group + j);  // behind the last neuron z is zero
        for (int i = 0; i < plan_.planes; i++) rows[i][j] = row.part[i];
      }
      if (io_.rows > 1) {
        const ManyZ z{io_.rows,
                      quads_ + int64_t{from} * kGroupQuads,
                      int64_t{plan_.groups} * kGroupQuads,
                      total_ + from,
                      factor_ + from,
                      plan_.groups,
                      y_,
                      plan_.d};
        set.down_many[m_.grouped.bits - 2](
            plan_, GroupsOfNeurons{scales, from, count, quads, rows[0], kGroups * 32, {}}, begin, end, z);
        continue;
      }
      for (int g = 0; g < count; g++) {
        const int at = from + g;
        const GroupOfNeurons of{
            scales,      at, quads, total_[at], 0, rows[0] + g * group, kGroups * 32, quads_ + at * kGroupQuads,
            factor_[at], {}};
        set.down[m_.grouped.bits - 2](plan_, of, begin, end, y_);
      }
    }
  }

  // A table format: a few neurons' columns at a time as float32.
  void add_unpacked(int begin, int end) {
    constexpr int kNeurons = 8;
    const int width = end - begin;
    const std::unique_ptr<float[]> room(new float[kNeurons * round_up(width, kPad)]);
    for (int first = 0; first < m_.d_in; first += kNeurons) {
      const int n = m_.d_in - first < kNeurons ? m_.d_in - first : kNeurons;
      const uint8_t* w[kNeurons];
      for (int j = 0; j < n; j++) {
        float* const to = room.get() + j * round_up(width, kPad);
        unpack_row(m_, first + j, begin, end, to);
        w[j] = reinterpret_cast<const uint8_t*>(to);
      }
      for (int r = 0; r < io_.rows; r++) {
        const char* const z = static_cast<const char*>(io_.x) + r * io_.x_stride;
        float own[kNeurons];
        if (io_.x_type == GRIFFIN_BF16)
          kernels().widen(reinterpret_cast<const uint16_t*>(z) + first, own, n);
        else
          memcpy(own, reinterpret_cast<const float*>(z) + first, sizeof(float) * n);
        kernels().axpy[GRIFFIN_F32](y_ + int64_t{r} * plan_.d + begin, w, own, n, width, 0, width, nullptr, 0);
      }
    }
  }

  const griffin_matrix& m_;
  const griffin_io& io_;
  const NeuronPlan plan_;
  float *y_, *factor_;
  int32_t *total_, *quads_;
};

int neuron_product(const griffin_matrix& matrix, const griffin_io& io, int threads) {
  void* const memory = scratch(NeuronProduct::bytes(matrix, io.rows));
  if (!memory) return GRIFFIN_NO_MEMORY;
  struct Of {
    NeuronProduct product;
    Barrier barrier;
  } call{NeuronProduct(matrix, io, memory), {}};
  parallel(
      threads,
      [](void* data, int thread, int team) {
        Of& c = *static_cast<Of*>(data);
        c.product.prepare(thread, team);
        c.barrier.wait(team);
        c.product.multiply(thread, team);
      },
      &call);
  return GRIFFIN_OK;
}

int row_product(const griffin_matrix& matrix, const griffin_io& io, int threads) {
  void* const memory = scratch(Inputs::bytes(matrix.d_in, io.rows));
  if (!memory) return GRIFFIN_NO_MEMORY;
  Call call{&matrix, &io, Inputs(io, matrix.d_in, memory), {}};
  call.inputs.meet(matrix);
  parallel(
      threads,
      [](void* data, int thread, int team) {
        Call& c = *static_cast<Call*>(data);
        c.inputs.prepare(thread, team);
        c.barrier.wait(team);
        const Product product{c.matrix, c.io->y, c.io->y_stride, c.io->y_type == GRIFFIN_BF16};
        multiply_part(&product, 1, c.inputs, c.io->rows, thread, team);
      },
      &call);
  return GRIFFIN_OK;
}

}  // namespace
}  // namespace griffin

using namespace griffin;

extern "C" int griffin_matvec(const griffin_matrix* matrix, const griffin_io* io, int threads) {
  if (!matrix || !io || threads < 1 || !valid_matrix(*matrix)) return GRIFFIN_BAD_ARGUMENT;
  const bool grouped = matrix->format == GRIFFIN_GROUPED;
  griffin_io tile = *io;
  if (grouped && io->rows > kMaxInputs) tile.rows = kMaxInputs;
  if (!valid_io(tile, grouped ? kMaxInputs : GRIFFIN_MAX_ROWS) || (matrix->neuron_major && !grouped))
    return GRIFFIN_BAD_ARGUMENT;
  for (int first = 0; first < io->rows; first += tile.rows) {
    tile.x = static_cast<const char*>(io->x) + first * io->x_stride;
    tile.y = static_cast<char*>(io->y) + first * io->y_stride;
    tile.rows = io->rows - first < kMaxInputs ? io->rows - first : kMaxInputs;
    const int status = (matrix->neuron_major ? neuron_product : row_product)(*matrix, tile, threads);
    if (status != GRIFFIN_OK) return status;
  }
  count_call();
  return GRIFFIN_OK;
}
