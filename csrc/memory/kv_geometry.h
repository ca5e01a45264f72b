// How an arena is cut: slabs of one size, each into blocks of one of the pool's shapes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace aegaeon::memory {

// A block's bytes, the bytes of a page (ids count pages), and a tag for how its elements are
// encoded: bytes that are finite numbers in one encoding may be a NaN in another.
struct KvShapeRecord {
  std::uint64_t block_bytes;
  std::uint64_t page_bytes;
  std::uint64_t encoding;

  friend bool operator==(const KvShapeRecord& a, const KvShapeRecord& b) {
    return a.block_bytes == b.block_bytes && a.page_bytes == b.page_bytes &&
           a.encoding == b.encoding;
  }
};

struct BlockPlace {
  std::size_t slab;
  std::size_t index;   // among the slab's blocks
  std::size_t offset;  // bytes from the arena's beginning
};

struct KvGeometry {
  std::uint64_t slab_bytes;
  std::uint64_t slab_count;
  std::vector<KvShapeRecord> shapes;

  // Raises std::invalid_argument when no arena could be cut so.
  void check() const;

  std::size_t arena_bytes() const { return slab_bytes * slab_count; }
  std::size_t blocks_of(std::size_t shape) const {
    const KvShapeRecord& record = shapes[shape];
    // Where slabs are not whole pages, up to a page is lost before a slab's first one.
    const std::uint64_t lost = slab_bytes % record.page_bytes == 0 ? 0 : record.page_bytes;
    return lost < slab_bytes ? (slab_bytes - lost) / record.block_bytes : 0;
  }
  // Blocks of the smallest shape in a slab.
  std::size_t most_blocks() const;

  BlockPlace place_of(std::size_t slab, std::size_t index, unsigned shape) const {
    return {slab, index, first_page_of(slab, shape) + index * shapes[shape].block_bytes};
  }
  std::uint64_t id_of(const BlockPlace& place, unsigned shape) const {
    return place.offset / shapes[shape].page_bytes;
  }
  // Where the first page that begins in the slab lies, in bytes from the arena's beginning.
  std::size_t first_page_of(std::size_t slab, unsigned shape) const {
    const std::uint64_t page_bytes = shapes[shape].page_bytes;
    return (slab * slab_bytes + page_bytes - 1) / page_bytes * page_bytes;
  }
  // Raises std::invalid_argument for what cannot be a block of `shape`.
  BlockPlace find(unsigned shape, std::uint64_t id) const;
};

}  // namespace aegaeon::memory
