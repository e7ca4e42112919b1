// Experts of a call by their place.
#pragma once
#include "griffin_native.h"

namespace griffin {

struct Experts {
  const griffin_rows& rows;
  int64_t operator[](int64_t i) const {
    if (!rows.experts) return i;
    return rows.index_bytes == 4 ? static_cast<const int32_t*>(rows.experts)[i]
                                 : static_cast<const int64_t*>(rows.experts)[i];
  }
};

}  // namespace griffin
