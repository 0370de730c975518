// SPDX-License-Identifier: Apache-2.0
// The scale and zero point of one group of weights (METHOD section 3, step 4, and section 9): an
// exhaustive definition, and a search that skips only candidates which provably cannot win.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "qeft/core/half.hpp"
#include "qeft/core/math.hpp"
#include "qeft/core/memory.hpp"
#include "qeft/core/status.hpp"
#include "qeft/core/text.hpp"
#include "qeft/format/quant_format.hpp"

namespace qeft::solver {
inline namespace QEFT_TARGET {

enum class search_method {
  grid,    // shrunken ranges x zero points, least error
  minmax,  // the full range, as plain round-to-nearest does
};

struct group_search_options {
  search_method method = search_method::grid;
  int steps = 40;         // P: ranges i / P for i = 1 .. P (100 without OPTQ in the authors' code)
  double norm = 2.4;      // p of mean |w - Q(w)|^p, in [1, 8]; 2 in the paper's text
  bool weighted = false;  // OPTQ: errors weighted by 1 / U_jj^2, what the solver pays for them
};

/// The part of a format that a group search depends on.
struct group_format {
  int bits = 4;
  zero_kind zero = zero_kind::integer;
  scalar_kind scalar = scalar_kind::half;
};

/// Throws when an option breaks its rule.
inline void check(const group_search_options& o) {
  if (o.steps < 1 || o.steps > 10000) {
    fail(errc::invalid_argument,
         text("group_search_options: steps is ", o.steps, ", but must be in [1, 10000]"));
  }
  if (!(o.norm >= 1.0 && o.norm <= 8.0)) {
    fail(errc::invalid_argument,
         text("group_search_options: norm is ", o.norm, ", but must be in [1, 8]"));
  }
}

/// Rounds weights with one (scale, zero) as stored. Every zero_kind is the same map: a weight
/// becomes scale * level + offset with an integer level in [lower, upper], and its code is level -
/// lower.
struct group_quantizer {
  float scale;   // what the stored 16-bit scale reads back as; positive and finite
  float offset;  // the stored scaled zero; 0 for the other kinds
  float lower;   // -z, or 0 for scaled zeros
  float upper;   // lower + 2^bits - 1

  /// The nearest level, ties to even; NaN gives the lowest.
  float level(float w) const noexcept {
    float x = (w - offset) / scale;
    x = x > lower ? x : lower;
    x = x < upper ? x : upper;
    // Adding 1.5 * 2^23 leaves no fraction bits: rounds |x| < 2^22 in any vector instruction set.
    return (x + 12582912.0F) - 12582912.0F;
  }
  /// The same value as dequantize_code: the product is exact.
  float value(float at_level) const noexcept { return scale * at_level + offset; }
  float nearest(float w) const noexcept { return value(level(w)); }
  std::uint8_t code(float at_level) const noexcept {
    return static_cast<std::uint8_t>(static_cast<int>(at_level - lower));
  }
};

/// A group's parameters, as quantized_matrix::write_params takes them, and what they do.
struct group_choice {
  std::uint16_t scale_bits = 0;
  std::uint16_t zero = 0;  // integer z, mid code (symmetric), or the bits of the scaled zero
  group_quantizer quantizer{1.0F, 0.0F, 0.0F, 0.0F};
};

namespace detail {

template <class Scalar>
inline constexpr bool is_half_v = std::is_same_v<Scalar, half_bits>;
template <class Scalar>
inline constexpr double largest_scalar = is_half_v<Scalar> ? 65504.0 : 3.3895313892515355e38;
/// Its product with an 8-bit code is finite in FP32.
template <class Scalar>
inline constexpr double largest_scale = is_half_v<Scalar> ? 65504.0 : 0x1p119;
/// Can be divided by: positive, and a normal number of FP32.
template <class Scalar>
inline constexpr double smallest_scale = is_half_v<Scalar> ? 0x1p-24 : 0x1p-126;

/// Rounds to a stored scalar; saturates instead of overflowing.
template <class Scalar>
Scalar store(double x) {
  constexpr double largest = largest_scalar<Scalar>;
  return from_float<Scalar>(static_cast<float>(std::clamp(x, -largest, largest)));
}

template <class Scalar>
Scalar store_scale(double x) {
  return store<Scalar>(std::clamp(x, smallest_scale<Scalar>, largest_scale<Scalar>));
}

/// What stored group parameters do: `zero` as quantized_matrix::write_params takes it.
template <class Scalar>
group_quantizer quantizer_of(const group_format& f, Scalar scale, unsigned zero) {
  const float s = to_float(scale);
  const auto max_code = static_cast<float>((1 << f.bits) - 1);
  if (f.zero == zero_kind::scaled) {
    return {s, to_float(Scalar{static_cast<std::uint16_t>(zero)}), 0.0F, max_code};
  }
  const auto z = static_cast<float>(f.zero == zero_kind::symmetric ? 1U << (f.bits - 1) : zero);
  return {s, 0.0F, -z, max_code - z};
}

/// The parameters for a wanted scale and an integer zero point, rounded as they will be stored.
template <class Scalar>
group_choice make_choice(const group_format& f, Scalar scale, int zero) {
  const auto stored = f.zero == zero_kind::scaled
                          ? store<Scalar>(-static_cast<double>(to_float(scale)) * zero).bits
                          : static_cast<std::uint16_t>(zero);
  return {scale.bits, stored, quantizer_of(f, scale, stored)};
}

struct weight_range {
  float lowest = std::numeric_limits<float>::infinity();    // min(w)
  float highest = -std::numeric_limits<float>::infinity();  // max(w)
  float low;                                                // min(w, 0)
  float high;                                               // max(w, 0)

  explicit weight_range(span<const float> w) {
    for (const float x : w) {
      lowest = x < lowest ? x : lowest;
      highest = x > highest ? x : highest;
    }
    low = std::min(lowest, 0.0F);
    high = std::max(highest, 0.0F);
  }
  double largest() const { return std::max(-static_cast<double>(low), static_cast<double>(high)); }
  /// Scale that spreads all codes over i / steps of the range (symmetric: of [-largest, largest]).
  double scale(const group_format& f, int i, int steps) const {
    const double width = f.zero == zero_kind::symmetric
                             ? 2.0 * largest()
                             : static_cast<double>(high) - static_cast<double>(low);
    return width * i / steps / ((1 << f.bits) - 1);
  }
  /// The integer zero point that represents `low` at this scale.
  int zero_point(const group_format& f, float stored_scale) const {
    const int max_code = (1 << f.bits) - 1;
    if (f.zero == zero_kind::symmetric) return (max_code + 1) / 2;
    const double z = std::nearbyint(-static_cast<double>(low) / stored_scale);
    return static_cast<int>(std::clamp(z, 0.0, static_cast<double>(max_code)));
  }
};

/// A power of two that brings weights up to `largest` near 1 (those below 2^-126 as near as FP32
/// allows), so that no norm overflows and none underflows that matters.
inline float normalizer(double largest) {
  if (largest == 0.0) return 1.0F;
  return static_cast<float>(std::ldexp(1.0, std::clamp(-std::ilogb(largest), -126, 126)));
}

/// |e|^2
struct squared_norm {
  float normalize;
  float operator()(float e) const noexcept {
    e *= normalize;
    return e * e;
  }
};

/// |e|^p as 2^(p log2 |e|) by polynomials, without branches, so that it vectorises. Relative error
/// below 3e-6 (1 + p) + 1e-7 p |log2 e|; values under 2^-126 become 0.
struct power_norm {
  float normalize;
  float p;
  float operator()(float e) const noexcept {
    const auto magnitude =
        static_cast<std::int32_t>(qeft::detail::float_to_bits(e * normalize) & 0x7fffffffU);
    // e = 2^k * m with m in [sqrt(1/2), sqrt(2)).
    const std::int32_t k = (magnitude - 0x3f3504f3) >> 23;
    const float r =
        qeft::detail::bits_to_float(static_cast<std::uint32_t>(magnitude - k * (1 << 23))) - 1.0F;
    float log2_m = -0.206605087F;
    log2_m = log2_m * r + 0.32214292F;
    log2_m = log2_m * r - 0.367483741F;
    log2_m = log2_m * r + 0.479349682F;
    log2_m = log2_m * r - 0.721132269F;
    log2_m = log2_m * r + 1.44271342F;
    const float y = p * (static_cast<float>(k) + log2_m * r);
    const float whole = (y + 12582912.0F) - 12582912.0F;
    const float t = y - whole;
    float power = 0.00957010143F;
    power = power * t + 0.0559178603F;
    power = power * t + 0.240247448F;
    power = power * t + 0.693121815F;
    power = power * t + 0.999999261F;
    // 2^-127 has the exponent field of zero.
    const std::int32_t exponent = std::min(std::max(static_cast<std::int32_t>(whole), -127), 127);
    return power *
           qeft::detail::bits_to_float(static_cast<std::uint32_t>((exponent + 127) * (1 << 23)));
  }
};

/// Calls visitor(norm) with the functor of |e|^p.
template <class Visitor>
auto visit_norm(double p, float normalize, Visitor&& visitor) {
  if (p == 2.0) return visitor(squared_norm{normalize});
  return visitor(power_norm{normalize, static_cast<float>(p)});
}

/// What the error e of weight i costs: |e|^p.
template <class Norm>
struct equal_cost {
  Norm norm;
  float operator()(index_t, float e) const noexcept { return norm(e); }
  float normalize() const noexcept { return norm.normalize; }
  /// The p-th root of the importance of the weights that equal `value`.
  double root_at(span<const float>, float /*value*/, double /*p*/) const noexcept { return 1.0; }
};

/// importance_i |e|^p
template <class Norm>
struct weighted_cost {
  Norm norm;
  const float* importances;
  float operator()(index_t i, float e) const noexcept { return importances[i] * norm(e); }
  float normalize() const noexcept { return norm.normalize; }
  double root_at(span<const float> w, float value, double p) const {
    float largest = 0.0F;
    for (index_t i = 0; i < w.size(); ++i) {
      if (w[i] == value) largest = std::max(largest, importances[i]);
    }
    return std::pow(static_cast<double>(largest), 1.0 / p);
  }
};

/// Calls visitor(cost) with the functor of the error of weights w.
template <class Visitor>
auto visit_cost(span<const float> w, double p, span<const float> importance, Visitor&& visitor) {
  if (!importance.empty() && importance.size() != w.size()) {
    fail(errc::invalid_argument, text("group search: importance has ", importance.size(),
                                      " elements, but the group has ", w.size()));
  }
  const float normalize = normalizer(weight_range(w).largest());
  return visit_norm(p, normalize, [&](const auto& norm) {
    using norm_type = std::decay_t<decltype(norm)>;
    if (importance.empty()) return visitor(equal_cost<norm_type>{norm});
    // Only ratios count: no sum overflows, and what underflows does not matter.
    std::vector<float> relative(importance.begin(), importance.end());
    const float largest = *std::max_element(relative.begin(), relative.end());
    for (float& v : relative) v = largest > 0.0F ? v / largest : 1.0F;
    return visitor(weighted_cost<norm_type>{norm, relative.data()});
  });
}

/// The sum of cost(i, w_i - Q(w_i)), in a fixed order; once it exceeds `limit`, any partial sum
/// above it.
template <class Cost>
double group_error(span<const float> w, const group_quantizer& q, const Cost& cost, double limit) {
  constexpr index_t lanes = 16;
  constexpr index_t block = 64;
  double total = 0.0;
  for (index_t begin = 0; begin < w.size(); begin += block) {
    const index_t count = std::min(block, w.size() - begin);
    const float* x = w.data() + begin;
    float sum[lanes] = {};
    index_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      for (index_t l = 0; l < lanes; ++l) {
        sum[l] += cost(begin + i + l, x[i + l] - q.nearest(x[i + l]));
      }
    }
    for (index_t l = 0; i + l < count; ++l) {
      sum[l] += cost(begin + i + l, x[i + l] - q.nearest(x[i + l]));
    }
    for (index_t half = lanes / 2; half > 0; half /= 2) {
      for (index_t l = 0; l < half; ++l) sum[l] += sum[l + half];
    }
    total += static_cast<double>(sum[0]);
    if (total > limit) return total;
  }
  return total;
}

/// Zero points that a search tries.
inline std::pair<int, int> zero_candidates(const group_format& f) {
  const int codes = 1 << f.bits;
  return f.zero == zero_kind::symmetric ? std::pair{codes / 2, codes / 2} : std::pair{0, codes - 1};
}

/// Whether the min-max parameters of a group can be stored without saturating.
template <class Scalar>
bool fits(const weight_range& range, const group_format& f) {
  const double scale = range.scale(f, 1, 1);
  const double zero = f.zero == zero_kind::scaled ? scale - static_cast<double>(range.low) : 0.0;
  return scale <= largest_scale<Scalar> && zero <= largest_scalar<Scalar>;
}

/// The best candidate so far. Searches meet the candidates in one order, and the first of equally
/// good ones counts.
struct best_candidate {
  group_choice choice;
  double error = std::numeric_limits<double>::infinity();
  /// `choice` is a guess from outside of that order, which an equal candidate replaces.
  bool guessed = false;

  /// Whether it is the best now.
  bool offer(const group_choice& candidate, double e) {
    if (!(e < error || (e == error && guessed))) return false;
    choice = candidate;
    error = e;
    guessed = false;
    return true;
  }
};

template <class Scalar, class Cost>
group_choice exhaustive(span<const float> w, const group_format& f, int steps, const Cost& cost) {
  const weight_range range(w);
  const auto [first_zero, last_zero] = zero_candidates(f);
  best_candidate best;
  for (int i = steps; i >= 1; --i) {
    const auto scale = store_scale<Scalar>(range.scale(f, i, steps));
    for (int z = first_zero; z <= last_zero; ++z) {
      const group_choice candidate = make_choice<Scalar>(f, scale, z);
      best.offer(candidate, group_error(w, candidate.quantizer, cost,
                                        std::numeric_limits<double>::infinity()));
    }
  }
  return best.choice;
}

template <class Scalar>
group_choice minmax(const weight_range& range, const group_format& f) {
  const auto scale = store_scale<Scalar>(range.scale(f, 1, 1));
  return make_choice<Scalar>(f, scale, range.zero_point(f, to_float(scale)));
}

/// How much of a group's lowest and highest weight a candidate may clip.
template <class Cost>
class clipping_bound {
 public:
  clipping_bound(span<const float> w, const weight_range& range, double p, const Cost& cost)
      : p_(p),
        normalize_(static_cast<double>(cost.normalize())),
        lowest_{static_cast<double>(range.lowest), cost.root_at(w, range.lowest, p), 0.0},
        highest_{static_cast<double>(range.highest), cost.root_at(w, range.highest, p), 0.0} {}

  /// A candidate that clips one of the two by more loses against this sum.
  void set(double sum) {
    constexpr double rounding = 1.001;                // all of group_error's and power_norm's
    const double underflow = std::exp2(-120.0 / p_);  // what a cost takes for 0 is smaller
    const double largest = (rounding * std::pow(sum, 1.0 / p_) + underflow) / normalize_;
    lowest_.limit = largest / lowest_.root;
    highest_.limit = largest / highest_.root;
  }

  /// Whether a window [lowest, highest] of representable values clips too much.
  bool excludes(const group_quantizer& q) const {
    return static_cast<double>(q.value(q.lower)) - lowest_.weight > lowest_.limit ||
           highest_.weight - static_cast<double>(q.value(q.upper)) > highest_.limit;
  }

  /// Whether every window of this width does, wherever it lies.
  bool excludes_width(double width) const {
    return highest_.weight - lowest_.weight - width > lowest_.limit + highest_.limit;
  }

 private:
  struct extreme {
    double weight;
    double root;   // of its importance
    double limit;  // infinite when its importance is 0
  };
  double p_;
  double normalize_;
  extreme lowest_;
  extreme highest_;
};

template <class Scalar, class Cost>
group_choice pruned(span<const float> w, const group_format& f, int steps, double p,
                    const Cost& cost) {
  const weight_range range(w);
  const auto [first_zero, last_zero] = zero_candidates(f);
  // The unclipped range is a good first bound.
  best_candidate best;
  best.choice = minmax<Scalar>(range, f);
  best.error = group_error(w, best.choice.quantizer, cost, best.error);
  best.guessed = true;
  clipping_bound<Cost> bound(w, range, p, cost);
  bound.set(best.error);

  std::uint16_t previous = 0;
  for (int i = steps; i >= 1; --i) {
    const auto scale = store_scale<Scalar>(range.scale(f, i, steps));
    if (scale.bits == previous) continue;  // rounded to a scale that was just tried
    previous = scale.bits;
    // Windows only get narrower.
    if (bound.excludes_width(static_cast<double>(to_float(scale)) * ((1 << f.bits) - 1))) break;
    for (int z = first_zero; z <= last_zero; ++z) {
      const group_choice candidate = make_choice<Scalar>(f, scale, z);
      if (bound.excludes(candidate.quantizer)) continue;
      if (best.offer(candidate, group_error(w, candidate.quantizer, cost, best.error))) {
        bound.set(best.error);
      }
    }
  }
  return best.choice;
}

template <class Visitor>
auto visit_scalar(scalar_kind kind, Visitor&& visitor) {
  return kind == scalar_kind::half ? visitor(half_bits{}) : visitor(bf16_bits{});
}

}  // namespace detail

/// The scale that spreads all codes over the whole range of the weights (symmetric: over as much on
/// both sides of zero), and the zero point that goes with it.
/// @pre w is finite, is_supported_bits(f.bits)
inline group_choice minmax_params(span<const float> w, const group_format& f) {
  return detail::visit_scalar(
      f.scalar, [&](auto s) { return detail::minmax<decltype(s)>(detail::weight_range(w), f); });
}

/// The definition of the grid search: of all ranges i / steps of [min(w, 0), max(w, 0)], i = steps
/// .. 1, and all zero points 0 .. 2^bits - 1 (symmetric: the middle), each rounded as it will be
/// stored, the first with the least sum importance_j |w_j - Q(w_j)|^p. A scale that would be stored
/// as zero becomes the smallest, one that would overflow the largest of its type.
/// @param importance of every weight, or empty: all equal; only their ratios count
/// @pre w is finite, check(o) passes, is_supported_bits(f.bits); importances are finite and not
///      negative (0: the weight does not count; all 0: all equal)
inline group_choice exhaustive_search(span<const float> w, const group_format& f,
                                      const group_search_options& o,
                                      span<const float> importance = {}) {
  return detail::visit_cost(w, o.norm, importance, [&](const auto& cost) {
    return detail::visit_scalar(
        f.scalar, [&](auto s) { return detail::exhaustive<decltype(s)>(w, f, o.steps, cost); });
  });
}

/// The result of exhaustive_search, without evaluating candidates whose clipping error alone
/// exceeds the best error so far. Same preconditions.
inline group_choice pruned_search(span<const float> w, const group_format& f,
                                  const group_search_options& o,
                                  span<const float> importance = {}) {
  return detail::visit_cost(w, o.norm, importance, [&](const auto& cost) {
    return detail::visit_scalar(
        f.scalar, [&](auto s) { return detail::pruned<decltype(s)>(w, f, o.steps, o.norm, cost); });
  });
}

/// Whether the range of the weights fits the scalar type of the format: its min-max scale and
/// scaled zero point are stored without saturating. False for a range that is not finite.
inline bool fits(span<const float> w, const group_format& f) {
  return detail::visit_scalar(
      f.scalar, [&](auto s) { return detail::fits<decltype(s)>(detail::weight_range(w), f); });
}

/// The search that `o.method` names. `importance` as in exhaustive_search; min-max has no use for
/// it.
inline group_choice find_params(span<const float> w, const group_format& f,
                                const group_search_options& o, span<const float> importance = {}) {
  return o.method == search_method::minmax ? minmax_params(w, f)
                                           : pruned_search(w, f, o, importance);
}

}  // namespace QEFT_TARGET
}  // namespace qeft::solver
