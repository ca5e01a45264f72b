#include "memory/kv_geometry.h"

#include <algorithm>
#include <stdexcept>

#include "memory/kv_words.h"

namespace aegaeon::memory {
namespace {

// Far beyond any machine; keeps every product below 2^64.
constexpr std::uint64_t kMostBytes = std::uint64_t{1} << 46;

}  // namespace

void KvGeometry::check() const {
  if (shapes.empty() || shapes.size() > kKvShapes) {
    throw std::invalid_argument("a KV pool has 1 to 256 block shapes, not " +
                                std::to_string(shapes.size()) + "; serve fewer kinds of models");
  }
  if (slab_count == 0 || slab_bytes == 0 || slab_bytes > kMostBytes / slab_count) {
    throw std::invalid_argument("a KV arena of " + std::to_string(slab_count) + " slabs of " +
                                std::to_string(slab_bytes) + " bytes cannot be");
  }
  for (std::size_t number = 0; number < shapes.size(); ++number) {
    const KvShapeRecord& shape = shapes[number];
    if (shape.page_bytes == 0 || shape.block_bytes == 0 ||
        shape.block_bytes % shape.page_bytes != 0 || blocks_of(number) == 0) {
      throw std::invalid_argument("blocks of " + std::to_string(shape.block_bytes) +
                                  " bytes in pages of " + std::to_string(shape.page_bytes) +
                                  " do not fit slabs of " + std::to_string(slab_bytes));
    }
  }
}

std::size_t KvGeometry::most_blocks() const {
  std::size_t most = 0;
  for (std::size_t shape = 0; shape < shapes.size(); ++shape) {
    most = std::max(most, blocks_of(shape));
  }
  return most;
}

BlockPlace KvGeometry::find(unsigned shape, std::uint64_t id) const {
  const KvShapeRecord& record = shapes[shape];
  if (id < arena_bytes() / record.page_bytes) {
    const std::size_t offset = id * record.page_bytes;
    const std::size_t slab = offset / slab_bytes;
    const std::size_t inside = offset - first_page_of(slab, shape);
    const std::size_t index = inside / record.block_bytes;
    if (inside % record.block_bytes == 0 && index < blocks_of(shape)) {
      return {slab, index, offset};
    }
  }
  throw std::invalid_argument("there is no block " + std::to_string(id) + " of " +
                              std::to_string(record.block_bytes) +
                              " bytes in this pool; ids belong to the shape they were made for");
}

}  // namespace aegaeon::memory
