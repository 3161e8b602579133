// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime: one device, one stream. Work is done when it is asked for, except for copies from and to pinned
// memory: those the host may not look at, or change, before it has waited.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <utility>

#include "call.h"
#include "memory.h"

namespace osora::standins {
namespace {

constexpr int kMultiprocessors = 132, kSharedBytes = 48 * 1024, kSharedBytesOptIn = 227 * 1024;

struct Copy {
  int64_t number;
  void* to;          // pinned memory that gets `bytes`; null where the copy went to the device
  const void* from;  // pinned memory that must still hold `bytes`; null where the copy came from the device
  std::string bytes;
};

struct Runtime {
  std::map<const char*, size_t> pinned;
  std::deque<Copy> queued;
  std::map<cudaEvent_t, int64_t> events;  // the last copy before the event
  int64_t copies = 0;
};

Runtime& runtime() {
  static Runtime& all = *new Runtime;
  return all;
}

thread_local cudaError_t last_error = cudaSuccess;

template <class Body>
cudaError_t run(const char* name, Body&& body) {
  const cudaError_t status = answer(name, cudaErrorInvalidValue, std::forward<Body>(body));
  if (status != cudaSuccess) last_error = status;
  return status;
}

void need_stream(cudaStream_t given) { need(given == stream(), "the stream is not the current one"); }
void need_no_capture(const char* what) {
  need_or(cudaErrorStreamCaptureUnsupported, !settings().capturing, what, " while a graph is being captured");
}

bool is_pinned(const void* data, size_t bytes) {
  const auto* begin = static_cast<const char*>(data);
  const auto after = runtime().pinned.upper_bound(begin);
  if (after == runtime().pinned.begin()) return false;
  const auto& [pinned, size] = *std::prev(after);
  return begin < pinned + size && begin + bytes <= pinned + size;
}

// The device has done every copy up to `number`.
void finish_copies(int64_t number) {
  auto& queued = runtime().queued;
  while (!queued.empty() && queued.front().number <= number) {
    const Copy copy = std::move(queued.front());
    queued.pop_front();
    if (copy.to) std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    if (copy.from && std::memcmp(copy.from, copy.bytes.data(), copy.bytes.size()) != 0)
      record_refusal("cudaMemcpyAsync", "pinned memory was changed before its copy to the device was waited for");
  }
  inspect_memory(/*released_too=*/false);
}

void need_device_range(const char* name, const void* data, size_t bytes) {
  if (const auto why = outside(data, bytes)) throw Refused{text(name, " ", *why)};
}
void need_host(const char* name, const void* data) {
  need(data, name, " is null");
  need(!is_device(data), name, " is device memory, but the kind of the copy says host");
}

void copy_row(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (bytes == 0) return;
  Runtime& all = runtime();
  switch (kind) {
    case cudaMemcpyDeviceToDevice:
      need_device_range("the target", to, bytes);
      need_device_range("the source", from, bytes);
      std::memmove(to, from, bytes);
      return;
    case cudaMemcpyHostToDevice:
      need_device_range("the target", to, bytes);
      need_host("the source", from);
      std::memcpy(to, from, bytes);
      if (is_pinned(from, bytes)) {
        all.queued.push_back({++all.copies, nullptr, from, {static_cast<const char*>(from), bytes}});
      } else {
        need_no_capture("a copy from pageable memory");
      }
      return;
    case cudaMemcpyDeviceToHost:
      need_host("the target", to);
      need_device_range("the source", from, bytes);
      if (is_pinned(to, bytes)) {
        all.queued.push_back({++all.copies, to, nullptr, {static_cast<const char*>(from), bytes}});
        std::memset(to, 0xff, bytes);
      } else {
        need_no_capture("a copy to pageable memory");
        std::memcpy(to, from, bytes);
      }
      return;
    default:
      throw Refused{text("a copy of kind ", static_cast<int>(kind), " is not modelled"),
                    cudaErrorInvalidMemcpyDirection};
  }
}

// A copy to pageable memory returns once it is done: the host has waited for everything before it.
void wait_if_pageable(const void* to, size_t bytes, cudaMemcpyKind kind) {
  if (kind != cudaMemcpyDeviceToHost || bytes == 0 || is_pinned(to, bytes)) return;
  count_host_wait();
  finish_copies(runtime().copies);
}

void pin(void** data, size_t bytes) {
  need(data, "the place for the address is null");
  need_no_capture("pinned memory was asked for");
  *data = std::malloc(std::max<size_t>(bytes, 1));
  std::memset(*data, 0xff, bytes);
  runtime().pinned[static_cast<const char*>(*data)] = bytes;
  add_object(*data, "pinned memory");
}

}  // namespace

void forget_copies() { runtime().queued.clear(); }

}  // namespace osora::standins

using namespace osora::standins;

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  return run("cudaGetDevice", [&](const Call&) {
    need(device, "the place for the device is null");
    *device = 0;
  });
}

cudaError_t cudaSetDevice(int device) {
  return run("cudaSetDevice",
             [&](const Call&) { need_or(cudaErrorInvalidDevice, device == 0, "there is no device ", device); });
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    default:
      return "another cudaError";
  }
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    default:
      return "another error";
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return run("cudaDeviceGetAttribute", [&](const Call&) {
    need(value, "the place for the value is null");
    need_or(cudaErrorInvalidDevice, device == 0, "there is no device ", device);
    switch (attribute) {
      case cudaDevAttrComputeCapabilityMajor:
        *value = settings().capability / 10;
        return;
      case cudaDevAttrComputeCapabilityMinor:
        *value = settings().capability % 10;
        return;
      case cudaDevAttrMultiProcessorCount:
        *value = kMultiprocessors;
        return;
      case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = kSharedBytes;
        return;
      case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = kSharedBytesOptIn;
        return;
      default:
        throw Refused{text("attribute ", static_cast<int>(attribute), " is not modelled")};
    }
  });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t given) {
  return run("cudaMemcpyAsync", [&](const Call&) {
    need_stream(given);
    copy_row(to, from, bytes, kind);
    wait_if_pageable(to, bytes, kind);
  });
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t given) {
  return run("cudaMemcpy2DAsync", [&](const Call&) {
    need_stream(given);
    need_or(cudaErrorInvalidPitchValue, width <= to_pitch && width <= from_pitch, "rows of ", width,
            " bytes, but pitches of ", to_pitch, " and ", from_pitch);
    for (size_t row = 0; row < height; ++row)
      copy_row(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width, kind);
    if (height) wait_if_pageable(to, width, kind);
  });
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t given) {
  return run("cudaMemsetAsync", [&](const Call&) {
    need_stream(given);
    need_device_range("the target", data, bytes);
    if (bytes) std::memset(data, value, bytes);
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t given) {
  return run("cudaStreamSynchronize", [&](const Call&) {
    need_stream(given);
    need_no_capture("the host waits");
    count_host_wait();
    finish_copies(runtime().copies);
  });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t given, cudaStreamCaptureStatus* status) {
  return run("cudaStreamIsCapturing", [&](const Call&) {
    need_stream(given);
    need(status, "the place for the status is null");
    *status = settings().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  });
}

cudaError_t cudaMallocHost(void** data, size_t bytes) {
  return run("cudaMallocHost", [&](const Call&) { pin(data, bytes); });
}
cudaError_t cudaHostAlloc(void** data, size_t bytes, unsigned) {
  return run("cudaHostAlloc", [&](const Call&) { pin(data, bytes); });
}
cudaError_t cudaFreeHost(void* data) {
  return run("cudaFreeHost", [&](const Call&) {
    if (!data) return;
    remove_object(data, "pinned memory");
    need_no_capture("pinned memory was given back");
    finish_copies(runtime().copies);  // the real call waits for the device
    runtime().pinned.erase(static_cast<const char*>(data));
    std::free(data);
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return run("cudaEventCreateWithFlags", [&](const Call&) {
    need(event, "the place for the event is null");
    *event = reinterpret_cast<cudaEvent_t>(new char);
    add_object(*event, "event");
    runtime().events[*event] = 0;
  });
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t given) {
  return run("cudaEventRecord", [&](const Call&) {
    need_stream(given);
    need(is_object(event, "event"), event, " is no live event");
    runtime().events[event] = runtime().copies;
  });
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return run("cudaEventSynchronize", [&](const Call&) {
    need(is_object(event, "event"), event, " is no live event");
    need_no_capture("the host waits");
    count_host_wait();
    finish_copies(runtime().events[event]);
  });
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return run("cudaEventDestroy", [&](const Call&) {
    remove_object(event, "event");
    runtime().events.erase(event);
    delete reinterpret_cast<char*>(event);
  });
}

}  // extern "C"
