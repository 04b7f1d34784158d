// The maths of every optimizer, host and device: the twin of fused_momentum/rules.py, and nothing
// else. Same names, same order of operations; one operation is one rounding, so every compiler is
// told not to contract (g++ -ffp-contract=off, nvcc -fmad=false).
#pragma once

#ifdef __CUDACC__
#define FM_RULE __host__ __device__ __forceinline__ static
#else
#define FM_RULE static inline __attribute__((always_inline))
#endif

namespace fused_momentum {

// Every rule has: kHyper hyper-parameters, kTensor scalars per tensor, kStates states, kSums terms
// that are summed over the tensor; Scalars<T>; derive (float64 in, each scalar rounded once to T);
// update (elementwise).

struct sgd {
  static constexpr const char* name = "sgd";
  static constexpr int kHyper = 6, kTensor = 1, kStates = 1, kSums = 0;

  template <class T>
  struct Scalars {
    T lr, mu, gain, wd, decay, nesterov;
  };

  template <class T>
  FM_RULE Scalars<T> derive(const double* hyper, const double* tensor) {
    const double lr = hyper[0], momentum = hyper[1], dampening = hyper[2], weight_decay = hyper[3],
                 nesterov = hyper[4], decoupled_weight_decay = hyper[5], first = tensor[0];
    const double gain = 1.0 - dampening * (1.0 - first);
    const double wd = weight_decay * (1.0 - decoupled_weight_decay);
    const double decay = 1.0 - lr * weight_decay * decoupled_weight_decay;
    return {T(lr), T(momentum), T(gain), T(wd), T(decay), T(nesterov)};
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

struct velocity {
  static constexpr const char* name = "velocity";
  static constexpr int kHyper = 4, kTensor = 1, kStates = 1, kSums = 0;

  template <class T>
  struct Scalars {
    T lr, mu, wd, decay;
  };

  template <class T>
  FM_RULE Scalars<T> derive(const double* hyper, const double*) {
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

struct lookahead {
  static constexpr const char* name = "lookahead";
  static constexpr int kHyper = 5, kTensor = 1, kStates = 1, kSums = 0;

  template <class T>
  struct Scalars {
    T lr, mu, wd, decay, ahead;
  };

  template <class T>
  FM_RULE Scalars<T> derive(const double* hyper, const double*) {
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

// Calls f with one value of each rule type, in the order of the table in rules.py.
template <class F>
void for_each_rule(F&& f) {
  f(sgd{});
  f(velocity{});
  f(lookahead{});
}

}  // namespace fused_momentum
