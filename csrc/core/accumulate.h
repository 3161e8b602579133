// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace osora::core {

// The type of S0, s, o, P and every sum: float64 where factors are float64, float32 for all others.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

}  // namespace osora::core
