// Float weights as codes, scales and offsets of a grouped format.
#include <math.h>
#include <string.h>

#include <algorithm>

#include "griffin_gguf.h"
#include "grouped.h"
#include "half.h"
#include "parallel.h"

namespace griffin {
namespace {

// n weights with a symmetric scale: the largest magnitude, rounded to float16, divided by the largest code.
uint16_t symmetric(const float* w, int n, int zero, uint8_t* codes) {
  float top = 0;
  for (int i = 0; i < n; i++) top = std::max(top, fabsf(w[i]));
  const uint16_t scale = float_to_half(top / static_cast<float>(zero - 1));
  const float s = half_to_float(scale), inverse = s > 0 ? 1.f / s : 0.f;
  for (int i = 0; i < n; i++)
    codes[i] = static_cast<uint8_t>(std::clamp(static_cast<int>(rintf(w[i] * inverse)), 1 - zero, zero - 1) + zero);
  return scale;
}

// Scale and offset of a group, and the weighted squares that they leave.
struct Fit {
  float s = 0, m = 0, error = INFINITY;
};

// Sums are of eight lanes, so that compilers vectorise them, to the same bits on every machine.
constexpr int kSums = 8;
struct Sum {
  float lane[kSums] = {};
  float total() const {
    return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
  }
};

// The nearest code, ties to even: without a call, as rintf is one where the instruction set has no rounding.
inline float code_of(float value, float most) {
  constexpr float kShift = 12582912.f;  // 1.5 * 2^23: floats from there on are whole numbers
  return (std::min(std::max(value, 0.f), most) + kShift) - kShift;
}

// Searched: the range of the weights, shrunk and grown in steps; for each, the codes that it gives, the scale and offset
// that fit these codes best (weighted least squares), and the squares that they leave. n: a multiple of 8.
Fit search(const float* w, const float* importance, int n, int most) {
  float low = 0, high = w[0];
  Sum weights, by_ws, of_w;
  for (int i = 0; i < n; i++) low = std::min(low, w[i]), high = std::max(high, w[i]);
  for (int i = 0; i < n; i += kSums)
    for (int l = 0; l < kSums; l++) {
      const float weighted = importance[i + l] * w[i + l];
      weights.lane[l] += importance[i + l], by_ws.lane[l] += weighted, of_w.lane[l] += weighted * w[i + l];
    }
  const float weight = weights.total(), by_w = by_ws.total(), all = of_w.total();
  Fit best;
  if (high <= low) return {0.f, -low, 0.f};
  for (int step = -4; step <= 14; step += 2) {
    const float inverse = (static_cast<float>(most) + 0.125f * static_cast<float>(step)) / (high - low);
    Sum by_codes, all_squares, crosses;
    for (int i = 0; i < n; i += kSums)
      for (int l = 0; l < kSums; l++) {
        const float code = code_of((w[i + l] - low) * inverse, static_cast<float>(most));
        const float weighted = importance[i + l] * code;
        by_codes.lane[l] += weighted;
        all_squares.lane[l] += weighted * code, crosses.lane[l] += weighted * w[i + l];
      }
    const float by_code = by_codes.total(), squares = all_squares.total(), cross = crosses.total();
    const float determinant = weight * squares - by_code * by_code;
    if (determinant <= 0) continue;
    float s = (weight * cross - by_w * by_code) / determinant, m = (s * by_code - by_w) / weight;
    if (m < 0) m = 0, s = squares > 0 ? cross / squares : 0;
    if (s <= 0) continue;
    const float error = all + s * (s * squares - 2 * cross) + m * (m * weight + 2 * (by_w - s * by_code));
    if (error < best.error) best = {s, m, error};
  }
  if (best.error == INFINITY) best = {(high - low) / static_cast<float>(most), -low, 0.f};
  return best;
}

// 256 weights: scales and offsets of the groups as bytes of two float16.
void with_supers(const float* w, const float* importance, int n, const griffin_grouped& f, uint8_t* codes, uint16_t* d,
                 uint16_t* d_offset, uint8_t* sub, uint8_t* sub_offset) {
  const int groups = n / f.group, most = (1 << f.bits) - 1;
  Fit fit[16];
  float top = 0, top_offset = 0;
  for (int g = 0; g < groups; g++) {
    fit[g] = search(w + g * f.group, importance + g * f.group, f.group, most);
    top = std::max(top, fit[g].s), top_offset = std::max(top_offset, fit[g].m);
  }
  *d = float_to_half(top / 255.f), *d_offset = float_to_half(top_offset / 255.f);
  const float unit = half_to_float(*d), unit_offset = half_to_float(*d_offset);
  for (int g = 0; g < groups; g++) {
    const auto byte = [](float value, float by) {
      return static_cast<uint8_t>(by > 0 ? std::clamp(static_cast<int>(rintf(value / by)), 0, 255) : 0);
    };
    sub[g] = byte(fit[g].s, unit), sub_offset[g] = byte(fit[g].m, unit_offset);
    const float s = unit * sub[g], m = unit_offset * sub_offset[g], inverse = s > 0 ? 1.f / s : 0.f;
    for (int i = g * f.group; i < (g + 1) * f.group; i++)
      codes[i] = static_cast<uint8_t>(code_of((w[i] + m) * inverse, static_cast<float>(most)));
  }
}

struct Call {
  griffin_grouped format;
  const float *weight, *importance;
  int64_t rows, d_in;
  const griffin_codes* out;
};

void quantise_row(const Call& c, int64_t row) {
  const griffin_grouped& f = c.format;
  const int64_t d = up_to(c.d_in, f.group), supers = (d + kSuper - 1) / kSuper, spans = (d + f.span - 1) / f.span;
  uint8_t* const codes = const_cast<uint8_t*>(c.out->codes) + row * d;
  uint16_t* const scale =
      static_cast<uint16_t*>(const_cast<void*>(c.out->scale)) + row * (has_supers(f) ? supers : spans);
  for (int64_t at = 0; at < d; at += kSuper) {
    const int n = static_cast<int>(std::min<int64_t>(kSuper, d - at)),
              real = static_cast<int>(std::min<int64_t>(n, c.d_in - at));
    float w[kSuper] = {}, importance[kSuper] = {};
    memcpy(w, c.weight + row * c.d_in + at, sizeof(float) * static_cast<size_t>(real));
    for (int i = 0; i < n; i++) {
      if (!(fabsf(w[i]) < INFINITY)) w[i] = 0;
      importance[i] = i >= real ? 1e-6f : c.importance ? c.importance[at + i] : 1.f;
    }
    if (!has_supers(f)) {
      for (int s = 0; s < n; s += f.span)
        scale[(at + s) / f.span] = symmetric(w + s, std::min<int>(f.span, n - s), f.zero, codes + at + s);
      continue;
    }
    uint16_t* const offset = static_cast<uint16_t*>(const_cast<void*>(c.out->offset)) + row * supers + at / kSuper;
    const int64_t group = row * (d / f.group) + at / f.group;
    with_supers(w, importance, n, f, codes + at, scale + at / kSuper, offset, const_cast<uint8_t*>(c.out->sub) + group,
                const_cast<uint8_t*>(c.out->sub_offset) + group);
  }
}

}  // namespace
}  // namespace griffin

extern "C" int griffin_quantise(const griffin_grouped* format, const float* weight, int64_t rows, int64_t d_in,
                                const float* importance, const griffin_codes* out, int threads) {
  using namespace griffin;
  if (!format || !weight || !out || !out->codes || !out->scale || rows < 0 || d_in < 1 || threads < 1)
    return GRIFFIN_BAD_ARGUMENT;
  const griffin_grouped& f = *format;
  const bool supers = f.scale == GRIFFIN_SCALE_SUB_UNSIGNED && f.offset == GRIFFIN_OFFSET_SUB;
  const bool plain = f.scale == GRIFFIN_SCALE_F16 && f.offset == GRIFFIN_OFFSET_NONE && f.zero == 1 << (f.bits - 1);
  if (!valid_grouped(f) || !(supers || plain) || (supers && (!out->offset || !out->sub || !out->sub_offset)))
    return GRIFFIN_BAD_ARGUMENT;
  Call call{f, weight, importance, rows, d_in, out};
  parallel(
      threads,
      [](void* data, int thread, int team) {
        const Call& c = *static_cast<Call*>(data);
        for (int64_t r = c.rows * thread / team; r < c.rows * (thread + 1) / team; r++) quantise_row(c, r);
      },
      &call);
  return GRIFFIN_OK;
}
