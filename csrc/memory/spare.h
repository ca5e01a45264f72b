// Memory of a weight cache made ready before a model needs it.
//
// To find pages for a model costs more processor time than to read it: 0.6 s for each GB, where a
// disk of 3 GB/s takes 0.3. So one file, the spare, is kept beside the models while the budget has
// room for it: filled with huge pages by whoever has time, or left by a model that was evicted to
// make room. The next model to be loaded takes it over, by its name, and fills it.
//
// - `spare_bytes` of it count: models and spare together never exceed the budget. It is raised
//   before the file is made and lowered after it was taken, so a process killed between the two
//   leaves a number without a file, which whoever looks for the file sets right.
// - The number of the spare moves when another file becomes it or it is taken, and is in one word
//   with how much of it is ready. So whoever fills it cannot count a step for what is another's by
//   now. Nor can such a late step add memory to it: the file ends where the model does, and when
//   one is at the very page in which that is, the model begins with a file of its own.
// - What lies in a recycled file is another model's: every page of a model is written by its load.
// - A 16th of the file system is left to others, keys and values among them. Should they come to
//   need half of that, the spare is given up.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "memory/directory.h"
#include "memory/file.h"
#include "memory/huge_pages.h"

namespace aegaeon::memory {

// The word of a spare: its number, and how many of its huge pages, from the first, are ready.
constexpr std::uint64_t ready_of(std::uint64_t word) {
  return (word & 0xffffffff) * kHugePageBytes;
}
constexpr std::uint64_t number_of(std::uint64_t word) { return word >> 32; }
constexpr std::uint64_t spare_word_of(std::uint64_t number, std::uint64_t ready_bytes) {
  return number << 32 | ready_bytes / kHugePageBytes;
}

class Spare {
 public:
  explicit Spare(Directory& directory) : directory_(directory) {}

  // With the directory's lock held. Makes the spare the data file of an entry, if there is one;
  // keeps it when it is far larger than the model and both fit.
  void give(std::size_t slot);
  // Makes the data file of an evicted entry the spare. False when there is one, or no file.
  bool recycle(std::size_t slot);

  // Without the lock. Makes memory ready for a model of `bytes`, or as much of it as the budget has
  // left, until that is done, `is_unwanted()`, the spare is taken or the file system has no more to
  // give: false then. Returns at once when another live process is at it. Raises RegionError.
  bool prepare(std::uint64_t bytes, const std::function<bool()>& is_unwanted);

 private:
  bool begin(std::uint64_t bytes);
  bool give_way();
  void drop();
  std::uint64_t next_number(std::uint64_t ready_bytes);
  std::uint64_t file_bytes() const;
  bool is_free_to_cut(std::uint64_t bytes) const;
  bool is_taken(std::uint64_t word) const;
  bool has_room(std::uint64_t bytes, unsigned share) const;
  bool fill(std::uint64_t word, const std::function<bool()>& is_unwanted);
  bool step(std::uint64_t word, std::byte* address);
  std::string path() const { return directory_.path() + "+spare"; }

  Directory& directory_;
};

}  // namespace aegaeon::memory
