// gather_blocks and scatter_blocks: a block of KV is one piece of memory, copied by 16 bytes a
// thread, side by side.

#include "ops/cuda/compiler.h"
#include "ops/cuda/ops.h"

namespace aegaeon::ops::cuda {
namespace {

constexpr std::size_t kCopyThreads = 256;
// What a block of threads copies: enough in flight, and a block of KV is many of them.
constexpr std::size_t kPieceWords = 8 * kCopyThreads;

struct alignas(16) Word {
  std::uint32_t of[4];
};

// Blocks: [number of the block of KV][piece of a block of KV]: there may be any count of the
// former, and 65,535 of the latter, which are 2 GiB.
template <bool is_gathering>
__global__ void __launch_bounds__(kCopyThreads) copy_blocks(const CopyBlocksParams params) {
  const std::size_t words = params.block_pages * params.page_bytes / sizeof(Word);
  const std::size_t number = blockIdx.x, first = blockIdx.y * kPieceWords;
  const auto id = static_cast<std::size_t>(params.blocks[number]);
  Word* const block = static_cast<Word*>(params.pages) + id * params.page_bytes / sizeof(Word);
  Word* const staged = static_cast<Word*>(params.stage) + number * words;
  const Word* const from = is_gathering ? block : staged;
  Word* const to = is_gathering ? staged : block;
  const std::size_t end = min(words, first + kPieceWords);
#pragma unroll 8
  for (std::size_t at = first + threadIdx.x; at < end; at += kCopyThreads) to[at] = from[at];
}

template <bool is_gathering>
void copy(Stream stream, const CopyBlocksParams& params) {
  if (params.count == 0) return;
  const std::size_t words = params.block_pages * params.page_bytes / sizeof(Word);
  const auto pieces = static_cast<unsigned>((words + kPieceWords - 1) / kPieceWords);
  launch(&copy_blocks<is_gathering>,
         {{static_cast<unsigned>(params.count), pieces, 1}, kCopyThreads, 0}, stream, params);
}

}  // namespace

void gather_blocks(Stream stream, const CopyBlocksParams& params) { copy<true>(stream, params); }

void scatter_blocks(Stream stream, const CopyBlocksParams& params) { copy<false>(stream, params); }

}  // namespace aegaeon::ops::cuda
