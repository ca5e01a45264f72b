// What sampling_kernel.h promises, for the instruction set that the including file is compiled for.
// Static: files for other processors have copies of their own.
#pragma once

#include "ops/cpu/sampling_kernel.h"

namespace aegaeon::ops {

static inline double multiply_add(double a, double b, double c) {
#if defined(__FMA__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x for x in [-708, 0], within an ulp. Cody and Waite's reduction, then 1 + r + r^2 q(r) with the
// minimax q of degree 9 on [-log(2) / 2, log(2) / 2].
static inline double exp_double(double x) {
  constexpr double kRound = 0x1.8p52;  // what is added is rounded to an integer
  const double shifted = multiply_add(x, 1.4426950408889634, kRound);
  const double n = shifted - kRound;
  const double r =
      multiply_add(n, -1.42860682030941723212e-6, multiply_add(n, -6.93145751953125e-1, x));
  double q = 0x1.af38d6336c037p-26;
  q = multiply_add(q, r, 0x1.2891a98de7fcbp-22);
  q = multiply_add(q, r, 0x1.71de0d9baab4ap-19);
  q = multiply_add(q, r, 0x1.a019b8eebc08ap-16);
  q = multiply_add(q, r, 0x1.a01a01a7c8efbp-13);
  q = multiply_add(q, r, 0x1.6c16c17893af7p-10);
  q = multiply_add(q, r, 0x1.11111111109adp-7);
  q = multiply_add(q, r, 0x1.5555555553d4fp-5);
  q = multiply_add(q, r, 0x1.5555555555556p-3);
  q = multiply_add(q, r, 0x1.0000000000001p-1);
  const double p = multiply_add(q * r, r, r) + 1.0;
  std::uint64_t power, rounding;
  std::memcpy(&power, &shifted, sizeof power);
  std::memcpy(&rounding, &kRound, sizeof rounding);
  const std::uint64_t factor_bits = (power - rounding + 1023U) << 52;
  double factor;
  std::memcpy(&factor, &factor_bits, sizeof factor);
  return p * factor;
}

static void weigh(const float* logits, std::size_t count, double high, double coldness,
                  double* weights) {
  for (std::size_t i = 0; i < count; ++i) {
    const double scaled = (static_cast<double>(logits[i]) - high) * coldness;
    weights[i] = exp_double(scaled > -708.0 ? scaled : -708.0);
  }
}

static inline float higher(float a, float b) { return b > a ? b : a; }

// Loops over lanes whose rounds are straight lines, which is what compilers make vectors of.
static bool find_highs(const float* logits, std::size_t count, float* highs) {
  constexpr std::size_t kLanes = kHighBlock / 4;
  float check[kLanes] = {};  // stays 0 unless something is infinite or NaN
  std::size_t first = 0;
  for (; first + kHighBlock <= count; first += kHighBlock) {
    const float* const block = logits + first;
    float high[kLanes];
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const float a = block[lane], b = block[kLanes + lane];
      const float c = block[2 * kLanes + lane], d = block[3 * kLanes + lane];
      high[lane] = higher(higher(a, b), higher(c, d));
      check[lane] += (a * 0.0F + b * 0.0F) + (c * 0.0F + d * 0.0F);
    }
    for (std::size_t lane = 0; lane < 8; ++lane) high[lane] = higher(high[lane], high[8 + lane]);
    for (std::size_t lane = 0; lane < 4; ++lane) high[lane] = higher(high[lane], high[4 + lane]);
    highs[first / kHighBlock] = higher(higher(high[0], high[1]), higher(high[2], high[3]));
  }
  if (first < count) {
    float high = logits[first];
    for (std::size_t i = first; i < count; ++i) {
      high = higher(high, logits[i]);
      check[0] += logits[i] * 0.0F;
    }
    highs[first / kHighBlock] = high;
  }
  for (std::size_t lane = 1; lane < kLanes; ++lane) check[0] += check[lane];
  return check[0] == 0.0F;
}

static double sum_block(const double* weights, std::size_t count, double floor) {
  constexpr std::size_t kLanes = 8;
  const auto kept = [&](std::size_t i) { return weights[i] >= floor ? weights[i] : 0.0; };
  double lanes[kLanes] = {};
  std::size_t first = 0;
  for (; first + 4 * kLanes <= count; first += 4 * kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const std::size_t i = first + lane;
      lanes[lane] += (kept(i) + kept(i + kLanes)) + (kept(i + 2 * kLanes) + kept(i + 3 * kLanes));
    }
  }
  for (std::size_t i = first; i < count; ++i) lanes[i % kLanes] += kept(i);
  for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

static void sum_blocks(const double* weights, std::size_t count, double floor, double* sums) {
  for (std::size_t first = 0; first < count; first += kSumBlock) {
    const std::size_t length = first + kSumBlock < count ? kSumBlock : count - first;
    sums[first / kSumBlock] = sum_block(weights + first, length, floor);
  }
}

static std::size_t find_between(const double* weights, std::size_t count, double low, double high,
                                std::uint32_t* found) {
  constexpr std::size_t kGroup = 16;
  std::size_t length = 0;
  for (std::size_t first = 0; first < count; first += kGroup) {
    const std::size_t end = first + kGroup < count ? first + kGroup : count;
    std::uint64_t hits = 0;
    for (std::size_t i = first; i < end; ++i) {
      hits += static_cast<std::uint64_t>(weights[i] >= low) & (weights[i] <= high);
    }
    if (hits == 0) continue;
    for (std::size_t i = first; i < end; ++i) {
      found[length] = static_cast<std::uint32_t>(i);
      length += weights[i] >= low && weights[i] <= high ? 1 : 0;
    }
  }
  return length;
}

static SamplingKernel sampling_kernel() { return {find_highs, weigh, sum_blocks, find_between}; }

}  // namespace aegaeon::ops
