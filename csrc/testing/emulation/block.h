// Runs a kernel's threads on the CPU: block after block, each thread a fiber that gives way where
// it waits for others. What a CUDA program must not do ends the launch with an error that says so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct CUstream_st;

namespace aegaeon::emulation {

struct Extent {
  unsigned x = 1, y = 1, z = 1;
};

constexpr unsigned kWarpLanes = 32;
// Most that a lane gives to others at once, in words of 32 bits.
constexpr unsigned kGivenWords = 16;
// What a block of any device that we compile for may have.
constexpr std::size_t kMostSharedBytes = 163 << 10;
constexpr unsigned kMostThreads = 1024;

// In which order blocks and threads take their turns, and when asynchronous copies happen.
struct Schedule {
  std::uint64_t seed = 0;        // 0: ascending, 1: descending, others: at random
  bool is_copying_late = false;  // when they are waited for; else at once
};

Schedule& schedule();

// Who is given launches on a stream, to run them when their turn comes; nobody: they run at once.
using StreamQueue = void (*)(CUstream_st* stream, std::function<void()> work);
StreamQueue& stream_queue();

struct Launch {
  Extent grid;
  Extent block;
  std::size_t shared_bytes;
  void (*body)(void*);  // called with `context` on every thread
  void* context;
};

// Throws std::runtime_error: the launch is not possible, or threads wait for each other in vain, or
// in a way that is undefined on a device.
void run(const Launch& launch);

// Below is for code on a thread of a block.
const Extent& thread_index();
const Extent& block_index();
const Extent& block_extent();
const Extent& grid_extent();
// The block's shared memory: exactly as many bytes as were asked for, filled with NaN.
void* shared_memory();

// Returns whether any thread of the block gave true. All of its threads must come.
bool sync_block(bool claim);

// What lanes of a warp do together. All 32 of them must come, and for the same thing.
enum class Meeting : int { sync, shuffle, vote, matrices, multiply };

// What all lanes gave, [lane][word]; valid until the lane's next meeting.
using Given = const std::uint32_t (*)[kGivenWords];
Given meet(Meeting meeting, const std::uint32_t* given, unsigned words);

unsigned lane_index();

// Ends the launch: run() throws std::runtime_error.
[[noreturn]] void stop_block(const char* why);

// Where a thread's asynchronous copies wait; the caller's own.
struct CopyQueue;
CopyQueue& copy_queue();

}  // namespace aegaeon::emulation
