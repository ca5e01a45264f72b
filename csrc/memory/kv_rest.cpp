// Blocks that rest: laid down, woken, and evicted when somebody needs their room.
#include <algorithm>

#include "memory/kv_pool.h"
#include "memory/kv_verb.h"

namespace aegaeon::memory {
namespace {

// Evicted beyond what is wanted, so that not each block costs a look at all words: a share of what
// rests, and the most.
constexpr std::size_t kSpareShare = 16;
constexpr std::size_t kMostSpare = 64;

}  // namespace

// What may be evicted in one go: a block of the wanted shape, or all of a slab of another one.
struct KvPool::Resting {
  std::uint64_t age;  // in blocks laid to rest since
  std::size_t slab;
  std::size_t first;  // among the slab's words
  std::size_t end;
  std::size_t gain;  // blocks of the wanted shape
};

std::vector<KvIdentity> KvPool::rest(unsigned shape, const std::vector<std::uint64_t>& ids,
                                     KvIdentity offer) {
  const Verb verb(*this);
  Patience patience;
  std::vector<KvIdentity> words;
  words.reserve(ids.size());
  for (const std::uint64_t id : ids) {
    words.push_back(rest_block(geometry_.find(shape, id), shape, offer, patience));
    if (words.back() != kFreeBlock) {
      charged_bytes_.fetch_sub(geometry_.shapes[shape].block_bytes);
    }
  }
  return words;
}

std::size_t KvPool::wake(unsigned shape, const std::vector<std::uint64_t>& ids,
                         const std::vector<KvIdentity>& words) {
  const Verb verb(*this);
  const std::uint64_t block_bytes = geometry_.shapes[shape].block_bytes;
  std::size_t count = 0;
  for (; count < ids.size(); ++count) {
    const BlockPlace place = geometry_.find(shape, ids[count]);
    KvIdentity word = words[count];
    if (!is_resting(word) || !charge(block_bytes)) {
      break;
    }
    // It held its slab's binding as any word does, and no two rests have the same one.
    if (!control_.owners(place.slab)[place.index].compare_exchange_strong(word, identity_)) {
      charged_bytes_.fetch_sub(block_bytes);
      break;
    }
  }
  return count;
}

std::vector<bool> KvPool::still_rest(unsigned shape, const std::vector<std::uint64_t>& ids,
                                     const std::vector<KvIdentity>& words) const {
  check_usable();
  std::vector<bool> rests;
  rests.reserve(ids.size());
  for (std::size_t at = 0; at < ids.size(); ++at) {
    const BlockPlace place = geometry_.find(shape, ids[at]);
    rests.push_back(is_resting(words[at]) &&
                    control_.owners(place.slab)[place.index].load() == words[at]);
  }
  return rests;
}

// Returns the word that it rests under, kFreeBlock when it is not ours, or not under the offer.
KvIdentity KvPool::rest_block(const BlockPlace& place, unsigned shape, KvIdentity offer,
                              Patience& patience) {
  const std::uint64_t number = control_.head().rests.fetch_add(1) % kRests;
  const KvIdentity resting = with_offer(identity_, kFirstRest + number);
  std::atomic<KvIdentity>& word = control_.owners(place.slab)[place.index];
  while (true) {
    KvIdentity owner = settled_owner(place, patience);
    if (!is_ours(owner) || is_reserved(owner) || (offer != 0 && owner != offer) ||
        !control_.state(place.slab).has_blocks_of(shape)) {
      return kFreeBlock;
    }
    if (word.compare_exchange_strong(owner, resting)) {
      return resting;
    }
  }
}

// Makes room for `want` blocks of `shape`, and some more, by what has rested longest; or, where all
// that rests would not do, none. Returns how many blocks there is room for now.
std::size_t KvPool::evict(unsigned shape, std::size_t want) {
  std::vector<Resting> found;
  const std::uint64_t now = control_.head().rests.load();
  for (std::size_t slab = 0; slab < geometry_.slab_count; ++slab) {
    find_resting(slab, shape, now, found);
  }
  std::size_t gain = 0;
  for (const Resting& victim : found) {
    gain += victim.gain;
  }
  if (gain < want) {
    return 0;
  }
  want += std::min(kMostSpare, found.size() / kSpareShare);
  // A heap, for of many few are wanted.
  const auto is_younger = [](const Resting& a, const Resting& b) { return a.age < b.age; };
  std::make_heap(found.begin(), found.end(), is_younger);
  std::size_t gained = 0;
  for (auto end = found.end(); end != found.begin() && gained < want; --end) {
    std::pop_heap(found.begin(), end, is_younger);
    gained += evict_in(*(end - 1));
  }
  return gained;
}

void KvPool::find_resting(std::size_t slab, unsigned shape, std::uint64_t now,
                          std::vector<Resting>& found) const {
  const SlabState state = control_.state(slab);
  const std::atomic<KvIdentity>* owners = control_.owners(slab);
  const bool is_own_shape = state.has_blocks_of(shape);
  if (!is_own_shape && (state.use != SlabUse::bound || !is_bindable(slab))) {
    return;
  }
  const std::size_t blocks = geometry_.blocks_of(state.shape);
  Resting whole{kRests, slab, 0, blocks, geometry_.blocks_of(shape)};
  for (std::size_t index = 0; index < blocks; ++index) {
    const KvIdentity word = owners[index].load(std::memory_order_relaxed);
    if (is_resting(word)) {
      const std::uint64_t age = rest_age(word, now);
      whole.age = std::min(whole.age, age);
      if (is_own_shape) found.push_back({age, slab, index, index + 1, 1});
    }
  }
  if (!is_own_shape && whole.age < kRests) {
    found.push_back(whole);
  }
}

// Returns for how many blocks of the wanted shape that made room.
std::size_t KvPool::evict_in(const Resting& victim) {
  std::atomic<KvIdentity>* owners = control_.owners(victim.slab);
  bool is_free = true;
  for (std::size_t index = victim.first; index < victim.end; ++index) {
    KvIdentity word = owners[index].load();
    if (is_resting(word) && owners[index].compare_exchange_strong(word, kFreeBlock)) {
      evicted_.fetch_add(1);
    } else {
      is_free = is_free && word == kFreeBlock;
    }
  }
  after_freeing(victim.slab);
  return is_free ? victim.gain : 0;
}

// Whether nobody needs what is in the slab.
bool KvPool::is_bindable(std::size_t slab) const {
  const std::atomic<KvIdentity>* owners = control_.owners(slab);
  return std::all_of(owners, owners + control_.most_blocks(),
                     [](const std::atomic<KvIdentity>& owner) {
                       const KvIdentity word = owner.load(std::memory_order_relaxed);
                       return word == kFreeBlock || is_resting(word);
                     });
}

}  // namespace aegaeon::memory
