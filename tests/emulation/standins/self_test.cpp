// SPDX-License-Identifier: Apache-2.0
// The stand-ins against torch, and wrong calls that they must refuse.
//   standins_self_test          all cases, one line each: "NAME: right", "NAME: wrong: WHY", "NAME: STATUS: REFUSAL"
//   standins_self_test NAME     one case
//   standins_self_test --list   the names
#include "self_test.h"

#include <ATen/core/grad_mode.h>

#include <cstdio>

using namespace osora::standins;

namespace {

std::string outcome(const Case& each) {
  reset();
  int status = 0;
  try {
    status = each.run();
  } catch (const std::exception& error) {
    return std::string("wrong: ") + error.what();
  }
  const auto refused = refusals();
  if (refused.empty()) return status ? text("wrong: status ", status, " without a refusal") : "right";
  if (refused.size() > 1) return text("wrong: ", refused.size(), " refusals, the first: ", refused.front());
  return text(status, ": ", refused.front());
}

}  // namespace

int main(int count, char** arguments) {
  const at::NoGradGuard no_grad;
  const std::string wish = count == 2 ? arguments[1] : "";
  std::vector<Case> cases = right_cases();
  for (Case& each : wrong_cases()) cases.push_back(std::move(each));
  bool found = false;
  for (const Case& each : cases) {
    if (wish == "--list") std::printf("%s\n", each.name.c_str());
    if (!wish.empty() && wish != each.name) continue;
    found = true;
    std::printf("%s: %s\n", each.name.c_str(), outcome(each).c_str());
    const Counts left = counts();
    if (left.live_allocations || left.live_objects) {
      std::printf("%s leaves memory or handles behind\n", each.name.c_str());
      return 1;
    }
  }
  return found || wish == "--list" ? 0 : 2;
}
