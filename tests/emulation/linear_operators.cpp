// SPDX-License-Identifier: Apache-2.0
// The kernels around the linear operator, by the emulator on CPU tensors: steps that no operator of torch.ops.osora is
// alone. Through the same glue as on a card.
#include <torch/library.h>

#include "core/linear_plan.h"
#include "torch/linear/decode_launch.h"
#include "torch/linear/multi_launch.h"
#include "torch/linear/stream_order.h"

namespace osora {
namespace {

// osora::linear as core::LinearPlan::kDecode computes it; with `index`, s [A, r] and o [A, d].
std::tuple<at::Tensor, at::Tensor> decode_emulated(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                                   const std::optional<at::Tensor>& bias, const at::Tensor& U,
                                                   const at::Tensor& V, const at::Tensor& S0, const at::Tensor& s,
                                                   const at::Tensor& o, const std::optional<at::Tensor>& ranks,
                                                   const std::optional<at::Tensor>& index) {
  if (index) {
    TORCH_CHECK(s.size(1) == U.size(1) && o.size(1) == U.size(0) && o.size(0) == s.size(0) &&
                index->size(0) == x.size(0) && (!ranks || ranks->size(0) == s.size(0)));
  } else {
    check_linear(x, weight, bias, U, V, S0, s, o);
  }
  TORCH_CHECK(x.dim() == 2 && x.size(0) <= core::kMaxDecodeRows);
  return decode_launch(decode_inputs(x, weight, bias, U, V, S0, s, o, ranks, index), /*stream=*/nullptr);
}

// 0: split, 1: decode.
int64_t linear_plan(int64_t n, int64_t d, int64_t k, int64_t r, bool cuda, bool row_major) {
  return static_cast<int64_t>(core::linear_plan(n, d, k, r, cuda, row_major));
}

at::Tensor multi_scale_emulated(const at::Tensor& h, const at::Tensor& S0, const at::Tensor& s,
                                const std::optional<at::Tensor>& ranks, const at::Tensor& index) {
  TORCH_CHECK(S0.size(0) == h.size(1) && s.size(1) == h.size(1) && index.size(0) == h.size(0) &&
              (!ranks || ranks->size(0) == s.size(0)));
  return multi_scale_launch(h, S0, s, ranks, index, /*stream=*/nullptr);
}

void multi_combine_emulated(const at::Tensor& y, const at::Tensor& t, const at::Tensor& o, const at::Tensor& index) {
  TORCH_CHECK(t.size(0) == 2 * y.size(0) && t.size(1) == y.size(1) && o.size(1) == y.size(1) &&
              index.size(0) == y.size(0));
  multi_combine_launch(y, t, o, index, /*stream=*/nullptr);
}

// Streams that only note what is asked of them, in threes: what, stream, and the number of the event or 0.
struct NotedStreams {
  using Stream = int64_t;
  using Event = int64_t;
  enum What : int64_t { kRead, kWrite, kRecord, kWait, kUse };

  Stream current() const { return now; }
  Event record(Stream stream) {
    note(kRecord, stream, ++events);
    return events;
  }
  void wait(Stream stream, Event event) { note(kWait, stream, event); }
  void use(Stream stream) { note(kUse, stream, 0); }
  void note(What what, Stream stream, Event event) { notes.insert(notes.end(), {what, stream, event}); }

  Stream now = 0;
  Event events = 0;
  std::vector<int64_t> notes;
};

// script: reads (0) and writes (1) of one memory, each followed by its stream -> what StreamOrder asks for around them.
std::vector<int64_t> stream_order(at::IntArrayRef script) {
  NotedStreams streams;
  StreamOrder<NotedStreams> order;
  for (size_t i = 0; i + 1 < script.size(); i += 2) {
    streams.now = script[i + 1];
    if (script[i] == NotedStreams::kRead) {
      order.read(streams);
      streams.note(NotedStreams::kRead, streams.now, 0);
    } else {
      order.before_write(streams);
      streams.note(NotedStreams::kWrite, streams.now, 0);
      order.after_write(streams);
    }
  }
  return streams.notes;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(osora_emulated, m) {
  m.def(
      "decode(Tensor x, Tensor? weight, Tensor? bias, Tensor U, Tensor V, Tensor S0, Tensor s, Tensor o,"
      " Tensor? ranks=None, Tensor? index=None) -> (Tensor, Tensor)");
  m.def("linear_plan", &linear_plan);
  m.def("stream_order", &stream_order);
  m.def("multi_scale(Tensor h, Tensor S0, Tensor s, Tensor? ranks, Tensor index) -> Tensor");
  m.def("multi_combine(Tensor(a!) y, Tensor t, Tensor o, Tensor index) -> ()");
}
TORCH_LIBRARY_IMPL(osora_emulated, CPU, m) {
  m.impl("decode", &decode_emulated);
  m.impl("multi_scale", &multi_scale_emulated);
  m.impl("multi_combine", &multi_combine_emulated);
}

}  // namespace osora
