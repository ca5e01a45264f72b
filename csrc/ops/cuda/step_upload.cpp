#include "ops/cuda/step_upload.h"

#include <algorithm>
#include <cstring>

namespace aegaeon::ops::cuda {
namespace {

constexpr std::size_t kAlignment = 16;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

std::size_t heads_of(const StepPlan& plan, const PagedKv& kv) {
  return plan.heads() > 0 ? plan.heads() : kv.kv_heads;
}

// Of a bucket, as StepTables would count them for a full one.
StepBounds bounds_of(const StepBucket& bucket, std::size_t rows, std::size_t group) {
  StepBounds bounds;
  bounds.rows = rows;
  if (bucket.rows == 0) return bounds;
  const bool is_short = group <= kMostShortQueries;
  const std::size_t each = is_short ? kShortQueries : kLongQueries;
  const std::size_t tiles = bucket.rows * ((group + each - 1) / each);
  bounds.long_tiles = is_short ? 0 : tiles;
  if (!is_short) return bounds;
  bounds.short_tiles = tiles;
  bounds.short_queries = bucket.rows * group;
  bounds.splits = bucket.splits;
  return bounds;
}

template <typename Value>
void append(std::string& bytes, const Value& value) {
  char given[sizeof value];
  std::memcpy(given, &value, sizeof value);
  bytes.append(given, sizeof value);
}

}  // namespace

StepUpload::StepUpload(const StepPlan& plan, const HostStep& step, const PagedKv& kv,
                       StepBucket bucket, std::size_t most_floats)
    : step_(step),
      kv_(kv),
      head_dim_(plan.head_dim()),
      hidden_(plan.hidden()),
      rows_(std::max(step.rows, bucket.rows)),
      outputs_(std::max(step.outputs, bucket.rows)),
      tables_(kv, heads_of(plan, kv), bounds_of(bucket, rows_, heads_of(plan, kv) / kv.kv_heads),
              most_floats) {
  const std::size_t angles = rows_ * head_dim_ * sizeof(float);
  cos_ = aligned(rows_ * sizeof(std::int64_t));
  sin_ = aligned(cos_ + angles);
  chosen_ = aligned(sin_ + angles);
  words_ = aligned(chosen_ + outputs_ * sizeof(std::int64_t));
  table_ = aligned(words_ + tables_.words().size() * sizeof(std::int32_t));
  total_ = aligned(table_ + step_.table_bytes);
}

std::size_t StepUpload::workspace_floats() const {
  return cuda::workspace_floats(tables_.bounds(), kv_);
}

// Rows of nobody are of token 0, and turned by no angle.
void StepUpload::fill(std::byte* buffer) const {
  const std::size_t angles = step_.rows * head_dim_ * sizeof(float);
  std::memset(buffer, 0, words_);
  const auto put = [buffer](std::size_t at, const void* from, std::size_t bytes) {
    if (bytes > 0) std::memcpy(buffer + at, from, bytes);
  };
  put(0, step_.token_ids, step_.rows * sizeof(std::int64_t));
  put(cos_, step_.cos, angles);
  put(sin_, step_.sin, angles);
  put(chosen_, step_.chosen, step_.outputs * sizeof(std::int64_t));
  put(words_, tables_.words().data(), tables_.words().size() * sizeof(std::int32_t));
  put(table_, step_.table.tiles, step_.table_bytes);
}

StepInputs StepUpload::on_device(const std::byte* base, float* workspace) const {
  const auto floats = [base](std::size_t at) { return reinterpret_cast<const float*>(base + at); };
  Matrix table = step_.table;
  if (step_.table_bytes > 0) table.tiles = base + table_;
  const EmbedParams embedding = {reinterpret_cast<const std::int64_t*>(base), rows_, hidden_, table,
                                 nullptr};
  const DeviceTables tables = {reinterpret_cast<const std::int32_t*>(base + words_),
                               tables_.bounds(), workspace};
  return {rows_,        outputs_,     embedding,
          floats(cos_), floats(sin_), reinterpret_cast<const std::int64_t*>(base + chosen_),
          &kv_,         tables};
}

std::string StepUpload::identity(const StepMemory& memory, const std::byte* base,
                                 float* workspace) const {
  const StepBounds& bounds = tables_.bounds();
  std::string bytes;
  for (const std::size_t count :
       {rows_, outputs_, bounds.rows, bounds.short_tiles, bounds.short_queries, bounds.splits,
        bounds.long_tiles, memory.slot_rows, step_.table.out_features, kv_.kv_heads,
        kv_.head_dim}) {
    append(bytes, count);
  }
  for (const void* address :
       {static_cast<const void*>(memory.slots), static_cast<const void*>(memory.result),
        static_cast<const void*>(base), static_cast<const void*>(workspace), step_.table.tiles,
        static_cast<const void*>(kv_.pages)}) {
    append(bytes, address);
  }
  append(bytes, step_.table.type);
  append(bytes, kv_.type);
  return bytes;
}

}  // namespace aegaeon::ops::cuda
