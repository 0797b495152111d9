// The product of the Hessian of L = <grad_out, out> + <grad_lse, lse> by q, k, v and the bias with their tangents, in
// the layout and the passes of backward.cpp. With tangents t, mu = tangent_lse and f the softcap,
//
//   T = K Qt^T + Kt Q^T,  ts = f' T + tangent_bias,  dP = V dO^T,  tdP = Vt dO^T
//   dS = P (dP - delta),  tdS = (ts - mu) dS + P (tdP - tangent_delta)
//   dX = f' dS,  tdX = f' tdS + f'' T dS
//   dV += (P (ts - mu)) dO,  dK += tdX Q + dX Qt,  dQ^T += K^T tdX + Kt^T dX,  dbias += tdS
//
// Dropout applies to P (ts - mu) in dV, to dP and to tdP.
#include "backward_passes.h"
#include "kernels.h"

namespace flashattn {
namespace FLASHATTN_ISA {

struct Hvp {
  // P, P (ts - mu) as A, ts - mu in place of ts, dP in place of dS and tdP in place of tdS.
  template <class Dot>
  static void compute_tile(const Attention& a, const Weights& w, const Queries& x, const Keys& keys) {
    int64_t n = keys.keys.end - keys.keys.begin, lanes = x.lanes;
    int64_t depth = k_lanes<Dot>(a.head_dim), depth_v = k_lanes<Dot>(a.head_dim_v);
    matmul<Dot>(keys.k, x.q_t, lanes, n, lanes, depth, store_to(w.p, lanes));
    matmul_sum<Dot>(n, lanes, store_scaled_to(w.ts, lanes, a.score.scale),
                    Product{keys.k, {x.tangent_q_t, lanes}, a.tangent.q.data ? depth : 0},
                    Product{keys.tangent_k, {x.q_t, lanes}, a.tangent.k.data ? depth : 0});
    compute_weights<Dot>(a, w, x, keys.keys, [&](vf p, int64_t at, int64_t i) {
      vf centered = load<vf>(w.ts + at) - load<vf>(x.mu + i);
      store(w.ts + at, centered);
      if (w.dropout) p *= load<vf>(w.dropout + at);
      store_as_a<Dot>(w.p_a, at, p * centered);
    });
    matmul<Dot>(keys.v, x.grad_t, lanes, n, lanes, depth_v, store_to(w.ds, lanes));
    matmul_sum<Dot>(n, lanes, store_to(w.tds, lanes),
                    Product{keys.tangent_v, {x.grad_t, lanes}, a.tangent.v.data ? depth_v : 0});
  }

  struct Gradient {
    vf ds, tds;
  };
  FLASHATTN_INLINE Gradient score_gradients(const Weights& w, const Queries& x, int64_t at, int64_t i) {
    vf dp = load<vf>(w.ds + at), tdp = load<vf>(w.tds + at), p = load<vf>(w.p + at);
    if (w.dropout) dp *= load<vf>(w.dropout + at), tdp *= load<vf>(w.dropout + at);
    vf ds = p * (dp - load<vf>(x.delta + i));
    return {ds, load<vf>(w.ts + at) * ds + p * (tdp - load<vf>(x.tangent_delta + i))};
  }
  // tdS of W scores.
  FLASHATTN_INLINE vf score_gradient(const Weights& w, const Queries& x, int64_t at, int64_t i) {
    return score_gradients(w, x, at, i).tds;
  }

  // dX and tdX, as A and as B.
  template <class Dot>
  static void compute_score_gradients(const Weights& w, const Queries& x, int64_t n) {
    auto gradients = [&](int64_t j, int64_t i) {
      int64_t at = j * x.lanes + i;
      Gradient g = score_gradients(w, x, at, i);
      if (w.softcap.first) {
        vf first = load<vf>(w.softcap.first + at);
        g = {first * g.ds, first * g.tds + load<vf>(w.softcap.second + at) * g.ds};
      }
      store_as_a<Dot>(w.ds_a, at, g.ds), store_as_a<Dot>(w.tds_a, at, g.tds);
      return g;
    };
    for (int64_t j = 0; j < n; j += Dot::K_PER_LANE)
      for (int64_t i = 0; i < x.lanes; i += W) {
        Gradient even = gradients(j, i);
        if constexpr (Dot::K_PER_LANE == 2) {
          Gradient odd = j + 1 < n ? gradients(j + 1, i) : Gradient{};
          int64_t at = j / 2 * x.lanes + i;
          store(w.ds_b + at, Dot::pack_pairs(even.ds, odd.ds));
          store(w.tds_b + at, Dot::pack_pairs(even.tds, odd.tds));
        }
      }
  }

  template <class Dot>
  static void accumulate(const Attention& a, const Weights& w, const Queries& x, const Keys& keys, const Sums& sums) {
    int64_t d = round_up(a.head_dim, W), dv = round_up(a.head_dim_v, W), n = keys.keys.end - keys.keys.begin;
    int64_t queries = k_lanes<Dot>(x.rows.end - x.rows.begin), row = x.lanes * 4 / Dot::K_PER_LANE;
    auto as_a = [row](const float* weights) { return PackedA{(const char*)weights, row, 4}; };
    compute_tile<Dot>(a, w, x, keys);
    compute_score_gradients<Dot>(w, x, n);
    matmul<Dot>(as_a(w.p_a), x.grad.data, x.grad.ld, n, dv, queries, add_to(sums.v, dv));
    matmul_sum<Dot>(n, d, add_to(sums.k, d), Product{as_a(w.tds_a), x.q, queries},
                    Product{as_a(w.ds_a), x.tangent_q, a.tangent.q.data ? queries : 0});
    matmul_sum<Dot>(a.head_dim, x.lanes, add_to(sums.q_t, x.lanes),
                    Product{keys.k_t, {w.tds_b, x.lanes}, k_lanes<Dot>(n)},
                    Product{keys.tangent_k_t, {w.ds_b, x.lanes}, a.tangent.k.data ? k_lanes<Dot>(n) : 0});
  }
};

int64_t hvp_tiles(const Attention& a) { return sections_tiles(a); }
size_t hvp_scratch(const Attention& a) { return sections_scratch(a); }
void hvp_tile(const Attention& a, int64_t index, float* memory) { sections_tile<Hvp>(a, index, memory); }

int64_t hvp_bias_tiles(const Attention& a) { return bias_tiles(a); }
size_t hvp_bias_scratch(const Attention& a) { return bias_scratch(a); }
void hvp_bias_tile(const Attention& a, int64_t index, float* memory) { bias_tile<Hvp>(a, index, memory); }

}  // namespace FLASHATTN_ISA
}  // namespace flashattn
