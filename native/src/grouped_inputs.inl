// Rows of input in integers.

// Quantise a row of d floats (a multiple of the group) in groups, in the order of the steps. A step's four values lie in
// two places, as two bytes each, 128 high + low (high bytes first), or as pairs of 16 bits (values 0 and 2 first).
template <int kGroup, bool kBytes> void quantise_groups(const float* x, int d, const GroupedInput& to_input) {
  int8_t *const q = (int8_t*)to_input.q, *const apart = (int8_t*)to_input.high;
  float *const scale = (float*)to_input.scale, *const sum = (float*)to_input.sum,
               *const high_sum = (float*)to_input.high_sum;
  const int groups = d / kGroup, padded = (int)up_to(groups, kChunkGroups);
  const int64_t last = (int64_t)(padded - kChunkGroups) * kGroup;
  if (padded > groups) memset(q + 2 * last, 0, 2 * (size_t)kChunkGroups * kGroup);
  if (padded > groups && !kBytes) memset(apart + last, 0, (size_t)kChunkGroups * kGroup);
  for (int g = 0; g < groups; g++) {
    const float* const from = x + (int64_t)g * kGroup;
    uint32_t top = 0;  // of |x|, as bits: they order as the values do
    for (int i = 0; i < kGroup; i++) {
      const uint32_t bits = bits_of(from[i]) & 0x7fffffffu;
      top = bits > top ? bits : top;
    }
    const bool finite = top < 0x7f800000u;
    const float s = finite ? float_of(top) / kWide : float_of(0x7fc00000u);  // NaN and infinity come out as NaN
    // kWide / max rather than 1 / s: a denormal maximum would make that infinite. Maxima below 1e-30 become zero.
    const float inverse = finite && top > 0x0da24260u ? kWide / float_of(top) : 0.f;
    int16_t value[kGroup] = {};
    int32_t total = 0;
    if (finite)
      for (int i = 0; i < kGroup; i++) value[i] = (int16_t)__builtin_rintf(from[i] * inverse), total += value[i];
    int8_t high[kGroup], low[kGroup];
    int32_t high_total = 0;
    for (int i = 0; i < kGroup; i++) {
      const int h = (value[i] + 64) >> 7;
      high[i] = (int8_t)h, low[i] = (int8_t)(value[i] - 128 * h), high_total += h;
    }
    scale[g] = s, sum[g] = s * (float)total, high_sum[g] = s * 128.f * (float)high_total;
    const int64_t chunk = (int64_t)(g / kChunkGroups) * kChunkGroups * kGroup;
    int8_t* const to = q + 2 * chunk + g % kChunkGroups * 4;
    if (kBytes) {
      for (int t = 0; t < kGroup / 4; t++)
        memcpy(to + 128 * t, high + 4 * t, 4), memcpy(to + 128 * t + 64, low + 4 * t, 4);
    } else {
      for (int t = 0; t < kGroup / 4; t++) {
        const int16_t* const v = value + 4 * t;
        const int16_t even[2] = {v[0], v[2]}, odd[2] = {v[1], v[3]};
        memcpy(to + 128 * t, even, 4), memcpy(to + 128 * t + 64, odd, 4);
        memcpy(apart + chunk + g % kChunkGroups * 4 + 64 * t, high + 4 * t, 4);
      }
    }
  }
  for (int g = groups; g < padded; g++) scale[g] = sum[g] = high_sum[g] = 0;
}

template <class B> void grouped_quantise(const float* x, int d, int group, const GroupedInput& to) {
  if (group == 16)
    quantise_groups<16, B::kByteInputs>(x, d, to);
  else
    quantise_groups<32, B::kByteInputs>(x, d, to);
}
