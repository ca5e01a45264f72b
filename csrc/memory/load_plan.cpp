#include "memory/load_plan.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "memory/quantize.h"

namespace aegaeon::memory {
namespace {

constexpr std::uint64_t kPageBytes = 4096;
constexpr std::uint64_t kLargest = std::uint64_t{1} << 46;  // so that no sum of sizes overflows

[[noreturn]] void refuse(const Job& job, const char* what) {
  throw std::invalid_argument("the load of " + job.file.path + " at " +
                              std::to_string(job.file_offset) + " " + what);
}

void check_job(const Job& job, std::uint64_t size_bytes, std::uint32_t stages) {
  if (job.row_bytes == 0 || job.element_bytes == 0 || job.row_bytes % job.element_bytes != 0 ||
      job.element_bytes > 16) {
    refuse(job, "has rows that are not whole elements");
  }
  if (job.rows == 0 || job.rows > kLargest / job.row_bytes ||
      job.data_bytes != job.rows * job.row_bytes || job.file_offset > kLargest) {
    refuse(job, "has a size that is not that of its rows");
  }
  if (job.layout > Layout::quantized_tiles ||
      static_cast<std::uint32_t>(job.convert) >= kConvertCount) {
    refuse(job, "has an unknown layout or conversion");
  }
  if (job.convert != Convert::none && job.element_bytes != 2) {
    refuse(job, "converts elements that are not of 16 bits");
  }
  if (job.is_tiled() &&
      (job.row_bytes > kMaxRowBytes || (job.element_bytes != 2 && job.element_bytes != 4))) {
    refuse(job, "has rows or elements that no tile takes");
  }
  if (job.layout == Layout::quantized_tiles &&
      (job.convert == Convert::none) != (job.element_bytes == 4)) {
    refuse(job, "rounds elements that are neither float32 nor become it");
  }
  if (job.stage >= stages) {
    refuse(job, "belongs to a stage that the model does not have");
  }
  if (job.dest_offset % kDestinationAlignment != 0 || job.dest_offset > size_bytes ||
      job.dest_bytes() > size_bytes - job.dest_offset) {
    refuse(job, "has a destination that is not aligned, or beyond the model's end");
  }
}

}  // namespace

std::uint64_t Job::rows_out(std::uint64_t count) const {
  return is_tiled() ? (count + kTileRows - 1) / kTileRows * kTileRows : count;
}

std::uint64_t Job::out_row_bytes() const {
  return layout == Layout::quantized_tiles ? quantized_row_bytes(columns())
                                           : columns() * out_element_bytes();
}

std::uint64_t Job::dest_bytes() const { return rows_out(rows) * out_row_bytes(); }

LoadPlan::LoadPlan(std::vector<Job> unordered, std::uint64_t size_bytes, std::uint32_t stage_count,
                   std::uint64_t chunk_bytes)
    : jobs(std::move(unordered)), stages(stage_count) {
  for (const Job& job : jobs) check_job(job, size_bytes, stages);
  std::sort(jobs.begin(), jobs.end(),
            [](const Job& a, const Job& b) { return a.dest_offset < b.dest_offset; });
  check(size_bytes);
  std::uint64_t end = 0;
  for (std::size_t job = 0; job < jobs.size(); ++job) {
    fill_gap(end, jobs[job].dest_offset, jobs[job].stage, chunk_bytes);
    cut(job, chunk_bytes);
    end = jobs[job].dest_offset + jobs[job].dest_bytes();
  }
  fill_gap(end, size_bytes, stages - 1, chunk_bytes);
  for (const Chunk& chunk : chunks) {
    longest_source_bytes = std::max(longest_source_bytes, chunk.source_bytes);
    if (chunk.file != Chunk::kZeros && !jobs[chunk.job].is_plain()) {
      const std::uint64_t rows_out = jobs[chunk.job].rows_out(chunk.rows);
      const std::uint64_t row_bytes = chunk.dest_bytes / rows_out;
      longest_slice_bytes =
          std::max(longest_slice_bytes, std::min(slice_rows(chunk), rows_out) * row_bytes);
    }
  }
}

std::uint64_t LoadPlan::slice_rows(const Chunk& chunk) const {
  const Job& job = jobs[chunk.job];
  const std::uint64_t unit = job.is_tiled() ? kTileRows : 1;
  const std::uint64_t row_bytes = chunk.dest_bytes / job.rows_out(chunk.rows);
  return std::max(unit, kSliceBytes / row_bytes / unit * unit);
}

void LoadPlan::check(std::uint64_t size_bytes) const {
  if (size_bytes > kLargest || stages == 0) {
    throw std::invalid_argument("a model has at least one stage, and fewer than 2^46 bytes");
  }
  for (std::size_t at = 1; at < jobs.size(); ++at) {
    const Job& before = jobs[at - 1];
    if (before.dest_offset + before.dest_bytes() > jobs[at].dest_offset) {
      refuse(jobs[at], "has a destination that overlaps another one");
    }
    if (before.stage > jobs[at].stage) {
      refuse(jobs[at], "has a destination behind that of a later stage");
    }
  }
}

void LoadPlan::cut(std::size_t at, std::uint64_t chunk_bytes) {
  const std::size_t file = file_of(jobs[at].file);
  const Job& job = jobs[at];
  // Rows of a "rows" job mean nothing to us: it is cut anywhere between elements.
  const std::uint64_t row_bytes = job.is_tiled() ? job.row_bytes : job.element_bytes;
  const std::uint64_t rows = job.data_bytes / row_bytes;
  const std::uint64_t unit = job.is_tiled() ? kTileRows : kPageBytes;
  const std::uint64_t step = std::max(unit, chunk_bytes / row_bytes / unit * unit);
  const std::uint64_t out_row_bytes =
      job.is_tiled() ? job.out_row_bytes() : job.out_element_bytes();
  for (std::uint64_t row = 0; row < rows; row += step) {
    const std::uint64_t count = std::min(step, rows - row);
    chunks.push_back({at, file, job.file_offset + row * row_bytes, count * row_bytes, count,
                      job.dest_offset + row * out_row_bytes, job.rows_out(count) * out_row_bytes,
                      job.stage});
  }
}

void LoadPlan::fill_gap(std::uint64_t begin, std::uint64_t end, std::uint32_t stage,
                        std::uint64_t chunk_bytes) {
  if (end < begin + kPageBytes) {
    return;
  }
  for (std::uint64_t at = begin; at < end; at += chunk_bytes) {
    const std::uint64_t bytes = std::min(chunk_bytes, end - at);
    chunks.push_back({0, Chunk::kZeros, 0, 0, 0, at, bytes, stage});
  }
}

std::size_t LoadPlan::file_of(const PlannedFile& file) {
  const auto found = std::find(files.begin(), files.end(), file);
  if (found == files.end()) {
    files.push_back(file);
    return files.size() - 1;
  }
  return static_cast<std::size_t>(found - files.begin());
}

}  // namespace aegaeon::memory
