// Checks of arguments that all bindings share.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <limits>
#include <string>

#include "core/args.h"
#include "core/codes.h"
#include "core/lanes.h"

namespace gqsgd {

using at::Tensor;

inline DType dtype_of(const Tensor& x, const char* role) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, role, " must be float16, bfloat16, float32 or float64, got ",
                       x.scalar_type());
  }
}

inline void check_buffer(const Tensor& buffer, const char* role, at::ScalarType dtype,
                         int64_t numel, at::Device device) {
  TORCH_CHECK_TYPE(buffer.scalar_type() == dtype, role, " must be ", dtype, ", got ",
                   buffer.scalar_type());
  TORCH_CHECK_VALUE(buffer.is_contiguous(), role, " must be contiguous");
  TORCH_CHECK_VALUE(buffer.numel() == numel, role, " must have ", numel, " elements, got ",
                    buffer.numel());
  TORCH_CHECK_VALUE(buffer.device() == device, role, " must be on ", device, ", got one on ",
                    buffer.device());
}

// About a quarter of a megabyte of float32 for each thread at the least.
inline int64_t grain(int64_t elements_each) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, elements_each));
}

inline Layout layout_of(int64_t numel, int64_t block_size, int64_t bits) {
  TORCH_CHECK_VALUE(numel >= 0, "numel must be at least 0, got ", numel);
  TORCH_CHECK_VALUE(block_size >= 1, "block_size must be at least 1, got ", block_size);
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 16, "bits must be from 2 to 16, got ", bits);
  return {numel, block_size, lanes_per_word(static_cast<int>(bits))};
}

// f(Type<code>) for the kind of this number; returns whether there is one.
template <class F>
bool with_numbered_kind(int64_t kind, int64_t bits, F f) {
  if (kind < 0 || kind > std::numeric_limits<int>::max()) return false;
  bool known = false;
  with_code_type<float>(static_cast<CodeKind>(kind), static_cast<int>(bits), [&](auto type) {
    known = true;
    f(type);
  });
  return known;
}

// Such as "0 (linear) or 1 (exponential)".
inline std::string known_kinds() {
  std::string text;
  int64_t kind = 0;
  const auto name = [&](auto type) {
    const bool nearest = kind == static_cast<int64_t>(CodeKind::kNearest);
    const char* called = nearest ? "nearest" : decltype(type)::type::kName;
    text += (kind ? " or " : "") + std::to_string(kind) + " (" + called + ")";
  };
  while (with_numbered_kind(kind, 0, name)) ++kind;
  return text;
}

// The kind of this number, for a width from 2 to 16 and levels that it has at this width.
inline CodeKind checked_kind(int64_t kind, int64_t bits, int64_t levels) {
  const bool known = with_numbered_kind(kind, bits, [&](auto type) {
    using Code = typename decltype(type)::type;
    const LevelRange range = Code::levels_at(static_cast<int>(bits));
    TORCH_CHECK_VALUE(range.most > 0, "bits must be ", Code::kWidths, " for ", Code::kName,
                      " codes, got ", bits);
    const std::string least = std::to_string(range.least), most = std::to_string(range.most);
    TORCH_CHECK_VALUE(range.least <= levels && levels <= range.most, "levels must be ",
                      least == most ? most : "from " + least + " to " + most, " for ", Code::kName,
                      " codes of ", bits, " bits, got ", levels);
  });
  TORCH_CHECK_VALUE(known, "kind must be ", known_kinds(), ", got ", kind);
  return static_cast<CodeKind>(kind);
}

// How many ranks' codes can be put together in lanes.
inline int64_t most_ranks(const CodeArgs& args) {
  int64_t most = 0;
  with_code_type<float>(args.kind, args.bits, [&](auto type) {
    most = decltype(type)::type::most_ranks(args.bits, args.levels);
  });
  return most;
}

// That words can be added to have sums of codes.
inline void check_added(const CodeArgs& args) {
  with_code_type<float>(args.kind, args.bits, [&](auto type) {
    using Code = typename decltype(type)::type;
    TORCH_CHECK_VALUE(Code::Sums::kAdded, "kind must be one of codes that can be added, got ",
                      static_cast<int>(args.kind), " (", Code::kName, ")");
  });
}

}  // namespace gqsgd
