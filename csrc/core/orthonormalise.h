// SPDX-License-Identifier: Apache-2.0
// Orthonormal columns against a basis, round by round: what an algebra's orthonormalise() (core/dense.h) means, for
// those that have no shorter way.
#pragma once

namespace osora::core {

// z -> orthonormal columns, orthogonal to v [*, *, width] (orthonormal). A column whose projection is no more than
// rounding, measured by sigma_1 times `norms` [B, 1, columns of z], is replaced by a random one.
// D::cholesky_qr tells how well conditioned its input was: 1 for orthonormal columns, 0 if it was not measured. A
// projection that leaves little of orthonormal columns leaves rounding in them, and asks for another round ("twice is
// enough" where it leaves much: Daniel, Gragg, Kaufman, Stewart, Math. Comp. 30, 1976).
template <class D, class Array>
void orthonormalise_in_rounds(D& dense, Array& z, const Array& v, const Array& norms) {
  dense.project_out(z, v);
  dense.drop_noise(z, norms);
  for (int round = 0; round < D::kRounds; ++round) {
    if (round > 0) dense.project_out(z, v);
    if (dense.cholesky_qr(z) > 0.7 && round > 0) return;  // and they were orthonormal before: nothing left to mend
  }
}

}  // namespace osora::core
