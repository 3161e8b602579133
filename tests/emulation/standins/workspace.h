// SPDX-License-Identifier: Apache-2.0
// Workspaces: the size must have been asked for with the same parameters, and what is in them does not survive the
// call.
#pragma once
#include <cstddef>
#include <string>

#include "arrays.h"

namespace osora::standins {

struct WorkspaceSize {
  size_t device = 0, host = 0;  // bytes
};
// Never 0 and of no round size, so that nobody gets by without asking: `numbers` are those that the routine keeps
// around.
WorkspaceSize workspace_size(int64_t numbers, size_t bytes_per_number);

// `parameters`: the routine's name and all that its size may depend on.
void remember_query(const std::string& parameters, WorkspaceSize size);
void forget_queries();

struct Workspace {
  void* device = nullptr;
  size_t device_bytes = 0;
  void* host = nullptr;
  size_t host_bytes = 0;
};
// Checks size and place, and fills both parts with NaN. `others`: the operands, which must lie elsewhere.
void use_workspace(const std::string& parameters, const Workspace& workspace, const std::vector<Matrix>& others,
                   bool zeroed = false);

}  // namespace osora::standins
