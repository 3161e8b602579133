// SPDX-License-Identifier: Apache-2.0
// The materialised weights that are kept: made when first asked for, made again when a source has changed.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace osora {

// What W_eff = W + D V^T is made of.
struct EffectiveSources {
  const at::Tensor& weight;  // [d, k], in any strides
  const at::Tensor& U;
  const at::Tensor& V;
  const at::Tensor& S0;
  const at::Tensor& s;
  const at::Tensor& o;
};

// W_eff [d, k] in `type`, in the weight's layout. Kept by the storages of weight and o together (one per adapter of a
// weight) and by `type`; given as it is while all six sources are the same storages, views and versions, and else made
// again in place. A source that was changed without torch's knowledge (through .data, by a replayed CUDA graph) does
// not show: effective_refresh is for that. While a CUDA graph is recorded, a weight that is not up to date is made for
// this call alone: each replay then makes it again, from what the sources hold by then. A caller on another stream than
// the one it was written on waits there for that, and a rewrite waits for what other streams have been given by then.
at::Tensor effective_weight(const EffectiveSources& sources, at::ScalarType type);

// Makes what is kept for these sources again, in every dtype it is kept in; in the weight's dtype if in none.
void effective_refresh(const EffectiveSources& sources);

void effective_drop(const at::Tensor& weight, const at::Tensor& o);
std::vector<at::Tensor> effective_kept(const at::Tensor& weight, const at::Tensor& o);

}  // namespace osora
