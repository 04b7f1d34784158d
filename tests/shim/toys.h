// The rule table with two rules of the tests at its end; included before everything that reads it.
// `toy` has everything that a rule may have, its twin is tests/toy_rule.py; `totals` keeps the sums
// of g and of g * g as they are.
#pragma once

#define for_each_rule for_each_shipped_rule
#include "rules.h"
#undef for_each_rule

namespace fused_momentum {

struct toy : Elementwise {
  static constexpr const char* name = "toy";
  static constexpr int kHyper = 4, kTensor = 2, kStates = 5, kKept = 2;
  using Kept = double;
  FM_RULE double initial(int k) { return k == 0 ? 0.1 : 1.5; }

  template <class T>
  FM_RULE T ratio(T x, T y) {
    return x / (std::fabs(y) + T(0.1));
  }

  template <class T>
  struct Scalars {
    T rate, mu, gain, limit, order;
  };

  template <class T>
  FM_RULE Scalars<T> derive(const double* hyper, const double* tensor, const double* kept) {
    const double lr = hyper[0], momentum = hyper[1], order = hyper[2], first = tensor[0],
                 factor = tensor[1], count = kept[0], mean = kept[1];
    const double rate = lr * (1.0 + factor);
    const double gain = 1.0 - momentum * (1.0 - first);
    const double limit = sqrt(ratio(mean, count));
    return {T(rate), T(momentum), T(gain), T(limit), T(order)};
  }

  template <class S>
  FM_RULE unsigned reads(const S& s) {
    return 1 | 2 | (s.mu != 0 ? 4 : 0) | 8 | (s.order != 0 ? 64 : 0);
  }
  static constexpr unsigned kWrites = 1 | 2;

  template <class T>
  FM_RULE void update(T& p, T g, T& slow, T& fast, T, T, T size, const Scalars<T>& s) {
    T d = g;
    if (s.mu != T(0)) {
      slow = s.mu * slow + s.gain * g;
      d = slow;
    }
    const T share = T(std::fabs(double(s.limit)) + 0.1);  // numbers are Python's floats there
    fast = T(0.7) * fast + d / share;
    d = std::fabs(fast) > s.limit ? s.limit : fast;
    if (s.order != T(0)) d = d / (sqrt(size) + T(0.3));
    p = p - s.rate * d;
  }

  struct Measure {
    static constexpr int kSums = 2;
    static constexpr bool kSettles = false;
    static constexpr unsigned kWrites = 4 | 8 | 16;  // peak, drift, size

    template <class S>
    FM_RULE unsigned reads(const S& s) {
      return 1 | 2 | 16 | (s.order != 0 ? 32 : 0) | 64;
    }

    template <class T>
    FM_RULE void terms(T p, T g, T, T, T& peak, T& drift, T& size, const Scalars<T>& s,
                       double* terms) {
      peak = std::fabs(g) > peak ? std::fabs(g) : T(0.9) * peak;
      size = size + g * g;
      if (s.order != T(0)) drift = drift + ratio(p, g);
      terms[0] = double(sqrt(peak) + ratio(g, drift) + T(0.3));
      terms[1] = double(g) * double(p);
    }

    FM_RULE void settle(const double* hyper, double numel, double updates, const double* sums,
                        double* tensor, double* kept) {
      const double order = hyper[2], peaks = sums[0], products = sums[1], count = kept[0],
                   mean = kept[1];
      double found = ratio(peaks, numel);
      if (order != 0.0) found = found + 0.2 * sqrt(std::fabs(products));
      tensor[0] = count < 0.5 ? 1.0 : 0.0;
      tensor[1] = found > mean ? 0.1 : 0.7;
      kept[0] = count + (updates != 0.0 ? 1.0 : 0.1);
      kept[1] = 0.6 * mean + 0.4 * found;
    }

    FM_RULE bool settled(const double* hyper, const double*) { return hyper[3] > 0.8; }
  };
};

struct totals : Elementwise {
  static constexpr const char* name = "totals";
  static constexpr int kHyper = 1, kStates = 1, kKept = 2;
  using Kept = double;
  static constexpr unsigned kWrites = 0;

  template <class T>
  struct Scalars {};

  template <class T>
  FM_RULE Scalars<T> derive(const double*, const double*, const double*) {
    return {};
  }

  template <class T>
  FM_RULE void update(T&, T, T, const Scalars<T>&) {}

  struct Measure {
    static constexpr int kSums = 2;
    static constexpr bool kSettles = false;
    static constexpr unsigned kWrites = 0;

    template <class S>
    FM_RULE unsigned reads(const S&) {
      return 2;
    }

    template <class T>
    FM_RULE void terms(T, T g, T, const Scalars<T>&, double* terms) {
      terms[0] = double(g);
      terms[1] = double(g) * double(g);
    }

    FM_RULE void settle(const double*, double, double, const double* sums, double*, double* kept) {
      kept[0] = sums[0];
      kept[1] = sums[1];
    }

    FM_RULE bool settled(const double*, const double*) { return false; }
  };
};

template <class F>
void for_each_rule(F&& f) {
  for_each_shipped_rule(f);
  f(toy{});
  f(totals{});
}

}  // namespace fused_momentum
