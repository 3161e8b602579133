// SPDX-License-Identifier: Apache-2.0
// The order of writes and reads of memory that is kept from call to call, where callers are on several streams: each
// sees its own stream, and cannot order what it does not know of.
#pragma once
#include <algorithm>
#include <optional>
#include <vector>

namespace osora {

// `Streams` says what a stream and an event are and how to use them, so that tests can write down what is asked of
// them: current() -> Stream; record(stream) -> Event, all that the stream has been given so far; wait(stream, event);
// use(stream): the memory is used there, and is not given to anyone else before that is done.
template <class Streams>
class StreamOrder {
 public:
  using Stream = typename Streams::Stream;
  using Event = typename Streams::Event;

  // The current stream reads from now on what was written last.
  void read(Streams& streams) {
    const auto stream = streams.current();
    if (!written_ || stream == written_->stream || knows(stream)) return;
    streams.wait(stream, written_->event);
    streams.use(stream);
    readers_.push_back(stream);
  }

  // The current stream is about to write. What it waits for are the tails of the other streams: a reader's products are
  // queued after it was told to read, and nobody tells us when.
  void before_write(Streams& streams) {
    const auto stream = streams.current();
    if (written_ && !(written_->stream == stream)) readers_.push_back(written_->stream);
    for (const auto& reader : readers_) {
      if (!(reader == stream)) streams.wait(stream, streams.record(reader));
    }
    if (written_) streams.use(stream);
    if (!knows(stream)) readers_.push_back(stream);  // until the write is done: one that fails has begun all the same
  }

  // All writing has been queued, on the stream that is current.
  void after_write(Streams& streams) {
    const auto stream = streams.current();
    written_ = Written{stream, streams.record(stream)};
    readers_.clear();
  }

 private:
  struct Written {
    Stream stream;
    Event event;
  };

  bool knows(const Stream& stream) const {
    return std::find(readers_.begin(), readers_.end(), stream) != readers_.end();
  }

  std::optional<Written> written_;  // last
  std::vector<Stream> readers_;     // since then, without the writer
};

}  // namespace osora
