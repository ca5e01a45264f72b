// The operators of csrc/ops/cuda on the emulation, as functions that tests call from Python: what
// they throw is what last_error() says.

#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <string>
#include <vector>

#include "ops/cuda/ops.h"
#include "testing/emulation/block.h"

namespace {

using namespace aegaeon::ops;

std::string error;

template <typename Work>
int tried(const Work& work) {
  try {
    work();
    return 0;
  } catch (const std::exception& caught) {
    error = caught.what();
    return 1;
  }
}

// A PagedKv, and its tables as if they were on a device. `sequences` are [count][4]: first row,
// rows, start, blocks; `ids` are their blocks' one after another.
struct Given {
  void* pages;
  std::int64_t kv_heads, head_dim, type, count;
  const std::int64_t* sequences;
  const std::int64_t* ids;
  std::int64_t heads;
  const std::int64_t* least;  // a StepBounds
};

struct Paged {
  PagedKv kv;
  std::vector<std::int32_t> words;
  std::vector<float> workspace;
  cuda::DeviceTables tables;

  explicit Paged(const Given& given);
};

std::size_t size(std::int64_t value) { return static_cast<std::size_t>(value); }

Paged::Paged(const Given& given)
    : kv{given.pages,
         size(given.kv_heads),
         size(given.head_dim),
         {},
         static_cast<KvType>(given.type)} {
  const std::int64_t* id = given.ids;
  for (std::int64_t at = 0; at < given.count; ++at) {
    const std::int64_t* const from = given.sequences + 4 * at;
    kv.sequences.push_back({size(from[0]), size(from[1]), size(from[2]), {id, id + from[3]}});
    id += from[3];
  }
  const std::int64_t* const least = given.least;
  const cuda::StepTables made(
      kv, size(given.heads),
      {size(least[0]), size(least[1]), size(least[2]), size(least[3]), size(least[4])});
  words = made.words();
  // What nobody writes is no number.
  workspace.assign(cuda::workspace_floats(made.bounds(), kv),
                   std::numeric_limits<float>::quiet_NaN());
  tables = {words.data(), made.bounds(), workspace.data()};
}

}  // namespace

extern "C" {

const char* last_error() { return error.c_str(); }

void set_schedule(std::uint64_t seed, int is_copying_late) {
  aegaeon::emulation::schedule() = {seed, is_copying_late != 0};
}

int attend(const Given* given, std::int64_t layer, const float* queries, float scale, float* out) {
  return tried([&] {
    const Paged paged(*given);
    cuda::attend(nullptr, paged.tables,
                 {paged.kv, size(layer), size(given->heads), queries, scale, out});
  });
}

}  // extern "C"
