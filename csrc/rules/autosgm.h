// AutoSGM: a lowpass filter on the gradient, moment estimates, and learning rates per tensor.
#pragma once

#include "table.h"

namespace fused_momentum {

using std::fabs;

struct autosgm : Elementwise {
  static constexpr const char* name = "autosgm";
  static constexpr int kHyper = 24, kTensor = 2, kStates = 5, kKept = 3;
  static constexpr unsigned kWrites = 3;  // m, q
  using Kept = double;

  template <class T>
  struct Scalars {
    T shift, wd, smoothed, gain, pole, lead, debias, normalized, offset, var_gain, var_pole,
        var_debias, eps, decay, rate, averaged, correlated, clipped, mu, num_gain, num_pole,
        size_gain, size_pole;
  };

  template <class T>
  static constexpr std::array<T Scalars<T>::*, 2> switches(Scalars<T>*) {
    using S = Scalars<T>;
    return {&S::smoothed, &S::normalized};
  }

  template <class T>
  FM_RULE Scalars<T> derive(const double* hyper, const double* tensor, const double* kept) {
    const double averaged = hyper[15], limited = hyper[23], shrink = tensor[1], lr_num = kept[0];
    const double rate = hyper[14] * (averaged != 0.0 ? lr_num : limited != 0.0 ? shrink : 1.0);
    return {T(hyper[0]),  T(hyper[1]),  T(hyper[2]),  T(hyper[3]),  T(hyper[4]),  T(hyper[5]),
            T(hyper[6]),  T(hyper[7]),  T(hyper[8]),  T(hyper[9]),  T(hyper[10]), T(hyper[11]),
            T(hyper[12]), T(hyper[13]), T(rate),      T(hyper[15]), T(hyper[16]), T(hyper[17]),
            T(hyper[18]), T(hyper[19]), T(hyper[20]), T(hyper[21]), T(hyper[22])};
  }

  // The weight and the gradient that the filters take.
  template <class T>
  FM_RULE void prepare(T& p, T& g, const Scalars<T>& s) {
    p = fabs(p) < s.shift ? p + s.shift : p;
    if (s.wd != T(0)) g = g + s.wd * p;
  }

  // The filtered gradient.
  template <class T>
  FM_RULE T smooth(T g, T& m, const Scalars<T>& s) {
    T y = s.gain * g;
    if (s.smoothed != T(0)) {
      y = m + y;
      m = s.pole * y - s.lead * g;
    }
    return s.debias * y;
  }

  // The root of the gradient's second moment.
  template <class T>
  FM_RULE T deviation(T g, T& q, const Scalars<T>& s) {
    const T e = g + s.offset;
    const T y = q + s.var_gain * (e * e);
    q = s.var_pole * y;
    return sqrt(s.var_debias * y) + s.eps;
  }

  template <class S>
  FM_RULE unsigned reads(const S& s) {
    return 3 | (s.smoothed != 0) << 2 | (s.normalized != 0) << 3;
  }

  template <class T>
  FM_RULE void update(T& p, T g, T& m, T& q, T&, T&, T&, const Scalars<T>& s) {
    prepare(p, g, s);
    T v = smooth(g, m, s);
    if (s.normalized != T(0)) v = v / deviation(g, q, s);
    if (s.decay != T(0)) v = v + s.decay * p;
    p = p - s.rate * v;
  }

  struct Measure {
    static constexpr int kSums = 2;
    static constexpr bool kSettles = false;
    static constexpr unsigned kWrites = 28;  // num, squares, sizes

    template <class S>
    FM_RULE unsigned reads(const S& s) {
      const bool moment = s.averaged != s.correlated;
      const bool weight = s.wd != 0 || s.correlated != 0 || (s.decay != 0 && !moment);
      return weight | 2 | (s.smoothed != 0 && !moment) << 2 | 8 | (s.averaged != 0) << 4 |
             (s.correlated != 0) << 5 | (s.clipped != 0) << 6;
    }

    template <class T>
    static constexpr std::array<T Scalars<T>::*, 4> switches(Scalars<T>*) {
      using S = Scalars<T>;
      return {&S::smoothed, &S::averaged, &S::correlated, &S::clipped};
    }

    template <class S>
    FM_RULE int sums(const S& s) {
      return s.averaged != 0 ? 1 : 2;
    }

    template <class T>
    FM_RULE void terms(T p, T g, T m, T q, T& num, T& squares, T& sizes, const Scalars<T>& s,
                       double* terms) {
      prepare(p, g, s);
      T v = smooth(g, m, s);
      const T d = deviation(g, q, s);
      const bool moment = s.averaged != s.correlated;
      const T plus = moment ? T(0) : s.decay;
      if (moment) v = g;
      v = v / d;
      if (plus != T(0)) v = v + plus * p;
      T x = s.num_gain * (v * v);
      T w = squares;
      if (s.correlated != T(0)) {
        x = p * v;
        w = squares + s.num_gain * (p * p);
        squares = s.num_pole * w;
      }
      T c = T(1) + w;
      if (s.clipped != T(0)) {
        const T size = sizes + s.size_gain * fabs(x);
        sizes = s.size_pole * size;
        const T most = T(4) * size;
        x = x > most ? most : x;
        x = x < T(0) - most ? T(0) - most : x;
        x = x / c;
      }
      T sum = num + s.mu * x;
      num = s.num_pole * sum;
      sum = fabs(sum);
      c = s.mu * c;
      sum = sum > c ? c : sum;
      terms[0] = double(s.averaged != T(0) ? sum : v);
      terms[1] = terms[0] * terms[0];
    }

    FM_RULE void settle(const double* hyper, double numel, double, const double* sums,
                        double* tensor, double* kept) {
      const double eps = hyper[12], averaged = hyper[15], num_gain = hyper[19],
                   num_pole = hyper[20], limited = hyper[23], total = sums[0], other = sums[1];
      const double lr_num = kept[0], norm = kept[1], spread = kept[2];
      const double norm_now = num_pole * norm + num_gain * sqrt(other);
      const double away = other - 2.0 * norm_now * total + numel * norm_now * norm_now;
      const double distance = sqrt(away > 0.0 ? away : 0.0) + eps;
      const double spread_now = num_pole * spread + num_gain * (distance * distance);
      const double most = 4.0 * (sqrt(spread_now) + eps);
      tensor[0] = 0.0;
      tensor[1] = distance > most ? most / distance : 1.0;
      kept[0] = averaged != 0.0 ? (lr_num + 9.0 * (total / numel)) / 10.0 : lr_num;
      kept[1] = limited != 0.0 ? norm_now : norm;
      kept[2] = limited != 0.0 ? spread_now : spread;
    }

    FM_RULE bool settled(const double* hyper, const double*) {
      return hyper[15] == 0.0 && hyper[23] == 0.0;
    }
  };
};

}  // namespace fused_momentum
