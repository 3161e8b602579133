// SPDX-License-Identifier: Apache-2.0
// What every kernel of ours needs around its ATen calls.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace osora {

// Inside an operator, ATen calls must neither record a graph nor be re-cast by autocast: the operator's own formula
// (osora.ops) covers the first, its caller has settled the dtypes for the second.
struct OperatorGuard {
  explicit OperatorGuard(const at::Device& device) : device_(device) {}
  at::AutoDispatchBelowADInplaceOrView no_autograd_;
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
  c10::DeviceGuard device_;
};

}  // namespace osora
