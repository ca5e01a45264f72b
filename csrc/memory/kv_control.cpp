#include "memory/kv_control.h"

#include <new>
#include <utility>

#include "shm/errors.h"

namespace aegaeon::memory {
namespace {

static_assert(std::atomic<std::uint64_t>::is_always_lock_free);
static_assert(sizeof(KvControlHead) % 8 == 0 && sizeof(KvSlab) == 16);

std::size_t hint_words_for(const KvGeometry& geometry) { return (geometry.slab_count + 63) / 64; }

std::size_t index_sets_for(const KvGeometry& geometry) {
  return KvIndex::sets_for(geometry.slab_count * geometry.most_blocks());
}

template <typename T>
T* place(std::byte* at) {
  return std::launder(reinterpret_cast<T*>(at));
}

}  // namespace

KvControl::KvControl(std::byte* body, const KvGeometry& geometry, std::string name)
    : name_(std::move(name)),
      slab_count_(geometry.slab_count),
      shape_count_(geometry.shapes.size()),
      most_blocks_(geometry.most_blocks()),
      hint_words_(hint_words_for(geometry)),
      head_(place<KvControlHead>(body)),
      index_(nullptr, 0) {
  std::byte* at = body + sizeof(KvControlHead);
  hints_ = place<std::atomic<std::uint64_t>>(at);
  at += (1 + shape_count_) * hint_words_ * sizeof(*hints_);
  slabs_ = place<KvSlab>(at);
  at += slab_count_ * sizeof(KvSlab);
  owners_ = place<std::atomic<KvIdentity>>(at);
  at += slab_count_ * most_blocks_ * sizeof(*owners_);
  index_ = KvIndex(place<KvIndexSet>(at), index_sets_for(geometry));
}

std::size_t KvControl::bytes_for(const KvGeometry& geometry) {
  const std::size_t hints = (1 + geometry.shapes.size()) * hint_words_for(geometry);
  const std::size_t words = hints + geometry.slab_count * (2 + geometry.most_blocks());
  const std::size_t index_bytes = index_sets_for(geometry) * sizeof(KvIndexSet);
  return sizeof(KvControlHead) + words * sizeof(std::uint64_t) + index_bytes;
}

void KvControl::initialise(std::byte* body, const KvGeometry& geometry) {
  auto& head = *place<KvControlHead>(body);
  head.shape_count = geometry.shapes.size();
  for (std::size_t shape = 0; shape < geometry.shapes.size(); ++shape) {
    head.shapes[shape] = geometry.shapes[shape];
  }
  SlabSet free_slabs = KvControl(body, geometry, "").free_slabs();
  for (std::size_t slab = 0; slab < geometry.slab_count; ++slab) {
    free_slabs.add(slab);
  }
}

void KvControl::check(const std::byte* body, std::size_t bytes, const KvGeometry& geometry,
                      const std::string& name) {
  const auto differs = [&name](const std::string& fact) {
    throw shm::RegionMismatch(name + " " + fact +
                              "; give all processes the same models and --kv-budget-gb, or stop "
                              "them and remove the file");
  };
  if (bytes < sizeof(KvControlHead)) {
    differs("is too short for a KV pool");
  }
  const auto& head = *std::launder(reinterpret_cast<const KvControlHead*>(body));
  const std::size_t count = geometry.shapes.size();
  if (head.shape_count != count) {
    differs("has " + std::to_string(head.shape_count) + " block shapes, this process wants " +
            std::to_string(count));
  }
  for (std::size_t shape = 0; shape < count; ++shape) {
    if (!(head.shapes[shape] == geometry.shapes[shape])) {
      differs("has blocks of " + std::to_string(head.shapes[shape].block_bytes) +
              " bytes where this process wants " +
              std::to_string(geometry.shapes[shape].block_bytes));
    }
  }
  if (bytes != bytes_for(geometry)) {
    differs("holds " + std::to_string(bytes) + " bytes of control, " +
            std::to_string(bytes_for(geometry)) + " are needed");
  }
}

SlabState KvControl::state(std::size_t slab) const {
  const SlabState state = SlabState::unpack(slabs_[slab].state.load());
  if (state.shape >= shape_count_) {
    damaged("a slab is bound to no shape of the pool");
  }
  return state;
}

bool KvControl::is_all_free(std::size_t slab) const {
  const std::atomic<KvIdentity>* words = owners(slab);
  for (std::size_t index = 0; index < most_blocks_; ++index) {
    if (words[index].load() != kFreeBlock) return false;
  }
  return true;
}

void KvControl::damaged(const char* what) const {
  throw shm::RegionMismatch(name_ + " is damaged (" + what +
                            "); stop the servers that use it and remove the file");
}

}  // namespace aegaeon::memory
