// SPDX-License-Identifier: Apache-2.0
// The group search against its definition in double, and the pruned search against the exhaustive
// one.
#include "qeft/solver/group_search.hpp"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "support/catch.hpp"

namespace {

using qeft::scalar_kind;
using qeft::zero_kind;
using qeft::solver::group_choice;
using qeft::solver::group_format;
using qeft::solver::group_search_options;

/// A group to search: its distribution and size.
std::vector<float> make_group(int kind, std::size_t size, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  std::vector<float> w(size);
  for (float& x : w) {
    switch (kind) {
      case 0:
        x = 0.02F * normal(rng);
        break;
      case 1:
        x = std::pow(normal(rng), 5.0F);
        break;  // heavy tails
      case 2:
        x = 0.3F + 0.01F * normal(rng);
        break;  // far from zero
      case 3:
        x = -uniform(rng);
        break;  // one sign
      case 4:
        x = -0.625F;
        break;  // constant
      case 5:
        x = 0.0F;
        break;
      case 6:
        x = 1e-7F * normal(rng);
        break;  // below FP16's normal range
      case 7:
        x = 3e-39F * normal(rng);
        break;  // FP32 subnormals
      case 8:
        x = 3e6F * normal(rng);
        break;  // above FP16's range
      case 9:
        x = 1e38F * std::clamp(normal(rng), -3.0F, 3.0F);
        break;
      case 10:
        x = uniform(rng) < 0.02F ? 1.0F : 1e-4F * normal(rng);
        break;  // rare spikes
      default:
        x = static_cast<float>(static_cast<int>(7.0F * uniform(rng)) - 3);
        break;  // few values
    }
  }
  return w;
}
constexpr int kinds = 12;

/// From 1e-6 to 1e6.
std::vector<float> make_importance(std::size_t size, std::mt19937& rng) {
  std::uniform_real_distribution<float> exponent(-6.0F, 6.0F);
  std::vector<float> importance(size);
  for (float& v : importance) v = std::pow(10.0F, exponent(rng));
  return importance;
}

/// @param importance may be empty: all equal
double mean_error(const std::vector<float>& w, const group_choice& c, double p,
                  const std::vector<float>& importance = {}) {
  double sum = 0.0;
  for (std::size_t i = 0; i < w.size(); ++i) {
    const double e =
        std::abs(static_cast<double>(w[i]) - static_cast<double>(c.quantizer.nearest(w[i])));
    sum += (importance.empty() ? 1.0 : static_cast<double>(importance[i])) * std::pow(e, p);
  }
  return sum / static_cast<double>(w.size());
}

void require_same(const group_choice& a, const group_choice& b) {
  REQUIRE(a.scale_bits == b.scale_bits);
  REQUIRE(a.zero == b.zero);
}

group_format make_format(int bits, int zero, int scalar) {
  return {bits, static_cast<zero_kind>(zero), static_cast<scalar_kind>(scalar)};
}

}  // namespace

TEST_CASE("power_norm keeps its error bound over all mantissas and exponents") {
  std::mt19937 rng(3);
  std::uniform_real_distribution<float> mantissa(1.0F, 2.0F);
  for (const float p : {1.0F, 1.7F, 2.4F, 3.0F, 8.0F}) {
    const qeft::solver::detail::power_norm norm{1.0F, p};
    CHECK(norm(0.0F) == 0.0F);
    for (int exponent = -40; exponent <= 14; ++exponent) {
      for (int i = 0; i < 400; ++i) {
        const float e = std::ldexp(mantissa(rng), exponent) * (i % 2 == 0 ? 1.0F : -1.0F);
        const double expected = std::pow(std::abs(static_cast<double>(e)), static_cast<double>(p));
        const double log_size = std::abs(std::log2(std::abs(static_cast<double>(e))));
        const double allowed =
            3e-6 * (1.0 + static_cast<double>(p)) + 1e-7 * static_cast<double>(p) * log_size;
        if (expected < 0x1p-126) {
          REQUIRE(norm(e) <= 0x1p-125F);
        } else if (expected < 0x1p126) {
          REQUIRE(std::abs(static_cast<double>(norm(e)) - expected) <= allowed * expected);
        }
      }
    }
  }
}

TEST_CASE("the pruned search returns what the exhaustive search returns") {
  std::mt19937 rng(11);
  int searched = 0;
  for (int bits : {2, 3, 4, 8}) {
    for (int zero = 0; zero < 3; ++zero) {
      for (int scalar = 0; scalar < 2; ++scalar) {
        const group_format f = make_format(bits, zero, scalar);
        for (int kind = 0; kind < kinds; ++kind) {
          const int repeats = bits == 8 ? 1 : 6;
          for (int i = 0; i < repeats; ++i) {
            const std::size_t size =
                std::vector<std::size_t>{128, 32, 48, 1, 300, 17}[static_cast<std::size_t>(i)];
            const auto w = make_group(kind, size, rng);
            for (const double p : {2.4, 2.0, 1.0}) {
              group_search_options o;
              o.norm = p;
              o.steps = bits == 8 ? 5 : (i % 2 == 0 ? 40 : 100);
              INFO("bits " << bits << " zero " << zero << " scalar " << scalar << " kind " << kind
                           << " size " << size << " p " << p);
              require_same(qeft::solver::pruned_search(w, f, o),
                           qeft::solver::exhaustive_search(w, f, o));
              const auto importance = make_importance(size, rng);
              require_same(qeft::solver::pruned_search(w, f, o, importance),
                           qeft::solver::exhaustive_search(w, f, o, importance));
              ++searched;
            }
          }
        }
      }
    }
  }
  CHECK(searched == (3 * 6 + 1) * 3 * 2 * kinds * 3);
}

TEST_CASE("the search is never worse than any candidate of the definition, in double") {
  std::mt19937 rng(5);
  for (int which = 0; which < 6; ++which) {
    const int zero = which % 3;
    const bool weighted = which >= 3;
    for (int kind : {0, 1, 2, 3, 8, 10}) {
      const auto w = make_group(kind, 64, rng);
      const auto importance = weighted ? make_importance(64, rng) : std::vector<float>{};
      const group_format f = make_format(3, zero, 0);
      const group_search_options o;
      const double found =
          mean_error(w, qeft::solver::pruned_search(w, f, o, importance), o.norm, importance);
      double low = 0.0;
      double high = 0.0;
      for (const float x : w) {
        low = std::min(low, static_cast<double>(x));
        high = std::max(high, static_cast<double>(x));
      }
      const double width = zero == 0 ? 2.0 * std::max(-low, high) : high - low;
      double least = INFINITY;
      for (int i = 1; i <= o.steps; ++i) {
        const auto s = static_cast<double>(qeft::to_float(qeft::from_float<qeft::half_bits>(
            std::min(65504.0F, static_cast<float>(width * i / o.steps / 7.0)))));
        for (int z = zero == 0 ? 4 : 0; z <= (zero == 0 ? 4 : 7); ++z) {
          const double offset =
              zero == 2
                  ? std::max(-65504.0,
                             static_cast<double>(qeft::to_float(qeft::from_float<qeft::half_bits>(
                                 static_cast<float>(std::max(-65504.0, -s * z))))))
                  : -s * z;
          double sum = 0.0;
          for (std::size_t j = 0; j < w.size(); ++j) {
            double best = INFINITY;
            for (int q = 0; q < 8; ++q) {
              best = std::min(best, std::abs(static_cast<double>(w[j]) - (s * q + offset)));
            }
            sum += (weighted ? static_cast<double>(importance[j]) : 1.0) * std::pow(best, o.norm);
          }
          least = std::min(least, sum / static_cast<double>(w.size()));
        }
      }
      INFO("zero " << zero << " kind " << kind << " weighted " << weighted);
      CHECK(found <= least * (1.0 + 1e-4));
      CHECK(found >= least * (1.0 - 1e-4));
    }
  }
}

TEST_CASE("equal importances change no choice, and only ratios count") {
  std::mt19937 rng(17);
  for (int kind = 0; kind < kinds; ++kind) {
    const auto w = make_group(kind, 100, rng);
    const auto importance = make_importance(100, rng);
    for (int zero = 0; zero < 3; ++zero) {
      const group_format f = make_format(4, zero, kind % 2);
      group_search_options o;
      o.norm = kind % 3 == 0 ? 2.0 : 2.4;
      const group_choice plain = qeft::solver::pruned_search(w, f, o);
      for (const float equal : {1.0F, 0.3F, 3e38F, 1e-45F, 0.0F}) {
        const std::vector<float> all(100, equal);
        require_same(qeft::solver::pruned_search(w, f, o, all), plain);
        require_same(qeft::solver::exhaustive_search(w, f, o, all), plain);
      }
      const group_choice weighted = qeft::solver::pruned_search(w, f, o, importance);
      for (const float factor : {0x1p-100F, 0x1p100F}) {
        auto scaled = importance;
        for (float& v : scaled) v *= factor;
        require_same(qeft::solver::pruned_search(w, f, o, scaled), weighted);
      }
    }
  }
}

TEST_CASE("the choice follows the importance, to its extremes") {
  std::mt19937 rng(19);
  const group_format f = make_format(3, 1, 0);
  const group_search_options o;
  for (std::size_t favourite = 0; favourite < 40; ++favourite) {
    const auto w = make_group(0, 40, rng);
    for (const float others : {0.0F, 1e-45F, 1e-30F}) {
      std::vector<float> importance(40, others);
      importance[favourite] = 1.0F;
      const group_choice c = qeft::solver::pruned_search(w, f, o, importance);
      require_same(c, qeft::solver::exhaustive_search(w, f, o, importance));
      const auto error = [&](const group_choice& choice) {
        return std::abs(w[favourite] - choice.quantizer.nearest(w[favourite]));
      };
      CHECK(error(c) <= error(qeft::solver::pruned_search(w, f, o)));
      CHECK(error(c) <= 5e-4F);
    }
  }
  // The extreme weights may be what counts for nothing.
  std::vector<float> w = make_group(0, 64, rng);
  w[3] = -5.0F;
  w[60] = 7.0F;
  std::vector<float> importance(64, 1.0F);
  importance[3] = importance[60] = 0.0F;
  const group_choice c = qeft::solver::pruned_search(w, f, o, importance);
  require_same(c, qeft::solver::exhaustive_search(w, f, o, importance));
  CHECK(c.quantizer.scale < 0.1F * qeft::solver::pruned_search(w, f, o).quantizer.scale);
  require_same(qeft::solver::find_params(w, f, o, importance), c);
  group_search_options minmax;
  minmax.method = qeft::solver::search_method::minmax;
  require_same(qeft::solver::find_params(w, f, minmax, importance),
               qeft::solver::minmax_params(w, f));
}

TEST_CASE("stored parameters read back as the quantizer that was tested") {
  std::mt19937 rng(7);
  for (int bits : {2, 3, 4, 8}) {
    for (int zero = 0; zero < 3; ++zero) {
      for (int scalar = 0; scalar < 2; ++scalar) {
        for (int kind = 0; kind < kinds; ++kind) {
          const auto w = make_group(kind, 96, rng);
          const group_format f = make_format(bits, zero, scalar);
          group_search_options o;
          o.steps = 8;
          for (const auto method :
               {qeft::solver::search_method::grid, qeft::solver::search_method::minmax}) {
            o.method = method;
            const group_choice c = qeft::solver::find_params(w, f, o);
            const auto read = [&](std::uint16_t stored) {
              return scalar == 0 ? qeft::to_float(qeft::half_bits{stored})
                                 : qeft::to_float(qeft::bf16_bits{stored});
            };
            INFO("bits " << bits << " zero " << zero << " scalar " << scalar << " kind " << kind);
            REQUIRE(read(c.scale_bits) == c.quantizer.scale);
            REQUIRE(std::isnormal(c.quantizer.scale));
            if (f.zero == zero_kind::scaled) {
              REQUIRE(read(c.zero) == c.quantizer.offset);
            } else {
              REQUIRE(c.quantizer.lower == -static_cast<float>(c.zero));
              REQUIRE(c.zero < (1 << bits));
            }
            for (const float x : w) {
              const float level = c.quantizer.level(x);
              REQUIRE(c.quantizer.code(level) < (1 << bits));
              REQUIRE(std::isfinite(c.quantizer.value(level)));
            }
          }
        }
      }
    }
  }
}

TEST_CASE("min-max represents the ends of the range, and the grid is never worse") {
  std::mt19937 rng(9);
  for (int kind = 0; kind < kinds; ++kind) {
    const auto w = make_group(kind, 128, rng);
    for (int zero = 0; zero < 3; ++zero) {
      const group_format f = make_format(4, zero, 0);
      const group_search_options o;
      const group_choice minmax = qeft::solver::minmax_params(w, f);
      const group_choice grid = qeft::solver::pruned_search(w, f, o);
      CHECK(mean_error(w, grid, o.norm) <= mean_error(w, minmax, o.norm) * (1.0 + 1e-4));
      if (kind == 0) {
        const float s = minmax.quantizer.scale;
        for (const float x : w) CHECK(std::abs(x - minmax.quantizer.nearest(x)) <= 0.51F * s);
      }
    }
  }
}

TEST_CASE("a group of zeros becomes zeros") {
  const std::vector<float> w(128, 0.0F);
  for (int zero = 0; zero < 3; ++zero) {
    const auto c = qeft::solver::pruned_search(w, make_format(4, zero, 0), {});
    CHECK(c.quantizer.nearest(0.0F) == 0.0F);
    CHECK(c.quantizer.scale > 0.0F);
  }
}

TEST_CASE("search options are checked") {
  group_search_options o;
  o.steps = 0;
  CHECK_THROWS_AS(qeft::solver::check(o), qeft::error);
  o.steps = 40;
  for (const double p : {0.5, 9.0, std::nan("")}) {
    o.norm = p;
    CHECK_THROWS_AS(qeft::solver::check(o), qeft::error);
  }
  o.norm = 1.0;
  CHECK_NOTHROW(qeft::solver::check(o));
}
