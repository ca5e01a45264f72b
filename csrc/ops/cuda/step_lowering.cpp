// What of a step becomes one launch. Sums that a residual is added to are added up by the norm
// behind them; keys are rotated as they are appended, beside the queries; and what is only
// multiplied with weights of bf16 is rounded to it by whoever makes it. Whether so never depends on
// rows.

#include <algorithm>
#include <optional>
#include <utility>

#include "ops/cuda/step_plan.h"

namespace aegaeon::ops::cuda {
namespace {

bool is_product(const Recorded& op) { return op.kind == Kind::linear || op.kind == Kind::gated; }

bool has_bias(const std::vector<Part>& parts) {
  return std::any_of(parts.begin(), parts.end(),
                     [](const Part& part) { return part.bias != nullptr; });
}

bool are_of(const std::vector<Part>& parts, WeightType type) {
  return std::all_of(parts.begin(), parts.end(),
                     [type](const Part& part) { return part.type == type; });
}

class Lowering {
 public:
  Lowering(const StepRecord& record, Slot result);
  Lowered run();

 private:
  using Run = std::function<void(const StepPass&)>;

  void lower(std::size_t& at);
  void linear(const Recorded& op, const Recorded* next);
  void gated(const Recorded& op);
  void norm(const Recorded& op);
  bool rotate_and_append(std::size_t at);
  void rotate(const Recorded& op);
  void append(const Recorded& op);
  void attend(const Recorded& op);

  // Has the parts multiplied into `out`; returns where the rows' scales are, if they have some.
  std::optional<Slot> multiply(const Recorded& op, Slot out);
  // x as weights of `type` take it.
  Slot narrowed(const Recorded& op, WeightType type);
  void finish(const Recorded& op, std::optional<Slot> scales);
  bool is_added_by(const Recorded& op, const Recorded* next) const;

  Slot new_slot(std::size_t width, WeightType type, bool is_of_outputs);
  std::vector<std::size_t> readers_of(Slot slot) const;
  bool is_rounded(Slot slot) const { return lowered_.places[slot].type == WeightType::bf16; }
  void emit(const Recorded& op, std::vector<Slot> reads, std::vector<Slot> makes, Run run);

  const StepRecord& record_;
  const std::vector<Recorded>& operators_;
  Lowered lowered_;
  // The sums of a product whose residual is not in them yet, and the residual.
  std::optional<std::pair<Slot, Slot>> pending_;
  // What was narrowed already: x and what it became.
  std::vector<std::pair<Slot, Slot>> narrowed_;
  std::vector<std::pair<Slot, Slot>> scales_;  // of those of f16
};

Lowering::Lowering(const StepRecord& record, Slot result)
    : record_(record), operators_(record.operators()) {
  require(!operators_.empty() && operators_.back().makes == result &&
              record.slots()[result].is_of_outputs && operators_.back().kind == Kind::linear,
          "a step ends with its result, a product of the outputs");
  for (const SlotForm& slot : record.slots()) {
    lowered_.places.push_back({slot.width, WeightType::f32, slot.is_of_outputs, Home::slots, 0});
  }
  for (const Recorded& op : operators_) {
    const bool can_round = op.kind == Kind::rms_norm || op.kind == Kind::gated;
    const std::vector<std::size_t> readers = readers_of(op.makes);
    const bool is_factor =
        !readers.empty() && std::all_of(readers.begin(), readers.end(), [&](std::size_t at) {
          const Recorded& reader = operators_[at];
          const bool is_added = !reader.others.empty() && reader.others[0].slot == op.makes;
          return is_product(reader) && !is_added && are_of(reader.parts, WeightType::bf16);
        });
    if (can_round && is_factor) lowered_.places[op.makes].type = WeightType::bf16;
  }
  lowered_.places[1].home = lowered_.places[2].home = Home::upload;
  lowered_.places[result].home = Home::result;
}

Lowered Lowering::run() {
  const Run embedding = [](const StepPass& pass) {
    EmbedParams params = pass.given.embedding;
    params.out = pass.floats(0);
    embed(pass.stream, params);
  };
  lowered_.launches.push_back({embedding, 0, {}, {0}, 0, false});
  for (std::size_t at = 0; at < operators_.size(); ++at) lower(at);
  return std::move(lowered_);
}

void Lowering::lower(std::size_t& at) {
  const Recorded& op = operators_[at];
  const Recorded* const next = at + 1 < operators_.size() ? &operators_[at + 1] : nullptr;
  switch (op.kind) {
    case Kind::linear:
      return linear(op, next);
    case Kind::gated:
      return gated(op);
    case Kind::rms_norm:
      return norm(op);
    case Kind::rotate:
      if (rotate_and_append(at)) {
        at += 2;
        return;
      }
      return rotate(op);
    case Kind::append_kv:
      return append(op);
    case Kind::attend:
      return attend(op);
  }
}

// Only where the norm is the next operator, so that nobody reads the sums before they are whole.
bool Lowering::is_added_by(const Recorded& op, const Recorded* next) const {
  if (op.others.empty() || next == nullptr || next->kind != Kind::rms_norm) return false;
  const bool is_plain = !has_bias(op.parts) && !are_of(op.parts, WeightType::f16);
  return is_plain && next->heads == 1 && !next->is_choosing && next->x.slot == op.makes &&
         next->x.width == record_.slots()[op.makes].width;
}

void Lowering::linear(const Recorded& op, const Recorded* next) {
  const std::optional<Slot> scales = multiply(op, op.makes);
  if (is_added_by(op, next)) {
    // They are needed until then, and so is the residual.
    pending_ = {op.makes, op.others[0].slot};
  } else if (!op.others.empty() || scales || has_bias(op.parts)) {
    finish(op, scales);
  }
}

void Lowering::gated(const Recorded& op) {
  const std::size_t width = op.parts[0].outputs;
  const bool is_of_outputs = lowered_.places[op.makes].is_of_outputs;
  const Slot products = new_slot(2 * width, WeightType::f32, is_of_outputs);
  const std::optional<Slot> scales = multiply(op, products);
  std::vector<Slot> reads{products};
  if (scales) reads.push_back(*scales);
  const bool rounds = is_rounded(op.makes);
  emit(op, reads, {op.makes}, [=](const StepPass& pass) {
    SiluMulParams params = {pass.rows_of({products, 0, width}),
                            pass.rows_of({products, width, width}), pass.count_of(op.makes), width,
                            rounds ? nullptr : pass.floats(op.makes)};
    params.rounded = rounds ? pass.at(op.makes) : nullptr;
    params.scales = scales ? pass.floats(*scales) : nullptr;
    params.gate_bias = op.parts[0].bias;
    params.up_bias = op.parts[1].bias;
    silu_mul(pass.stream, params);
  });
}

void Lowering::norm(const Recorded& op) {
  const bool rounds = is_rounded(op.makes);
  std::optional<Slot> residual;
  std::vector<Slot> reads{op.x.slot}, makes{op.makes};
  if (pending_ && pending_->first == op.x.slot) {
    residual = pending_->second;
    reads.push_back(*residual);
    makes.push_back(op.x.slot);
    pending_.reset();
  }
  emit(op, reads, makes, [=](const StepPass& pass) {
    const RmsNormParams params = {pass.rows_of(op.x),
                                  pass.count_of(op.makes),
                                  op.heads,
                                  op.x.width / op.heads,
                                  op.weight,
                                  op.number,
                                  rounds ? nullptr : pass.floats(op.makes),
                                  op.is_choosing ? pass.given.chosen : nullptr};
    add_rms_norm(pass.stream, {params, residual ? pass.floats(*residual) : nullptr,
                               residual ? pass.floats(op.x.slot) : nullptr,
                               rounds ? pass.at(op.makes) : nullptr});
  });
}

std::optional<Slot> Lowering::multiply(const Recorded& op, Slot out) {
  Product product;
  std::vector<Slot> reads;
  std::size_t column = 0;
  for (const Part& part : op.parts) {
    product.push_back({part, narrowed(op, part.type), out, column});
    reads.push_back(product.back().x);
    column += part.outputs;
  }
  emit(op, reads, {out}, nullptr);
  lowered_.launches.back().product = lowered_.products.size();
  lowered_.products.push_back(std::move(product));
  for (const auto& [x, scales] : scales_) {
    if (x == reads[0]) return scales;
  }
  return std::nullopt;
}

Slot Lowering::narrowed(const Recorded& op, WeightType type) {
  const Slot x = op.x.slot;
  if (lowered_.places[x].type == type) return x;
  for (const auto& [from, to] : narrowed_) {
    if (from == x && lowered_.places[to].type == type) return to;
  }
  const bool is_of_outputs = lowered_.places[x].is_of_outputs;
  const Slot made = new_slot(op.x.width, type, is_of_outputs);
  narrowed_.emplace_back(x, made);
  std::vector<Slot> makes{made};
  std::optional<Slot> scales;
  if (type == WeightType::f16) {
    scales = new_slot(1, WeightType::f32, is_of_outputs);
    scales_.emplace_back(made, *scales);
    makes.push_back(*scales);
  }
  emit(op, {x}, makes, [=](const StepPass& pass) {
    narrow_rows(pass.stream, {pass.rows_of(op.x), pass.count_of(made), op.x.width, type,
                              pass.at(made), scales ? pass.floats(*scales) : nullptr});
  });
  return made;
}

void Lowering::finish(const Recorded& op, std::optional<Slot> scales) {
  std::vector<Slot> reads{op.makes};
  if (scales) reads.push_back(*scales);
  if (!op.others.empty()) reads.push_back(op.others[0].slot);
  const std::size_t width = record_.slots()[op.makes].width;
  emit(op, reads, {op.makes}, [=](const StepPass& pass) {
    FinishParams params = {pass.floats(op.makes),
                           pass.count_of(op.makes),
                           width,
                           scales ? pass.floats(*scales) : nullptr,
                           op.others.empty() ? nullptr : pass.floats(op.others[0].slot),
                           {},
                           {}};
    std::size_t end = 0;
    for (std::size_t at = 0; at < op.parts.size(); ++at) {
      params.biases[at] = op.parts[at].bias;
      params.ends[at] = end += op.parts[at].outputs;
    }
    finish_product(pass.stream, params);
  });
}

RotateParams rotation(const StepPass& pass, const Recorded& op) {
  return {pass.rows_of(op.x),    pass.count_of(op.makes),        op.heads,
          op.x.width / op.heads, pass.floats(op.others[0].slot), pass.floats(op.others[1].slot),
          pass.floats(op.makes)};
}

// Keys, rotated and appended, then queries, rotated by the same angles.
bool Lowering::rotate_and_append(std::size_t at) {
  if (at + 2 >= operators_.size()) return false;
  const Recorded &keys = operators_[at], &append = operators_[at + 1];
  const Recorded& queries = operators_[at + 2];
  const bool is_chain = append.kind == Kind::append_kv && queries.kind == Kind::rotate &&
                        append.x.slot == keys.makes && append.x.width == keys.x.width &&
                        readers_of(keys.makes).size() == 1 && append.heads == keys.heads &&
                        queries.others[0].slot == keys.others[0].slot &&
                        queries.others[1].slot == keys.others[1].slot;
  if (!is_chain || append.others[0].slot == keys.makes) return false;
  const std::vector<Slot> reads{keys.x.slot, queries.x.slot, append.others[0].slot};
  emit(queries, reads, {queries.makes}, [=](const StepPass& pass) {
    ops::cuda::rotate_and_append(
        pass.stream, pass.given.tables, rotation(pass, queries),
        {*pass.given.kv, append.layer, pass.rows_of(keys.x), pass.rows_of(append.others[0])});
  });
  return true;
}

void Lowering::rotate(const Recorded& op) {
  emit(op, {op.x.slot}, {op.makes},
       [=](const StepPass& pass) { ops::cuda::rotate(pass.stream, rotation(pass, op)); });
}

void Lowering::append(const Recorded& op) {
  emit(op, {op.x.slot, op.others[0].slot}, {}, [=](const StepPass& pass) {
    append_kv(pass.stream, pass.given.tables,
              {*pass.given.kv, op.layer, pass.rows_of(op.x), pass.rows_of(op.others[0])});
  });
}

void Lowering::attend(const Recorded& op) {
  emit(op, {op.x.slot}, {op.makes}, [=](const StepPass& pass) {
    ops::cuda::attend(pass.stream, pass.given.tables,
                      {*pass.given.kv, op.layer, op.heads, pass.floats(op.x.slot), op.number,
                       pass.floats(op.makes)});
  });
}

Slot Lowering::new_slot(std::size_t width, WeightType type, bool is_of_outputs) {
  lowered_.places.push_back({width, type, is_of_outputs, Home::slots, 0});
  return lowered_.places.size() - 1;
}

std::vector<std::size_t> Lowering::readers_of(Slot slot) const {
  std::vector<std::size_t> readers;
  for (std::size_t at = 0; at < operators_.size(); ++at) {
    const Recorded& op = operators_[at];
    const bool reads = std::any_of(op.others.begin(), op.others.end(),
                                   [slot](const View& view) { return view.slot == slot; });
    if (reads || op.x.slot == slot) readers.push_back(at);
  }
  return readers;
}

void Lowering::emit(const Recorded& op, std::vector<Slot> reads, std::vector<Slot> makes, Run run) {
  const bool is_of_outputs = op.is_choosing || lowered_.places[op.x.slot].is_of_outputs;
  lowered_.launches.push_back(
      {std::move(run), 0, std::move(reads), std::move(makes), op.stages, is_of_outputs});
}

}  // namespace

Lowered lower(const StepRecord& record, Slot result) { return Lowering(record, result).run(); }

}  // namespace aegaeon::ops::cuda
