// SPDX-License-Identifier: Apache-2.0
// The fold of many layers in one launch. One layer's fold is some microseconds of launching around one of work; a
// model has hundreds.
#pragma once
#include "cuda/fold/fold.h"

namespace osora::cuda {

// One layer as fold() takes it: u, d_out [d, r]; s0, s [r]; o [d]. On the device.
template <class T>
struct FoldLayer {
  const T* u;
  const accumulate_t<T>*s0, *s, *o;
  T* d_out;
  int64_t d, r;
};

// Layers of one launch. They travel as the kernel's argument: no copy to wait for, and nothing that a captured graph
// would have to keep alive.
constexpr int kMaxFoldLayers = 256;

// fold() of `count` layers in host memory, bit for bit: one launch per kMaxFoldLayers layers that are not empty.
template <class T>
void fold_many(const FoldLayer<T>* layers, int64_t count, cudaStream_t stream);

}  // namespace osora::cuda
