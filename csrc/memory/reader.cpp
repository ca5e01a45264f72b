#include "memory/reader.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <system_error>
#include <utility>

#include "memory/errors.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

namespace aegaeon::memory {
namespace {

constexpr std::uint64_t kPageBytes = 4096;

struct Free {
  void operator()(std::byte* memory) const { std::free(memory); }
};

std::unique_ptr<std::byte, Free> aligned(std::size_t bytes) {
  const std::size_t rounded = (bytes + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment;
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(kDirectAlignment, rounded));
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return std::unique_ptr<std::byte, Free>(memory);
}

}  // namespace

// Of one thread, reused for each of its chunks.
struct Reader::Buffers {
  explicit Buffers(const LoadPlan& plan)
      : source(aligned(plan.longest_source_bytes + 2 * kDirectAlignment)),
        wide(aligned(plan.longest_dest_bytes + kDirectAlignment)),
        packed(aligned(plan.longest_dest_bytes + kDirectAlignment)) {}

  std::unique_ptr<std::byte, Free> source;
  std::unique_ptr<std::byte, Free> wide;
  std::unique_ptr<std::byte, Free> packed;
};

Reader::Reader(LoadPlan plan, Target target, std::uint32_t first_stage, int threads,
               Progress progress)
    : plan_(std::move(plan)),
      target_(std::move(target)),
      progress_(std::move(progress)),
      chunk_end_(plan_.chunks.size()),
      chunks_left_(plan_.stages, 0),
      stages_done_(first_stage) {
  for (const std::string& path : plan_.paths) files_.emplace_back(path);
  std::size_t first = 0;
  for (const Chunk& chunk : plan_.chunks) {
    if (chunk.file != Chunk::kZeros) {
      files_[chunk.file].check_range(chunk.file_offset, chunk.source_bytes);
    }
    first += chunk.stage < first_stage ? 1 : 0;
    ++chunks_left_[chunk.stage];
  }
  next_chunk_.store(first);
  {
    const std::lock_guard<std::mutex> held(mutex_);
    while (stages_done_ < plan_.stages && chunks_left_[stages_done_] == 0) ++stages_done_;
    progress_.publish(stages_done_);
  }
  start(static_cast<int>(std::min<std::size_t>(static_cast<std::size_t>(std::max(threads, 1)),
                                               std::max<std::size_t>(chunk_end_ - first, 1))));
}

Reader::~Reader() {
  cancel();
  join();
}

void Reader::join() {
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

// Fewer threads than asked for are slower, none is a failure.
void Reader::start(int threads) {
  for (int count = 0; count < threads; ++count) {
    try {
      const std::lock_guard<std::mutex> held(mutex_);
      threads_.emplace_back([this] { work(); });
      ++running_;
    } catch (const std::system_error& error) {
      if (threads_.empty()) {
        throw CheckpointError(std::string("no thread could be started to read weights: ") +
                              error.what() + "; raise the limit of threads (ulimit -u)");
      }
      return;
    }
  }
}

void Reader::work() {
  pthread_setname_np(pthread_self(), "reader");
  std::exception_ptr failure;
  try {
    Buffers buffers(plan_);
    while (!is_stopped_.load(std::memory_order_relaxed) && !progress_.is_unwanted()) {
      const std::size_t at = next_chunk_.fetch_add(1, std::memory_order_relaxed);
      if (at >= chunk_end_) break;
      load(plan_.chunks[at], buffers);
      finish(plan_.chunks[at].stage);
    }
  } catch (...) {
    failure = std::current_exception();
    cancel();
  }
  const std::lock_guard<std::mutex> held(mutex_);
  if (failure && !failure_) failure_ = failure;
  --running_;
  ended_.notify_all();
}

void Reader::load(const Chunk& chunk, Buffers& buffers) {
  if (chunk.file == Chunk::kZeros) {
    std::fill_n(buffers.packed.get(), chunk.dest_bytes, std::byte{0});
    write(chunk, buffers.packed.get());
    return;
  }
  const Job& job = plan_.jobs[chunk.job];
  const std::byte* data =
      files_[chunk.file].read(chunk.file_offset, chunk.source_bytes, buffers.source.get());
  bytes_read_.fetch_add(chunk.source_bytes, std::memory_order_relaxed);
  if (job.convert != Convert::none) {
    auto* wide = reinterpret_cast<float*>(buffers.wide.get());
    widen(data, wide, chunk.source_bytes / job.element_bytes, job.convert);
    data = buffers.wide.get();
  }
  if (job.layout == Layout::tiles) {
    pack_tiles(data, buffers.packed.get(), chunk.rows, job.columns(), job.out_element_bytes());
    data = buffers.packed.get();
  }
  write(chunk, data);
}

void Reader::write(const Chunk& chunk, const std::byte* data) {
  std::uint64_t done = 0;
  while (done < chunk.dest_bytes) {
    const ssize_t count = pwrite(target_.file, data + done, chunk.dest_bytes - done,
                                 static_cast<off_t>(chunk.dest_offset + done));
    if (count > 0) {
      done += static_cast<std::uint64_t>(count);
    } else if (count == 0 || errno != EINTR) {
      throw CheckpointError("cannot write weights to " + target_.path + ": " +
                            (count == 0 ? "nothing was taken" : reason(errno)) +
                            "; free memory there or make it larger (docker: --shm-size), or lower "
                            "--model-cache-budget-gb");
    }
  }
  // Mapped here, by many threads, rather than fault by fault in the first kernel. A kernel that
  // does not know this does it then.
  const std::uint64_t begin = chunk.dest_offset / kPageBytes * kPageBytes;
  madvise(const_cast<std::byte*>(target_.mapping) + begin,
          chunk.dest_offset + chunk.dest_bytes - begin, MADV_POPULATE_READ);
}

void Reader::finish(std::uint32_t stage) {
  const std::lock_guard<std::mutex> held(mutex_);
  --chunks_left_[stage];
  const std::uint32_t before = stages_done_;
  while (stages_done_ < plan_.stages && chunks_left_[stages_done_] == 0) ++stages_done_;
  if (stages_done_ > before) {
    progress_.publish(stages_done_);
  }
}

bool Reader::wait(std::int64_t timeout_ns) {
  std::unique_lock<std::mutex> held(mutex_);
  return ended_.wait_for(held, std::chrono::nanoseconds(timeout_ns),
                         [this] { return running_ == 0; });
}

void Reader::check() {
  const std::lock_guard<std::mutex> held(mutex_);
  if (failure_) {
    std::rethrow_exception(failure_);
  }
  if (stages_done_ < plan_.stages) {
    throw LoadCancelled("the load of " + target_.path + " was cancelled; acquire the model again");
  }
  for (const SourceFile& file : files_) file.check_unchanged();
}

}  // namespace aegaeon::memory
