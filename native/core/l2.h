// The L2 norm of a block over all ranks, sqrt(sum over ranks and elements of x^2): the norm p = q =
// 2 of Global-QSGD (arXiv 2305.18627). Ranks add squares as integers, on the scale of the largest
// magnitude M that they have agreed on before, so that the sum has no order to depend on.
#pragma once

#include "core/config.h"
#include "core/linear.h"

namespace gqsgd {

// Squares are of x / M in units of 2^-15: at most 2^30, so that 2^33 of them can be added.
constexpr int32_t kSquareUnits = 1 << 15;

template <class Real>
GQSGD_INLINE int64_t square_element(Real x, Grid<Real> grid) {
  const int32_t nearest = quantize_element(x, grid, kSquareUnits, 15, kHalf);
  return static_cast<int64_t>(nearest) * nearest;
}

// At least M, as codes need it: the largest element alone gives kSquareUnits^2. And finite if M is.
template <class Real>
GQSGD_INLINE Real l2_norm(Real largest, int64_t squares, Real most) {
  const Real one = static_cast<Real>(kSquareUnits);
  const Real factor = square_root(static_cast<Real>(squares)) / one;
  const Real norm = largest * (factor > 1 ? factor : Real(1));
  return norm < most ? norm : most;
}

}  // namespace gqsgd
