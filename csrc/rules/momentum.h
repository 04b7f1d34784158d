// Momentum in its classical velocity form, and Nesterov's with an exact look-ahead.
#pragma once

#include "table.h"

namespace fused_momentum {

struct velocity : Elementwise {
  static constexpr const char* name = "velocity";
  static constexpr int kHyper = 4, kStates = 1;

  template <class T>
  struct Scalars {
    T lr, mu, wd, decay;
  };

  template <class T>
  static constexpr std::array<T Scalars<T>::*, 1> switches(Scalars<T>*) {
    using S = Scalars<T>;
    return {&S::wd};
  }

  template <class T>
  FM_RULE Scalars<T> derive(const double* hyper, const double*, const double*) {
    const double lr = hyper[0], momentum = hyper[1], weight_decay = hyper[2],
                 decoupled_weight_decay = hyper[3];
    const double wd = weight_decay * (1.0 - decoupled_weight_decay);
    const double decay = 1.0 - lr * weight_decay * decoupled_weight_decay;
    return {T(lr), T(momentum), T(wd), T(decay)};
  }

  template <class T>
  FM_RULE void update(T& p, T g, T& v, const Scalars<T>& s) {
    if (s.wd != T(0)) g = g + s.wd * p;
    v = s.mu * v - s.lr * g;
    p = s.decay * p + v;
  }
};

struct lookahead : Elementwise {
  static constexpr const char* name = "lookahead";
  static constexpr int kHyper = 5, kStates = 1;

  template <class T>
  struct Scalars {
    T lr, mu, wd, decay, ahead;
  };

  template <class T>
  static constexpr std::array<T Scalars<T>::*, 1> switches(Scalars<T>*) {
    using S = Scalars<T>;
    return {&S::wd};
  }

  template <class T>
  FM_RULE Scalars<T> derive(const double* hyper, const double*, const double*) {
    const double lr = hyper[0], momentum = hyper[1], weight_decay = hyper[2],
                 decoupled_weight_decay = hyper[3], lookahead_momentum = hyper[4];
    const double wd = weight_decay * (1.0 - decoupled_weight_decay);
    const double decay = 1.0 - lr * weight_decay * decoupled_weight_decay;
    return {T(lr), T(momentum), T(wd), T(decay), T(lookahead_momentum)};
  }

  template <class T>
  FM_RULE void update(T& p, T g, T& v, const Scalars<T>& s) {
    if (s.wd != T(0)) g = g + s.wd * p;
    T x = p - s.ahead * v;
    v = s.mu * v - s.lr * g;
    x = s.decay * x + v;
    p = x + s.mu * v;
  }
};

}  // namespace fused_momentum
