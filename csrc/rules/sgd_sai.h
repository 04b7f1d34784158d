// SGD with learning rate Scaling at Initialization.
#pragma once

#include "table.h"

namespace fused_momentum {

struct sgd_sai : Elementwise {
  static constexpr const char* name = "sgd_sai";
  static constexpr int kHyper = 6, kStates = 1, kKept = 3;
  FM_RULE double initial(int k) { return k == 2 ? 1.0 : 0.0; }

  template <class T>
  struct Scalars {
    T rate, mu, gain, decay;
  };

  template <class T>
  static constexpr std::array<T Scalars<T>::*, 1> switches(Scalars<T>*) {
    using S = Scalars<T>;
    return {&S::mu};
  }

  template <class T>
  FM_RULE Scalars<T> derive(const double* hyper, const double* tensor, const double* kept) {
    const double lr = hyper[0], momentum = hyper[1], weight_decay = hyper[2], scale = hyper[4],
                 first = tensor[0], gsnr = kept[0], gsnr_max = kept[2];
    const double rate = lr * (scale == 1.0 ? gsnr / gsnr_max : gsnr);
    const double gain = 1.0 - momentum * (1.0 - first);
    const double decay = 1.0 - lr * weight_decay;
    return {T(rate), T(momentum), T(gain), T(decay)};
  }

  template <class S>
  FM_RULE unsigned reads(const S& s) {
    return 3 | (s.mu != 0) << 2;
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

  struct Measure : NoSwitches {
    static constexpr int kSums = 2;
    // Whether `settled` depends on the kept numbers, else on the hyper-parameters alone.
    static constexpr bool kSettles = true;
    static constexpr unsigned kWrites = 0;

    template <class S>
    FM_RULE unsigned reads(const S&) {
      return 2;  // g
    }

    template <class S>
    FM_RULE int sums(const S&) {
      return kSums;
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

}  // namespace fused_momentum
