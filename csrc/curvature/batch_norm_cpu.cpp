#include "curvature/batch_norm.h"

#include <array>

#include "support/dtypes.h"
#include "support/vec.h"

namespace blokern {
namespace {

// Layouts: how to walk what one thread takes at a time, and how its lanes belong to channels.

// One channel; lanes are pixels.
struct Planes {
  static constexpr int64_t width(int64_t) { return 1; }

  template <class A, class Body>
  static __attribute__((flatten)) void walk(const Channels& s, int64_t channel, Body body) {
    for (int64_t n = 0; n < s.samples; ++n) {
      const int64_t row = (n * s.channels + channel) * s.pixels;
      sweep<A>(row, row + s.pixels, body);
    }
  }
  template <class A>
  static void add(const Lanes<A>& lanes, double* totals) {
    totals[0] += sum(lanes);
  }
  template <class A>
  static Lanes<A> factor(const double* values) {
    return Lanes<A>(static_cast<A>(values[0]));
  }
};

// A group of channels that lie beside each other; lanes are channels.
struct Columns {
  static constexpr int64_t width(int64_t lanes) { return lanes; }

  template <class A, class Body>
  static __attribute__((flatten)) void walk(const Channels& s, int64_t channel, Body body) {
    const int64_t last = channel + Lanes<A>::size() < s.channels ? channel + Lanes<A>::size() : s.channels;
    for (int64_t m = 0; m < s.samples * s.pixels; ++m)
      sweep<A>(m * s.channels + channel, m * s.channels + last, body);
  }
  template <class A>
  static void add(const Lanes<A>& lanes, double* totals) {
    std::array<A, Lanes<A>::size()> values;
    store(values.data(), lanes, Full{});
    for (int64_t i = 0; i < Lanes<A>::size(); ++i) totals[i] += static_cast<double>(values[i]);
  }
  template <class A>
  static Lanes<A> factor(const double* values) {
    std::array<A, Lanes<A>::size()> narrow;
    for (int64_t i = 0; i < Lanes<A>::size(); ++i) narrow[i] = static_cast<A>(values[i]);
    return load<A>(narrow.data(), Full{});
  }
};

// A value for each channel of a group.
template <class A>
using Group = std::array<double, Lanes<A>::size()>;

// K sums over each channel of a group: body(i, width, sums) adds into lanes, which are added up in double
// every so often, so that rounding does not grow with the batch.
template <class Layout, class A, int K, class Body>
__attribute__((flatten)) std::array<Group<A>, K> channel_sums(const Channels& s, int64_t channel, Body body) {
  std::array<Group<A>, K> total{};
  std::array<Lanes<A>, K> part{};
  int count = 0;
  Layout::template walk<A>(s, channel, [&](int64_t i, auto w) {
    body(i, w, part);
    if (++count == 128) {
      for (int k = 0; k < K; ++k) Layout::add(part[k], total[k].data());
      part = {};
      count = 0;
    }
  });
  for (int k = 0; k < K; ++k) Layout::add(part[k], total[k].data());
  return total;
}

// v where the gate is open.
template <bool kGated, class T, class A, class Width>
BLOKERN_INLINE Lanes<A> gated(const Lanes<A>& v, const T* gate, int64_t i, Width w) {
  if constexpr (!kGated) return v;
  return where(less(Lanes<A>(), load<A>(gate + i, w)), v, Lanes<A>());
}

// K values for every channel of a group: of(channel, place in the group).
template <class Layout, class A, int K, class Of>
std::array<Lanes<A>, K> factors(const Channels& s, int64_t channel, Of of) {
  std::array<Group<A>, K> value{};
  for (int64_t j = 0; j < Layout::width(Lanes<A>::size()) && channel + j < s.channels; ++j) {
    const std::array<double, K> column = of(channel + j, j);
    for (int k = 0; k < K; ++k) value[k][j] = column[k];
  }
  std::array<Lanes<A>, K> lanes;
  for (int k = 0; k < K; ++k) lanes[k] = Layout::template factor<A>(value[k].data());
  return lanes;
}

template <class Layout, class A>
Lanes<A> means(const Channels& s, const ChannelValues& values, int64_t channel) {
  return factors<Layout, A, 1>(s, channel, [&](int64_t c, int64_t) { return std::array{values.mean[c]}; })[0];
}

template <class Layout, bool kGated, class T>
__attribute__((flatten)) void tangent(const BatchNormTangent<T>& p, int64_t channel) {
  using A = Accum<T>;
  const double count = static_cast<double>(p.shape.samples * p.shape.pixels);
  const T *const x = p.x, *const x_dot = p.x_dot, *const gate = p.gate;
  T* const y_dot = p.y_dot;
  const Lanes<A> mu = means<Layout, A>(p.shape, p.values, channel);
  std::array<Group<A>, 2> total{};
  if (p.train) {
    total = channel_sums<Layout, A, 2>(p.shape, channel, [=](int64_t i, auto w, auto& t) {
      const Lanes<A> v = load<A>(x_dot + i, w);
      t[0] = t[0] + v;
      t[1] = t[1] + v * (load<A>(x + i, w) - mu);
    });
  }
  const auto factor = factors<Layout, A, 3>(p.shape, channel, [&](int64_t c, int64_t j) {
    const auto f = tangent_factors(p.values.rstd[c], p.values.gamma(c), p.values.gamma_dot(c),
                                   p.values.beta_dot(c), {total[0][j] / count, total[1][j] / count});
    return std::array{f.x_dot, f.x, f.constant};
  });
  const Lanes<A> by_x_dot = factor[0], by_x = factor[1], constant = factor[2];
  Layout::template walk<A>(p.shape, channel, [=](int64_t i, auto w) {
    const Lanes<A> v = by_x_dot * load<A>(x_dot + i, w) + by_x * (load<A>(x + i, w) - mu) + constant;
    store(y_dot + i, gated<kGated>(v, gate, i, w), w);
  });
}

template <class Layout, bool kGated, class T>
__attribute__((flatten)) void adjoint(const BatchNormAdjoint<T>& p, int64_t channel) {
  using A = Accum<T>;
  const double count = static_cast<double>(p.shape.samples * p.shape.pixels);
  const T *const x = p.x, *const grad = p.grad, *const gate = p.gate;
  T* const x_bar = p.x_bar;
  const Lanes<A> mu = means<Layout, A>(p.shape, p.values, channel);
  std::array<Group<A>, 2> total{};
  if (p.train || p.weight_bar != nullptr) {
    total = channel_sums<Layout, A, 2>(p.shape, channel, [=](int64_t i, auto w, auto& t) {
      const Lanes<A> g = gated<kGated>(load<A>(grad + i, w), gate, i, w);
      t[0] = t[0] + g;
      t[1] = t[1] + g * (load<A>(x + i, w) - mu);
    });
  }
  const auto factor = factors<Layout, A, 3>(p.shape, channel, [&](int64_t c, int64_t j) {
    const double r = p.values.rstd[c];
    if (p.weight_bar != nullptr) {
      p.weight_bar[c] = r * total[1][j];
      p.bias_bar[c] = total[0][j];
    }
    const double per = p.train ? 1 / count : 0;
    const auto f = adjoint_factors(r, p.values.gamma(c), {total[0][j] * per, total[1][j] * per});
    return std::array{f.grad, f.x, f.constant};
  });
  if (x_bar == nullptr) return;
  const Lanes<A> by_grad = factor[0], by_x = factor[1], constant = factor[2];
  Layout::template walk<A>(p.shape, channel, [=](int64_t i, auto w) {
    const Lanes<A> g = gated<kGated>(load<A>(grad + i, w), gate, i, w);
    store(x_bar + i, by_grad * g + by_x * (load<A>(x + i, w) - mu) + constant, w);
  });
}

template <class Layout, bool kGated, bool kBoth, class T>
__attribute__((flatten)) void adjoint_tangent(const BatchNormAdjoint<T>& p, int64_t channel) {
  using A = Accum<T>;
  const double count = static_cast<double>(p.shape.samples * p.shape.pixels);
  const T *const x = p.x, *const x_dot = p.x_dot, *const grad = p.grad, *const grad_dot = p.grad_dot;
  const T* const gate = p.gate;
  T *const x_bar = p.x_bar, *const x_bar_dot = p.x_bar_dot;
  const Lanes<A> mu = means<Layout, A>(p.shape, p.values, channel);
  std::array<Group<A>, 7> total{};
  if (p.train || p.weight_bar != nullptr) {
    total = channel_sums<Layout, A, 7>(p.shape, channel, [=](int64_t i, auto w, auto& t) {
      const Lanes<A> v = load<A>(x_dot + i, w), centred = load<A>(x + i, w) - mu;
      const Lanes<A> g = gated<kGated>(load<A>(grad + i, w), gate, i, w);
      const Lanes<A> g_dot = gated<kGated>(load<A>(grad_dot + i, w), gate, i, w);
      t[0] = t[0] + v;
      t[1] = t[1] + v * centred;
      t[2] = t[2] + g;
      t[3] = t[3] + g * centred;
      t[4] = t[4] + g_dot;
      t[5] = t[5] + g_dot * centred;
      t[6] = t[6] + g * v;
    });
  }
  const auto factor = factors<Layout, A, 8>(p.shape, channel, [&](int64_t c, int64_t j) {
    const double r = p.values.rstd[c], gamma = p.values.gamma(c);
    const double per = p.train ? 1 / count : 0;
    const TangentMeans t{total[0][j] * per, total[1][j] * per};
    const AdjointMeans a{total[2][j] * per, total[3][j] * per};
    const AdjointTangentMeans d{total[4][j] * per, total[5][j] * per, total[6][j] * per};
    if (p.weight_bar != nullptr) {
      const double moved = p.train ? count * normal_dot_grad(r, t, a, d.x_dot_grad) : r * total[6][j];
      p.weight_bar[c] = r * total[5][j] + moved;
      p.bias_bar[c] = total[4][j];
    }
    const auto f = adjoint_tangent_factors(r, gamma, p.values.gamma_dot(c), t, a, d);
    const auto g = adjoint_factors(r, gamma, a);
    return std::array{f.grad_dot, f.grad, f.x_dot, f.x, f.constant, g.grad, g.x, g.constant};
  });
  const Lanes<A> by_grad_dot = factor[0], by_grad = factor[1], by_x_dot = factor[2], by_x = factor[3];
  const Lanes<A> constant = factor[4], own_grad = factor[5], own_x = factor[6], own_constant = factor[7];
  Layout::template walk<A>(p.shape, channel, [=](int64_t i, auto w) {
    const Lanes<A> centred = load<A>(x + i, w) - mu;
    const Lanes<A> g = gated<kGated>(load<A>(grad + i, w), gate, i, w);
    const Lanes<A> g_dot = gated<kGated>(load<A>(grad_dot + i, w), gate, i, w);
    const Lanes<A> straight = by_grad_dot * g_dot + by_grad * g;
    store(x_bar_dot + i, straight + by_x_dot * load<A>(x_dot + i, w) + by_x * centred + constant, w);
    if constexpr (kBoth) store(x_bar + i, own_grad * g + own_x * centred + own_constant, w);
  });
}

template <class Layout, class T>
void tangents(const BatchNormTangent<T>& p, int64_t channel) {
  p.gate != nullptr ? tangent<Layout, true>(p, channel) : tangent<Layout, false>(p, channel);
}

template <class Layout, bool kGated, class T>
void adjoints(const BatchNormAdjoint<T>& p, int64_t channel) {
  if (p.grad_dot == nullptr) return adjoint<Layout, kGated>(p, channel);
  p.x_bar != nullptr ? adjoint_tangent<Layout, kGated, true>(p, channel)
                     : adjoint_tangent<Layout, kGated, false>(p, channel);
}

}  // namespace

template <class T>
int64_t channel_group() {
  return Lanes<Accum<T>>::size();
}

template <class T>
void batch_norm_tangent(const BatchNormTangent<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    p.shape.channels_inner ? tangents<Columns>(p, i * channel_group<T>()) : tangents<Planes>(p, i);
  }
}

template <class T>
void batch_norm_adjoint(const BatchNormAdjoint<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (p.shape.channels_inner) {
      const int64_t channel = i * channel_group<T>();
      p.gate != nullptr ? adjoints<Columns, true>(p, channel) : adjoints<Columns, false>(p, channel);
    } else {
      p.gate != nullptr ? adjoints<Planes, true>(p, i) : adjoints<Planes, false>(p, i);
    }
  }
}

#define INSTANTIATE(T)                                                               \
  template int64_t channel_group<T>();                                               \
  template void batch_norm_tangent<T>(const BatchNormTangent<T>&, int64_t, int64_t); \
  template void batch_norm_adjoint<T>(const BatchNormAdjoint<T>&, int64_t, int64_t);
BLOKERN_FOR_IMAGE(INSTANTIATE)
#undef INSTANTIATE

}  // namespace blokern
