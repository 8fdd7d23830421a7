// Latents as Python hands them over.
#pragma once
#include "bindings.h"
#include "latents.h"

namespace etude {

// address, dtype, batch stride, channel stride, pixel stride
using Field = std::tuple<Address, int, int64_t, int64_t, int64_t>;

inline Latents latents(const Field& t) {
  return {reinterpret_cast<void*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t),
          std::get<4>(t)};
}

}  // namespace etude
