// SPDX-License-Identifier: Apache-2.0
// From a tensor's dtype to the type of its numbers: the only switch over dtypes. What comes here is checked before.
#pragma once
#include <ATen/Dispatch.h>

namespace osora {

// call(T()) with T double, float, c10::BFloat16 or c10::Half.
template <class Call>
void with_number(at::ScalarType type, Call call) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "osora", [&] { call(scalar_t()); });
}

// Of the dtypes of sums alone: double or float.
template <class Call>
void with_wide_number(at::ScalarType type, Call call) {
  AT_DISPATCH_FLOATING_TYPES(type, "osora", [&] { call(scalar_t()); });
}

}  // namespace osora
