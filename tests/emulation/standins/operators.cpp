// SPDX-License-Identifier: Apache-2.0
// torch.ops.osora_standins: the hooks of standins.h for Python.
#include <torch/library.h>

#include "standins.h"

namespace osora::standins {
namespace {

// "host_waits", "live_bytes", "peak_bytes", "live_allocations", "live_objects"; and each call by its name.
c10::Dict<std::string, int64_t> counts_by_name() {
  const Counts now = counts();
  c10::Dict<std::string, int64_t> all;
  all.insert("host_waits", now.host_waits);
  all.insert("live_bytes", now.live_bytes);
  all.insert("peak_bytes", now.peak_bytes);
  all.insert("live_allocations", now.live_allocations);
  all.insert("live_objects", now.live_objects);
  for (const auto& [name, count] : now.calls) all.insert(name, count);
  return all;
}

void inject_fault(const std::string& call, int64_t nth, int64_t status, int64_t info, int64_t matrix) {
  inject({call, nth, static_cast<int>(status), static_cast<int>(info), matrix});
}

void set(const std::string& name, int64_t value) {
  Settings& all = settings();
  if (name == "capability") {
    all.capability = static_cast<int>(value);
  } else if (name == "cublas_version") {
    all.cublas_version = static_cast<int>(value);
  } else if (name == "cusolver_version") {
    all.cusolver_version = static_cast<int>(value);
  } else if (name == "capturing") {
    all.capturing = value != 0;
  } else if (name == "cheap_batch") {
    all.cheap_batch = value;
  } else if (name == "packs_of_16_bytes") {
    all.packs_of_16_bytes = value != 0;
  } else if (name == "rounding") {
    all.rounding = value;
  } else if (name == "own_workspace") {
    all.own_workspace = value != 0;
  } else {
    TORCH_CHECK(false, "the stand-ins have no setting ", name);
  }
}

}  // namespace

TORCH_LIBRARY(osora_standins, m) {
  m.def("reset", &reset);
  m.def("refusals", &refusals);
  m.def("counts", &counts_by_name);
  m.def("inject(str call, int nth=1, int status=0, int info=0, int matrix=0) -> ()", &inject_fault);
  m.def("faults_left", &faults_left);
  m.def("set", &set);
}

}  // namespace osora::standins
