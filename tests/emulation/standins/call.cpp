// SPDX-License-Identifier: Apache-2.0
#include "call.h"

#include <cstdio>
#include <list>

#include "memory.h"
#include "workspace.h"

namespace osora::standins {
namespace {

struct State {
  Settings settings;
  std::map<std::string, int64_t> calls;
  std::vector<std::string> refusals;
  std::list<Fault> faults;
  std::map<const void*, std::string> objects;
  int64_t host_waits = 0;
};

// Never destroyed, like the memory.
State& state() {
  static State& all = *new State;
  return all;
}

}  // namespace

std::recursive_mutex& mutex() {
  static std::recursive_mutex& one = *new std::recursive_mutex;
  return one;
}

CUstream_st* stream() {
  static char nothing = 0;
  return reinterpret_cast<CUstream_st*>(&nothing);
}

Settings& settings() { return state().settings; }

Counts counts() {
  const std::lock_guard lock(mutex());
  const MemoryUse use = memory_use();
  return {state().calls, state().host_waits, use.bytes,
          use.peak,      use.allocations,    static_cast<int64_t>(state().objects.size())};
}

std::vector<std::string> refusals() {
  inspect_memory(/*released_too=*/true);
  const std::lock_guard lock(mutex());
  return state().refusals;
}

void inject(const Fault& fault) {
  const std::lock_guard lock(mutex());
  state().faults.push_back(fault);
}

int64_t faults_left() {
  const std::lock_guard lock(mutex());
  return static_cast<int64_t>(state().faults.size());
}

void reset() {
  inspect_memory(/*released_too=*/true);  // what is wrong by now is told before it is forgotten, and not told again
  const std::lock_guard lock(mutex());
  State& all = state();
  all.settings = {};
  all.calls.clear();
  all.refusals.clear();
  all.faults.clear();
  all.host_waits = 0;
  forget_peak();
  forget_queries();
  forget_copies();
}

void observe_launch(const CUstream_st* on) {
  const std::lock_guard lock(mutex());
  const Call call("launch");
  if (on != stream()) record_refusal("launch", "the stream is not the current one");
}

Call::Call(const char* name) : name(name) {
  ++state().calls[name];
  for (auto planned = state().faults.begin(); planned != state().faults.end();) {
    if (planned->call == name && --planned->nth == 0) {
      fault = *planned;
      planned = state().faults.erase(planned);
    } else {
      ++planned;
    }
  }
}

void record_refusal(const std::string& call, const std::string& reason) {
  const std::lock_guard lock(mutex());
  state().refusals.push_back(call + ": " + reason);
  std::fprintf(stderr, "stand-in: %s: %s\n", call.c_str(), reason.c_str());
}

void count_host_wait() { ++state().host_waits; }

void add_object(const void* object, const char* kind) { state().objects[object] = kind; }

bool is_object(const void* object, const char* kind) {
  const auto found = state().objects.find(object);
  return found != state().objects.end() && found->second == kind;
}

void remove_object(const void* object, const char* kind) {
  need(is_object(object, kind), object, " is no live ", kind);
  state().objects.erase(object);
}

}  // namespace osora::standins
