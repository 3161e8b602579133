// SPDX-License-Identifier: Apache-2.0
// The frame around every stand-in: count the call, let a planted fault happen, turn a refusal into a status.
#pragma once
#include <exception>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>

#include "standins.h"

namespace osora::standins {

// One lock for everything: the stand-ins run one call at a time.
std::recursive_mutex& mutex();

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Thrown inside a stand-in, caught by answer(). `status` 0: the library's INVALID_VALUE.
struct Refused {
  std::string reason;
  int status = 0;
};

template <class... Parts>
void need(bool condition, const Parts&... parts) {
  if (!condition) throw Refused{text(parts...)};
}
template <class... Parts>
void need_or(int status, bool condition, const Parts&... parts) {
  if (!condition) throw Refused{text(parts...), status};
}

void record_refusal(const std::string& call, const std::string& reason);
void count_host_wait();

struct Call {
  explicit Call(const char* name);
  // What to write as the info of this matrix: `computed`, unless a fault is planted there.
  int info(int64_t matrix, int computed) const {
    return fault && fault->info && fault->matrix == matrix ? fault->info : computed;
  }
  const char* name;
  std::optional<Fault> fault;
};

template <class Status, class Body>
Status answer(const char* name, Status invalid, Body&& body) {
  const std::lock_guard lock(mutex());
  try {
    const Call call(name);
    if (call.fault && call.fault->status) return static_cast<Status>(call.fault->status);
    body(call);
    return static_cast<Status>(0);
  } catch (const Refused& refused) {
    record_refusal(name, refused.reason);
    return refused.status ? static_cast<Status>(refused.status) : invalid;
  } catch (const std::exception& error) {
    record_refusal(name, text("the stand-in itself failed: ", error.what()));
    return invalid;
  }
}

// Objects that a library hands out: handles, parameters, events. Known from creation to destruction.
void add_object(const void* object, const char* kind);
void remove_object(const void* object, const char* kind);  // refuses what is not live
bool is_object(const void* object, const char* kind);

// Copies that a real device would still have to make; runtime.cpp.
void forget_copies();

}  // namespace osora::standins
