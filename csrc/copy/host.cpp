#include "copy/host.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace aegaeon::copy {
namespace {

using Lines = void (*)(std::byte* to, const std::byte* from, std::size_t bytes);

#if defined(__x86_64__)

constexpr std::size_t kLine = 64;
// The hardware prefetcher stops at page borders and fills the outer cache; this does neither.
constexpr std::size_t kAhead = 1024;

// `to` is aligned to a line and `bytes` are whole lines, in all three.
__attribute__((target("avx512f"))) void lines_avx512(std::byte* to, const std::byte* from,
                                                     std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(from + at + kAhead), _MM_HINT_NTA);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
  }
}

__attribute__((target("avx2"))) void lines_avx2(std::byte* to, const std::byte* from,
                                                std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += kLine) {
    const auto* source = reinterpret_cast<const __m256i*>(from + at);
    auto* target = reinterpret_cast<__m256i*>(to + at);
    _mm_prefetch(reinterpret_cast<const char*>(from + at + kAhead), _MM_HINT_NTA);
    const __m256i low = _mm256_loadu_si256(source);
    const __m256i high = _mm256_loadu_si256(source + 1);
    _mm256_stream_si256(target, low);
    _mm256_stream_si256(target + 1, high);
  }
}

void lines_sse2(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += kLine) {
    const auto* source = reinterpret_cast<const __m128i*>(from + at);
    auto* target = reinterpret_cast<__m128i*>(to + at);
    _mm_prefetch(reinterpret_cast<const char*>(from + at + kAhead), _MM_HINT_NTA);
    const __m128i first = _mm_loadu_si128(source);
    const __m128i second = _mm_loadu_si128(source + 1);
    const __m128i third = _mm_loadu_si128(source + 2);
    const __m128i fourth = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, first);
    _mm_stream_si128(target + 1, second);
    _mm_stream_si128(target + 2, third);
    _mm_stream_si128(target + 3, fourth);
  }
}

void stream(Lines lines, std::byte* to, const std::byte* from, std::size_t bytes) {
  const std::size_t past_line = reinterpret_cast<std::uintptr_t>(to) % kLine;
  const std::size_t head = std::min(bytes, (kLine - past_line) % kLine);
  std::memcpy(to, from, head);
  const std::size_t whole = (bytes - head) / kLine * kLine;
  lines(to + head, from + head, whole);
  std::memcpy(to + head + whole, from + head + whole, bytes - head - whole);
  // Without it, these stores may become visible after later plain ones, such as of a progress.
  _mm_sfence();
}

Lines lines_of(const char* instructions) {
  if (std::strcmp(instructions, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") ? lines_avx512 : nullptr;
  }
  if (std::strcmp(instructions, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") ? lines_avx2 : nullptr;
  }
  return std::strcmp(instructions, "sse2") == 0 ? lines_sse2 : nullptr;
}

Lines widest_lines() {
  for (const char* instructions : {"avx512", "avx2"}) {
    if (const Lines lines = lines_of(instructions)) return lines;
  }
  return lines_sse2;
}

#else

void stream(Lines, std::byte* to, const std::byte* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
}

Lines lines_of(const char*) { return nullptr; }
Lines widest_lines() { return nullptr; }

#endif

}  // namespace

void copy_cached(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

void copy_streaming(void* to, const void* from, std::size_t bytes) {
  static const Lines lines = widest_lines();
  stream(lines, static_cast<std::byte*>(to), static_cast<const std::byte*>(from), bytes);
}

bool copy_streaming_with(const char* instructions, void* to, const void* from, std::size_t bytes) {
  if (std::strcmp(instructions, "none") == 0) {
    copy_cached(to, from, bytes);
    return true;
  }
  const Lines lines = lines_of(instructions);
  if (lines == nullptr) {
    return false;
  }
  stream(lines, static_cast<std::byte*>(to), static_cast<const std::byte*>(from), bytes);
  return true;
}

}  // namespace aegaeon::copy
