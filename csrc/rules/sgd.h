// SGD, heavy ball and Nesterov momentum in torch's form.
#pragma once

#include "table.h"

namespace fused_momentum {

struct sgd : Elementwise {
  static constexpr const char* name = "sgd";
  static constexpr int kHyper = 6, kStates = 1;

  template <class T>
  struct Scalars {
    T lr, mu, gain, wd, decay, nesterov;
  };

  template <class T>
  static constexpr std::array<T Scalars<T>::*, 3> switches(Scalars<T>*) {
    using S = Scalars<T>;
    return {&S::wd, &S::mu, &S::nesterov};
  }

  template <class T>
  FM_RULE Scalars<T> derive(const double* hyper, const double* tensor, const double*) {
    const double lr = hyper[0], momentum = hyper[1], dampening = hyper[2], weight_decay = hyper[3],
                 nesterov = hyper[4], decoupled_weight_decay = hyper[5], first = tensor[0];
    const double gain = 1.0 - dampening * (1.0 - first);
    const double wd = weight_decay * (1.0 - decoupled_weight_decay);
    const double decay = 1.0 - lr * weight_decay * decoupled_weight_decay;
    return {T(lr), T(momentum), T(gain), T(wd), T(decay), T(nesterov)};
  }

  template <class S>
  FM_RULE unsigned reads(const S& s) {
    return 3 | (s.mu != 0) << 2;
  }

  template <class T>
  FM_RULE void update(T& p, T g, T& m, const Scalars<T>& s) {
    if (s.wd != T(0)) g = g + s.wd * p;
    T d = g;
    if (s.mu != T(0)) {
      m = s.mu * m + s.gain * g;
      d = m;
      if (s.nesterov != T(0)) d = g + s.mu * m;
    }
    p = s.decay * p - s.lr * d;
  }
};

}  // namespace fused_momentum
