// Not to be compiled under a sanitizer: threads' states are read across fibers, and what lanes give
// each other goes through registers on a device, which orders nothing in memory.

#include "testing/emulation/block.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "testing/emulation/copies.h"
#include "testing/emulation/fiber.h"

namespace aegaeon::emulation {
namespace {

constexpr unsigned kKeptMemories = 64;

enum class State { runs, in_block_sync, in_meeting, returned };

struct Warp {
  std::uint32_t given[2][kWarpLanes][kGivenWords];  // what is read while the next is written
  unsigned arrived = 0, phase = 0;
  Meeting meeting = Meeting::sync;
  char order[2];
};

struct Thread {
  Extent index;
  unsigned number = 0;
  State state = State::returned;
  CopyQueue copies;
  std::unique_ptr<Fiber> fiber;
};

class Block {
 public:
  void run(const Launch& launch);

  bool sync(bool claim);
  Given meet(Meeting meeting, const std::uint32_t* given, unsigned words);
  [[noreturn]] void stop(const char* why);

  const Launch* launch_ = nullptr;
  Thread* thread_ = nullptr;
  Extent index_;
  unsigned char* shared_ = nullptr;

 private:
  static void live(void* self);
  void make_threads();
  void run_block();
  bool run_round(unsigned round);
  void explain_standstill();
  void give_way(State state);
  unsigned random(unsigned below);

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<std::unique_ptr<Warp>> warps_;
  unsigned count_ = 0, living_ = 0, arrived_ = 0, phase_ = 0;
  bool any_[2] = {};
  std::uint64_t random_ = 0;
  std::string error_;
  char order_[2], begin_order_, end_order_;
};

thread_local std::unique_ptr<Block> current;

Block& block() { return *current; }

void Block::stop(const char* why) {
  if (error_.empty()) error_ = why;
  give_way(State::returned);
  std::abort();  // nobody resumes a thread of a stopped launch
}

void Block::give_way(State state) {
  thread_->state = state;
  thread_->fiber->give_way();
}

unsigned Block::random(unsigned below) {
  random_ = random_ * 6364136223846793005U + 1442695040888963407U;
  return static_cast<unsigned>(random_ >> 33) % below;
}

// A fiber is a thread of block after block.
void Block::live(void* self) {
  Block& block = *static_cast<Block*>(self);
  for (;;) {
    acquire_order(&block.begin_order_);
    block.launch_->body(block.launch_->context);
    if (block.thread_->copies.count != 0) block.stop("a thread returned with copies in flight");
    release_order(&block.end_order_);
    --block.living_;
    block.give_way(State::returned);
  }
}

bool Block::sync(bool claim) {
  if (living_ != count_) stop("__syncthreads after some threads have returned");
  const unsigned phase = phase_ % 2;
  release_order(&order_[phase]);
  if (arrived_ == 0) any_[phase] = false;
  any_[phase] |= claim;
  if (++arrived_ == count_) {
    arrived_ = 0;
    ++phase_;
    for (const auto& thread : threads_) {
      if (thread->state == State::in_block_sync) thread->state = State::runs;
    }
  } else {
    give_way(State::in_block_sync);
  }
  acquire_order(&order_[phase]);
  return any_[phase];
}

Given Block::meet(Meeting meeting, const std::uint32_t* given, unsigned words) {
  Warp& warp = *warps_[thread_->number / kWarpLanes];
  const unsigned phase = warp.phase % 2, lane = thread_->number % kWarpLanes;
  if (warp.arrived > 0 && warp.meeting != meeting) stop("lanes of a warp wait for unlike things");
  warp.meeting = meeting;
  for (unsigned at = 0; at < words; ++at) warp.given[phase][lane][at] = given[at];
  if (meeting == Meeting::sync) release_order(&warp.order[phase]);
  if (++warp.arrived == kWarpLanes) {
    warp.arrived = 0;
    ++warp.phase;
    const unsigned first = thread_->number - lane;
    for (unsigned at = 0; at < kWarpLanes; ++at) {
      if (at != lane) threads_[first + at]->state = State::runs;
    }
  } else {
    give_way(State::in_meeting);
  }
  if (meeting == Meeting::sync) acquire_order(&warp.order[phase]);
  return warp.given[phase];
}

void Block::make_threads() {
  const Extent& extent = launch_->block;
  count_ = extent.x * extent.y * extent.z;
  while (threads_.size() < count_) {
    threads_.push_back(std::make_unique<Thread>());
    threads_.back()->fiber = std::make_unique<Fiber>(&Block::live, this);
    if (threads_.size() % kWarpLanes == 1) warps_.push_back(std::make_unique<Warp>());
  }
  for (unsigned number = 0; number < count_; ++number) {
    Thread& thread = *threads_[number];
    thread.index = {number % extent.x, number / extent.x % extent.y,
                    number / (extent.x * extent.y)};
    thread.number = number;
  }
}

// Gives every thread that can run its turn; false where none can.
bool Block::run_round(unsigned round) {
  const std::uint64_t seed = schedule().seed;
  const unsigned first = seed > 1 ? random(count_) : 0;
  const bool is_descending = seed == 1 || (seed > 1 && round % 2 == 1);
  bool has_run = false;
  for (unsigned at = 0; at < count_ && error_.empty(); ++at) {
    const unsigned number = (first + (is_descending ? count_ - 1 - at : at)) % count_;
    thread_ = threads_[number].get();
    if (thread_->state != State::runs) continue;
    has_run = true;
    thread_->fiber->resume();
  }
  return has_run;
}

void Block::explain_standstill() {
  unsigned syncing = 0, meeting = 0;
  for (unsigned number = 0; number < count_; ++number) {
    syncing += threads_[number]->state == State::in_block_sync ? 1 : 0;
    meeting += threads_[number]->state == State::in_meeting ? 1 : 0;
  }
  error_ = "deadlock: " + std::to_string(syncing) + " threads in __syncthreads, " +
           std::to_string(meeting) + " among lanes, " + std::to_string(count_ - living_) +
           " returned";
}

void Block::run_block() {
  living_ = count_;
  arrived_ = 0;
  for (const auto& warp : warps_) warp->arrived = 0;
  for (unsigned number = 0; number < count_; ++number) {
    threads_[number]->state = State::runs;
  }
  for (unsigned round = 0; living_ > 0 && error_.empty(); ++round) {
    if (!run_round(round) && error_.empty()) explain_standstill();
  }
}

void Block::run(const Launch& launch) {
  launch_ = &launch;
  make_threads();
  random_ = schedule().seed;
  const Extent& grid = launch.grid;
  const unsigned total = grid.x * grid.y * grid.z;
  // Blocks are in no order, but for threads of one number, which are one fiber: so no two blocks
  // near each other share memory.
  std::vector<std::unique_ptr<unsigned char[]>> kept(kKeptMemories);
  for (unsigned at = 0; at < total && error_.empty(); ++at) {
    const unsigned number = schedule().seed % 2 == 0 ? at : total - 1 - at;
    index_ = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
    if (at >= kKeptMemories) acquire_order(&end_order_);
    kept[at % kKeptMemories].reset(new unsigned char[launch.shared_bytes]);
    shared_ = kept[at % kKeptMemories].get();
    std::memset(shared_, 0xFF, launch.shared_bytes);
    release_order(&begin_order_);
    run_block();
  }
  acquire_order(&end_order_);
  if (!error_.empty()) {
    const std::string where = " in block (" + std::to_string(index_.x) + ", " +
                              std::to_string(index_.y) + ", " + std::to_string(index_.z) + ")";
    throw std::runtime_error(error_ + where);
  }
}

}  // namespace

StreamQueue& stream_queue() {
  static StreamQueue queue = nullptr;
  return queue;
}

Schedule& schedule() {
  static Schedule schedule;
  return schedule;
}

void run(const Launch& launch) {
  const Extent &block = launch.block, &grid = launch.grid;
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kMostThreads || threads % kWarpLanes != 0) {
    throw std::runtime_error("blocks of " + std::to_string(threads) + " threads");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("a grid that no device takes");
  }
  if (launch.shared_bytes > kMostSharedBytes) {
    throw std::runtime_error(std::to_string(launch.shared_bytes) + " bytes of shared memory");
  }
  if (current == nullptr) current = std::make_unique<Block>();
  try {
    current->run(launch);
  } catch (...) {
    current.reset();  // with all threads that have not come to their ends
    throw;
  }
}

const Extent& thread_index() { return block().thread_->index; }
const Extent& block_index() { return block().index_; }
const Extent& block_extent() { return block().launch_->block; }
const Extent& grid_extent() { return block().launch_->grid; }
void* shared_memory() { return block().shared_; }
bool sync_block(bool claim) { return block().sync(claim); }
unsigned lane_index() { return block().thread_->number % kWarpLanes; }
CopyQueue& copy_queue() { return block().thread_->copies; }
void stop_block(const char* why) { block().stop(why); }

Given meet(Meeting meeting, const std::uint32_t* given, unsigned words) {
  return block().meet(meeting, given, words);
}

}  // namespace aegaeon::emulation
