// The kinds of codes, and the way from the types that are known at run time to those of templates.
//
// A code is a class template over the arithmetic type, which its header defines for all loops:
//     kName, kWidths     what error messages call it and the widths that it has
//     kBits              its width where that is part of the type; 0: any from 2 to 16
//     levels_at(bits)    the levels a side that it may have; none, {0, 0}, if it has no such width
//     most_ranks(bits, levels)  ranks whose codes can be put together in a lane
//     grid(norm), encode(x, grid, dither)  from an element to what a lane holds
//     drawn(dither)      the dither that takes the place of an element's, as the kind says
//     bias()             what to add to each word of encoded elements
//     decode(word, shift, top)  the number that one rank's lane holds, of the type Sum
//     ratio(factor)      what to multiply a sum of decoded codes by to have it, times this factor,
//                        as a share of the norm
//     Sums               what ranks have made of their codes together, back in the units of the
//                        gradient; Sums::kAdded says whether that is adding their words
#pragma once

#include <type_traits>

#include "core/args.h"
#include "core/dtypes.h"
#include "core/exponential.h"
#include "core/lanes.h"
#include "core/linear.h"

namespace gqsgd {

template <class T>
struct Type {
  using type = T;
};

// Below, f gets a value, or a Type, of what is asked for. Local to each source file, as the CPU
// kernels are compiled once for each instruction set.
namespace {

// f(Type<code>), unless there is no such kind. This is the list of all kinds.
template <class Real, class F>
void with_code_type(CodeKind kind, int bits, F f) {
  switch (kind) {
    case CodeKind::kLinear:
    case CodeKind::kNearest:
      return f(Type<LinearCode<Real>>{});
    case CodeKind::kExponential:
      return bits == 8 ? f(Type<ExponentialCode<Real, 8>>{}) : f(Type<ExponentialCode<Real, 4>>{});
  }
}

template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
  }
}

// The arithmetic type alone.
template <class F>
void with_real(DType dtype, F f) {
  if (dtype == DType::kFloat64) {
    f(double{});
  } else {
    f(float{});
  }
}

// The type of the words that lanes are packed in; kBits: their width if it is known, or 0.
template <int kBits, class F>
void with_word(int bits, F f) {
  if constexpr (kBits > 0) {
    f(std::conditional_t<32 % kBits == 0, uint32_t, uint64_t>{});
  } else if (fits_int32(bits)) {
    f(uint32_t{});
  } else {
    f(uint64_t{});
  }
}

// f(code, word)
template <class Real, class F>
void with_code(const CodeArgs& args, F f) {
  with_code_type<Real>(args.kind, args.bits, [&](auto type) {
    using Code = typename decltype(type)::type;
    with_word<Code::kBits>(args.bits, [&](auto word) { f(Code(args), word); });
  });
}

// f(sums, word)
template <class Real, class F>
void with_sums(const CodeArgs& args, int64_t contributors, double scale, F f) {
  with_code_type<Real>(args.kind, args.bits, [&](auto type) {
    using Code = typename decltype(type)::type;
    with_word<Code::kBits>(
        args.bits, [&](auto word) { f(typename Code::Sums(args, contributors, scale), word); });
  });
}

}  // namespace
}  // namespace gqsgd
