// What processor and memory do at most: the limits that benchmarks hold operators against.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aegaeon::ops {

class ThreadPool;

// Reads `count` words once, each thread a range of its own from end to end; returns their sum.
std::uint64_t read_words(ThreadPool& pool, const std::uint64_t* words, std::size_t count);

// Does `rounds` rounds of independent fused multiply-adds (products and sums where the instructions
// in use cannot fuse) on each thread, all in registers; returns the floating-point operations done,
// two each.
std::size_t multiply_add(ThreadPool& pool, std::size_t rounds);

// The same with products of pairs of bf16, as products with activations of bf16 do them; with
// floats where the instructions in use have none.
std::size_t multiply_add_pairs(ThreadPool& pool, std::size_t rounds);

// Forks and joins `rounds` times: every thread comes in, waits for all others and goes.
void fork_join(ThreadPool& pool, std::size_t rounds);

}  // namespace aegaeon::ops
