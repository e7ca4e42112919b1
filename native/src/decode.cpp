// A whole generation step in one parallel region. The matrices, the cache and the experts are shared out. What is only
// a vector long (the residual stream, in float32, its norms, and the inputs prepared from them) every thread computes
// for itself: that is cheaper than waiting for another to have done it, so six barriers a layer are enough (seven with
// dynamic selection).
#include "griffin_decode.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "attend.h"
#include "checks.h"
#include "half.h"
#include "parallel.h"
#include "parts.h"
#include "unpack.h"

namespace griffin {
namespace {

constexpr int kMaxHeadSize = 512;

void normalise(const griffin_norm& norm, const float* x, float* y, int n) {
  if (!norm.weight) {
    if (x != y) memcpy(y, x, sizeof(float) * n);
    return;
  }
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int i = 0; i < n; i++) squares += x[i] * x[i];
  const float scale = 1.f / sqrtf(squares / n + norm.eps);
#pragma omp simd
  for (int i = 0; i < n; i++) y[i] = x[i] * scale * norm.weight[i];
}

void rotate(const float* cosines, const float* sines, float* head, int rotary) {
  const int half = rotary / 2;
  for (int i = 0; i < half; i++) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosines[i] - b * sines[i];
    head[i + half] = b * cosines[i] + a * sines[i];
  }
}

int longest(const griffin_cache& cache, int rows) { return *std::max_element(cache.length, cache.length + rows); }

// In floats; all but `inputs` rounded up to 16, a cache line.
struct Sizes {
  int64_t d, q, kv, partial, scores, inputs, accumulator, dynamic = 0;
  Sizes(const griffin_decoder& m, const griffin_experts* experts, int rows, int length, int threads) {
    const int heads = m.heads * m.head_size;
    d = round_up(static_cast<int64_t>(rows) * m.d_model, 16);
    q = round_up(static_cast<int64_t>(rows) * heads, 16);
    kv = round_up(static_cast<int64_t>(rows) * m.kv_heads * m.head_size, 16);
    partial = round_up(static_cast<int64_t>(rows) * m.heads * (m.head_size + 2), 16);
    scores = round_up(static_cast<int64_t>(m.heads / m.kv_heads) * (length + 1), 16);
    inputs = Inputs::bytes(m.d_model > heads ? m.d_model : heads, rows) / 4;
    accumulator = ff_accumulator(m.d_model, rows);
    for (int l = 0; experts && l < m.n_layers; l++) {
      if (!experts[l].dynamic) continue;
      griffin_io own = {};
      own.experts = experts[l].experts, own.n_experts = experts[l].n_experts, own.rows = rows;
      dynamic = std::max(dynamic, round_up(Dynamic::floats(m.layers[l].ff, own, threads), 16));
    }
  }
  int64_t shared() const { return d + q + 2 * kv + dynamic; }
  int64_t own() const { return inputs + accumulator + 2 * d + q + partial + scores; }
};

class Step {
 public:
  Step(const griffin_decoder& m, const griffin_cache& cache, const griffin_experts* experts, const int64_t* tokens,
       int rows, float* logits, int threads, char* memory)
      : m_(m), cache_(cache), experts_(experts), tokens_(tokens), rows_(rows), logits_(logits),
        sizes_(m, experts, rows, longest(cache, rows), threads) {
    attend_ = attend_portable;
#if defined(GRIFFIN_X86)
    const char* const isa = kernels().name;
    if (!strncmp(isa, "avx512", 6)) attend_ = attend_avx512;
    if (!strcmp(isa, "avx2")) attend_ = attend_avx2;
#endif
    float* next = reinterpret_cast<float*>(memory);
    const auto take = [&next](int64_t floats) { return std::exchange(next, next + floats); };
    accumulators_ = take(sizes_.accumulator * threads);
    dynamic_ = take(sizes_.dynamic), y_ = take(sizes_.d), q_ = take(sizes_.q), k_ = take(sizes_.kv),
    v_ = take(sizes_.kv);
    partial_ = take(sizes_.partial * threads), scores_ = take(sizes_.scores * threads);
    own_ = next;
  }

  static int64_t bytes(const griffin_decoder& m, const griffin_experts* experts, int rows, int length, int threads) {
    const Sizes sizes(m, experts, rows, length, threads);
    return 4 * (sizes.shared() + threads * sizes.own());
  }

  void run(int thread, int threads) {
    float* const inputs = own_ + thread * (sizes_.inputs + 2 * sizes_.d + sizes_.q);
    float *const x = inputs + sizes_.inputs, *const h = x + sizes_.d, *const attended = h + sizes_.d;
    const int heads = m_.heads * m_.head_size, kv_heads = m_.kv_heads * m_.head_size;
    embed(x);
    for (int l = 0; l < m_.n_layers; l++) {
      const griffin_layer& layer = m_.layers[l];
      norm_rows(layer.attention, x, h);
      multiply({to(layer.q, q_, heads), to(layer.k, k_, kv_heads), to(layer.v, v_, kv_heads)}, h, inputs, thread,
               threads);
      barrier_.wait(threads);
      position_and_store(layer, l, thread, threads);
      barrier_.wait(threads);
      attend(layer, l, thread, threads);
      barrier_.wait(threads);
      merge(attended, threads);
      multiply({to(layer.o, y_, m_.d_model)}, attended, inputs, thread, threads);
      barrier_.wait(threads);
      add(layer.after_attention, x, h);
      norm_rows(layer.feedforward, x, h);
      feedforward(layer, l, h, inputs, thread, threads);
      barrier_.wait(threads);
      add(layer.after_feedforward, x, h);
    }
    norm_rows(m_.final, x, h);
    multiply({to(m_.head, logits_, m_.vocabulary)}, h, inputs, thread, threads);
    if (m_.logits_scale == 1.f && m_.logits_softcap <= 0) return;
    barrier_.wait(threads);
    finish(thread, threads);
  }

 private:
  void embed(float* to) const {
    for (int r = 0; r < rows_; r++) {
      float* const x = to + static_cast<int64_t>(r) * m_.d_model;
      unpack_row(m_.embedding, tokens_[r], x);
      for (int i = 0; i < m_.d_model; i++) x[i] *= m_.embedding_scale;
    }
  }

  void norm_rows(const griffin_norm& norm, const float* x, float* y) const {
    for (int r = 0; r < rows_; r++) {
      const int64_t at = static_cast<int64_t>(r) * m_.d_model;
      normalise(norm, x + at, y + at, m_.d_model);
    }
  }

  static Product to(const griffin_matrix& matrix, float* y, int64_t n_out) { return {&matrix, y, n_out * 4, false}; }

  griffin_io io(const float* x, int64_t n_in) const {
    griffin_io io = {};
    io.x = x, io.x_stride = n_in * 4, io.x_type = GRIFFIN_F32, io.rows = rows_;
    io.y = y_, io.y_stride = m_.d_model * int64_t{4}, io.y_type = GRIFFIN_F32;
    return io;
  }

  void multiply(std::initializer_list<Product> products, const float* x, float* memory, int thread, int threads) const {
    const griffin_matrix& first = *products.begin()->matrix;
    const griffin_io own = io(x, first.d_in);
    Inputs inputs(own, first.d_in, memory);
    for (const Product& product : products) inputs.meet(*product.matrix);
    inputs.prepare(0, 1);
    multiply_part(products.begin(), static_cast<int>(products.size()), inputs, rows_, thread, threads);
  }

  void feedforward(const griffin_layer& layer, int l, const float* x, float* memory, int thread, int threads) {
    griffin_io own = io(x, m_.d_model);
    if (experts_) {
      own.experts = experts_[l].experts, own.n_experts = experts_[l].n_experts;
      own.row_mask = experts_[l].row_mask, own.index_bytes = experts_[l].index_bytes, own.dynamic = experts_[l].dynamic;
      own.compact = experts_[l].compact;
    }
    Inputs inputs(own, m_.d_model, memory);
    ff_meet(layer.ff, own, inputs);
    inputs.prepare(0, 1);
    Chosen chosen;
    if (own.dynamic) {
      Dynamic dynamic(layer.ff, own, dynamic_);
      dynamic.gate(inputs, thread, threads);
      barrier_.wait(threads);
      chosen = dynamic.choose(thread);
    }
    ff_accumulate(layer.ff, own, inputs, own.dynamic ? &chosen : nullptr, accumulators_, thread, threads);
    barrier_.wait(threads);
    ff_reduce(layer.ff, own, accumulators_, thread, threads);
  }

  // x += norm(y) * residual_scale, by way of `room`.
  void add(const griffin_norm& after, float* to, float* room) const {
    norm_rows(after, y_, room);
    const int64_t count = static_cast<int64_t>(rows_) * m_.d_model;
    for (int64_t i = 0; i < count; i++) to[i] += room[i] * m_.residual_scale;
  }

  int start(int r) const { return cache_.start ? cache_.start[r] : 0; }

  char* cached(void* const* base, int l, int r, int head, int token) const {
    const int64_t element = cache_.type == GRIFFIN_F32 ? 4 : 2;
    return static_cast<char*>(base[l * rows_ + r]) + head * cache_.head_stride[r] + token * element * m_.head_size;
  }

  // Norm and rotate q and k, scale q, and write k and v behind the cached tokens: this thread's share of the heads.
  void position_and_store(const griffin_layer& layer, int l, int thread, int threads) const {
    const int size = m_.head_size, q_begin = m_.heads * thread / threads, q_end = m_.heads * (thread + 1) / threads;
    const int kv_begin = m_.kv_heads * thread / threads, kv_end = m_.kv_heads * (thread + 1) / threads;
    for (int r = 0; r < rows_; r++) {
      const int length = cache_.length[r];
      const int64_t position = length - start(r);
      const float *cosines = nullptr, *sines = nullptr;
      if (layer.rope >= 0) {
        cosines = m_.cosines[layer.rope] + position * (m_.rotary / 2);
        sines = m_.sines[layer.rope] + position * (m_.rotary / 2);
      }
      for (int h = q_begin; h < q_end; h++) {
        float* const q = q_ + (static_cast<int64_t>(r) * m_.heads + h) * size;
        normalise(layer.query, q, q, size);
        if (cosines) rotate(cosines, sines, q, m_.rotary);
        for (int i = 0; i < size; i++) q[i] *= m_.attention_scale;
      }
      for (int h = kv_begin; h < kv_end; h++) {
        float* const k = k_ + (static_cast<int64_t>(r) * m_.kv_heads + h) * size;
        normalise(layer.key, k, k, size);
        if (cosines) rotate(cosines, sines, k, m_.rotary);
        store(k, cached(cache_.keys, l, r, h, length));
        store(v_ + (static_cast<int64_t>(r) * m_.kv_heads + h) * size, cached(cache_.values, l, r, h, length));
      }
    }
  }

  void store(const float* from, char* to) const {
    if (cache_.type == GRIFFIN_F32) {
      memcpy(to, from, sizeof(float) * m_.head_size);
    } else {
      for (int i = 0; i < m_.head_size; i++) reinterpret_cast<uint16_t*>(to)[i] = float_to_bf16(from[i]);
    }
  }

  float* partial(int thread, int r, int head) const {
    return partial_ + thread * sizes_.partial + (static_cast<int64_t>(r) * m_.heads + head) * m_.head_size;
  }
  float* partial_max(int thread, int r, int head) const {
    return partial_ + thread * sizes_.partial + static_cast<int64_t>(rows_) * m_.heads * m_.head_size + r * m_.heads +
           head;
  }
  float* partial_sum(int thread, int r, int head) const { return partial_max(thread, r, head) + rows_ * m_.heads; }

  // Each thread takes a share of every row's tokens, so that the work is even however few the heads are.
  void attend(const griffin_layer& layer, int l, int thread, int threads) {
    const int group = m_.heads / m_.kv_heads;
    for (int r = 0; r < rows_; r++) {
      const int end = cache_.length[r] + 1;
      int begin = start(r);
      if (layer.window > 0 && end - layer.window > begin) begin = end - layer.window;
      const int from = begin + static_cast<int>(static_cast<int64_t>(end - begin) * thread / threads);
      const int to = begin + static_cast<int>(static_cast<int64_t>(end - begin) * (thread + 1) / threads);
      for (int h = 0; h < m_.kv_heads; h++) {
        Attend part;
        part.q = q_ + (static_cast<int64_t>(r) * m_.heads + h * group) * m_.head_size;
        part.k = cached(cache_.keys, l, r, h, from), part.v = cached(cache_.values, l, r, h, from);
        part.heads = group, part.size = m_.head_size, part.count = to - from;
        part.softcap = m_.attention_softcap;
        part.scores = scores_ + thread * sizes_.scores;
        part.out = partial(thread, r, h * group);
        part.max = partial_max(thread, r, h * group), part.sum = partial_sum(thread, r, h * group);
        attend_(part, cache_.type != GRIFFIN_F32);
      }
    }
  }

  void merge(float* attended, int threads) const {
    for (int r = 0; r < rows_; r++) {
      for (int h = 0; h < m_.heads; h++) {
        float max = -INFINITY, sum = 0;
        for (int t = 0; t < threads; t++) max = fmaxf(max, *partial_max(t, r, h));
        float* const out = attended + (static_cast<int64_t>(r) * m_.heads + h) * m_.head_size;
        memset(out, 0, sizeof(float) * m_.head_size);
        for (int t = 0; t < threads; t++) {
          const float weight = expf(*partial_max(t, r, h) - max);  // 0 for a thread without tokens
          sum += weight * *partial_sum(t, r, h);
          const float* const own = partial(t, r, h);
          for (int i = 0; i < m_.head_size; i++) out[i] += weight * own[i];
        }
        for (int i = 0; i < m_.head_size; i++) out[i] /= sum;
      }
    }
  }

  void finish(int thread, int threads) {
    const int64_t count = static_cast<int64_t>(rows_) * m_.vocabulary;
    for (int64_t i = count * thread / threads; i < count * (thread + 1) / threads; i++) {
      logits_[i] *= m_.logits_scale;
      if (m_.logits_softcap > 0) logits_[i] = m_.logits_softcap * tanhf(logits_[i] / m_.logits_softcap);
    }
  }

  const griffin_decoder& m_;
  const griffin_cache& cache_;
  const griffin_experts* const experts_;
  const int64_t* const tokens_;
  const int rows_;
  float* const logits_;
  const Sizes sizes_;
  AttendFn attend_;
  Barrier barrier_;
  float *accumulators_, *dynamic_, *y_, *q_, *k_, *v_, *partial_, *scores_;
  float* own_;  // of each thread in turn: prepared inputs, residual stream, its norm, attended values
};

bool has_shape(const griffin_matrix& matrix, int64_t d_out, int64_t d_in) {
  return valid_rows(matrix) && matrix.d_out == d_out && matrix.d_in == d_in;
}

bool valid(const griffin_decoder& m, const griffin_layer& layer) {
  const int64_t heads = int64_t{m.heads} * m.head_size, kv_heads = int64_t{m.kv_heads} * m.head_size;
  if (!has_shape(layer.q, heads, m.d_model) || !has_shape(layer.o, m.d_model, heads)) return false;
  if (!has_shape(layer.k, kv_heads, m.d_model) || !has_shape(layer.v, kv_heads, m.d_model)) return false;
  if (!valid_block(layer.ff) || layer.ff.up.d_in != m.d_model) return false;
  return layer.rope < 0 || (layer.rope < 2 && m.cosines[layer.rope] && m.sines[layer.rope]);
}

bool valid(const griffin_decoder& m, const griffin_cache& cache, const griffin_experts* experts, const int64_t* tokens,
           int rows) {
  if (rows < 1 || rows > GRIFFIN_MAX_ROWS || m.n_layers < 1 || m.d_model < 1 || m.heads < 1 || m.kv_heads < 1)
    return false;
  if (m.heads % m.kv_heads || m.head_size < 1 || m.head_size > kMaxHeadSize) return false;
  if (m.rotary < 0 || m.rotary % 2 || m.rotary > m.head_size) return false;
  if (!m.layers || !cache.keys || !cache.values || !cache.head_stride || !cache.length) return false;
  if (cache.type != GRIFFIN_F32 && cache.type != GRIFFIN_BF16) return false;
  if (!has_shape(m.head, m.vocabulary, m.d_model) || !has_shape(m.embedding, m.vocabulary, m.d_model)) return false;
  bool rope = false;
  for (int l = 0; l < m.n_layers; l++) {
    const griffin_layer& layer = m.layers[l];
    if (!valid(m, layer)) return false;
    rope |= layer.rope >= 0;
    if (!experts) continue;
    if (!valid_experts(experts[l])) return false;
    if (experts[l].dynamic && !valid_dynamic(layer.ff, *experts[l].dynamic)) return false;
    if (experts[l].compact && !valid_compact(layer.ff, experts[l])) return false;
  }
  for (int r = 0; r < rows; r++) {
    const int start = cache.start ? cache.start[r] : 0;
    if (start < 0 || cache.length[r] < start || tokens[r] < 0 || tokens[r] >= m.vocabulary) return false;
    if (rope && cache.length[r] - start >= m.positions) return false;  // the rotary tables are too short
  }
  for (int64_t i = 0; i < int64_t{m.n_layers} * rows; i++)
    if (!cache.keys[i] || !cache.values[i]) return false;
  return true;
}

}  // namespace
}  // namespace griffin

extern "C" int griffin_decode(const griffin_decoder* decoder, const griffin_cache* cache,
                              const griffin_experts* experts, const int64_t* tokens, int rows, float* logits,
                              int threads) {
  using namespace griffin;
  if (!decoder || !cache || !tokens || !logits || !valid(*decoder, *cache, experts, tokens, rows))
    return GRIFFIN_BAD_ARGUMENT;
  // The team may turn out smaller than asked for; never larger.
  threads = threads < 1 ? 1 : threads;
  char* const memory =
      static_cast<char*>(scratch(Step::bytes(*decoder, experts, rows, longest(*cache, rows), threads)));
  if (!memory) return GRIFFIN_NO_MEMORY;
  Step step(*decoder, *cache, experts, tokens, rows, logits, threads, memory);
  parallel(threads, [](void* data, int thread, int team) { static_cast<Step*>(data)->run(thread, team); }, &step);
  count_call();
  return GRIFFIN_OK;
}
