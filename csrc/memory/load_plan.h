// What a load reads and where it puts it: the jobs of a model, checked and cut into chunks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "memory/pack.h"
#include "memory/source_file.h"

namespace aegaeon::memory {

// Quantized tiles are of int8, made of float32 or what `convert` makes that of.
enum class Layout : std::uint32_t { rows = 0, tiles = 1, quantized_tiles = 2 };

// The widest row: a tile of such rows is what a thread must hold at once.
constexpr std::size_t kMaxRowBytes = std::size_t{1} << 22;
constexpr std::size_t kDestinationAlignment = 64;
// About what is packed at a time: half of it comes in, half goes out of a small second cache.
constexpr std::uint64_t kSliceBytes = std::uint64_t{128} << 10;

// One tensor: `rows` rows of `row_bytes`, which lie one behind the other in the file.
struct Job {
  PlannedFile file;
  std::uint64_t file_offset;
  std::uint64_t data_bytes;
  std::uint64_t rows;
  std::uint64_t row_bytes;
  std::uint64_t element_bytes;
  Layout layout;
  std::uint64_t dest_offset;
  std::uint32_t stage;
  Convert convert;

  std::uint64_t columns() const { return row_bytes / element_bytes; }
  std::uint64_t out_element_bytes() const { return convert == Convert::none ? element_bytes : 4; }
  bool is_tiled() const { return layout != Layout::rows; }
  // Whether its bytes are kept as they are.
  bool is_plain() const { return layout == Layout::rows && convert == Convert::none; }
  // What `count` of its rows take, those included that fill up a tile.
  std::uint64_t rows_out(std::uint64_t count) const;
  // What one of those takes.
  std::uint64_t out_row_bytes() const;
  std::uint64_t dest_bytes() const;
};

// What one thread reads, packs and writes at a time. Without a file: zeros, for a gap between
// tensors that is as long as a page; every page of the model is written, so that no reader of it
// has the kernel look for memory that may not be there.
struct Chunk {
  static constexpr std::size_t kZeros = ~std::size_t{0};

  std::size_t job;
  std::size_t file;
  std::uint64_t file_offset;
  std::uint64_t source_bytes;
  std::uint64_t rows;
  std::uint64_t dest_offset;
  std::uint64_t dest_bytes;
  std::uint32_t stage;
};

struct LoadPlan {
  std::vector<Job> jobs;           // in the order of their destinations
  std::vector<PlannedFile> files;  // each once
  std::vector<Chunk> chunks;       // in the order of stages
  std::uint32_t stages;
  std::uint64_t longest_source_bytes = 0;
  std::uint64_t longest_slice_bytes = kSliceBytes;  // as packed

  // Checks that the jobs make sense for a model of `size_bytes` in `stages` stages: sizes agree,
  // destinations are aligned, inside, in stage order and apart. Throws std::invalid_argument.
  LoadPlan(std::vector<Job> unordered, std::uint64_t size_bytes, std::uint32_t stage_count,
           std::uint64_t chunk_bytes);

  // The rows of `chunk` to pack at a time.
  std::uint64_t slice_rows(const Chunk& chunk) const;

 private:
  void check(std::uint64_t size_bytes) const;
  void cut(std::size_t job, std::uint64_t chunk_bytes);
  void fill_gap(std::uint64_t begin, std::uint64_t end, std::uint32_t stage,
                std::uint64_t chunk_bytes);
  std::size_t file_of(const PlannedFile& file);
};

}  // namespace aegaeon::memory
