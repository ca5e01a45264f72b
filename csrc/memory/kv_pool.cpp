#include "memory/kv_pool.h"

#include <sched.h>

#include <algorithm>
#include <utility>

#include "memory/kv_verb.h"
#include "shm/errors.h"
#include "shm/futex.h"

namespace aegaeon::memory {
namespace {

constexpr char kArenaEnding[] = "+arena";
// A holder of the lock makes files or reclaims: milliseconds, seconds where memory is slow.
constexpr std::int64_t kLockPatience = 10 * shm::kSecond;
constexpr std::int64_t kReclaimPatience = 100 * shm::kMillisecond;
constexpr int kOpenTries = 100;
constexpr int kRecounts = 3;

void lock(KvControl& control, shm::Owner self) {
  shm::OwnerLock& word = control.head().lock;
  if (!word.lock(self, kLockPatience)) {
    throw shm::RegionError("pid " + std::to_string(shm::owner_pid(word.holder())) +
                           " has held the lock of " + control.name() +
                           " for seconds; is it stopped? continue or kill it");
  }
}

}  // namespace

std::byte* KvPool::Body::bytes() const {
  return region ? region->body() : reinterpret_cast<std::byte*>(words.get());
}

KvPool::KvPool(Body body, KvArena arena, const KvGeometry& geometry, std::uint64_t quota_bytes)
    : body_(std::move(body)),
      arena_(std::move(arena)),
      geometry_(geometry),
      control_(body_.bytes(), geometry_,
               body_.region ? body_.region->path() : "this private KV pool"),
      quota_bytes_(std::min<std::uint64_t>(quota_bytes, geometry.arena_bytes())),
      self_(shm::self_owner()) {}

std::unique_ptr<KvPool> KvPool::open_private(const KvGeometry& geometry, std::uint64_t quota_bytes,
                                             void* base, std::shared_ptr<DeviceBytes> device) {
  geometry.check();
  const std::size_t words = (KvControl::bytes_for(geometry) + 7) / 8;
  Body body{std::nullopt, std::make_unique<std::uint64_t[]>(words)};
  KvControl::initialise(body.bytes(), geometry);
  const std::size_t bytes = geometry.arena_bytes();
  KvArena arena =
      base == nullptr ? KvArena::anonymous(bytes) : KvArena::at(base, bytes, std::move(device));
  std::unique_ptr<KvPool> pool(
      new KvPool(std::move(body), std::move(arena), geometry, quota_bytes));
  pool->enter();
  return pool;
}

std::unique_ptr<KvPool> KvPool::open_shared(const std::string& path, const KvGeometry& geometry,
                                            std::uint64_t quota_bytes) {
  geometry.check();
  std::unique_ptr<KvPool> pool;  // before the guard, whose lock lies in what the pool maps
  Body body = open_region(path, geometry);
  KvControl control(body.bytes(), geometry, path);
  lock(control, shm::self_owner());
  const shm::OwnerLockGuard guard(control.head().lock);
  KvArena arena = open_arena(path + kArenaEnding, control, geometry);
  pool.reset(new KvPool(std::move(body), std::move(arena), geometry, quota_bytes));
  pool->enter();
  return pool;
}

KvPool::Body KvPool::open_region(const std::string& path, const KvGeometry& geometry) {
  const shm::RegionParameters sizes{geometry.slab_bytes, geometry.slab_count};
  // Between two tries somebody has created or removed it; that cannot go on.
  for (int attempt = 0;; ++attempt) {
    try {
      if (!shm::region_exists(path)) {
        return {shm::Region::create(
                    path, shm::RegionKind::kv_pool, sizes, KvControl::bytes_for(geometry),
                    [&](std::byte* body) { KvControl::initialise(body, geometry); }),
                nullptr};
      }
      shm::Region region = shm::Region::attach(path, shm::RegionKind::kv_pool);
      if (region.parameters() != sizes) {
        throw shm::RegionMismatch(
            path + " has " + std::to_string(region.parameters()[1]) + " slabs of " +
            std::to_string(region.parameters()[0]) + " bytes, this process wants " +
            std::to_string(sizes[1]) + " of " + std::to_string(sizes[0]) +
            "; give all processes the same models and --kv-budget-gb, or remove the file");
      }
      KvControl::check(region.body(), region.body_bytes(), geometry, path);
      return {std::move(region), nullptr};
    } catch (const shm::RegionMismatch&) {
      throw;
    } catch (const shm::RegionError&) {
      if (attempt == kOpenTries) throw;
    }
  }
}

// Under the lock. The inode ties the two files together: an arena that an earlier pool has left
// behind is never taken for this one's.
KvArena KvPool::open_arena(const std::string& path, KvControl& control,
                           const KvGeometry& geometry) {
  std::atomic<std::uint64_t>& inode = control.head().arena_inode;
  if (inode.load() != 0) {
    return KvArena::attach(path, geometry.arena_bytes(), inode.load());
  }
  KvArena arena = KvArena::create(path, geometry.arena_bytes());
  inode.store(arena.inode());
  return arena;
}

// Under the lock, or alone. The slot of a dead client is taken only after the slabs that it was
// busy with are; from its new generation on, the blocks it held are nobody's.
void KvPool::enter() {
  const Living living = find_living();
  const auto* const free = std::find(living.begin(), living.end(), KvIdentity{0});
  if (free == living.end()) {
    throw shm::RegionError(std::to_string(kKvClients) + " live processes use " + control_.name() +
                           ", and no more can; run fewer instances on this node");
  }
  slot_ = static_cast<unsigned>(free - living.begin());
  finish_for_dead(living, slot_);
  KvClient& client = control_.head().clients[slot_];
  std::uint64_t generation = (client.generation.load() + 1) & kGenerationMask;
  generation += generation == 0;
  client.owner.store(shm::kNobody);
  client.generation.store(generation);
  client.owner.store(self_);
  identity_ = make_identity(slot_, generation);
  reclaim_locked();
}

KvPool::~KvPool() {
  try {
    close();
  } catch (const shm::RegionError&) {
    // A damaged region, or one whose lock is held by a stopped process: what we hold comes back
    // when this process ends.
  }
}

void KvPool::close() {
  // A forked child has our object, not our blocks. Nobody is left who could use a private pool, and
  // memory of the caller's may be gone.
  if (is_closed_.exchange(true) || !body_.region || shm::self_owner() != self_ || identity_ == 0) {
    return;
  }
  // Other threads may be in the middle of a verb, though in none that takes long.
  const std::int64_t deadline = shm::now_ns() + kLockPatience;
  while (verbs_begun_.load() != verbs_ended_.load() && shm::now_ns() < deadline) {
    sched_yield();
  }
  lock(control_, self_);
  const shm::OwnerLockGuard guard(control_.head().lock);
  control_.head().clients[slot_].owner.store(shm::kNobody);
  reclaim_locked();
}

std::size_t KvPool::reclaim() {
  const Verb verb(*this);
  lock(control_, self_);
  const shm::OwnerLockGuard guard(control_.head().lock);
  return reclaim_locked();
}

// For one who needs room, and gets on without when the lock is not to be had soon.
bool KvPool::try_reclaim() {
  if (!control_.head().lock.lock(self_, kReclaimPatience)) {
    return false;
  }
  const shm::OwnerLockGuard guard(control_.head().lock);
  return reclaim_locked() > 0;
}

void KvPool::check_usable() const {
  if (is_closed_.load(std::memory_order_relaxed)) {
    throw shm::RegionError("this KV pool, " + control_.name() + ", has been closed");
  }
  if (shm::self_owner() != self_) {
    throw shm::RegionError("this KV pool, " + control_.name() +
                           ", was opened before a fork; open it in the process that uses it");
  }
}

bool KvPool::charge(std::uint64_t bytes) {
  for (int tries = 0; bytes <= quota_bytes_; ++tries) {
    if (charged_bytes_.fetch_add(bytes) <= quota_bytes_ - bytes) {
      return true;
    }
    charged_bytes_.fetch_sub(bytes);
    if (tries == kRecounts || !recount()) break;
  }
  return false;
}

// Lowers the charge to what we hold, which is less when others have taken blocks from us. While
// another thread changes either, the charge stays what it is: too high at worst.
bool KvPool::recount() {
  const std::uint64_t begun = verbs_begun_.load();
  if (verbs_ended_.load() + 1 != begun) {
    return false;
  }
  std::uint64_t charged = charged_bytes_.load();
  const std::uint64_t held = used_bytes();
  return verbs_begun_.load() == begun && held < charged &&
         charged_bytes_.compare_exchange_strong(charged, held);
}

}  // namespace aegaeon::memory
