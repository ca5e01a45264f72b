#include "memory/cached_model.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <stdexcept>
#include <utility>

#include "memory/errors.h"
#include "shm/errors.h"
#include "shm/futex.h"
#include "shm/ring.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

namespace aegaeon::memory {
namespace {

EntryState state_of(std::uint64_t status) { return static_cast<EntryState>(status & 7); }

}  // namespace

CachedModel::CachedModel(std::shared_ptr<WeightCache> cache, std::size_t slot, bool is_loader)
    : cache_(std::move(cache)),
      slot_(slot),
      generation_(generation_of(cache_->directory_.status(slot))),
      size_bytes_(entry().size_bytes),
      stages_(entry().stages),
      model_(entry().model.get()),
      is_loader_(is_loader) {}

CachedModel::~CachedModel() {
  try {
    close();
  } catch (const std::exception&) {
    // The region is damaged, or its lock kept by a stopped process; our end frees what we had.
  }
}

// Opens the data file, makes it when that is still to be done, and maps it.
void CachedModel::map(bool is_new) {
  const std::string data = cache_->directory_.data_path(slot_, generation_);
  if (is_new) {
    ::unlink(data.c_str());  // of a cache that was removed without it
    cache_->spare_.give(slot_);
  }
  const int create = is_loader() ? O_CREAT : 0;
  File file(::open(data.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | create, 0600));
  struct stat info{};
  if (!file.is_open() || fstat(file.get(), &info) != 0) {
    throw shm::RegionError("cannot open " + data + ": " + reason(errno) +
                           "; restart the servers that use it");
  }
  const auto found_bytes = static_cast<std::uint64_t>(info.st_size);
  if (found_bytes != size_bytes_) {
    start_file(data, file.get(), found_bytes);
  }
  if (address() == nullptr) {
    mapping_ = HugeMapping(file.get(), size_bytes_, PROT_READ);
    if (address() == nullptr) {
      throw shm::RegionError("cannot map " + data + ": " + reason(errno));
    }
    // Whole huge pages only, so that the last one takes no more than the model has. Most systems
    // do not give any, which is no failure.
    madvise(mapping_.address(), whole_huge_pages(size_bytes_), MADV_HUGEPAGE);
  }
  if (is_loader()) file_ = std::move(file);
}

// A load begins in what was made ready or an empty file, also one that goes on where somebody has
// removed the file. Of a huge page that the model has a part of the kernel might keep the rest: it
// is cut off whole.
void CachedModel::start_file(const std::string& data, int file, std::uint64_t found_bytes) {
  if (!is_loader() || address() != nullptr) {
    throw shm::RegionError(data + " has been removed or cut; restart the servers that use it");
  }
  entry().stages_done.store(0);
  entry().ready_bytes.store(std::min(entry().ready_bytes.load(), whole_huge_pages(found_bytes)));
  const std::uint64_t kept_bytes = std::min(found_bytes, whole_huge_pages(size_bytes_));
  if (ftruncate(file, static_cast<off_t>(kept_bytes)) != 0 ||
      ftruncate(file, static_cast<off_t>(size_bytes_)) != 0) {
    throw shm::RegionError("cannot make " + data + ": " + reason(errno) + "; free memory there");
  }
}

void CachedModel::populate() const { madvise(mapping_.address(), size_bytes_, MADV_POPULATE_READ); }

bool CachedModel::gather(std::uint64_t offset) {
  if (offset % kHugePageBytes != 0 || offset >= whole_huge_pages(size_bytes_)) {
    throw std::invalid_argument("no huge page of " + model_ + " begins there");
  }
  // Pinned, so that the file is not cut or another model's meanwhile.
  try {
    if (!try_pin().value_or(false)) return false;
  } catch (const shm::RegionError&) {  // closed
    return false;
  }
  const bool is_done = madvise(mapping_.address() + offset, kHugePageBytes, MADV_COLLAPSE) == 0;
  try {
    if (unpin()) free_failed();
  } catch (const std::logic_error&) {  // who closed it meanwhile has let go of this pin too
  }
  return is_done;
}

bool CachedModel::is_current(std::uint64_t status) const {
  return generation_of(status) == generation_ &&
         (state_of(status) == EntryState::loading || state_of(status) == EntryState::ready);
}

std::uint32_t CachedModel::stages_done() const {
  const std::uint32_t done = entry().stages_done.load();
  if (generation_of(cache_->directory_.status(slot_)) != generation_) {
    return 0;  // it may count the stages of another model by now
  }
  if (done > stages_) {
    cache_->directory_.damaged("more stages are in than the model has");
  }
  return done;
}

std::optional<bool> CachedModel::try_pin() {
  const Directory& directory = cache_->directory_;
  if (is_closed_.load() || directory.control().clients[cache_->client_].load() != cache_->owner_ ||
      shm::self_owner() != cache_->owner_) {
    throw shm::RegionError(model_ + " cannot be pinned: it was closed, or opened before a fork");
  }
  std::atomic<std::uint32_t>& pins = entry().pins[cache_->client_];
  pins.fetch_add(1);
  const std::uint64_t status = directory.status(slot_);
  if (is_current(status)) {
    pins_.fetch_add(1);
    return true;
  }
  pins.fetch_sub(1);
  if (status == status_of(generation_, EntryState::evicting)) {
    return std::nullopt;  // somebody looks whether it may be evicted, and may find that it may not
  }
  return false;
}

bool CachedModel::pin_slowly() {
  const Directory::Locked held(cache_->directory_);
  if (!is_current(cache_->directory_.status(slot_))) {
    return false;
  }
  entry().pins[cache_->client_].fetch_add(1);
  pins_.fetch_add(1);
  return true;
}

bool CachedModel::unpin() {
  std::uint32_t held = pins_.load();
  do {
    if (held == 0) {
      throw std::logic_error(model_ + " is not pinned; every unpin needs a pin before it");
    }
  } while (!pins_.compare_exchange_weak(held, held - 1));
  return drop_pins(1);
}

bool CachedModel::drop_pins(std::uint32_t count) {
  Directory& directory = cache_->directory_;
  if (entry().pins[cache_->client_].fetch_sub(count) != count) {
    return false;  // others of this process have it pinned
  }
  directory.signal_room();
  return directory.status(slot_) == status_of(generation_, EntryState::failed);
}

void CachedModel::free_failed() { cache_->free_unpinned_failures(); }

void CachedModel::note_use() {
  if (!is_current(cache_->directory_.status(slot_))) {
    return;
  }
  const std::int64_t now = shm::now_ns();
  const std::int64_t before = entry().used_at_ns.exchange(now);
  const double age_s = static_cast<double>(now - before) * 1e-9;
  entry().uses.store(decayed_uses(entry().uses.load(), age_s) + 1);
}

std::optional<bool> CachedModel::look_for_stages(std::uint32_t count) const {
  if (count > stages_) {
    throw std::invalid_argument(model_ + " has " + std::to_string(stages_) + " stages");
  }
  const std::uint32_t done = stages_done();
  const std::uint64_t status = cache_->directory_.status(slot_);
  if (generation_of(status) == generation_ && state_of(status) != EntryState::failed &&
      state_of(status) != EntryState::freeing) {
    return done >= count;
  }
  return std::nullopt;
}

bool CachedModel::has_stages(std::uint32_t count) const {
  if (const auto seen = look_for_stages(count)) {
    return *seen;
  }
  const Directory::Locked held(cache_->directory_);
  if (entry().failed_generation == generation_ + 1) {
    const std::string failure = entry().failure.get();
    if (entry().lacked_memory != 0) throw MemoryFull(failure);
    throw CheckpointError(failure);
  }
  throw WeightsEvicted(model_ + " has been evicted from the weight cache; acquire it again");
}

bool CachedModel::is_abandoned() const {
  const Directory& directory = cache_->directory_;
  return directory.status(slot_) == status_of(generation_, EntryState::loading) &&
         !directory.has_live_owner(slot_);
}

std::uint32_t CachedModel::change() const { return entry().signal.load(); }

void CachedModel::wait_for_change(std::uint32_t seen, std::int64_t timeout_ns) const {
  shm::futex_wait(entry().signal, seen, timeout_ns);
}

bool CachedModel::take_over() {
  cache_->check_usable();
  const Directory::Locked held(cache_->directory_);
  const std::lock_guard<std::mutex> open(mutex_);  // so that a close finds what we take over
  if (is_closed_.load() || !is_abandoned()) {
    return false;
  }
  entry().owner.store(cache_->owner_);
  is_loader_.store(true);
  try {
    map(false);
  } catch (...) {
    abandon();
    throw;
  }
  return true;
}

// What a step of a load fails with is the end of the load.
template <typename Step>
void CachedModel::end_load_on_failure(const Step& step) {
  try {
    step();
  } catch (const CheckpointError& error) {
    fail(error.what(), false);
    end_load();
    throw;
  } catch (const MemoryFull& error) {
    fail(error.what(), true);
    end_load();
    throw;
  } catch (...) {
    abandon();
    end_load();
    throw;
  }
}

void CachedModel::start_load(std::vector<Job> jobs, int threads) {
  cache_->check_usable();
  {
    const std::lock_guard<std::mutex> held(mutex_);
    if (!is_loader() || is_loading_ || is_closed_.load()) {
      throw std::logic_error(model_ + " is not ours to load; wait for its stages");
    }
    is_loading_ = true;
  }
  end_load_on_failure([&] { begin_load(std::move(jobs), threads); });
}

void CachedModel::begin_load(std::vector<Job> jobs, int threads) {
  if (is_cancelled_.load()) {
    throw LoadCancelled("the load of " + model_ + " was cancelled; acquire the model again");
  }
  first_stage_ = stages_done();
  load_began_ns_ = shm::now_ns();
  const std::string data = cache_->directory_.data_path(slot_, generation_);
  const auto publish = [this](std::uint32_t done) {
    entry().stages_done.store(done);
    cache_->directory_.signal_entry(slot_);
  };
  const auto is_unwanted = [this] { return is_cancelled_.load() || cache_->is_closed(); };
  try {
    reader_ =
        std::make_unique<Reader>(LoadPlan(std::move(jobs), size_bytes_, stages_, kChunkBytes),
                                 Target{file_.get(), address(), entry().ready_bytes.load(), data},
                                 first_stage_, threads, Progress{publish, is_unwanted});
  } catch (const std::invalid_argument& error) {
    // Whoever took the load over would find the same, without end.
    throw CheckpointError(model_ + " cannot be loaded: " + error.what() +
                          "; leave the model out, or import it again");
  } catch (const std::bad_alloc&) {
    throw CheckpointError(model_ +
                          " cannot be loaded: there is no memory to read it with; "
                          "free some, or give the machine more");
  }
}

bool CachedModel::wait_for_load(std::int64_t timeout_ns) { return reader_->wait(timeout_ns); }

void CachedModel::finish_load() {
  end_load_on_failure([this] {
    const std::unique_ptr<Reader> reader = std::move(reader_);
    reader->cancel();  // no more than a formality, unless the wait was given up
    reader->join();
    cache_->directory_.control().bytes_read.fetch_add(reader->bytes_read());
    reader->check();
    complete(static_cast<double>(shm::now_ns() - load_began_ns_) * 1e-9);
  });
  end_load();
}

void CachedModel::end_load() {
  {
    const std::lock_guard<std::mutex> held(mutex_);
    is_loading_ = false;
    if (!is_closed_.load()) return;
  }
  release();
}

void CachedModel::complete(double seconds) {
  Directory& directory = cache_->directory_;
  const Directory::Locked held(directory);
  if (directory.status(slot_) != status_of(generation_, EntryState::loading)) {
    directory.damaged("a model was taken from its loader");
  }
  if (first_stage_ == 0) {  // else it is a part of the load that was measured
    entry().reload_s = seconds;
    directory.control().load_bytes_per_s.store(static_cast<double>(size_bytes_) /
                                               std::max(seconds, 1e-6));
  }
  const auto twice_ns = static_cast<std::int64_t>(std::min(seconds, 100.0) * 2e9);
  entry().protected_until_ns = shm::now_ns() + std::min(twice_ns, kLongestProtection);
  is_loader_.store(false);
  directory.set_state(slot_, EntryState::ready);
  entry().owner.store(shm::kNobody);
  file_ = File();
  directory.signal_entry(slot_);
  directory.signal_room();
}

void CachedModel::fail(const std::string& message, bool lacked_memory) {
  reader_.reset();
  if (!is_loader_.exchange(false)) {
    return;
  }
  {
    const Directory::Locked held(cache_->directory_);
    entry().failure.set(message);
    entry().lacked_memory = lacked_memory ? 1 : 0;
    entry().failed_generation = generation_ + 1;  // 0: none has
    cache_->directory_.set_state(slot_, EntryState::failed);
    entry().owner.store(shm::kNobody);
    cache_->directory_.signal_entry(slot_);
  }
  file_ = File();
  cache_->free_unpinned_failures();
}

// The owner's word is ours alone while we load, so this needs no lock.
void CachedModel::abandon() {
  reader_.reset();
  if (is_loader_.exchange(false) && shm::self_owner() == cache_->owner_) {
    entry().owner.store(shm::kNobody);
    cache_->directory_.signal_entry(slot_);
    cache_->directory_.signal_room();
  }
  file_ = File();
}

void CachedModel::close() {
  cancel();
  {
    const std::lock_guard<std::mutex> held(mutex_);
    if (is_closed_.exchange(true) || is_loading_) return;
  }
  release();
}

void CachedModel::release() {
  abandon();
  const std::uint32_t pins = pins_.exchange(0);
  if (pins > 0 && shm::self_owner() == cache_->owner_ && drop_pins(pins)) {
    free_failed();
  }
}

}  // namespace aegaeon::memory
