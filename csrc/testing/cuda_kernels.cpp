// The operators of csrc/ops/cuda on the emulation, as functions that tests call from Python: what
// they throw is what last_error() says.

#include <cstddef>
#include <cstdint>
#include <exception>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "ops/cuda/attend_long.h"
#include "ops/cuda/attend_short.h"
#include "ops/cuda/ops.h"
#include "ops/cuda/sampling.h"
#include "ops/cuda/sampling_block.h"
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

// Bytes of shared memory that kernels are launched with, by nvcc's names of them.
using SharedBytes = std::map<std::string, std::size_t>;

template <typename T, int head_dim>
void add_attend(SharedBytes& bytes, const std::string& type) {
  const std::string arguments = "<" + type + ", " + std::to_string(head_dim) + ">";
  bytes["attend_short" + arguments] = sizeof(cuda::ShortMemory<T, head_dim>);
  bytes["attend_long" + arguments] = sizeof(cuda::LongMemory<T, head_dim>);
}

template <typename T>
void add_type(SharedBytes& bytes, const std::string& type) {
  add_attend<T, 64>(bytes, type);
  add_attend<T, 96>(bytes, type);
  add_attend<T, 128>(bytes, type);
  add_attend<T, 256>(bytes, type);
}

SharedBytes all_shared_bytes() {
  SharedBytes bytes;
  add_type<float>(bytes, "float");
  add_type<cuda::Bf16>(bytes, "__nv_bfloat16");
  add_type<cuda::F16>(bytes, "__half");
  bytes["sample_rows"] = sizeof(cuda::SampleMemory);
  return bytes;
}

}  // namespace

extern "C" {

// Of a kernel that needs next to none, 0.
std::int64_t shared_bytes(const char* kernel) {
  static const SharedBytes bytes = all_shared_bytes();
  const auto found = bytes.find(kernel);
  return found == bytes.end() ? 0 : static_cast<std::int64_t>(found->second);
}

// What `attend` says of itself; -1 where it has no such kernel.
std::int64_t attend_shared_bytes(int type, std::int64_t head_dim) {
  try {
    const auto bytes = cuda::attend_shared_bytes(static_cast<KvType>(type), size(head_dim));
    return static_cast<std::int64_t>(bytes);
  } catch (const std::invalid_argument&) {
    return -1;
  }
}

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

// x is [rows, stride], of which heads * features columns count; `chosen`, `residual` and `sum` may
// be null. Where `is_rounded`, `out` is bf16.
int rms_norm(const float* x, std::int64_t stride, const std::int64_t* shape, const float* weight,
             float eps, const std::int64_t* chosen, const float* residual, float* sum, void* out,
             int is_rounded) {
  return tried([&] {
    const RmsNormParams norm = {{x, size(stride)},
                                size(shape[0]),
                                size(shape[1]),
                                size(shape[2]),
                                weight,
                                eps,
                                is_rounded != 0 ? nullptr : static_cast<float*>(out),
                                chosen};
    if (sum == nullptr && is_rounded == 0) return cuda::rms_norm(nullptr, norm);
    cuda::add_rms_norm(nullptr, {norm, residual, sum, is_rounded != 0 ? out : nullptr});
  });
}

// Gate and up lie side by side in a row of 2 * features, and so do their biases; scales and biases
// may be null. Where `is_rounded`, `out` is bf16.
int silu_mul(const float* gate_up, std::int64_t rows, std::int64_t features, void* out,
             int is_rounded, const float* scales, const float* biases) {
  return tried([&] {
    const std::size_t width = size(features);
    cuda::SiluMulParams params = {{gate_up, 2 * width},
                                  {gate_up + width, 2 * width},
                                  size(rows),
                                  width,
                                  is_rounded != 0 ? nullptr : static_cast<float*>(out)};
    if (is_rounded != 0) params.rounded = out;
    params.scales = scales;
    params.gate_bias = biases;
    params.up_bias = biases == nullptr ? nullptr : biases + width;
    cuda::silu_mul(nullptr, params);
  });
}

// x is [rows, stride]; `scales` may be null.
int narrow_rows(const float* x, std::int64_t stride, const std::int64_t* shape, std::int64_t type,
                void* out, float* scales) {
  return tried([&] {
    cuda::narrow_rows(nullptr, {{x, size(stride)},
                                size(shape[0]),
                                size(shape[1]),
                                static_cast<WeightType>(type),
                                out,
                                scales});
  });
}

// Three parts that end at `ends`, of which each may have a bias; all but `out` may be null.
int finish_product(float* out, const std::int64_t* shape, const float* scales,
                   const float* residual, const std::int64_t* ends, const float* first,
                   const float* second, const float* third) {
  return tried([&] {
    cuda::finish_product(nullptr, {out,
                                   size(shape[0]),
                                   size(shape[1]),
                                   scales,
                                   residual,
                                   {first, second, third},
                                   {size(ends[0]), size(ends[1]), size(ends[2])}});
  });
}

int embed(const std::int64_t* ids, std::int64_t rows, std::int64_t features, const void* tiles,
          std::int64_t outputs, std::int64_t type, float* out) {
  return tried([&] {
    const Matrix table = {tiles, size(outputs), static_cast<WeightType>(type)};
    cuda::embed(nullptr, {ids, size(rows), size(features), table, out});
  });
}

// x is [rows, heads * head_dim]; angles are cos and sin.
int rotate(const float* x, const std::int64_t* shape, const float* cos, const float* sin,
           float* out) {
  return tried([&] {
    const std::size_t rows = size(shape[0]), heads = size(shape[1]), head_dim = size(shape[2]);
    cuda::rotate(nullptr, {{x, heads * head_dim}, rows, heads, head_dim, cos, sin, out});
  });
}

// Queries, keys and values lie side by side in a row of x; without angles, keys are as they are and
// queries are nobody's.
int append_kv(const Given* given, std::int64_t layer, const float* x, std::int64_t rows,
              const float* cos, const float* sin, float* out) {
  return tried([&] {
    const Paged paged(*given);
    const std::size_t head_dim = paged.kv.head_dim, heads = size(given->heads);
    const std::size_t stride = (heads + 2 * paged.kv.kv_heads) * head_dim;
    const float *keys = x + heads * head_dim, *values = keys + paged.kv.kv_heads * head_dim;
    const AppendParams append = {paged.kv, size(layer), {keys, stride}, {values, stride}};
    if (cos == nullptr) return cuda::append_kv(nullptr, paged.tables, append);
    cuda::rotate_and_append(nullptr, paged.tables,
                            {{x, stride}, size(rows), heads, head_dim, cos, sin, out}, append);
  });
}

int copy_blocks(void* pages, std::int64_t page_bytes, std::int64_t block_pages,
                const std::int32_t* blocks, std::int64_t count, void* stage, int is_gathering) {
  return tried([&] {
    const cuda::CopyBlocksParams params = {pages,  size(page_bytes), size(block_pages),
                                           blocks, size(count),      stage};
    if (is_gathering != 0) return cuda::gather_blocks(nullptr, params);
    cuda::scatter_blocks(nullptr, params);
  });
}

// numbers are [rows][4]: temperature, top_p, min_p, a height or -1 for the draw's own; choices are
// [rows][3]: top_k, seed, position.
int sample(const float* logits, std::int64_t rows, std::int64_t vocab, const double* numbers,
           const std::uint64_t* choices, std::int64_t* tokens) {
  return tried([&] {
    std::vector<cuda::DeviceDraw> draws;
    for (std::int64_t row = 0; row < rows; ++row) {
      const double* const number = numbers + 4 * row;
      const std::uint64_t* const choice = choices + 3 * row;
      draws.push_back(cuda::device_draw({number[0], static_cast<std::size_t>(choice[0]), number[1],
                                         number[2], choice[1], choice[2]}));
      if (number[3] >= 0) draws.back().height = number[3];
    }
    std::vector<char> workspace(cuda::sample_workspace_bytes(size(rows), size(vocab)), '\xFF');
    cuda::sample(nullptr,
                 {logits, size(rows), size(vocab), draws.data(), tokens, workspace.data()});
  });
}

}  // extern "C"
