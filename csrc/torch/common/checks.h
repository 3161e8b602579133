// SPDX-License-Identifier: Apache-2.0
// One check per operator, shared by every backend: a wrong call fails with the same words on CPU, CUDA and in the
// emulator. Messages name the operator, the argument, what is wished and what came.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/aminmax.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace osora {

inline bool is_supported_float(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

// The dtype of S0, P and every sum: float64 for float64 factors, float32 otherwise.
inline at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// `many`: s and o have a row for each adapter.
inline void check_factors(const char* op, const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s,
                          const at::Tensor& o, bool many = false) {
  TORCH_CHECK(U.dim() == 2, op, ": U must be [out_features, rank], got shape ", U.sizes());
  TORCH_CHECK(is_supported_float(U.scalar_type()), op, ": U must be float64, float32, bfloat16 or float16, got ",
              U.scalar_type());
  TORCH_CHECK(S0.dim() == 1 && S0.size(0) == U.size(1), op, ": S0 must be [rank] = [", U.size(1), "], got shape ",
              S0.sizes());
  if (many) {
    TORCH_CHECK(s.dim() == 2 && s.size(1) == U.size(1), op, ": s must be [adapters, rank] with rank ", U.size(1),
                ", got shape ", s.sizes());
    TORCH_CHECK(o.dim() == 2 && o.size(0) == s.size(0) && o.size(1) == U.size(0), op,
                ": o must be [adapters, out_features] = [", s.size(0), ", ", U.size(0), "], got shape ", o.sizes());
  } else {
    TORCH_CHECK(s.dim() == 1 && s.size(0) == U.size(1), op, ": s must be [rank] = [", U.size(1), "], got shape ",
                s.sizes());
    TORCH_CHECK(o.dim() == 1 && o.size(0) == U.size(0), op, ": o must be [out_features] = [", U.size(0),
                "], got shape ", o.sizes());
  }
  const auto exact = accumulate_type(U.scalar_type());
  TORCH_CHECK(S0.scalar_type() == exact, op, ": S0 must be ", exact, " for ", U.scalar_type(),
              " factors (rounded singular values would shift the starting point), got ", S0.scalar_type());
  for (const auto* delta : {&s, &o}) {
    const auto type = delta->scalar_type();
    TORCH_CHECK(type == exact || type == at::kBFloat16 || type == at::kHalf, op, ": ", delta == &s ? "s" : "o",
                " must be ", exact, ", bfloat16 or float16, got ", type);
  }
  TORCH_CHECK(S0.device() == U.device() && s.device() == U.device() && o.device() == U.device(), op,
              ": U, S0, s and o must be on one device, got ", U.device(), ", ", S0.device(), ", ", s.device(), " and ",
              o.device());
}

inline void check_fold(const at::Tensor& U, const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o) {
  check_factors("osora::fold", U, S0, s, o);
}

// D of whoever has folded it already.
inline void check_folded(const char* op, const std::optional<at::Tensor>& D, const at::Tensor& U) {
  TORCH_CHECK(!D || (D->sizes() == U.sizes() && D->scalar_type() == U.scalar_type() && D->device() == U.device()), op,
              ": D must be [out_features, rank] as U (", U.sizes(), ", ", U.scalar_type(), " on ", U.device(),
              "), got ", D ? D->sizes() : at::IntArrayRef{}, ", ", D ? at::toString(D->scalar_type()) : "none");
}

// A message names the layer by its place in the lists.
inline void check_fold_many(at::TensorList U, at::TensorList S0, at::TensorList s, at::TensorList o) {
  TORCH_CHECK(S0.size() == U.size() && s.size() == U.size() && o.size() == U.size(),
              "osora::fold_many: U, S0, s and o must be lists of one length, got ", U.size(), ", ", S0.size(), ", ",
              s.size(), " and ", o.size(), " tensors");
  for (size_t k = 0; k < U.size(); ++k) {
    const auto op = "osora::fold_many: layer " + std::to_string(k);
    check_factors(op.c_str(), U[k], S0[k], s[k], o[k]);
    TORCH_CHECK(U[k].scalar_type() == U[0].scalar_type() && U[k].device() == U[0].device(), op,
                ": every U must have one dtype and device, got ", U[k].scalar_type(), " on ", U[k].device(), " after ",
                U[0].scalar_type(), " on ", U[0].device());
  }
}

inline void check_fold_backward(const at::Tensor& U, const at::Tensor& P, const at::Tensor& S0, const at::Tensor& s,
                                const at::Tensor& o) {
  check_factors("osora::fold_backward", U, S0, s, o);
  TORCH_CHECK(P.sizes() == U.sizes(), "osora::fold_backward: P must have U's shape ", U.sizes(), ", got ", P.sizes());
  TORCH_CHECK(P.scalar_type() == accumulate_type(U.scalar_type()), "osora::fold_backward: P must be ",
              accumulate_type(U.scalar_type()), " for ", U.scalar_type(), " factors, got ", P.scalar_type());
  TORCH_CHECK(P.device() == U.device(), "osora::fold_backward: P must be on ", U.device(), ", got ", P.device());
}

// What the linear operators share: the frozen tensors among themselves, and `rows` (x or dy) against them.
inline void check_linear_frozen(const char* op, const at::Tensor& rows, const std::optional<at::Tensor>& weight,
                                const at::Tensor& U, const at::Tensor& V, const at::Tensor& S0, const at::Tensor& s,
                                const at::Tensor& o, bool many = false) {
  check_factors(op, U, S0, s, o, many);
  TORCH_CHECK(V.dim() == 2 && V.size(1) == U.size(1), op, ": V must be [in_features, rank] with rank ", U.size(1),
              ", got shape ", V.sizes());
  TORCH_CHECK(!weight || (weight->dim() == 2 && weight->size(0) == U.size(0) && weight->size(1) == V.size(0)), op,
              ": weight must be [out_features, in_features] = [", U.size(0), ", ", V.size(0), "], got shape ",
              weight ? weight->sizes() : at::IntArrayRef{});
  TORCH_CHECK(rows.scalar_type() == U.scalar_type() && V.scalar_type() == U.scalar_type() &&
                  (!weight || weight->scalar_type() == U.scalar_type()),
              op, ": the input, weight, U and V must share one dtype, got ", rows.scalar_type(), ", ",
              weight ? at::toString(weight->scalar_type()) : "none", ", ", U.scalar_type(), " and ", V.scalar_type(),
              " (under autocast, call osora.ops.linear, which casts them)");
  TORCH_CHECK(rows.device() == U.device() && V.device() == U.device() && (!weight || weight->device() == U.device()),
              op, ": the input, weight, U and V must be on one device, got ", rows.device(), ", ",
              weight ? weight->device() : U.device(), ", ", U.device(), " and ", V.device());
}

// x and the bias of an operator with a forward, against the frozen tensors.
inline void check_linear_input(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& bias, const at::Tensor& U, const at::Tensor& V) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == V.size(0), op,
              ": the last dimension of x must be in_features = ", V.size(0), ", got shape ", x.sizes());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == U.size(0)), op, ": bias must be [out_features] = [",
              U.size(0), "], got shape ", bias ? bias->sizes() : at::IntArrayRef{});
  TORCH_CHECK(!bias || (bias->scalar_type() == x.scalar_type() && bias->device() == x.device()), op,
              ": bias must have x's dtype and device (", x.scalar_type(), " on ", x.device(), "), got ",
              bias ? at::toString(bias->scalar_type()) : "none");
  TORCH_CHECK(weight || !bias, op, ": a bias needs a weight (without one, only the adapter's branch is given)");
}

inline void check_linear(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, const at::Tensor& U, const at::Tensor& V,
                         const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o) {
  check_linear_frozen("osora::linear", x, weight, U, V, S0, s, o);
  check_linear_input("osora::linear", x, weight, bias, U, V);
}

// Lowest and highest of a tensor of int64 on the CPU are in [least, most]; other devices are not asked, for that would
// make the host wait for them.
inline void check_range_on_cpu(const char* op, const char* name, const at::Tensor& t, int64_t least, int64_t most,
                               const char* meaning) {
  if (!t.is_cpu() || t.numel() == 0) return;
  const auto [low, high] = at::aminmax(t);
  const int64_t lowest = low.item<int64_t>(), highest = high.item<int64_t>();
  TORCH_CHECK_INDEX(lowest >= least && highest <= most, op, ": ", name, " must be in ", least, " .. ", most, " (",
                    meaning, "), got values from ", lowest, " to ", highest);
}

inline void check_linear_multi(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& bias, const at::Tensor& U, const at::Tensor& V,
                               const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o, const at::Tensor& index,
                               const std::optional<at::Tensor>& ranks) {
  const char* const op = "osora::linear_multi";
  check_linear_frozen(op, x, weight, U, V, S0, s, o, /*many=*/true);
  check_linear_input(op, x, weight, bias, U, V);
  TORCH_CHECK(index.dim() < x.dim() && index.sizes() == x.sizes().slice(0, index.dim()), op,
              ": index must have x's leading dimensions or the first of them (x is ", x.sizes(), "), got shape ",
              index.sizes());
  TORCH_CHECK(index.scalar_type() == at::kLong && index.device() == x.device(), op, ": index must be int64 on ",
              x.device(), ", got ", index.scalar_type(), " on ", index.device());
  check_range_on_cpu(op, "index", index, -1, s.size(0) - 1, "-1 is the base");
  if (!ranks) return;
  TORCH_CHECK(ranks->dim() == 1 && ranks->size(0) == s.size(0), op, ": ranks must be [adapters] = [", s.size(0),
              "], got shape ", ranks->sizes());
  TORCH_CHECK(ranks->scalar_type() == at::kLong && (ranks->is_cpu() || ranks->device() == x.device()), op,
              ": ranks must be int64 on the CPU or on ", x.device(), ", got ", ranks->scalar_type(), " on ",
              ranks->device());
  check_range_on_cpu(op, "ranks", *ranks, 0, U.size(1), "the basis has no more columns");
}

inline void check_down(const at::Tensor& x, const at::Tensor& V) {
  TORCH_CHECK(V.dim() == 2, "osora::down: V must be [in_features, rank], got shape ", V.sizes());
  TORCH_CHECK(is_supported_float(V.scalar_type()), "osora::down: V must be float64, float32, bfloat16 or float16, got ",
              V.scalar_type());
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == V.size(0),
              "osora::down: the last dimension of x must be in_features = ", V.size(0), ", got shape ", x.sizes());
  TORCH_CHECK(x.scalar_type() == V.scalar_type() && x.device() == V.device(),
              "osora::down: x must have V's dtype and device (", V.scalar_type(), " on ", V.device(), "), got ",
              x.scalar_type(), " on ", x.device());
}

// x, weight and bias as check_linear has them, with h in V's place.
inline void check_up(const at::Tensor& x, const at::Tensor& h, const std::optional<at::Tensor>& weight,
                     const std::optional<at::Tensor>& bias, const at::Tensor& U, const at::Tensor& S0,
                     const at::Tensor& s, const at::Tensor& o) {
  check_factors("osora::up", U, S0, s, o);
  TORCH_CHECK(x.dim() >= 1, "osora::up: x must be [..., in_features], got shape ", x.sizes());
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) n *= x.size(i);
  TORCH_CHECK(h.dim() == 2 && h.size(0) == n && h.size(1) == U.size(1), "osora::up: h must be [n, rank] = [", n, ", ",
              U.size(1), "], got shape ", h.sizes());
  TORCH_CHECK(!weight || (weight->dim() == 2 && weight->size(0) == U.size(0) && weight->size(1) == x.size(-1)),
              "osora::up: weight must be [out_features, in_features] = [", U.size(0), ", ", x.size(-1), "], got shape ",
              weight ? weight->sizes() : at::IntArrayRef{});
  TORCH_CHECK(!bias || (weight && bias->dim() == 1 && bias->size(0) == U.size(0)),
              "osora::up: bias must be [out_features] = [", U.size(0), "], and needs a weight, got shape ",
              bias ? bias->sizes() : at::IntArrayRef{});
  for (const auto* t : {&x, &h, weight ? &*weight : &x, bias ? &*bias : &x}) {
    TORCH_CHECK(t->scalar_type() == U.scalar_type() && t->device() == U.device(),
                "osora::up: x, h, weight, bias and U must share one dtype and device (", U.scalar_type(), " on ",
                U.device(), "), got ", t->scalar_type(), " on ", t->device());
  }
}

inline void check_linear_backward(const at::Tensor& dy, const at::Tensor& h, const std::optional<at::Tensor>& weight,
                                  const at::Tensor& U, const at::Tensor& V, const at::Tensor& S0, const at::Tensor& s,
                                  const at::Tensor& o) {
  check_linear_frozen("osora::linear_backward", dy, weight, U, V, S0, s, o);
  TORCH_CHECK(dy.dim() >= 1 && dy.size(-1) == U.size(0),
              "osora::linear_backward: the last dimension of dy must be out_features = ", U.size(0), ", got shape ",
              dy.sizes());
  TORCH_CHECK(h.dim() == 2 && h.size(1) == U.size(1) && h.size(0) * dy.size(-1) == dy.numel(),
              "osora::linear_backward: h must be [n, rank] = [", dy.size(-1) ? dy.numel() / dy.size(-1) : h.size(0),
              ", ", U.size(1), "], got shape ", h.sizes());
  TORCH_CHECK(h.scalar_type() == dy.scalar_type() && h.device() == dy.device(),
              "osora::linear_backward: h must have dy's dtype and device, got ", h.scalar_type(), " on ", h.device());
}

// -- linear_add_ ------------------------------------------------------------------------------------------------------

// Whether two of its elements may be one number: true for expanded tensors and sliding windows, false for every slice,
// transpose or permutation of a dense one.
inline bool may_overlap_itself(const at::Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return false;
    if (t.size(i) > 1) dims.emplace_back(t.stride(i), t.size(i));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 1;  // elements from the first to the last of the dimensions so far
  for (const auto& [stride, size] : dims) {
    if (stride < reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

// Whether their elements lie within each other's range of one storage.
inline bool share_memory(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0 || !a.storage().is_alias_of(b.storage())) return false;
  const auto range = [](const at::Tensor& t) {
    int64_t reach = 1;
    for (int64_t i = 0; i < t.dim(); ++i) reach += t.stride(i) * (t.size(i) - 1);
    const int64_t begin = t.storage_offset() * static_cast<int64_t>(t.itemsize());
    return std::pair{begin, begin + reach * static_cast<int64_t>(t.itemsize())};
  };
  const auto [a_begin, a_end] = range(a);
  const auto [b_begin, b_end] = range(b);
  return a_begin < b_end && b_begin < a_end;
}

inline void check_linear_add(const at::Tensor& y, const at::Tensor& x, const at::Tensor& U, const at::Tensor& V,
                             const at::Tensor& S0, const at::Tensor& s, const at::Tensor& o) {
  const char* const op = "osora::linear_add_";
  check_linear_frozen(op, x, std::nullopt, U, V, S0, s, o);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == V.size(0), op,
              ": the last dimension of x must be in_features = ", V.size(0), ", got shape ", x.sizes());
  auto wish = x.sizes().vec();
  wish.back() = U.size(0);
  TORCH_CHECK(y.sizes() == wish, op, ": y must be x's shape with out_features at the end, ", at::IntArrayRef(wish),
              ", got ", y.sizes());
  TORCH_CHECK(y.scalar_type() == x.scalar_type() && y.device() == x.device(), op,
              ": y must have x's dtype and device (", x.scalar_type(), " on ", x.device(), "), got ", y.scalar_type(),
              " on ", y.device());
  TORCH_CHECK(!may_overlap_itself(y), op, ": elements of y must not share memory (is it expanded?), got sizes ",
              y.sizes(), " with strides ", y.strides());
  const std::pair<const char*, const at::Tensor*> others[] = {{"x", &x},   {"U", &U}, {"V", &V},
                                                              {"S0", &S0}, {"s", &s}, {"o", &o}};
  for (const auto& [name, other] : others) {
    TORCH_CHECK(!share_memory(y, *other), op, ": y and ", name,
                " share memory, or lie between each other's rows in one storage: clone one of them");
  }
}

}  // namespace osora
