#include "testing/cudart/streams.h"

#include <algorithm>

#include "testing/cudart/races.h"

namespace cudart {
namespace {

constexpr double kCallSeconds = 2e-6;  // what a call takes on the modelled clock
constexpr std::uint64_t kMostAtOnce = 4;

}  // namespace

void Streams::reset(Order order, std::uint64_t seed) {
  order_ = order;
  state_ = seed * 2654435761U + 12345;
  now_s_ = 0;
  std::fill(std::begin(unit_free_s_), std::end(unit_free_s_), 0.0);
  streams_.clear();
}

CUstream_st* Streams::make_stream() {
  streams_.push_back(std::make_unique<CUstream_st>());
  streams_.back()->fiber = races::new_fiber();
  return streams_.back().get();
}

// What it has been given is done nevertheless; here, at the latest now.
void Streams::destroy_stream(CUstream_st* stream) {
  if (stream->last) run(stream->last);
  stream->is_alive = false;
}

bool Streams::is_stream(const CUstream_st* stream) const {
  return std::any_of(streams_.begin(), streams_.end(),
                     [stream](const auto& one) { return one.get() == stream && one->is_alive; });
}

std::size_t Streams::alive() const {
  return static_cast<std::size_t>(std::count_if(
      streams_.begin(), streams_.end(), [](const auto& stream) { return stream->is_alive; }));
}

OperationPtr Streams::push(CUstream_st* stream, Operation operation) {
  operation.stream = stream;
  if (stream->recording) {
    stream->recording->operations.push_back(std::move(operation));
    return nullptr;
  }
  auto pushed = std::make_shared<Operation>(std::move(operation));
  pushed->stream = stream;
  pushed->issued_s = now_s_;
  races::give(&pushed->issue_tag);
  stream->queue.push_back(pushed);
  stream->last = pushed;
  now_s_ += kCallSeconds;
  progress();
  return pushed;
}

void Streams::wait(const OperationPtr& operation) {
  if (!operation) return;
  run(operation);
  races::take(&operation->done_tag);
  now_s_ = std::max(now_s_, operation->end_s);
}

void Streams::wait_for_all() {
  for (const auto& stream : streams_) wait(stream->last);
}

void Streams::abandon() {
  for (const auto& stream : streams_) {
    for (const OperationPtr& operation : stream->queue) {
      operation->is_done = true;
      operation->work = nullptr;
      operation->after.clear();
    }
    stream->queue.clear();
    races::take(&stream->end_tag);
  }
}

void Streams::progress() {
  if (order_ == Order::eager) {
    for (const auto& stream : streams_) {
      if (!stream->queue.empty()) run(stream->last);
    }
  } else if (order_ == Order::random) {
    for (std::uint64_t count = random() % kMostAtOnce; count > 0; --count) {
      CUstream_st& stream = *streams_[random() % streams_.size()];
      if (!stream.queue.empty()) run_first(stream);
    }
  }
}

void Streams::run(const OperationPtr& operation) {
  while (!operation->is_done) run_first(*operation->stream);
}

void Streams::run_first(CUstream_st& stream) {
  const OperationPtr operation = stream.queue.front();
  for (const OperationPtr& earlier : operation->after) run(earlier);
  schedule(*operation);
  {
    races::Fiber fiber(stream.fiber);
    fiber.take(&operation->issue_tag);
    for (const OperationPtr& earlier : operation->after) fiber.take(&earlier->done_tag);
    if (operation->work) operation->work();
    fiber.give(&operation->done_tag);
    fiber.give(&stream.end_tag);
  }
  operation->is_done = true;
  operation->work = nullptr;
  operation->after.clear();
  stream.queue.pop_front();
}

// When it begins and ends on the modelled clock.
void Streams::schedule(Operation& operation) {
  double start_s = std::max(operation.stream->free_s, operation.issued_s);
  for (const OperationPtr& earlier : operation.after) start_s = std::max(start_s, earlier->end_s);
  double& unit_free_s = unit_free_s_[static_cast<std::size_t>(operation.unit)];
  if (operation.unit != Unit::none) start_s = std::max(start_s, unit_free_s);
  operation.end_s = start_s + operation.seconds;
  operation.stream->free_s = operation.end_s;
  if (operation.unit != Unit::none) unit_free_s = operation.end_s;
}

std::uint64_t Streams::random() {
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  return state_;
}

}  // namespace cudart
