// Looking before sleeping: a processor that nobody needs is woken from its sleep in 20 to 50 us,
// while one that looks sees a change in less than 1.
#pragma once

#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "shm/futex.h"

namespace aegaeon::shm {

// How long one waiter looks before it sleeps. The window doubles while waits are short enough to be
// looked through, and halves with each that is not, down to a moment: a waiter whose events are
// rare burns nothing. Looking yields the processor each time; when another thread takes it, all
// looking ends for a while: on a busy processor sleepers are woken in few microseconds, and before
// others that have yielded.
class SpinWindow {
 public:
  // The window stays below `longest_ns`: who waits often and not for long would look all the time.
  void limit(std::int64_t longest_ns) {
    longest_ns_ = std::clamp(longest_ns, kShortestNs, kLongestNs);
    window_ns_ = std::min(window_ns_, longest_ns_);
  }

  // Looks until `is_over()`; false when it is time to sleep, for up to `timeout_ns`.
  template <typename IsOver>
  bool look(std::int64_t timeout_ns, const IsOver& is_over) {
    for (int look = 0; look < kMomentLooks; ++look) {
      if (is_over()) {
        return true;
      }
      relax();
    }
    std::int64_t now = now_ns();
    const std::int64_t until = now + std::min(timeout_ns, window_ns_);
    while (now < until) {
      if (is_over()) {
        return true;
      }
      sched_yield();
      const std::int64_t before = std::exchange(now, now_ns());
      if (now - before > kSomebodyElseNs) {
        rests_until_ns_ = now + kRestNs;
        window_ns_ = 0;
        return is_over();
      }
    }
    return false;
  }

  // A wait from `start_ns` to `end_ns`, looking and sleeping, is over.
  void learn(std::int64_t start_ns, std::int64_t end_ns) {
    if (end_ns - start_ns > longest_ns_) {
      window_ns_ /= 2;
    } else if (end_ns >= rests_until_ns_) {
      window_ns_ = std::clamp(2 * window_ns_, kShortestNs, longest_ns_);
    }
  }

 private:
  static constexpr int kMomentLooks = 200;                  // costs less than falling asleep
  static constexpr std::int64_t kSomebodyElseNs = 500'000;  // who computes takes some ms
  static constexpr std::int64_t kShortestNs = 50'000;
  static constexpr std::int64_t kLongestNs = 4 * kMillisecond;
  static constexpr std::int64_t kRestNs = kSecond;

  std::int64_t longest_ns_ = kLongestNs;
  std::int64_t window_ns_ = 0;
  std::int64_t rests_until_ns_ = 0;
};

}  // namespace aegaeon::shm
