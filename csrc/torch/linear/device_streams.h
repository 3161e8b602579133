// SPDX-License-Identifier: Apache-2.0
// torch's streams for StreamOrder, of a tensor's device, by torch's interface to any device: no header of CUDA.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <memory>

namespace osora {

class DeviceStreams {
 public:
  using Stream = c10::Stream;
  using Event = std::shared_ptr<c10::Event>;

  explicit DeviceStreams(const at::Tensor& memory) : memory_(memory), device_(memory.device().type()) {}

  Stream current() const { return device_.getStream(memory_.device()); }
  Event record(const Stream& stream) const {
    auto event = std::make_shared<c10::Event>(stream.device_type());
    event->record(stream);
    return event;
  }
  void wait(const Stream& stream, const Event& event) const { event->block(stream); }
  void use(const Stream& stream) const { device_.recordDataPtrOnStream(memory_.storage().data_ptr(), stream); }

 private:
  const at::Tensor& memory_;
  c10::impl::VirtualGuardImpl device_;
};

}  // namespace osora
