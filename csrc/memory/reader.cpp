#include "memory/reader.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <system_error>
#include <utility>

#include "memory/errors.h"
#include "memory/huge_pages.h"
#include "memory/quantize.h"
#include "memory/source_buffer.h"

namespace aegaeon::memory {
namespace {

constexpr std::uint64_t kPageBytes = 4096;

void touch(const std::byte* at) { *static_cast<const volatile std::byte*>(at); }

// Makes tiles of `rows` rows at `source`, which are float32 already where that is what they become.
void make_tiles(const Job& job, const std::byte* source, std::byte* out, std::uint64_t rows,
                Fate fate) {
  if (job.layout == Layout::tiles) {
    pack_tiles(source, out, rows, job.columns(), job.out_element_bytes(), fate);
  } else if (!quantize_tiles(source, out, rows, job.columns(), job.convert, fate)) {
    throw CheckpointError(job.file.path + ": the tensor at byte " +
                          std::to_string(job.file_offset) +
                          " holds infinity or NaN, which int8 cannot hold; serve the model as it "
                          "is (--quantize none), or restore the file");
  }
}

}  // namespace

// Of one thread, reused for each of its chunks.
struct Reader::Buffers {
  explicit Buffers(const LoadPlan& plan)
      : source(plan.longest_source_bytes + 2 * kDirectAlignment),
        wide(aligned_memory(plan.longest_slice_bytes, kDirectAlignment)),
        packed(aligned_memory(plan.longest_slice_bytes, kDirectAlignment)) {}

  SourceBuffer source;
  AlignedMemory wide;
  AlignedMemory packed;
};

Reader::Reader(LoadPlan plan, Target target, std::uint32_t first_stage, int threads,
               Progress progress)
    : plan_(std::move(plan)),
      target_(std::move(target)),
      progress_(std::move(progress)),
      ready_(target_.ready_bytes == 0
                 ? HugeMapping()
                 : HugeMapping(target_.file, target_.ready_bytes, PROT_READ | PROT_WRITE)),
      chunk_end_(plan_.chunks.size()),
      chunks_left_(plan_.stages, 0),
      stages_done_(first_stage) {
  if (ready_.address() == nullptr) target_.ready_bytes = 0;
  for (const PlannedFile& file : plan_.files) files_.emplace_back(file);
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
    std::fill_n(buffers.packed.get(), std::min(chunk.dest_bytes, kSliceBytes), std::byte{0});
    for (std::uint64_t at = 0; at < chunk.dest_bytes; at += kSliceBytes) {
      write(chunk.dest_offset + at, buffers.packed.get(),
            std::min(kSliceBytes, chunk.dest_bytes - at));
    }
  } else {
    const std::byte* data =
        files_[chunk.file].read(chunk.file_offset, chunk.source_bytes, buffers.source.get());
    bytes_read_.fetch_add(chunk.source_bytes, std::memory_order_relaxed);
    if (plan_.jobs[chunk.job].is_plain()) {
      write(chunk.dest_offset, data, chunk.dest_bytes);
    } else {
      pack(chunk, data, buffers);
    }
  }
  map(chunk);
}

// Slice by slice, so that what has been packed is still in the processor's cache when it is copied.
void Reader::pack(const Chunk& chunk, const std::byte* data, Buffers& buffers) {
  const Job& job = plan_.jobs[chunk.job];
  const std::uint64_t row_bytes = chunk.source_bytes / chunk.rows;
  const std::uint64_t out_row_bytes = chunk.dest_bytes / job.rows_out(chunk.rows);
  const bool is_widened = job.convert != Convert::none && job.layout != Layout::quantized_tiles;
  const std::uint64_t step = plan_.slice_rows(chunk);
  for (std::uint64_t row = 0; row < chunk.rows; row += step) {
    const std::uint64_t count = std::min(step, chunk.rows - row);
    const std::byte* out = data + row * row_bytes;
    if (is_widened) {
      const std::uint64_t elements = count * (row_bytes / job.element_bytes);
      widen(out, reinterpret_cast<float*>(buffers.wide.get()), elements, job.convert);
      out = buffers.wide.get();
    }
    const std::uint64_t at = chunk.dest_offset + row * out_row_bytes;
    const std::uint64_t bytes = job.rows_out(count) * out_row_bytes;
    if (job.is_tiled()) {
      std::byte* const ready = ready_at(at, bytes);
      std::byte* const packed = ready == nullptr ? buffers.packed.get() : ready;
      make_tiles(job, out, packed, count, ready == nullptr ? Fate::copied : Fate::kept);
      if (ready != nullptr) continue;
      out = packed;
    }
    write(at, out, bytes);
  }
}

std::byte* Reader::ready_at(std::uint64_t offset, std::uint64_t bytes) const {
  return offset + bytes <= target_.ready_bytes ? ready_.address() + offset : nullptr;
}

// One thread at a time: the kernel would have the others wait for the file too, and spin meanwhile
// on processors that somebody packs or computes on.
void Reader::write(std::uint64_t offset, const std::byte* data, std::uint64_t bytes) {
  if (std::byte* const ready = ready_at(offset, bytes)) {
    std::memcpy(ready, data, bytes);
    return;
  }
  const std::lock_guard<std::mutex> turn(writing_);
  std::uint64_t done = 0;
  while (done < bytes) {
    const ssize_t count =
        pwrite(target_.file, data + done, bytes - done, static_cast<off_t>(offset + done));
    if (count > 0) {
      done += static_cast<std::uint64_t>(count);
    } else if (count == 0 || errno != EINTR) {
      throw MemoryFull("cannot write weights to " + target_.path + ": " +
                       (count == 0 ? "nothing was taken" : reason(errno)) +
                       "; free memory there or make it larger (docker: --shm-size), or lower "
                       "--model-cache-budget-gb");
    }
  }
}

// Rather than fault by fault in the first kernel. A touched page has the kernel map those around it
// too, in a fifth of the time of MADV_POPULATE_READ, which takes each by itself.
void Reader::map(const Chunk& chunk) {
  for (std::uint64_t at = 0; at < chunk.dest_bytes; at += kPageBytes) {
    touch(target_.mapping + chunk.dest_offset + at);
  }
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
