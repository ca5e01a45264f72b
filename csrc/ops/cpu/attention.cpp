// How `attend` is shared out: each sequence and KV head by itself, its queries in tiles, its tokens
// in splits. A thread takes all splits of a few tiles, or one split of a tile that is too long for
// one thread; then whoever ends last joins them. The order is the same either way.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "ops/cpu/attention_call.h"
#include "ops/cpu/kept.h"
#include "ops/cpu/thread_pool.h"
#include "ops/ops.h"

namespace aegaeon::ops {
namespace {

// Products that are worth waking another thread for.
constexpr std::size_t kClaimProducts = 64 << 10;
// Shares of a thread that all work is cut into at least, so that nobody waits long for the last.
constexpr std::size_t kSharesPerThread = 8;
// Tiles that pass over a split while it is in the second cache.
constexpr std::size_t kTilesTogether = 4;
// Floats that splits may take while they wait to be joined, those of single rows aside: counted in
// aegaeon/memory/workspace.py.
constexpr std::size_t kMostWaiting = 4 << 20;

// What is claimed: `tiles` tiles of a sequence and KV head from number `tile` on, or, of a tile
// that is cut, one split.
struct Unit {
  const SequenceRows* sequence;
  std::size_t kv_head;
  std::size_t tile;
  std::size_t tiles;
  std::size_t cut;
  std::size_t split;
};

constexpr std::size_t kUncut = SIZE_MAX;

// A tile whose splits are computed one by one, and where they wait: [splits][count][head_dim] sums
// and [splits][count] softmaxes from there on.
struct Cut {
  Tile tile;
  std::size_t splits;
  std::size_t first_sum;
  std::size_t first_softmax;
};

// What a thread computes in, and where splits wait that it has others compute. Kept from call to
// call: memory that is new to a process costs more than what is done in it.
struct Scratch {
  std::vector<float> queries, sums, split_sums, scores, waiting;
  std::vector<Softmax> softmax, waiting_softmax;

  static Scratch& of_this_thread() {
    thread_local Scratch scratch;
    return scratch;
  }

  void hold(std::size_t head_dim) {
    if (split_sums.size() >= kMaxTileQueries * head_dim) return;
    queries.resize(kTilesTogether * kMaxTileQueries * head_dim);
    sums.resize(kTilesTogether * kMaxTileQueries * head_dim);
    scores.resize(kMaxTileQueries * kScoreStride);
    softmax.resize(kTilesTogether * kMaxTileQueries);
    split_sums.resize(kMaxTileQueries * head_dim);  // last: it tells that all are there
  }
};

// The units of a call, and how each is computed.
class Units {
 public:
  Units(const AttendParams& params, unsigned threads);

  std::size_t count() const { return units_.size(); }
  // Units that are worth waking another thread for.
  std::size_t grain() const { return kClaimProducts * units_.size() / (products_ + 1) + 1; }
  void run(std::size_t first, std::size_t last);

 private:
  std::size_t products(const Tile& tile) const {
    return tile.count * call_.tokens_seen(tile) * call_.head_dim();
  }
  bool is_to_be_cut(const Tile& longest, std::size_t share) const;
  void add_whole(const SequenceRows& sequence, std::size_t together);
  void add_cut(const SequenceRows& sequence, std::size_t splits);
  void run_whole(const Unit& unit) const;
  void run_split(const Unit& unit, const Unit& next);
  void join(const Cut& cut) const;

  const AttentionCall call_;
  std::size_t products_ = 0;
  std::vector<Unit> units_;
  std::vector<Cut> cuts_;
  std::size_t sums_ = 0, softmaxes_ = 0;        // of all cuts
  std::vector<std::atomic<std::size_t>> left_;  // splits of each cut that are not done
  float* waiting_ = nullptr;
  Softmax* waiting_softmax_ = nullptr;
};

Units::Units(const AttendParams& params, unsigned threads) : call_(params) {
  for (const SequenceRows& sequence : params.kv.sequences) {
    products_ += sequence.rows * (sequence.start + (sequence.rows + 1) / 2);
  }
  products_ *= params.heads * params.kv.head_dim;
  const std::size_t share = threads == 1 ? SIZE_MAX : products_ / (threads * kSharesPerThread);
  for (const SequenceRows& sequence : params.kv.sequences) {
    if (sequence.rows == 0) continue;
    const Tile longest = call_.tile_of(sequence, 0, call_.tiles_of(sequence).count() - 1);
    if (is_to_be_cut(longest, share)) {
      add_cut(sequence, call_.splits_of(longest));
    } else {
      const std::size_t fitting = share / products(longest);
      add_whole(sequence, std::clamp<std::size_t>(fitting, 1, kTilesTogether));
    }
  }
  left_ = std::vector<std::atomic<std::size_t>>(cuts_.size());
  for (std::size_t at = 0; at < cuts_.size(); ++at) left_[at].store(cuts_[at].splits);
  Scratch& scratch = Scratch::of_this_thread();
  waiting_ = at_least(scratch.waiting, sums_);
  waiting_softmax_ = at_least(scratch.waiting_softmax, softmaxes_);
}

bool Units::is_to_be_cut(const Tile& longest, std::size_t share) const {
  const std::size_t splits = call_.splits_of(longest);
  if (splits == 1 || products(longest) <= share) return false;
  const SequenceRows& sequence = *longest.sequence;
  const std::size_t queries = call_.kv_heads() * call_.queries_of(sequence);
  return sequence.rows == 1 || sums_ + splits * queries * call_.head_dim() <= kMostWaiting;
}

void Units::add_whole(const SequenceRows& sequence, std::size_t together) {
  const std::size_t tiles = call_.tiles_of(sequence).count();
  for (std::size_t head = 0; head < call_.kv_heads(); ++head) {
    for (std::size_t tile = 0; tile < tiles; tile += together) {
      units_.push_back({&sequence, head, tile, std::min(together, tiles - tile), kUncut, 0});
    }
  }
}

// Heads of the same split one after another: their pages lie side by side.
void Units::add_cut(const SequenceRows& sequence, std::size_t splits) {
  const std::size_t tiles = call_.tiles_of(sequence).count(), first_cut = cuts_.size();
  for (std::size_t head = 0; head < call_.kv_heads(); ++head) {
    for (std::size_t at = 0; at < tiles; ++at) {
      const Tile tile = call_.tile_of(sequence, head, at);
      const std::size_t own = call_.splits_of(tile);
      cuts_.push_back({tile, own, sums_, softmaxes_});
      sums_ += own * tile.count * call_.head_dim();
      softmaxes_ += own * tile.count;
    }
  }
  for (std::size_t split = 0; split < splits; ++split) {
    for (std::size_t cut = first_cut; cut < cuts_.size(); ++cut) {
      if (split >= cuts_[cut].splits) continue;
      const std::size_t number = cut - first_cut;
      units_.push_back({&sequence, number / tiles, number % tiles, 1, cut, split});
    }
  }
}

void Units::run(std::size_t first, std::size_t last) {
  Scratch::of_this_thread().hold(call_.head_dim());
  for (std::size_t at = first; at < last; ++at) {
    if (units_[at].cut == kUncut) {
      run_whole(units_[at]);
    } else {
      run_split(units_[at], units_[at + 1 < last ? at + 1 : at]);
    }
  }
}

void Units::run_whole(const Unit& unit) const {
  Scratch& scratch = Scratch::of_this_thread();
  const std::size_t head_dim = call_.head_dim(), each = kMaxTileQueries * head_dim;
  std::fill(scratch.softmax.begin(), scratch.softmax.end(), Softmax{});
  Tile tiles[kTilesTogether];
  for (std::size_t i = 0; i < unit.tiles; ++i) {
    tiles[i] = call_.tile_of(*unit.sequence, unit.kv_head, unit.tile + i);
    call_.pack(tiles[i], scratch.queries.data() + i * each);
    std::fill_n(scratch.sums.data() + i * each, tiles[i].count * head_dim, 0.0F);
  }
  const Tile& longest = tiles[unit.tiles - 1];
  for (std::size_t split = 0; split < call_.splits_of(longest); ++split) {
    for (std::size_t i = 0; i < unit.tiles; ++i) {
      if (split >= call_.splits_of(tiles[i])) continue;
      SplitTile part = call_.split_of(tiles[i], split, scratch.queries.data() + i * each);
      part.scores = scratch.scores.data();
      part.sums = scratch.split_sums.data();
      if (i + 1 == unit.tiles) call_.read_next(part, longest, split + 1);
      call_.run(part);
      for (std::size_t query = 0; query < part.count; ++query) {
        if (part.visible[query] == 0) continue;
        join_split(part.softmax[query], part.sums + query * head_dim,
                   scratch.softmax[i * kMaxTileQueries + query],
                   scratch.sums.data() + i * each + query * head_dim, head_dim);
      }
    }
  }
  for (std::size_t i = 0; i < unit.tiles; ++i) {
    call_.write(tiles[i], scratch.softmax.data() + i * kMaxTileQueries,
                scratch.sums.data() + i * each);
  }
}

void Units::run_split(const Unit& unit, const Unit& next) {
  Scratch& scratch = Scratch::of_this_thread();
  const Cut& cut = cuts_[unit.cut];
  call_.pack(cut.tile, scratch.queries.data());
  SplitTile part = call_.split_of(cut.tile, unit.split, scratch.queries.data());
  const std::size_t first = unit.split * part.count;
  part.scores = scratch.scores.data();
  part.sums = waiting_ + cut.first_sum + first * call_.head_dim();
  if (next.cut != kUncut) call_.read_next(part, cuts_[next.cut].tile, next.split);
  call_.run(part);
  std::copy_n(part.softmax, part.count, waiting_softmax_ + cut.first_softmax + first);
  if (left_[unit.cut].fetch_sub(1, std::memory_order_acq_rel) == 1) join(cut);
}

void Units::join(const Cut& cut) const {
  Scratch& scratch = Scratch::of_this_thread();
  const std::size_t head_dim = call_.head_dim(), count = cut.tile.count;
  std::fill_n(scratch.softmax.begin(), count, Softmax{});
  std::fill_n(scratch.sums.begin(), count * head_dim, 0.0F);
  for (std::size_t split = 0; split < cut.splits; ++split) {
    for (std::size_t query = 0; query < count; ++query) {
      if (call_.tokens_seen(cut.tile, query) <= split * kSplitTokens) continue;
      const std::size_t at = split * count + query;
      join_split(waiting_softmax_[cut.first_softmax + at], waiting_ + cut.first_sum + at * head_dim,
                 scratch.softmax[query], scratch.sums.data() + query * head_dim, head_dim);
    }
  }
  call_.write(cut.tile, scratch.softmax.data(), scratch.sums.data());
}

}  // namespace

void attend(ThreadPool& pool, const AttendParams& params) {
  Units units(params, pool.threads());
  pool.for_ranges(units.count(), units.grain(),
                  [&](std::size_t first, std::size_t last) { units.run(first, last); });
}

}  // namespace aegaeon::ops
