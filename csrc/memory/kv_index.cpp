// Blocks at rest found by content: told of, looked up.
#include "memory/kv_index.h"

#include <algorithm>
#include <stdexcept>

#include "memory/kv_pool.h"
#include "memory/kv_verb.h"

namespace aegaeon::memory {
namespace {

constexpr std::size_t kMostSets = std::size_t{1} << 17;  // 40 MiB: a million blocks
constexpr unsigned kShapeBits = 8;
static_assert(kKvShapes <= 1u << kShapeBits);
static_assert(sizeof(KvIndexSlot) == 5 * sizeof(std::uint64_t));

std::uint64_t mix(std::uint64_t value) {
  value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
  value = (value ^ value >> 27) * 0x94d049bb133111eb;
  return value ^ value >> 31;
}

// Of zeroed words it is not zero, so that these are no entry.
std::uint64_t check_of(std::uint64_t high, std::uint64_t low, std::uint64_t place,
                       std::uint64_t word) {
  return mix(mix(mix(mix(high + 1) + low) + place) + word) | 1;
}

}  // namespace

std::optional<KvEntry> KvIndexSlot::read() const {
  const std::uint64_t high = high_.load(std::memory_order_relaxed);
  const std::uint64_t low = low_.load(std::memory_order_relaxed);
  const std::uint64_t place = place_.load(std::memory_order_relaxed);
  const KvIdentity word = word_.load(std::memory_order_relaxed);
  if (check_.load(std::memory_order_relaxed) != check_of(high, low, place, word)) {
    return std::nullopt;
  }
  const auto shape = static_cast<unsigned>(place & ((1u << kShapeBits) - 1));
  return KvEntry{{high, low}, place >> kShapeBits, shape, word};
}

void KvIndexSlot::write(const KvEntry& entry) {
  const std::uint64_t place = entry.id << kShapeBits | entry.shape;
  high_.store(entry.key.high, std::memory_order_relaxed);
  low_.store(entry.key.low, std::memory_order_relaxed);
  place_.store(place, std::memory_order_relaxed);
  word_.store(entry.word, std::memory_order_relaxed);
  check_.store(check_of(entry.key.high, entry.key.low, place, entry.word),
               std::memory_order_relaxed);
}

// Twice as many entries as blocks: fewer than one set in fifty is too full then.
std::size_t KvIndex::sets_for(std::size_t blocks) {
  return std::clamp<std::size_t>(2 * blocks / kIndexWays, 1, kMostSets);
}

void KvPool::tell(unsigned shape, const std::vector<KvKey>& keys,
                  const std::vector<std::uint64_t>& ids, const std::vector<KvIdentity>& words) {
  const Verb verb(*this);
  const std::uint64_t now = control_.head().rests.load();
  for (std::size_t at = 0; at < keys.size(); ++at) {
    if (is_resting(words[at])) {
      tell_one({keys[at], ids[at], shape, words[at]}, now);
    }
  }
}

// Writes over an entry of the same key, else over one that says nothing true, else over that of the
// block that has rested longest.
void KvPool::tell_one(const KvEntry& entry, std::uint64_t now) {
  KvIndexSlot* chosen = nullptr;
  std::uint64_t oldest = 0;
  for (KvIndexSlot& slot : control_.index().set_of(entry.key)) {
    const std::optional<KvEntry> known = slot.read();
    const bool is_true = known && rests_still(*known);
    if (is_true && known->key == entry.key && known->shape == entry.shape) {
      if (known->word != entry.word) let_go(*known);  // one of them is enough
      chosen = &slot;
      break;
    }
    const std::uint64_t age = is_true ? rest_age(known->word, now) : kRests;
    if (chosen == nullptr || age > oldest) {
      chosen = &slot;
      oldest = age;
    }
  }
  chosen->write(entry);
}

std::vector<KvFound> KvPool::look_up(unsigned shape, const std::vector<KvKey>& keys) const {
  check_usable();
  std::vector<KvFound> found(keys.size(), KvFound{0, kFreeBlock});
  for (std::size_t at = 0; at < keys.size(); ++at) {
    for (const KvIndexSlot& slot : control_.index().set_of(keys[at])) {
      const std::optional<KvEntry> known = slot.read();
      if (known && known->key == keys[at] && known->shape == shape && rests_still(*known)) {
        found[at] = {known->id, known->word};
        break;
      }
    }
  }
  return found;
}

bool KvPool::rests_still(const KvEntry& entry) const {
  if (entry.shape >= geometry_.shapes.size() || !is_resting(entry.word)) {
    control_.damaged("what rests is told of by something else");
  }
  try {
    const BlockPlace place = geometry_.find(entry.shape, entry.id);
    return control_.owners(place.slab)[place.index].load() == entry.word;
  } catch (const std::invalid_argument&) {
    control_.damaged("what rests is told of by no block");
  }
}

// Frees a block that rests, whoever laid it down.
void KvPool::let_go(const KvEntry& entry) {
  const BlockPlace place = geometry_.find(entry.shape, entry.id);
  KvIdentity word = entry.word;
  if (control_.owners(place.slab)[place.index].compare_exchange_strong(word, kFreeBlock)) {
    after_freeing(place.slab);
  }
}

}  // namespace aegaeon::memory
