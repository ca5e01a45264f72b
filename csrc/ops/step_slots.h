// The slots of a step while it is recorded, whichever device it is for, and what fits together of
// the columns that its operators read.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace aegaeon::ops {

// What an operator makes, or an input of the step: rows of so many elements.
using Slot = std::size_t;

// The columns first .. first + width - 1 of a slot.
struct View {
  Slot slot;
  std::size_t first;
  std::size_t width;
};

// The keys and values that a step's attention is made for.
struct KvForm {
  std::size_t layers = 0;
  std::size_t kv_heads = 0;
  std::size_t head_dim = 0;
};

struct SlotForm {
  std::size_t width;
  bool is_of_outputs;  // its rows are those that the step's results are wanted of
};

// Throws std::invalid_argument.
void require(bool claim, const std::string& what);

// Whoever records asks before an operator is added; what does not fit is std::invalid_argument.
class StepSlots {
 public:
  Slot add(const SlotForm& form);
  std::size_t size() const { return forms_.size(); }
  const SlotForm& operator[](Slot slot) const { return forms_[slot]; }
  std::vector<SlotForm>::const_iterator begin() const { return forms_.begin(); }
  std::vector<SlotForm>::const_iterator end() const { return forms_.end(); }
  const KvForm& kv_form() const { return kv_form_; }

  void check(const View& view) const;
  void check_whole(const View& view, const char* what) const;
  void check_heads(const View& view, std::size_t heads) const;
  // Of a product of `width` columns; the residual may be null.
  void check_product(const View& x, const View* residual, std::size_t width) const;
  void check_rotation(const View& x, std::size_t heads, const View& cos, const View& sin) const;
  // Returns the form with the layer, to `keep` once it is appended.
  KvForm check_kv(std::size_t layer, std::size_t kv_heads, const View& keys,
                  const View& values) const;
  void check_queries(std::size_t layer, std::size_t heads, const View& queries) const;
  // Of which `choose` may make rows of the outputs.
  void check_choice(const View& x) const;
  // What an operator makes has as many rows as what it reads; returns whether those of the outputs.
  bool are_of_outputs(const std::vector<View>& reads) const;

  void choose(Slot made) { forms_[made].is_of_outputs = true; }
  void keep(const KvForm& form) { kv_form_ = form; }

 private:
  std::vector<SlotForm> forms_;
  KvForm kv_form_;
};

}  // namespace aegaeon::ops
