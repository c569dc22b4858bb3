#include "nccl/allreduce.h"

#include "core/hash.h"
#include "core/lanes.h"

namespace gqsgd {

void linear_allreduce(const NcclReduction& r, const CudaKernels& kernels, NcclGroup& group) {
  const Layout layout(r.args.numel, r.args.block, lanes_per_word(r.args.bits));
  CodeArgs args = r.args;
  args.norms = r.norms;

  // Bits of floats, as integers: NaN and infinity are the largest of all.
  const ncclDataType_t norm_type = args.dtype == DType::kFloat64 ? ncclInt64 : ncclInt32;
  kernels.block_max(args.dtype, r.x, args.numel, args.block, r.norms, 0, layout.blocks());
  group.all_reduce(r.norms, layout.blocks(), norm_type, ncclMax, kernels.stream);
  if (r.squares) {
    kernels.block_squares(args, r.x, r.squares, 0, layout.blocks());
    group.all_reduce(r.squares, layout.blocks(), ncclInt64, ncclSum, kernels.stream);
    kernels.l2_norms(args.dtype, r.norms, r.squares, 0, layout.blocks());
  }

  const RankDither dither = rank_dither(r.seed, r.step, r.tensor, static_cast<uint32_t>(group.rank),
                                        static_cast<uint32_t>(group.size), r.correlated);
  kernels.quantize(args, r.x, dither.key, dither.offset, r.words, 0, layout.tiles());
  // Words hold lanes that no sum spills out of, so that adding words adds lanes.
  group.all_reduce(r.words, layout.words(), fits_int32(args.bits) ? ncclInt32 : ncclInt64, ncclSum,
                   kernels.stream);
  kernels.dequantize(args, r.words, group.size, r.scale, r.out, 0, layout.tiles());
}

}  // namespace gqsgd
