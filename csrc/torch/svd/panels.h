// SPDX-License-Identifier: Apache-2.0
// Products with one weight, some rows of it at a time. A panel of rows is read once, converted and scaled where that is
// needed, and used for A x and for A^T (A x) while it is in the cache: no copy of the weight is made.
#pragma once
#include <ATen/core/Tensor.h>

namespace osora {

// A = 2^-exponent W, in the dtype `work` (float32 or float64), largest entry in [1/2, 1).
class Panels {
 public:
  // weight: [d, k], finite (a ValueError otherwise), any strides; kept by reference.
  Panels(const at::Tensor& weight, at::ScalarType work);
  // The same weight in another working dtype; nothing is looked at again.
  Panels in(at::ScalarType work) const;

  int exponent() const { return exponent_; }
  double frobenius() const { return frobenius_; }  // of A

  void times(const at::Tensor& x, at::Tensor y) const { run(&x, y, nullptr); }  // y [d, n] = A x, x [k, n]
  at::Tensor transposed_times(const at::Tensor& y) const;                       // A^T y [k, n]
  at::Tensor times_and_back(const at::Tensor& x, at::Tensor y) const;           // y = A x, returns A^T y
  at::Tensor gram(bool of_rows) const;                                          // A A^T or A^T A
  at::Tensor whole() const;                                                     // A, a copy

 private:
  void run(const at::Tensor* x, at::Tensor y, at::Tensor* z) const;
  bool mild() const;  // the exponent can be left to the products
  at::Tensor converted(const at::Tensor& part) const;

  at::Tensor weight_;
  at::ScalarType work_;
  int exponent_ = 0;
  double frobenius_ = 0;
};

}  // namespace osora
