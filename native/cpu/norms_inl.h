// Norms of blocks. Included by kernels_inl.h alone.
#pragma once

#include "core/dtypes.h"
#include "core/l2.h"
#include "core/linear.h"
#include "kernels.h"

namespace gqsgd {
namespace {

template <class T>
decltype(magnitude(T{})) largest_magnitude(const T* __restrict x, int64_t size) {
  decltype(magnitude(T{})) most = 0;
  for (int64_t i = 0; i < size; ++i) {
    const auto bits = magnitude(x[i]);
    most = bits > most ? bits : most;
  }
  return most;
}

template <class T>
void block_max(const T* x, int64_t numel, int64_t block, typename Traits<T>::Norm* norms,
               int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t size = numel - b * block < block ? numel - b * block : block;
    norms[b] = norm_from_magnitude(T{}, largest_magnitude(x + b * block, size));
  }
}

// Looks at all of a block twice, the second time in the cache: without a branch on where the place
// is, which no processor can predict.
template <class T, class Place>
void block_argmax(const T* x, int64_t numel, int64_t block, Place* places, int64_t begin,
                  int64_t end) {
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  for (int64_t b = begin; b < end; ++b) {
    const T* __restrict in = x + b * block;
    const Index size = static_cast<Index>(numel - b * block < block ? numel - b * block : block);
    const auto most = largest_magnitude(in, size);
    Index place = size;
    for (Index i = 0; i < size; ++i) {
      const Index found = magnitude(in[i]) == most ? i : size;
      place = found < place ? found : place;
    }
    places[b] = static_cast<Place>(place);
  }
}

template <class T>
void block_squares(const CodeArgs& args, const T* x, int64_t* squares, int64_t begin, int64_t end) {
  using Real = typename Traits<T>::Real;
  using Norm = typename Traits<T>::Norm;
  for (int64_t b = begin; b < end; ++b) {
    const T* __restrict in = x + b * args.block;
    const int64_t left = args.numel - b * args.block;
    const int64_t size = left < args.block ? left : args.block;
    const Norm norm = static_cast<const Norm*>(args.norms)[b];
    int64_t sum = 0;
    if (is_finite_norm(norm)) {
      const Grid<Real> grid = make_grid(bit_cast<Real>(norm), kSquareUnits, 15);
      for (int64_t i = 0; i < size; ++i) sum += square_element(load(in[i]), grid);
    }
    squares[b] = sum;
  }
}

template <class Real>
void l2_norms(decltype(bits_of(Real{}))* norms, const int64_t* squares, int64_t begin,
              int64_t end) {
  const Real most = bit_cast<Real>(largest_finite(bits_of(Real{})));
  for (int64_t b = begin; b < end; ++b) {
    if (!is_finite_norm(norms[b])) continue;
    norms[b] = bits_of(l2_norm(bit_cast<Real>(norms[b]), squares[b], most));
  }
}

// In 16 sums, as many as the widest vectors want, whatever the instruction set.
template <class T>
double sum_of_squares(const T* __restrict x, int64_t numel) {
  double sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= numel; i += 16) {
    for (int64_t lane = 0; lane < 16; ++lane) {
      const double value = load(x[i + lane]);
      sums[lane] += value * value;
    }
  }
  for (; i < numel; ++i) {
    const double value = load(x[i]);
    sums[i % 16] += value * value;
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace
}  // namespace gqsgd
