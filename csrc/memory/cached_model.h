// One model of the weight cache in the hands of one process: its mapping, its pins, its load.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "memory/file.h"
#include "memory/huge_pages.h"
#include "memory/reader.h"
#include "memory/weight_cache.h"

namespace aegaeon::memory {

// One model as this process sees it: mapped until the object goes, to be looked at while pinned.
class CachedModel {
 public:
  CachedModel(std::shared_ptr<WeightCache> cache, std::size_t slot, bool is_loader);
  ~CachedModel();
  CachedModel(const CachedModel&) = delete;
  CachedModel& operator=(const CachedModel&) = delete;

  const std::byte* address() const { return mapping_.address(); }
  std::uint64_t size_bytes() const { return size_bytes_; }
  std::uint32_t stages() const { return stages_; }
  std::uint32_t stages_done() const;
  bool is_loader() const { return is_loader_.load(); }

  // Keeps it from being evicted, until as many unpins. False: it has been evicted, or its load has
  // failed; acquire it again. nullopt: pin_slowly() can tell, which takes the directory's lock. A
  // few dozen nanoseconds.
  std::optional<bool> try_pin();
  bool pin_slowly();
  // True when it was the last pin of a failed load: free_failed() then, which gives back gigabytes.
  // Throws std::logic_error without a pin.
  bool unpin();
  void free_failed();
  // Tells the cache that the model is used, for what it is worth to keep.
  void note_use();

  // Whether the stages [0, count) are in; nullopt when the load has failed or the entry is gone.
  std::optional<bool> look_for_stages(std::uint32_t count) const;
  // As above, but takes the lock to throw CheckpointError with the loader's message when the load
  // has failed, WeightsEvicted when the entry is gone.
  bool has_stages(std::uint32_t count) const;
  // True when nobody loads it any more though it is not all in: take_over() then.
  bool is_abandoned() const;
  // Sleeps until something changes, up to `timeout_ns` or a signal.
  void wait_for_change(std::uint32_t seen, std::int64_t timeout_ns) const;
  std::uint32_t change() const;
  // Becomes the loader of an abandoned load. False when it is not one.
  bool take_over();
  // Has the kernel map all pages that are in memory.
  void populate() const;
  // Has the kernel move the whole huge page from `offset` on, a multiple of its size, into one that
  // is, so that products read it faster: memory comes in small pages where most systems give no
  // others. For a model that is in; nobody need stop reading it. False where the kernel does not,
  // or the model is gone.
  bool gather(std::uint64_t offset);

  // Loader: starts to load what is missing; waits; ends the load. Both ends throw what it failed
  // with, LoadCancelled included. A CheckpointError is then the answer to all who wait for the
  // model; after any other failure somebody else may take the load over.
  void start_load(std::vector<Job> jobs, int threads);
  bool wait_for_load(std::int64_t timeout_ns);
  void finish_load();
  // Stops a running load after the chunks it is at, and any later one. From any thread.
  void cancel() { is_cancelled_.store(true); }

  // Lets go of pins and of an unfinished load, which others may take over; a running one first
  // comes to its end. Idempotent, from any thread.
  void close();

 private:
  friend class WeightCache;

  Entry& entry() const { return cache_->directory_.entry(slot_); }
  bool is_current(std::uint64_t status) const;
  bool drop_pins(std::uint32_t count);
  void map(bool is_new);
  void start_file(const std::string& data, int file, std::uint64_t found_bytes);
  void begin_load(std::vector<Job> jobs, int threads);
  template <typename Step>
  void end_load_on_failure(const Step& step);
  void end_load();
  void fail(const std::string& message, bool lacked_memory);
  void complete(double seconds);
  void abandon();
  void release();

  std::shared_ptr<WeightCache> cache_;
  std::size_t slot_;
  std::uint64_t generation_;
  std::uint64_t size_bytes_;
  std::uint32_t stages_;
  std::string model_;
  HugeMapping mapping_;
  File file_;  // of the loader
  std::atomic<bool> is_loader_;
  std::atomic<bool> is_cancelled_{false};
  std::mutex mutex_;  // of the two below
  bool is_loading_ = false;
  std::atomic<bool> is_closed_{false};
  std::atomic<std::uint32_t> pins_{0};
  std::unique_ptr<Reader> reader_;
  std::int64_t load_began_ns_ = 0;
  std::uint32_t first_stage_ = 0;
};

}  // namespace aegaeon::memory
