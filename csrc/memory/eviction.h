// Which models to evict for a new one: a pure function of what is known of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace aegaeon::memory {

// Half of the uses are forgotten after this long without another.
constexpr double kUseHalfLife_s = 60.0;

// `uses`, as of `age_s` ago, as of now.
double decayed_uses(double uses, double age_s);

struct Candidate {
  std::size_t slot;
  std::uint64_t bytes;
  double reload_s;
  double uses;       // decayed
  unsigned demands;  // live clients with requests for it
  double idle_s;

  // Seconds of loading that keeping it is expected to save in the next half-life.
  double value() const;
};

// Frees at least `need_bytes` and `need_slots` entries, lowest value per byte first, of equals the
// longest idle, without those that a later, larger one makes needless. Nothing when all of them
// together do not suffice.
std::optional<std::vector<Candidate>> choose_victims(std::vector<Candidate> candidates,
                                                     std::uint64_t need_bytes,
                                                     std::size_t need_slots);

}  // namespace aegaeon::memory
