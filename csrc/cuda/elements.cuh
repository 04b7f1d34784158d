// Elements of one tensor, on their way from memory through a rule and back.
#pragma once

#include <type_traits>
#include <utility>

#include "numbers.cuh"
#include "tensor.cuh"

namespace fused_momentum::cuda {

constexpr int larger(int a, int b) {
  return a > b ? a : b;
}

// Blocks that a processor holds at a time, where a thread has its elements of `streams` streams in
// registers, and so many others for addresses and numbers.
template <class T>
constexpr int blocks_per_processor(int streams, int others) {
  constexpr int kRegisters = 65536, kWords = int(sizeof(T) / 4);
  return kRegisters / (kThreads * (kPerThread * streams * kWords + others + 16 * kWords));
}

// A rule on values of type T, with the codecs of the parameter, the gradient and the states.
template <class Rule_, class T_, class P_, class G_, class S_>
struct Types {
  using Rule = Rule_;
  using T = T_;
  using P = P_;
  using G = G_;
  using S = S_;
  using Scalars = typename Rule::template Scalars<T>;
  using States = std::make_index_sequence<Rule::kStates>;
  static constexpr int kStreams = 2 + Rule::kStates;
  static constexpr int kVector = larger(larger(P::kVector, G::kVector), S::kVector);
  static constexpr bool kAny = std::is_same_v<P, AnyCodec>;
  // Bytes of an element that has so many states.
  static constexpr int bytes(int states) { return P::kBytes + G::kBytes + states * S::kBytes; }
};

// What a pass needs of a tensor's numbers.
template <class Types>
struct Factors {
  typename Types::Scalars scalars;
  typename Types::T grad_multiplier;

  FM_DEVICE static Factors of(const Numbers<typename Types::Rule>& numbers) {
    using T = typename Types::T;
    return {Types::Rule::template derive<T>(numbers.hyper, numbers.tensor, numbers.kept),
            T(numbers.grad_multiplier)};
  }
};

// Where a thread's groups of elements are in a full tile: every kStep elements, in all streams
// alike.
template <int kStep>
struct Whole {
  int64_t at;
  FM_DEVICE bool has(int) const { return true; }
  FM_DEVICE int64_t place(int group, int) const { return at + group * kStep; }
};

// The same in the last tile of a tensor, which ends after `left` elements.
template <int kStep>
struct Rest {
  int64_t at;
  int left;
  FM_DEVICE bool has(int group) const { return group * kStep < left; }
  FM_DEVICE int64_t place(int group, int) const { return at + group * kStep; }
};

// N groups of V elements.
template <class Types, int V, int N>
class Elements {
  using T = typename Types::T;
  using P = typename Types::P;
  using G = typename Types::G;
  using S = typename Types::S;
  using Rule = typename Types::Rule;
  using Streams = Tensor<Types::kStreams>;

 public:
  // reads: bit s is set where stream s is looked at; the others are zeros. Everything is on its way
  // before anything is waited for.
  template <class At>
  FM_DEVICE void load(const Header& header, const Streams& tensor, unsigned reads, const At& at) {
    const P param(header.dtype[0]);
    const G grad(header.dtype[1]);
    typename P::template Raw<V> raw_param[N];
    typename G::template Raw<V> raw_grad[N];
    typename S::template Raw<V> raw_states[Rule::kStates][N];
    fetch(param, tensor, reads, 0, at, raw_param);
    fetch(grad, tensor, reads, 1, at, raw_grad);
#pragma unroll
    for (int s = 0; s < Rule::kStates; s++)
      fetch(S(header.dtype[2 + s]), tensor, reads, 2 + s, at, raw_states[s]);
    decode(param, raw_param, x_[0]);
    decode(grad, raw_grad, x_[1]);
#pragma unroll
    for (int s = 0; s < Rule::kStates; s++)
      decode(S(header.dtype[2 + s]), raw_states[s], x_[2 + s]);
  }

  // writes: bit s is set where stream s is written.
  template <class At>
  FM_DEVICE void store(const Header& header, const Streams& tensor, unsigned writes,
                       const At& at) const {
    store(P(header.dtype[0]), tensor, writes, 0, at);
#pragma unroll
    for (int s = 2; s < Types::kStreams; s++) store(S(header.dtype[s]), tensor, writes, s, at);
  }

  FM_DEVICE void update(const Factors<Types>& factors) {
#pragma unroll
    for (int k = 0; k < N; k++)
#pragma unroll
      for (int v = 0; v < V; v++) update(k, v, factors, typename Types::States{});
  }

  FM_DEVICE void terms(int k, const Factors<Types>& factors, double* terms) {
    this->terms(k, factors, terms, typename Types::States{});
  }

 private:
  template <class C, class At>
  FM_DEVICE static void fetch(const C& codec, const Streams& tensor, unsigned reads, int s,
                              const At& at, typename C::template Raw<V>* raw) {
#pragma unroll
    for (int k = 0; k < N; k++) raw[k] = {};
    if ((reads >> s & 1) == 0 || tensor.data[s] == nullptr) return;
#pragma unroll
    for (int k = 0; k < N; k++)
      if (at.has(k)) codec.template fetch<V>(tensor.data[s], at.place(k, s), &raw[k]);
  }

  template <class C>
  FM_DEVICE static void decode(const C& codec, const typename C::template Raw<V>* raw,
                               T (*values)[V]) {
#pragma unroll
    for (int k = 0; k < N; k++) codec.template decode<V>(raw[k], values[k]);
  }

  template <class C, class At>
  FM_DEVICE void store(const C& codec, const Streams& tensor, unsigned writes, int s,
                       const At& at) const {
    if ((writes >> s & 1) == 0 || tensor.data[s] == nullptr) return;
#pragma unroll
    for (int k = 0; k < N; k++)
      if (at.has(k)) codec.template store<V>(tensor.data[s], at.place(k, s), x_[s][k]);
  }

  template <size_t... I>
  FM_DEVICE void update(int k, int v, const Factors<Types>& factors, std::index_sequence<I...>) {
    Rule::update(x_[0][k][v], x_[1][k][v] * factors.grad_multiplier, x_[2 + I][k][v]...,
                 factors.scalars);
  }

  template <size_t... I>
  FM_DEVICE void terms(int k, const Factors<Types>& factors, double* terms,
                       std::index_sequence<I...>) {
    Rule::Measure::terms(x_[0][k][0], x_[1][k][0] * factors.grad_multiplier, x_[2 + I][k][0]...,
                         factors.scalars, terms);
  }

  T x_[Types::kStreams][N][V];
};

}  // namespace fused_momentum::cuda
