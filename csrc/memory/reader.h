// Loads a model into its data file: several threads read, pack and write chunks in stage order.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "memory/huge_pages.h"
#include "memory/load_plan.h"
#include "memory/source_file.h"

namespace aegaeon::memory {

// Where the loaded bytes go: in place as far as memory has been made ready, by pwrite behind that.
// So a full file system is an error and not a SIGBUS, and pages need not be zeroed before they are
// filled.
struct Target {
  int file;
  const std::byte* mapping;   // of the same file; its pages are mapped as they come in
  std::uint64_t ready_bytes;  // from the first; whole huge pages
  std::string path;           // for errors
};

// What a load and its owner tell each other, from any of the threads.
struct Progress {
  std::function<void(std::uint32_t)> publish;  // this many stages are whole; one call at a time
  std::function<bool()> is_unwanted;           // asked before each chunk: stop here
};

class Reader {
 public:
  // Opens the files and starts `threads` threads on the stages from `first_stage` on. Throws
  // CheckpointError.
  Reader(LoadPlan plan, Target target, std::uint32_t first_stage, int threads, Progress progress);
  ~Reader();
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // True once all threads have ended; waits for it up to `timeout_ns`.
  bool wait(std::int64_t timeout_ns);
  void join();
  // Makes the threads end after the chunk they are at.
  void cancel() { is_stopped_.store(true); }
  // After join(): throws what a thread has failed with (CheckpointError, MemoryFull), LoadCancelled
  // when it was stopped before its end; else everything is in.
  void check();
  std::uint64_t bytes_read() const { return bytes_read_.load(); }

 private:
  struct Buffers;

  void start(int threads);
  void work();
  void load(const Chunk& chunk, Buffers& buffers);
  void pack(const Chunk& chunk, const std::byte* data, Buffers& buffers);
  // Where [offset, offset + bytes) can be written in place; null where it cannot.
  std::byte* ready_at(std::uint64_t offset, std::uint64_t bytes) const;
  void write(std::uint64_t offset, const std::byte* data, std::uint64_t bytes);
  void map(const Chunk& chunk);
  void finish(std::uint32_t stage);

  LoadPlan plan_;
  Target target_;
  Progress progress_;
  HugeMapping ready_;
  std::deque<SourceFile> files_;
  std::size_t chunk_end_;
  std::atomic<std::size_t> next_chunk_;
  std::atomic<bool> is_stopped_{false};
  std::atomic<std::uint64_t> bytes_read_{0};

  std::mutex writing_;
  std::mutex mutex_;
  std::condition_variable ended_;
  std::vector<std::size_t> chunks_left_;  // of each stage
  std::uint32_t stages_done_;
  std::size_t running_ = 0;
  std::exception_ptr failure_;
  std::vector<std::thread> threads_;
};

}  // namespace aegaeon::memory
