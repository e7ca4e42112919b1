// Experts of a call by their place.
#pragma once
#include "griffin_native.h"

namespace griffin {

struct Experts {
  const griffin_io& io;
  int64_t operator[](int64_t i) const {
    if (!io.experts) return i;
    return io.index_bytes == 4 ? static_cast<const int32_t*>(io.experts)[i]
                               : static_cast<const int64_t*>(io.experts)[i];
  }
};

}  // namespace griffin
