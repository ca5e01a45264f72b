// A recorded step as launches in order, between places that are known before: nothing is asked of
// Python between two products. Plain C++: needs no device until it runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "ops/cuda/ops.h"
#include "ops/cuda/step_record.h"

namespace aegaeon::ops::cuda {

// Where a slot lies: rows of `width` elements of `type`, in the memory that steps share, or where
// the step's result goes, or in what is uploaded (cosines and sines, that are their numbers).
enum class Home { slots, result, upload };

struct Place {
  std::size_t width;
  WeightType type;
  bool is_of_outputs;
  Home home;
  std::size_t begin = 0;  // in `slots`, in floats of a row
};

// out[r][column + c] = x[r] . weights[c], float32, for whoever multiplies.
struct Factor {
  Part part;
  Slot x;  // of the part's type
  Slot out;
  std::size_t column;
};

using Product = std::vector<Factor>;

// What a step is run with, on the device.
struct StepMemory {
  std::byte* slots;
  std::size_t slot_rows;  // that each slot has room for
  float* result;
};

struct StepInputs {
  std::size_t rows;  // some may be nobody's: what comes of them is in no other's result
  std::size_t outputs;
  EmbedParams embedding;       // but for `out`
  const float* cos;            // [rows, head_dim]
  const float* sin;            // likewise
  const std::int64_t* chosen;  // [outputs]
  const PagedKv* kv;
  DeviceTables tables;
};

class StepPlan;

// A step under way: resolves slots.
struct StepPass {
  const StepPlan& plan;
  StepMemory memory;
  StepInputs given;
  Stream stream;

  void* at(Slot slot) const;
  float* floats(Slot slot) const { return static_cast<float*>(at(slot)); }
  Rows rows_of(const View& view) const;
  std::size_t count_of(Slot slot) const;  // of its rows
};

struct Launch {
  std::function<void(const StepPass&)> run;  // none where `product` is to be multiplied
  std::size_t product;
  std::vector<Slot> reads;
  std::vector<Slot> makes;
  std::size_t stages;
  bool is_of_outputs;
};

// What `lower` makes of a record: see step_lowering.cpp for what becomes one launch.
struct Lowered {
  std::vector<Place> places;
  std::vector<Launch> launches;
  std::vector<Product> products;
};

Lowered lower(const StepRecord& record, Slot result);

// Of a record that is finished; the weights that it was given must outlive it.
class StepPlan {
 public:
  // `result` is what a step is for: made last, of the outputs. Throws std::invalid_argument.
  StepPlan(const StepRecord& record, Slot result);

  std::size_t launches() const { return lowered_.launches.size(); }
  const Launch& launch(std::size_t at) const { return lowered_.launches.at(at); }
  const std::vector<Product>& products() const { return lowered_.products; }
  const Place& place(Slot slot) const { return lowered_.places[slot]; }
  const KvForm& kv_form() const { return kv_form_; }
  std::size_t heads() const { return heads_; }  // of the queries; none without attention
  // Bytes that a row of all slots takes together.
  std::size_t row_bytes() const { return row_floats_ * sizeof(float); }
  std::size_t result_width() const { return result_width_; }
  std::size_t head_dim() const { return head_dim_; }
  std::size_t hidden() const { return lowered_.places[0].width; }

  // Launches from `first` on; returns the first that is a product, or needs more stages than
  // `stages`, or launches(). What is of outputs is left out where there are none.
  std::size_t run(const StepPass& pass, std::size_t first, std::size_t stages) const;

 private:
  void lay_out_slots();

  Lowered lowered_;
  const KvForm kv_form_;
  const std::size_t heads_;
  const std::size_t result_width_;
  const std::size_t head_dim_;
  std::size_t row_floats_ = 0;
};

}  // namespace aegaeon::ops::cuda
