// Neurons of a group whose codes are read to different bits: integer sums of each level, scaled together.

// y[c] += factor * (s[c] * (sums[c] + rest) - total * m[c]). rest: what the bits that are not read add at their mean.
template <class B>
inline void add_scaled_levels(const NeuronPlan& p, const GroupOfNeurons& of, float rest, int begin, int n,
                              const int32_t* sums, float* y) {
  const typename B::F factor = B::set1_float(of.factor), z_sum = B::set1_float(of.factor * (float)of.total);
  const typename B::F more = B::set1_float(rest), one = B::set1_float(1.f), zero = B::set1_float(p.format.zero);
  with_kind(p.format, [&](auto kind) {
    using Kind = decltype(kind);
    for (int c = begin; c < begin + n; c += B::kLanes) {
      typename B::F s, m = B::zero();
      neuron_scales<B, Kind::kScale, Kind::kOffset>(p, of.scales, of.group, c, &s, &m);
      if (Kind::kOffset == GRIFFIN_OFFSET_NONE) m = B::mul(s, zero);
      const typename B::F sum = B::fma(B::to_float(B::load((const uint8_t*)(sums + (c - begin)))), one, more);
      B::store(y + c, B::fma(sum, B::mul(s, factor), B::minus_product(B::load_floats(y + c), m, z_sum)));
    }
  });
}

template <class B>
void grouped_down_levels(const NeuronPlan& p, const GroupOfNeurons& of, const LevelOfNeurons* levels, int n_levels,
                         const int* ahead_bytes, int end, float* y) {
  alignas(64) int32_t sums[256], own[256];
  float rest = 0;
  int quads = 0;
  for (int l = 0; l < n_levels; l++)
    rest += (float)((1 << levels[l].left) - 1) / 2 * (float)levels[l].total, quads += levels[l].quads;
  Ahead ahead(of.ahead, of.n_ahead, ahead_bytes, quads * ((end + 255) / 256));
  for (int at = 0; at < end; at += 256) {
    const int n = end - at < 256 ? end - at : 256;
    for (int l = 0; l < n_levels; l++) {
      const LevelOfNeurons& level = levels[l];
      int32_t* const to = l ? own : sums;
      switch (level.bits) {
        case 2: chunk_sums<B, 2>(p, level.rows, level.z, level.quads, at, n, to, ahead); break;
        case 3: chunk_sums<B, 3>(p, level.rows, level.z, level.quads, at, n, to, ahead); break;
        case 4: chunk_sums<B, 4>(p, level.rows, level.z, level.quads, at, n, to, ahead); break;
        case 5: chunk_sums<B, 5>(p, level.rows, level.z, level.quads, at, n, to, ahead); break;
        case 6: chunk_sums<B, 6>(p, level.rows, level.z, level.quads, at, n, to, ahead); break;
        default: chunk_sums<B, 8>(p, level.rows, level.z, level.quads, at, n, to, ahead); break;
      }
      for (int c = 0; c < n; c++) sums[c] = (l ? sums[c] : 0) + to[c] * (1 << level.left);
    }
    add_scaled_levels<B>(p, of, rest, at, n, sums, y);
  }
}
