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
// - `spare_number` moves when the spare is taken; whoever fills it looks at that before each step,
//   and takes back what its last step may have added behind the end of the model's file.
// - What lies in a recycled file is another model's: every page of a model is written by its load.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "memory/directory.h"

namespace aegaeon::memory {

class Spare {
 public:
  explicit Spare(Directory& directory) : directory_(directory) {}

  // With the directory's lock held. Makes the spare the data file of an entry, if there is one;
  // keeps it when it is far larger than the model and both fit.
  void give(std::size_t slot);
  // Makes the data file of an evicted entry the spare. False when there is one, or no file.
  bool recycle(std::size_t slot);

  // Without the lock. Makes memory ready for a model of `bytes`, or as much of it as the budget has
  // left, until that is done, `is_unwanted()`, the spare is taken or the file system is full.
  // Returns at once when another live process is at it. Raises RegionError.
  void prepare(std::uint64_t bytes, const std::function<bool()>& is_unwanted);

 private:
  bool begin(std::uint64_t bytes);
  bool is_there() const;
  bool is_taken(std::uint64_t number) const;
  bool fill(std::uint64_t number, const std::function<bool()>& is_unwanted);
  std::string path() const { return directory_.path() + "+spare"; }

  Directory& directory_;
};

}  // namespace aegaeon::memory
