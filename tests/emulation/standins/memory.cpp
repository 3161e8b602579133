// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <stdexcept>
#include <vector>

#include "call.h"

namespace osora::standins {
namespace {

constexpr size_t kAlignment = 512, kRedZone = 512, kQuarantine = size_t{16} << 20;
constexpr unsigned char kNaN = 0xff, kRed = 0xa5;  // NaN in float64, float32, bfloat16 and float16

struct Block {
  unsigned char* base = nullptr;  // red zone, `bytes` rounded up to kAlignment, red zone
  size_t bytes = 0;
  int64_t number = 0;
  bool reported = false;
  unsigned char* data() const { return base + kRedZone; }
  unsigned char* end() const { return base + 2 * kRedZone + (bytes + kAlignment - 1) / kAlignment * kAlignment; }
};

struct Memory {
  std::map<const unsigned char*, Block> live;  // by data()
  std::deque<Block> released;                  // kept for a while, to tell who comes back to them
  size_t released_bytes = 0;
  std::list<std::pair<const unsigned char*, size_t>> lent;
  MemoryUse use;
  int64_t next_number = 1;
};

// Never destroyed: thread-local contexts give their handles and memory back later than any static object lives.
Memory& memory() {
  static Memory& all = *new Memory;
  return all;
}

bool all_equal(const unsigned char* begin, const unsigned char* end, unsigned char value) {
  return std::all_of(begin, end, [=](unsigned char byte) { return byte == value; });
}

std::string name_of(const Block& block) { return text("allocation ", block.number, " of ", block.bytes, " bytes"); }

void inspect(Block& block, bool is_live) {
  if (block.reported) return;
  std::string wrong;
  if (!all_equal(block.base, block.data(), kRed)) wrong = "was written to in front of its begin";
  if (!all_equal(block.data() + block.bytes, block.end(), kRed)) wrong = "was written to beyond its end";
  if (!is_live && !all_equal(block.data(), block.data() + block.bytes, kNaN))
    wrong = "was written to after its release";
  if (wrong.empty()) return;
  block.reported = true;
  record_refusal("memory", name_of(block) + " " + wrong);
}

void release(const unsigned char* data) {
  const std::lock_guard lock(mutex());
  Memory& all = memory();
  const auto found = all.live.find(data);
  Block block = found->second;
  inspect(block, /*is_live=*/true);
  all.live.erase(found);
  all.use.bytes -= block.bytes;
  all.use.allocations -= 1;
  if (block.bytes > kQuarantine) {
    std::free(block.base);
    return;
  }
  std::memset(block.data(), kNaN, block.bytes);
  all.released.push_back(block);
  all.released_bytes += block.bytes;
  while (all.released_bytes > kQuarantine) {
    Block& oldest = all.released.front();
    inspect(oldest, /*is_live=*/false);
    all.released_bytes -= oldest.bytes;
    std::free(oldest.base);
    all.released.pop_front();
  }
}

}  // namespace

std::shared_ptr<void> allocate(size_t bytes) {
  const std::lock_guard lock(mutex());
  const Call call("allocate");
  if (call.fault && call.fault->status) throw std::runtime_error("out of device memory (planted)");
  Memory& all = memory();
  Block block{nullptr, bytes, all.next_number++};
  const size_t total = 2 * kRedZone + (bytes + kAlignment - 1) / kAlignment * kAlignment;
  block.base = static_cast<unsigned char*>(std::aligned_alloc(kAlignment, total));
  if (!block.base) throw std::runtime_error(text("no host memory for ", bytes, " bytes of device memory"));
  std::memset(block.base, kRed, total);
  std::memset(block.data(), kNaN, bytes);
  all.live[block.data()] = block;
  all.use.bytes += bytes;
  all.use.allocations += 1;
  all.use.peak = std::max(all.use.peak, all.use.bytes);
  return {block.data(), [](void* data) { release(static_cast<const unsigned char*>(data)); }};
}

Lent::Lent(const void* data, size_t bytes) : data_(data), bytes_(bytes) {
  const std::lock_guard lock(mutex());
  memory().lent.emplace_back(static_cast<const unsigned char*>(data), bytes);
}

Lent::~Lent() {
  const std::lock_guard lock(mutex());
  auto& lent = memory().lent;
  lent.erase(std::find(lent.begin(), lent.end(), std::pair(static_cast<const unsigned char*>(data_), bytes_)));
}

std::optional<std::string> outside(const void* data, size_t bytes) {
  if (bytes == 0) return std::nullopt;
  const auto* begin = static_cast<const unsigned char*>(data);
  const auto* end = begin + bytes;
  const Memory& all = memory();
  if (!begin) return "is null";
  for (const auto& [lent, size] : all.lent)
    if (begin >= lent && end <= lent + size) return std::nullopt;
  const auto after = all.live.upper_bound(begin);
  if (after != all.live.begin()) {
    const Block& block = std::prev(after)->second;
    if (begin < block.data() + block.bytes) {
      if (end <= block.data() + block.bytes) return std::nullopt;
      return text("ends ", end - (block.data() + block.bytes), " bytes beyond ", name_of(block));
    }
  }
  for (const Block& block : all.released)
    if (begin >= block.data() && begin < block.data() + block.bytes) return "is in released " + name_of(block);
  for (const auto& [lent, size] : all.lent)
    if (begin >= lent && begin < lent + size) return text("ends ", end - (lent + size), " bytes beyond a lent range");
  return "is not in device memory";
}

bool is_device(const void* data) {
  const auto* byte = static_cast<const unsigned char*>(data);
  const Memory& all = memory();
  const auto holds = [=](const Block& block) { return byte >= block.base && byte < block.end(); };
  return std::any_of(all.live.begin(), all.live.end(), [&](const auto& item) { return holds(item.second); }) ||
         std::any_of(all.released.begin(), all.released.end(), holds) ||
         std::any_of(all.lent.begin(), all.lent.end(),
                     [=](const auto& range) { return byte >= range.first && byte < range.first + range.second; });
}

void inspect_memory(bool released_too) {
  const std::lock_guard lock(mutex());
  for (auto& [data, block] : memory().live) inspect(block, /*is_live=*/true);
  if (!released_too) return;
  for (Block& block : memory().released) inspect(block, /*is_live=*/false);
}

MemoryUse memory_use() { return memory().use; }
void forget_peak() { memory().use.peak = memory().use.bytes; }

}  // namespace osora::standins
