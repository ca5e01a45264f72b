// Streams and events of the stand-in: operations in queues, and when they run. One lock is over all
// of it, whatever thread calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "testing/cudart/control.h"

namespace cudart {

// What takes an operation's time on the modelled clock.
enum class Unit : std::uint8_t { none, inward, outward, inside };

struct Operation {
  std::function<void()> work;  // may be none
  CUstream_st* stream = nullptr;
  std::vector<std::shared_ptr<Operation>> after;
  Unit unit = Unit::none;
  double seconds = 0;
  double issued_s = 0;
  double end_s = 0;
  bool is_done = false;
  char issue_tag = 0;  // addresses that the thread sanitizer knows them by
  char done_tag = 0;
};

using OperationPtr = std::shared_ptr<Operation>;

}  // namespace cudart

// What was recorded of a stream.
struct CUgraph_st {
  std::vector<cudart::Operation> operations;
  bool is_void = false;
};

struct CUstream_st {
  std::deque<cudart::OperationPtr> queue;
  cudart::OperationPtr last;  // given to it
  double free_s = 0;
  void* fiber = nullptr;
  std::unique_ptr<CUgraph_st> recording;  // instead of running
  bool is_alive = true;
  char end_tag = 0;  // of what has run so far
};

struct CUevent_st {
  cudart::OperationPtr recorded;
};

namespace cudart {

class Streams {
 public:
  void reset(Order order, std::uint64_t seed);

  CUstream_st* make_stream();
  void destroy_stream(CUstream_st* stream);
  bool is_stream(const CUstream_st* stream) const;
  std::size_t alive() const;

  // Queues an operation; `after` is what it waits for beside the one before it.
  OperationPtr push(CUstream_st* stream, Operation operation);
  // As the calling thread: returns when `operation`, which may be null, has run.
  void wait(const OperationPtr& operation);
  void wait_for_all();
  // As the calling thread: nothing of what streams were given is done any more, nor under way.
  void abandon();
  double now_s() const { return now_s_; }

 private:
  void progress();
  void run(const OperationPtr& operation);
  void run_first(CUstream_st& stream);
  void schedule(Operation& operation);
  std::uint64_t random();

  Order order_ = Order::eager;
  std::uint64_t state_ = 1;
  double now_s_ = 0;
  double unit_free_s_[4] = {};
  std::vector<std::unique_ptr<CUstream_st>> streams_;  // also dead ones: events may point there
};

}  // namespace cudart
