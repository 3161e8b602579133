// SPDX-License-Identifier: Apache-2.0
// osora::linear for autograd, as torch's own operators have it: in C++. Around a Python function of autograd a small
// layer's call and backward wait for the interpreter a second time.
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>

namespace osora {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Places in the lists of inputs and of gradients. Those that may be missing come last: a missing one has no edge in the
// graph, which needs_input_grad() counts by.
enum Input : size_t { kX, kU, kV, kS0, kS, kO, kBias, kWeight, kCast, kH, kD, kInputs };

std::tuple<Tensor, Tensor> call_linear(const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& U,
                                       const Tensor& V, const Tensor& S0, const Tensor& s, const Tensor& o) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Optional&, const Optional&, const Tensor&,
                                               const Tensor&, const Tensor&, const Tensor&, const Tensor&);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("osora::linear", "").typed<Signature>();
  return op.call(x, weight, bias, U, V, S0, s, o);
}

// y and h where h or D is there already.
std::tuple<Tensor, Tensor> call_halves(const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& U,
                                       const Tensor& V, const Tensor& S0, const Tensor& s, const Tensor& o,
                                       const Optional& given, const Optional& D) {
  using Down = Tensor(const Tensor&, const Tensor&);
  using Up = Tensor(const Tensor&, const Tensor&, const Optional&, const Optional&, const Tensor&, const Tensor&,
                    const Tensor&, const Tensor&, const Optional&);
  static const auto down = c10::Dispatcher::singleton().findSchemaOrThrow("osora::down", "").typed<Down>();
  static const auto up = c10::Dispatcher::singleton().findSchemaOrThrow("osora::up", "").typed<Up>();
  const auto h = given ? *given : down.call(x, V);
  return {up.call(x, h, weight, bias, U, S0, s, o, D), h};
}

std::tuple<Tensor, Tensor, Tensor> call_backward(const Tensor& dy, const Tensor& h, const Optional& weight,
                                                 const Tensor& U, const Tensor& V, const Tensor& S0, const Tensor& s,
                                                 const Tensor& o, bool need_x, bool need_s, bool need_o,
                                                 const Optional& D) {
  using Signature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Optional&, const Tensor&,
                                                       const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool,
                                                       bool, bool, const Optional&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("osora::linear_backward", "").typed<Signature>();
  return op.call(dy, h, weight, U, V, S0, s, o, need_x, need_s, need_o, D);
}

Optional cast_to(const Optional& t, const Tensor& like) {
  return t && t->defined() ? Optional(t->to(like.scalar_type())) : std::nullopt;
}

// Whether a backward will find D here. Activation checkpointing, which hooks what is saved, must see the same number of
// tensors when it computes a layer again, and then there is no D; offloading one costs more than its fold.
bool keeps(const Tensor& x, const Optional& D) {
  return D && x.requires_grad() && at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
}

struct Linear : torch::autograd::Function<Linear> {
  // `cast`: the frozen tensors take x's dtype, here and once more in the backward: a 16-bit copy is not worth keeping.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& U, const Tensor& V, const Tensor& S0,
                        const Tensor& s, const Tensor& o, const Optional& bias, const Optional& weight, bool cast,
                        const Optional& given, const Optional& D) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto type = x.scalar_type();
    const auto frozen = cast ? cast_to(weight, x) : weight;
    const auto left = cast ? U.to(type) : U, right = cast ? V.to(type) : V;
    auto [y, h] = given || D ? call_halves(x, frozen, bias, left, right, S0, s, o, given, D)
                             : call_linear(x, frozen, bias, left, right, S0, s, o);
    ctx->save_for_backward({h, U, V, S0, s, o, weight.value_or(Tensor()), keeps(x, D) ? *D : Tensor()});
    ctx->saved_data["bias"] = bias.has_value();
    ctx->set_materialize_grads(false);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(kInputs);
    const auto& dy = grads[0];
    if (!dy.defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const auto &h = saved[0], &S0 = saved[3], &s = saved[4], &o = saved[5];
    const auto type = h.scalar_type();
    const bool need_s = ctx->needs_input_grad(kS), need_o = ctx->needs_input_grad(kO);
    // With create_graph the operator's own derivative, which refuses, must get into the graph.
    std::optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    auto [dx, ds, d_o] = call_backward(dy, h, cast_to(saved[6], h), saved[1].to(type), saved[2].to(type), S0, s, o,
                                       ctx->needs_input_grad(kX), need_s, need_o,
                                       saved[7].defined() ? Optional(saved[7]) : std::nullopt);
    if (ctx->needs_input_grad(kX)) result[kX] = dx;
    if (need_s) result[kS] = ds.to(s.scalar_type());
    if (need_o) result[kO] = d_o.to(o.scalar_type());
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(kBias)) {
      result[kBias] = dy.reshape({-1, dy.size(-1)}).sum(0);
    }
    return result;
  }
};

Tensor linear_trained(const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& U, const Tensor& V,
                      const Tensor& S0, const Tensor& s, const Tensor& o, bool cast, const Optional& h,
                      const Optional& D) {
  return Linear::apply(x, U, V, S0, s, o, bias, weight, cast, h, D);
}

}  // namespace

TORCH_LIBRARY_IMPL(osora, CompositeImplicitAutograd, m) { m.impl("linear_trained", &linear_trained); }

}  // namespace osora
