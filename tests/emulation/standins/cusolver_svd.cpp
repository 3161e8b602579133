// SPDX-License-Identifier: Apache-2.0
#include "cusolver_svd.h"

#include <ATen/Functions.h>

namespace osora::standins {
namespace {

// All of U, S, V^T, by torch; NaN where the input is not finite.
struct Factors {
  at::Tensor U, S, Vt;
  bool finite;
};
Factors factors(const Matrix& a, int64_t index) {
  const at::Tensor A = view(a, index).contiguous();
  if (all_finite(a, index)) {
    auto [U, S, Vt] = at::linalg_svd(A, /*full_matrices=*/true);
    return {U, S, Vt, true};
  }
  const auto nan = [&](at::IntArrayRef shape) { return at::full(shape, NAN, A.options()); };
  return {nan({a.rows, a.rows}), nan({std::min(a.rows, a.columns)}), nan({a.columns, a.columns}), false};
}

// The first `keep` columns of `from`; NaN in the others.
void put(const Matrix& to, int64_t index, const at::Tensor& from, int64_t keep) {
  if (to.columns == 0 || to.rows == 0) return;
  fill_nan(to, index);
  const int64_t count = std::min({to.columns, from.size(1), keep});
  view(to, index).narrow(1, 0, count).copy_(from.narrow(1, 0, count));
}

}  // namespace

std::string check_svd(cusolverDnHandle_t handle, const Svd& s) {
  need_solver(handle);
  need_types({s.A.type, s.S.type, s.U.type, s.V.type});
  need(s.A.rows >= 0 && s.A.columns >= 0, "the matrix is ", s.A.rows, " x ", s.A.columns);
  for (const Matrix* each : {&s.A, &s.U, &s.V})
    need(each->ld >= std::max<int64_t>(1, each->rows), each->name, " has ", each->rows, " rows and leading dimension ",
         each->ld);
  return text(s.routine, " ", s.A.rows, " x ", s.A.columns, " ld ", s.A.ld, ", ", s.U.ld, ", ", s.V.ld, " ",
              name_of(s.A.type), " mode ", handle->mode);
}

void solve_svd(const Call& call, cusolverDnHandle_t handle, const Svd& s, const Workspace& workspace, int* info,
               int64_t keep) {
  const std::string parameters = check_svd(handle, s);
  const Matrix flags{"info", info, CUDA_R_32I, s.A.batch, 1, s.A.batch};
  std::vector<Matrix> written = {s.S, s.U, s.V, flags}, read;
  (s.destroys ? written : read).push_back(s.A);
  for (const Matrix& each : written) need_device(each);
  need_device(s.A);
  need_disjoint(written, read);
  std::vector<Matrix> all = written;
  all.insert(all.end(), read.begin(), read.end());
  use_workspace(parameters, workspace, all);
  for (int64_t k = 0; k < s.A.batch; ++k) {
    const Factors f = factors(s.A, k);
    at::Tensor values = view(s.S, k).select(1, 0);
    values.fill_(NAN);
    const int64_t count = std::min({values.numel(), f.S.numel(), keep});
    values.narrow(0, 0, count).copy_(f.S.narrow(0, 0, count));
    put(s.U, k, f.U, keep);
    if (s.transposed) {
      if (s.V.rows && s.V.columns) view(s.V, k).copy_(f.Vt.narrow(0, 0, s.V.rows));
    } else {
      put(s.V, k, f.Vt.t(), keep);
    }
    if (s.destroys && s.A.rows && s.A.columns) fill_nan(s.A, k);
    write_info(call, info, k, f.finite ? 0 : 1, {s.S, s.U, s.V});
  }
}

void remember_svd(cusolverDnHandle_t handle, const Svd& s, size_t* device, size_t* host) {
  need(device && host, "the place for a workspace size is null");
  const WorkspaceSize size = workspace_size(s.numbers(), bytes_of(s.A.type));
  remember_query(check_svd(handle, s), size);
  *device = size.device;
  *host = size.host;
}

void remember_svd(cusolverDnHandle_t handle, const Svd& s, int* numbers) {
  need(numbers, "the place for the workspace size is null");
  const std::string parameters = check_svd(handle, s);
  const WorkspaceSize size = workspace_size(s.numbers(), bytes_of(s.A.type));
  const auto count = static_cast<int64_t>(size.device / bytes_of(s.A.type));
  need(count <= kInt32Max, "the workspace size does not fit into an int");
  remember_query(parameters, {size.device, 0});
  *numbers = static_cast<int>(count);
}

}  // namespace osora::standins
