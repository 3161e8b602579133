// SPDX-License-Identifier: Apache-2.0
// Every operator of the package, as torch sees it: the only m.def()s in the project.
// What each one means is written once, in plain torch, in python/osora/reference.py.
//
// Letters: n rows of x, k in_features, d out_features, r rank.
#include <torch/library.h>

TORCH_LIBRARY(osora, m) {
  m.set_python_module("osora.ops.osora");  // where the fake kernels and the derivatives live

  // D[d, r] = U * (o (S0 + s) + s): the adapter as one matrix, W = W0 + D V^T.
  m.def("fold(Tensor U, Tensor S0, Tensor s, Tensor o) -> Tensor");
  // The same of many layers at once: one dtype and device, any shapes. No derivative.
  m.def("fold_many(Tensor[] U, Tensor[] S0, Tensor[] s, Tensor[] o) -> Tensor[]");
  // P[d, r] = dL/dD  ->  dL/ds [r], dL/do [d]; what is not needed comes back empty, [0].
  m.def(
      "fold_backward(Tensor U, Tensor P, Tensor S0, Tensor s, Tensor o, bool need_s, bool need_o) -> (Tensor, Tensor)");

  // y[n, d] = x W^T + bias + (x V) D^T and h[n, r] = x V. Without a weight: the adapter's branch alone.
  m.def(
      "linear(Tensor x, Tensor? weight, Tensor? bias, Tensor U, Tensor V, Tensor S0, Tensor s, Tensor o)"
      " -> (Tensor, Tensor)");
  // y of linear with a derivative in x, bias, s and o, which keeps h. `cast`: weight, U and V take x's dtype. Who has h
  // or D already gives them, in x's dtype: a D is kept too, for the backward, and without one it is folded there again.
  m.def(
      "linear_trained(Tensor x, Tensor? weight, Tensor? bias, Tensor U, Tensor V, Tensor S0, Tensor s, Tensor o,"
      " bool cast, Tensor? h=None, Tensor? D=None) -> Tensor");
  // The two halves of linear, for those who keep h and compute y again: h = x V, y = x W^T + bias + h D^T. Where a D
  // is given it is not folded, here and in the backward; it must be that of U, S0, s and o.
  m.def("down(Tensor x, Tensor V) -> Tensor");
  m.def(
      "up(Tensor x, Tensor h, Tensor? weight, Tensor? bias, Tensor U, Tensor S0, Tensor s, Tensor o, Tensor? D=None)"
      " -> Tensor");
  // dy[n, d], h[n, r]  ->  dx[n, k], ds[r], do[d]; what is not needed comes back empty, [0].
  m.def(
      "linear_backward(Tensor dy, Tensor h, Tensor? weight, Tensor U, Tensor V, Tensor S0, Tensor s, Tensor o,"
      " bool need_x, bool need_s, bool need_o, Tensor? D=None) -> (Tensor, Tensor, Tensor)");

  // y[..., d] += (x V) D^T in place, for a base that owns its product (a quantised one)  ->  h[n, r] = x V.
  m.def("linear_add_(Tensor(a!) y, Tensor x, Tensor U, Tensor V, Tensor S0, Tensor s, Tensor o) -> Tensor");

  m.set_python_module("osora.ops.multi");
  // Row i of x by adapter a = index[i] of A that share U, V and S0; -1 is the base, other numbers are refused on the
  // CPU and give a row of NaN elsewhere. s [A, r], o [A, d]; of adapter a only the first ranks[a] columns count.
  // y_i = x_i W^T + bias + o_a (h_i (S0 + s_a)) U^T + (h_i s_a) U^T with h = x V. No derivative.
  m.def(
      "linear_multi(Tensor x, Tensor? weight, Tensor? bias, Tensor U, Tensor V, Tensor S0, Tensor s, Tensor o,"
      " Tensor index, Tensor? ranks=None) -> Tensor");

  m.set_python_module("osora.svd.truncated");
  // weights: matrices [d, k] of one shape; keys: one integer per matrix, part of its random stream.
  // -> U [B, d, r], S [B, r], V [B, k, r], residuals [B, r], converged [B] bool, passes [B], method [B], columns [B],
  // Frobenius norms [B], rounding floors [B]. max_memory: bytes beyond the weights and the answer; 0 for no limit.
  m.def(
      "truncated_svd(Tensor[] weights, int rank, float tol, int seed, int[] keys, str method, int max_memory=0)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // What truncated_svd will do with a matrix [d, k] -> method, block, keep, basis, bytes beyond the weight.
  m.def("svd_plan(int d, int k, int rank, int itemsize, str method, bool cuda, int threads) -> int[]");
  // The rounding floor of an SVD of [d, k] over sigma_1, where the factors have this many bytes a number.
  m.def("svd_floor(int d, int k, int itemsize) -> float");

  // SORSA. Trained are u [d, r], s [r], v [k, r], the changes of the singular triplets U0, S0, V0; with U = U0 + u and
  // so on, W + U S V^T - U0 S0 V0^T = W + A V0^T + B v^T for A = u S + U0 s and B = U S.
  m.set_python_module("osora.ops.sorsa");
  // y[n, d] = x W^T + bias + (x V0) A^T + (x v) B^T and h[n, r] = x V. Without a weight: the adapter's branch alone.
  m.def(
      "sorsa_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor U0, Tensor S0, Tensor V0, Tensor u, Tensor s,"
      " Tensor v) -> (Tensor, Tensor)");
  // dy[n, d], x[n, k] (for dv), h[n, r] (for du and ds)  ->  dx[n, k], du[d, r], ds[r], dv[k, r]; what is not needed
  // comes back empty, [0].
  m.def(
      "sorsa_linear_backward(Tensor dy, Tensor? x, Tensor? h, Tensor? weight, Tensor U0, Tensor S0, Tensor V0,"
      " Tensor u, Tensor s, Tensor v, bool need_x, bool need_u, bool need_s, bool need_v)"
      " -> (Tensor, Tensor, Tensor, Tensor)");

  // OSoRA with a materialised weight: W_eff[d, k] = W + D V^T, summed in float32 (float64), rounded once to x's dtype.
  // It is kept and made again when one of its six sources has changed, so that these are functions of their arguments.
  m.set_python_module("osora.ops.materialised");
  // y[n, d] = x W_eff^T + bias and h[n, r] = x V, empty [0] if not needed.
  m.def(
      "linear_effective(Tensor x, Tensor weight, Tensor? bias, Tensor U, Tensor V, Tensor S0, Tensor s, Tensor o,"
      " bool need_h) -> (Tensor, Tensor)");
  // dy[n, d], h[n, r] (for ds and do)  ->  dx[n, k] = dy W_eff, ds[r], do[d]; what is not needed comes back empty, [0].
  m.def(
      "linear_effective_backward(Tensor dy, Tensor h, Tensor weight, Tensor U, Tensor V, Tensor S0, Tensor s, Tensor o,"
      " bool need_x, bool need_s, bool need_o) -> (Tensor, Tensor, Tensor)");
  // Makes what is kept for this weight and this o again, at the address it has.
  m.def("effective_refresh(Tensor weight, Tensor U, Tensor V, Tensor S0, Tensor s, Tensor o) -> ()");
  m.def("effective_drop(Tensor weight, Tensor o) -> ()");
  m.def("effective_kept(Tensor weight, Tensor o) -> Tensor[]");
}
