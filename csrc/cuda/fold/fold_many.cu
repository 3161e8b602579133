// SPDX-License-Identifier: Apache-2.0
#include <limits>
#include <memory>

#include "cuda/common/half.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/layout.cuh"
#include "cuda/fold/fold_many.h"
#include "cuda/fold/fold_rows.cuh"

namespace osora::cuda {
namespace {

// Rows a group of lanes takes, one after the other: enough to have loads in flight, few enough for blocks to spread.
constexpr int kTurns = 4;

template <class T>
struct FoldEntry {
  FoldLayer<T> layer;
  unsigned first_block;
  unsigned char log2_lanes;
  bool packed, packed_vectors;  // whole 16-byte packs in u and d_out; in s0 and s as well
};

template <class T>
struct FoldTable {
  FoldEntry<T> entry[kMaxFoldLayers];
  int count;
};
static_assert(sizeof(FoldTable<double>) <= 32764, "the limit of a kernel's arguments since CUDA 12.1");

template <int N, class T>
__device__ __forceinline__ void fold_part(const FoldEntry<T>& entry, unsigned part) {
  const auto& [u, s0, s, o, d_out, d, r] = entry.layer;
  const Place at(Layout{entry.log2_lanes, entry.packed_vectors});
  const unsigned tiles = static_cast<unsigned>((r + at.lanes * N - 1) / (at.lanes * N));
  const int64_t column = (int64_t{part % tiles} * at.lanes + at.lane) * N;
  if (column >= r) return;
  const int64_t rows = int64_t{at.groups} * kTurns, first = part / tiles * rows;
  fold_rows<N>(u, s0, s, o, d_out, r, column, entry.packed_vectors, first + at.group,
               d < first + rows ? d : first + rows, at.groups);
}

// A block per column tile and kTurns rows a group, layer after layer: it first looks up whose block it is.
template <class T>
__global__ void __launch_bounds__(kThreads) fold_many_kernel(const __grid_constant__ FoldTable<T> table) {
  int low = 0, high = table.count;  // the last entry with first_block <= blockIdx.x
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.entry[middle].first_block <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const FoldEntry<T>& entry = table.entry[low];
  if (entry.packed) {
    fold_part<kPerPack<T>>(entry, blockIdx.x - entry.first_block);
  } else {
    fold_part<1>(entry, blockIdx.x - entry.first_block);
  }
}

template <int N, class T>
int64_t blocks_of(FoldEntry<T>& entry) {
  const auto layout = layout_for<N>(entry.layer.r, aligned(entry.layer.s0, entry.layer.s));
  entry.log2_lanes = static_cast<unsigned char>(layout.log2_lanes);
  entry.packed_vectors = layout.packed_vectors;
  return ceil_div(entry.layer.r, N << layout.log2_lanes) *
         ceil_div(entry.layer.d, int64_t{kTurns} * (kThreads >> layout.log2_lanes));
}

}  // namespace

template <class T>
void fold_many(const FoldLayer<T>* layers, int64_t count, cudaStream_t stream) {
  const auto table = std::make_unique<FoldTable<T>>();
  int64_t blocks = 0;
  const auto flush = [&] {
    if (blocks > 0) {
      launch(fold_many_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, *table);
    }
    table->count = 0, blocks = 0;
  };
  for (int64_t k = 0; k < count; ++k) {
    if (layers[k].d == 0 || layers[k].r == 0) continue;
    FoldEntry<T> entry{layers[k], 0, 0, false, false};
    entry.packed = layers[k].r % kPerPack<T> == 0 && aligned(layers[k].u, layers[k].d_out);
    const int64_t more = entry.packed ? blocks_of<kPerPack<T>>(entry) : blocks_of<1>(entry);
    if (table->count == kMaxFoldLayers || blocks + more > std::numeric_limits<int>::max()) flush();
    entry.first_block = static_cast<unsigned>(blocks);
    table->entry[table->count++] = entry;
    blocks += more;
  }
  flush();
}

#define OSORA_INSTANTIATE_FOLD_MANY(T) template void fold_many(const FoldLayer<T>*, int64_t, cudaStream_t);
OSORA_INSTANTIATE_FOLD_MANY(double)
OSORA_INSTANTIATE_FOLD_MANY(float)
OSORA_INSTANTIATE_FOLD_MANY(__nv_bfloat16)
OSORA_INSTANTIATE_FOLD_MANY(__half)
#undef OSORA_INSTANTIATE_FOLD_MANY

}  // namespace osora::cuda
