// SPDX-License-Identifier: Apache-2.0
#include "torch/linear/materialised.h"

#include <ATen/ops/empty_strided.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "torch/common/checks.h"
#include "torch/fold/fold.h"
#include "torch/linear/capture.h"
#include "torch/linear/device_streams.h"
#include "torch/linear/stream_order.h"

namespace osora {
namespace {

// Numbers of W_eff that are summed in float32 at a time: bounds the memory beside W_eff itself, 16 MiB.
constexpr int64_t kBlock = 4194304;

constexpr at::ScalarType kTypes[] = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf};  // it may be kept in

// A tensor as it was: this view of this storage at this version.
class Stamp {
 public:
  explicit Stamp(const at::Tensor& t)
      : storage_(t.storage().getWeakStorageImpl()),
        data_(t.const_data_ptr()),
        sizes_(t.sizes().vec()),
        strides_(t.strides().vec()),
        type_(t.scalar_type()),
        version_(version_of(t)) {}

  // A weak reference keeps the storage's address from being given to another one, so equal addresses are one storage.
  bool is(const at::Tensor& t) const {
    return version_ >= 0 && version_ == version_of(t) && data_ == t.const_data_ptr() &&
           storage_._unsafe_get_target() == t.storage().unsafeGetStorageImpl() && t.sizes() == sizes_ &&
           t.strides() == strides_ && t.scalar_type() == type_;
  }
  bool expired() const { return storage_.expired(); }

 private:
  // -1 for tensors of inference mode, whose changes nobody counts.
  static int64_t version_of(const at::Tensor& t) {
    return t.is_inference() ? -1 : int64_t{t.unsafeGetTensorImpl()->version_counter().current_version()};
  }

  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  const void* data_;
  std::vector<int64_t> sizes_, strides_;
  at::ScalarType type_;
  int64_t version_;
};

struct Kept {
  at::Tensor effective;
  std::optional<std::array<Stamp, 6>> stamps;  // none while it is being written: a write that fails leaves no trust
  StreamOrder<DeviceStreams> order;
};

// A stream that is being captured may not wait for work outside of its graph, nor that for the graph: whoever records
// one has waited for the device before (torch.cuda.graph does), and orders its replays himself.
bool has_order(const at::Tensor& t) { return t.is_cuda() && !is_capturing(t); }

const at::Tensor& to_be_read(Kept& kept) {
  if (has_order(kept.effective)) {
    DeviceStreams streams(kept.effective);
    kept.order.read(streams);
  }
  return kept.effective;
}

using Key = std::tuple<const c10::StorageImpl*, const c10::StorageImpl*, at::ScalarType>;

std::array<Stamp, 6> stamps_of(const EffectiveSources& f) {
  return {Stamp(f.weight), Stamp(f.U), Stamp(f.V), Stamp(f.S0), Stamp(f.s), Stamp(f.o)};
}

bool is_fresh(const Kept& kept, const EffectiveSources& f) {
  if (!kept.stamps) return false;
  const auto& [weight, U, V, S0, s, o] = *kept.stamps;
  return weight.is(f.weight) && U.is(f.U) && V.is(f.V) && S0.is(f.S0) && s.is(f.s) && o.is(f.o);
}

// In the weight's own strides, where it has no gaps.
at::Tensor empty_effective(const EffectiveSources& f, at::ScalarType type) {
  const c10::InferenceMode normal(false);  // a later call may be outside of inference mode, and writes to it
  auto strides = f.weight.strides().vec();
  if (!f.weight.is_non_overlapping_and_dense()) strides = {f.weight.size(1), 1};
  return at::empty_strided(f.weight.sizes(), strides, f.weight.options().dtype(type).requires_grad(false));
}

void write_effective(const at::Tensor& effective, const EffectiveSources& f) {
  const auto exact = accumulate_type(f.weight.scalar_type());
  const auto D = fold(f.U.to(exact), f.S0, f.s, f.o), Vt = f.V.to(exact).t();
  if (effective.scalar_type() == exact) {
    effective.copy_(f.weight).addmm_(D, Vt);
    return;
  }
  const int64_t d = f.weight.size(0), rows = std::max<int64_t>(1, kBlock / std::max<int64_t>(1, f.weight.size(1)));
  for (int64_t begin = 0; begin < d; begin += rows) {
    const int64_t count = std::min(rows, d - begin);
    auto sum = f.weight.narrow(0, begin, count).to(exact, /*non_blocking=*/false, /*copy=*/true);
    effective.narrow(0, begin, count).copy_(sum.addmm_(D.narrow(0, begin, count), Vt));
  }
}

class Memo {
 public:
  at::Tensor get(const EffectiveSources& f, at::ScalarType type) {
    const std::lock_guard lock(mutex_);
    const auto found = kept_.find(key(f.weight, f.o, type));
    if (found != kept_.end() && is_fresh(found->second, f)) return to_be_read(found->second);
    if (is_capturing(f.weight)) {
      auto effective = empty_effective(f, type);
      write_effective(effective, f);
      return effective;
    }
    return make(f, type);
  }

  void refresh(const EffectiveSources& f) {
    const std::lock_guard lock(mutex_);
    bool none = true;
    for (const auto type : kTypes) {
      if (!kept_.contains(key(f.weight, f.o, type))) continue;
      make(f, type);
      none = false;
    }
    if (none) make(f, f.weight.scalar_type());
  }

  void drop(const at::Tensor& weight, const at::Tensor& o) {
    const std::lock_guard lock(mutex_);
    for (const auto type : kTypes) kept_.erase(key(weight, o, type));
    forget_the_dead();
  }

  std::vector<at::Tensor> list(const at::Tensor& weight, const at::Tensor& o) {
    const std::lock_guard lock(mutex_);
    std::vector<at::Tensor> found;
    for (const auto type : kTypes) {
      const auto one = kept_.find(key(weight, o, type));
      if (one != kept_.end()) found.push_back(to_be_read(one->second));
    }
    return found;
  }

 private:
  static Key key(const at::Tensor& weight, const at::Tensor& o, at::ScalarType type) {
    return {weight.storage().unsafeGetStorageImpl(), o.storage().unsafeGetStorageImpl(), type};
  }

  at::Tensor make(const EffectiveSources& f, at::ScalarType type) {
    auto found = kept_.find(key(f.weight, f.o, type));
    if (found != kept_.end() && found->second.effective.sizes() != f.weight.sizes()) {
      kept_.erase(found);
      found = kept_.end();
    }
    if (found == kept_.end()) {
      forget_the_dead();
      found = kept_.emplace(key(f.weight, f.o, type), Kept{empty_effective(f, type), std::nullopt, {}}).first;
    }
    auto& kept = found->second;
    kept.stamps.reset();
    write_in_order(kept, f);
    // What a recorded graph writes is there after its replay, not now.
    if (!is_capturing(f.weight)) kept.stamps = stamps_of(f);
    return kept.effective;
  }

  static void write_in_order(Kept& kept, const EffectiveSources& f) {
    if (!has_order(kept.effective)) return write_effective(kept.effective, f);
    DeviceStreams streams(kept.effective);
    kept.order.before_write(streams);
    write_effective(kept.effective, f);
    kept.order.after_write(streams);
  }

  void forget_the_dead() {
    std::erase_if(kept_, [](const auto& item) {
      const auto& stamps = item.second.stamps;
      return stamps && std::any_of(stamps->begin(), stamps->end(), [](const auto& one) { return one.expired(); });
    });
  }

  std::mutex mutex_;
  std::map<Key, Kept> kept_;
};

// Never destroyed: at the end of the process the device may be gone before static objects are.
Memo& memo() {
  static auto* const one = new Memo;
  return *one;
}

}  // namespace

at::Tensor effective_weight(const EffectiveSources& sources, at::ScalarType type) { return memo().get(sources, type); }
void effective_refresh(const EffectiveSources& sources) { memo().refresh(sources); }
void effective_drop(const at::Tensor& weight, const at::Tensor& o) { memo().drop(weight, o); }
std::vector<at::Tensor> effective_kept(const at::Tensor& weight, const at::Tensor& o) { return memo().list(weight, o); }

}  // namespace osora
