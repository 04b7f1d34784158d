// The maths of every optimizer, host and device: the twin of fused_momentum/rules.py, and nothing
// else. Same names, same order of operations; one operation is one rounding, so every compiler is
// told not to contract (g++ -ffp-contract=off, nvcc -fmad=false).
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define FM_RULE __host__ __device__ __forceinline__ static
#else
#define FM_RULE static inline __attribute__((always_inline))
#endif

namespace fused_momentum {

using std::sqrt;

// What a rule has, unless it says otherwise.
struct Elementwise {
  // kHyper hyper-parameters, kTensor scalars per tensor, kStates states; kKept numbers per tensor,
  // stored as Kept, that begin as `initial` says.
  static constexpr int kTensor = 1, kKept = 0;
  using Kept = float;
  FM_RULE double initial(int) { return 0.0; }
  // The states that `update` writes: bit k is state k.
  static constexpr unsigned kWrites = ~0u;
  // The pass before the update, or void.
  using Measure = void;
};
constexpr unsigned kReadsAll = ~0u;

// Every rule has Scalars<T>; derive (float64 in, each scalar rounded once to T); update
// (elementwise); reads (bit s: update looks at stream s of p, g, states).

struct sgd : Elementwise {
  static constexpr const char* name = "sgd";
  static constexpr int kHyper = 6, kStates = 1;

  template <class T>
  struct Scalars {
    T lr, mu, gain, wd, decay, nesterov;
  };

  template <class T>
  FM_RULE Scalars<T> derive(const double* hyper, const double* tensor, const double*) {
    const double lr = hyper[0], momentum = hyper[1], dampening = hyper[2], weight_decay = hyper[3],
                 nesterov = hyper[4], decoupled_weight_decay = hyper[5], first = tensor[0];
    const double gain = 1.0 - dampening * (1.0 - first);
    const double wd = weight_decay * (1.0 - decoupled_weight_decay);
    const double decay = 1.0 - lr * weight_decay * decoupled_weight_decay;
    return {T(lr), T(momentum), T(gain), T(wd), T(decay), T(nesterov)};
  }

  template <class T>
  FM_RULE unsigned reads(const Scalars<T>&) {
    return kReadsAll;
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

struct velocity : Elementwise {
  static constexpr const char* name = "velocity";
  static constexpr int kHyper = 4, kStates = 1;

  template <class T>
  struct Scalars {
    T lr, mu, wd, decay;
  };

  template <class T>
  FM_RULE Scalars<T> derive(const double* hyper, const double*, const double*) {
    const double lr = hyper[0], momentum = hyper[1], weight_decay = hyper[2],
                 decoupled_weight_decay = hyper[3];
    const double wd = weight_decay * (1.0 - decoupled_weight_decay);
    const double decay = 1.0 - lr * weight_decay * decoupled_weight_decay;
    return {T(lr), T(momentum), T(wd), T(decay)};
  }

  template <class T>
  FM_RULE unsigned reads(const Scalars<T>&) {
    return kReadsAll;
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
  FM_RULE Scalars<T> derive(const double* hyper, const double*, const double*) {
    const double lr = hyper[0], momentum = hyper[1], weight_decay = hyper[2],
                 decoupled_weight_decay = hyper[3], lookahead_momentum = hyper[4];
    const double wd = weight_decay * (1.0 - decoupled_weight_decay);
    const double decay = 1.0 - lr * weight_decay * decoupled_weight_decay;
    return {T(lr), T(momentum), T(wd), T(decay), T(lookahead_momentum)};
  }

  template <class T>
  FM_RULE unsigned reads(const Scalars<T>&) {
    return kReadsAll;
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

struct sgd_sai : Elementwise {
  static constexpr const char* name = "sgd_sai";
  static constexpr int kHyper = 6, kStates = 1, kKept = 3;
  FM_RULE double initial(int k) { return k == 2 ? 1.0 : 0.0; }

  template <class T>
  struct Scalars {
    T rate, mu, gain, decay;
  };

  template <class T>
  FM_RULE Scalars<T> derive(const double* hyper, const double* tensor, const double* kept) {
    const double lr = hyper[0], momentum = hyper[1], weight_decay = hyper[2], first = tensor[0],
                 gsnr = kept[0], gsnr_max = kept[2];
    const double rate = lr * (gsnr / gsnr_max);
    const double gain = 1.0 - momentum * (1.0 - first);
    const double decay = 1.0 - lr * weight_decay;
    return {T(rate), T(momentum), T(gain), T(decay)};
  }

  template <class T>
  FM_RULE unsigned reads(const Scalars<T>&) {
    return kReadsAll;
  }

  template <class T>
  FM_RULE void update(T& p, T g, T& m, const Scalars<T>& s) {
    T d = g;
    if (s.mu != T(0)) {
      m = s.mu * m + s.gain * g;
      d = m;
    }
    p = s.decay * p - s.rate * d;
  }

  struct Measure {
    static constexpr int kSums = 2;
    // Whether `settled` depends on the kept numbers, else on the hyper-parameters alone.
    static constexpr bool kSettles = true;
    static constexpr unsigned kWrites = 0;

    template <class T>
    FM_RULE unsigned reads(const Scalars<T>&) {
      return 2;  // g
    }

    template <class T>
    FM_RULE void terms(T, T g, T&, const Scalars<T>&, double* terms) {
      terms[0] = double(g);
      terms[1] = double(g) * double(g);
    }

    // Writes the tensor's scalars of this step, and the kept numbers in place.
    FM_RULE void settle(const double* hyper, double numel, double updates, const double* sums,
                        double* tensor, double* kept) {
      const double eps = hyper[3], scale = hyper[4], degenerate = hyper[5];
      const double total = sums[0], squares = sums[1], gsnr = kept[0], stage = kept[1];
      const double others = numel - 1.0;
      const double variance = (squares - total * (total / numel)) / others;
      const double deviation = sqrt(variance > 0.0 ? variance : 0.0);
      bool usable = others * variance > 9.094947017729282e-13 * squares;
      double measured = sqrt(squares) / (deviation + eps);
      if (scale == 2.0) {
        usable = squares != 0.0;
        measured = sqrt(numel);
      }
      const bool official = degenerate == 1.0;
      const bool counts = official || squares != 0.0;
      const bool good = counts && (official || usable || degenerate == 0.0 || others < 1.0);
      const double bound = sqrt(others > 1.0 ? others : 1.0);
      const double found = official || usable ? measured : squares != 0.0 ? bound : gsnr;
      const bool known = stage == 1.0;
      const bool starts = counts && updates != 0.0;
      tensor[0] = starts && stage < 2.0 ? 1.0 : 0.0;
      kept[0] = known ? gsnr : found;
      kept[1] = starts ? (known || good ? 3.0 : 2.0) : good ? (stage == 2.0 ? 3.0 : 1.0) : stage;
    }

    FM_RULE bool settled(const double*, const double* kept) { return kept[1] == 3.0; }
  };
};

// Calls f with one value of each rule type, in the order of the table in rules.py.
template <class F>
void for_each_rule(F&& f) {
  f(sgd{});
  f(velocity{});
  f(lookahead{});
  f(sgd_sai{});
}

}  // namespace fused_momentum
