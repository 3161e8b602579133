// SPDX-License-Identifier: Apache-2.0
// Device memory of the stand-ins: ranges of host memory that are known to be lent.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace osora::standins {

// `bytes` full of NaN, aligned to 512 bytes as torch's allocator does it, between red zones that are looked at when the
// memory goes back and whenever the host waits for the device. Throws std::runtime_error where a fault says so.
std::shared_ptr<void> allocate(size_t bytes);

// Memory of somebody else (a tensor's) that counts as device memory as long as this lives.
class Lent {
 public:
  Lent(const void* data, size_t bytes);
  ~Lent();
  Lent(const Lent&) = delete;
  Lent& operator=(const Lent&) = delete;

 private:
  const void* data_;
  size_t bytes_;
};

// Nothing where [data, data + bytes) lies inside one live range; else why not.
std::optional<std::string> outside(const void* data, size_t bytes);
// Some byte of it is device memory, live or released.
bool is_device(const void* data);

// Refuses (refusals()) once for each red zone, or released block, that was written to. Released memory is much to read.
void inspect_memory(bool released_too);

struct MemoryUse {
  int64_t bytes = 0, peak = 0, allocations = 0;
};
MemoryUse memory_use();
void forget_peak();

}  // namespace osora::standins
