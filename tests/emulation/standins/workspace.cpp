// SPDX-License-Identifier: Apache-2.0
#include "workspace.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "call.h"
#include "memory.h"

namespace osora::standins {
namespace {

std::map<std::string, WorkspaceSize>& queries() {
  static auto& all = *new std::map<std::string, WorkspaceSize>;
  return all;
}

}  // namespace

WorkspaceSize workspace_size(int64_t numbers, size_t bytes_per_number) {
  return {static_cast<size_t>(numbers) * bytes_per_number + 1009 * bytes_per_number, 101 * bytes_per_number + 3};
}

void remember_query(const std::string& parameters, WorkspaceSize size) { queries()[parameters] = size; }
void forget_queries() { queries().clear(); }

void use_workspace(const std::string& parameters, const Workspace& workspace, const std::vector<Matrix>& others,
                   bool zeroed) {
  const auto asked = queries().find(parameters);
  need(asked != queries().end(), "nobody asked for the workspace size with these parameters: ", parameters);
  const auto [device, host] = asked->second;
  need(workspace.device_bytes >= device, "the device workspace has ", workspace.device_bytes, " bytes, not ", device);
  need(workspace.host_bytes >= host, "the host workspace has ", workspace.host_bytes, " bytes, not ", host);
  need(host == 0 || workspace.host, "the host workspace is null");
  need(!workspace.host || !is_device(workspace.host), "the host workspace is device memory");
  need(reinterpret_cast<uintptr_t>(workspace.device) % 16 == 0, "the device workspace is not aligned to 16 bytes");
  const auto bytes = static_cast<int64_t>(workspace.device_bytes);
  const Matrix whole{"the device workspace", workspace.device, CUDA_R_8U, bytes, 1, bytes};
  need_device(whole);
  need_disjoint({whole}, others);
  const auto* begin = static_cast<const unsigned char*>(workspace.device);
  need(!zeroed || std::all_of(begin, begin + bytes, [](unsigned char byte) { return byte == 0; }),
       "the device workspace is not all zero, which cuSOLVER 11.7.1 needs");
  std::memset(workspace.device, 0xff, workspace.device_bytes);
  if (workspace.host) std::memset(workspace.host, 0xff, workspace.host_bytes);
}

}  // namespace osora::standins
