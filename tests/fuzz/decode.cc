// What other ranks send is untrusted. Here the kernels that read it get any bits as norms, words,
// means and codes, in buffers of just the size that hvd_gqsgd promises them: AddressSanitizer sees
// whoever leaves these. The first bytes of an input choose the kernel, the code, the tensor and the
// tiles; all else is payload. Every instruction set, and every way of cutting the tiles between
// threads, must give the same bits and leave alone what belongs to other tiles.
#include "input.h"

namespace {

using namespace gqsgd;

// A tensor, its code and its norms, as hvd_gqsgd's checks let them pass; and a run of its tiles.
struct Case {
  CodeArgs args;
  int64_t norm_size, word_size;
  Layout layout;
  int64_t first, last, cut;
  Memory norms;

  explicit Case(Input& in)
      : args(code(in)),
        norm_size(args.dtype == DType::kFloat64 ? 8 : 4),
        word_size(fits_int32(args.bits) ? 4 : 8),
        layout(args.numel, args.block, lanes_per_word(args.bits)),
        first(in.number(0, layout.tiles())),
        last(in.number(first, layout.tiles())),
        cut(in.number(first, last)),
        norms(norms_of(in)) {
    args.norms = norms.data.get();
  }

  static CodeArgs code(Input& in) {
    const auto dtype = static_cast<DType>(in.number(0, 3));
    const int64_t numel = in.number(0, in.flip() ? 70 : 5000);
    const int64_t blocks[] = {in.number(1, 9), in.number(1, 3000), kTile, INT64_MAX};
    const int64_t block = blocks[in.number(0, 3)];
    if (in.flip()) {
      const int bits = in.flip() ? 4 : 8;
      const auto headroom = static_cast<int>(in.number(0, (1 << (bits - 1)) - 2));
      const int32_t levels = (1 << (bits - 1)) - 1;
      return {dtype, numel, block, CodeKind::kExponential, bits, levels, nullptr, false, headroom};
    }
    const auto bits = static_cast<int>(in.number(2, 16));
    const auto levels = static_cast<int32_t>(in.number(1, ((1 << bits) - 1) / 2));
    return {dtype, numel, block, CodeKind::kLinear, bits, levels, nullptr, in.flip()};
  }
  // The largest of some magnitudes has no sign, but who knows what a peer makes of it.
  Memory norms_of(Input& in) const {
    const bool honest = in.flip();
    Memory bits = in.payload(layout.blocks() * norm_size);
    const auto top = static_cast<size_t>(norm_size - 1);
    for (size_t i = top; honest && i < bits.size; i += top + 1) bits.data[i] &= 0x7f;
    return bits;
  }
  MeansLayout means() const { return {layout, word_size, std::max(norm_size, word_size)}; }
  int64_t means_bytes() const {
    return (means().begin(last) - means().begin(first)) * means().unit;
  }
  int64_t element(int64_t tile) const {
    return tile == layout.tiles() ? args.numel : layout.tile(tile).begin;
  }
};

// What peers have summed, or combined, to the gradient.
void dequantize(Input& in) {
  const Case c(in);
  const int64_t most =
      c.args.kind == CodeKind::kLinear ? ((1 << c.args.bits) - 1) / (2 * c.args.levels) : 128;
  const int64_t contributors = in.number(1, most);
  const auto scale = in.take<double>();
  const Memory words = in.payload(c.layout.words() * c.word_size);
  const int64_t size = size_of(c.args.dtype);
  everywhere(
      c.first, c.cut, c.last, c.args.numel * size, c.element(c.first) * size,
      c.element(c.last) * size,
      [&](const Kernels& kernels, unsigned char* out, int64_t begin, int64_t end) {
        kernels.dequantize(c.args, words.data.get(), contributors, scale, out, begin, end);
      },
      [&](const Memory& a, const Memory& b) { return same(c.args.dtype, a, b); });
}

// The codes of all ranks to means.
void requantize(Input& in) {
  Case c(in);
  c.args.unsigned_words = false;
  c.args.headroom = 0;
  const int64_t ranks = in.number(1, 6);
  const int64_t words = c.layout.word(c.last) - c.layout.word(c.first);
  const int64_t stride = words + in.number(0, 3);
  const auto key = in.take<uint64_t>();
  const Memory sent = in.payload(((ranks - 1) * stride + words) * c.word_size);
  everywhere(
      c.first, c.cut, c.last, c.means_bytes(), 0, c.means_bytes(),
      [&](const Kernels& kernels, unsigned char* means, int64_t begin, int64_t end) {
        kernels.requantize(c.args, {sent.data.get(), ranks, stride}, key, means, c.first, begin,
                           end);
      },
      same_bytes);
}

// The codes of all ranks to this one's shard.
void sum_codes(Input& in) {
  Case c(in);
  c.args.unsigned_words = false;
  c.args.headroom = 0;
  const int64_t ranks = in.number(1, 6), words = c.layout.words();
  const int64_t stride = words + in.number(0, 3);
  const auto scale = in.take<double>();
  const Memory sent = in.payload(((ranks - 1) * stride + words) * c.word_size);
  const int64_t size = size_of(c.args.dtype);
  everywhere(
      c.first, c.cut, c.last, c.args.numel * size, c.element(c.first) * size,
      c.element(c.last) * size,
      [&](const Kernels& kernels, unsigned char* out, int64_t begin, int64_t end) {
        kernels.sum_codes(c.args, {sent.data.get(), ranks, stride}, scale, out, begin, end);
      },
      [&](const Memory& a, const Memory& b) { return same(c.args.dtype, a, b); });
}

// The means of other ranks to the gradient.
void dequantize_means(Input& in) {
  Case c(in);
  c.args.unsigned_words = false;
  c.args.headroom = 0;
  const auto scale = in.take<double>();
  const Memory means = in.payload(c.means_bytes());
  const int64_t size = size_of(c.args.dtype);
  everywhere(
      c.first, c.cut, c.last, c.args.numel * size, c.element(c.first) * size,
      c.element(c.last) * size,
      [&](const Kernels& kernels, unsigned char* out, int64_t begin, int64_t end) {
        kernels.dequantize_means(c.args, means.data.get(), scale, out, c.first, begin, end);
      },
      [&](const Memory& a, const Memory& b) { return same(c.args.dtype, a, b); });
}

// This rank's elements, on norms that a peer may have made up.
void quantize(Input& in) {
  const Case c(in);
  const auto key = in.take<uint64_t>();
  const auto offset = in.take<uint32_t>();
  const Memory x = in.payload(c.args.numel * size_of(c.args.dtype));
  everywhere(
      c.first, c.cut, c.last, c.layout.words() * c.word_size, c.layout.word(c.first) * c.word_size,
      c.layout.word(c.last) * c.word_size,
      [&](const Kernels& kernels, unsigned char* words, int64_t begin, int64_t end) {
        kernels.quantize(c.args, x.data.get(), key, offset, words, begin, end);
      },
      same_bytes);
}

void block_squares(Input& in) {
  const Case c(in);
  const Memory x = in.payload(c.args.numel * size_of(c.args.dtype));
  const int64_t blocks = c.layout.blocks();
  everywhere(
      0, blocks / 2, blocks, blocks * 8, 0, blocks * 8,
      [&](const Kernels& kernels, unsigned char* squares, int64_t begin, int64_t end) {
        kernels.block_squares(c.args, x.data.get(), reinterpret_cast<int64_t*>(squares), begin,
                              end);
      },
      same_bytes);
}

// In place, so that each output begins as the norms.
void l2_norms(Input& in) {
  const Case c(in);
  const int64_t blocks = c.layout.blocks();
  const Memory squares = in.payload(blocks * 8);
  everywhere(
      0, blocks / 2, blocks, blocks * c.norm_size, 0, blocks * c.norm_size,
      [&](const Kernels& kernels, unsigned char* norms, int64_t begin, int64_t end) {
        const int64_t from = begin * c.norm_size, size = (end - begin) * c.norm_size;
        if (size) memcpy(norms + from, c.norms.data.get() + from, static_cast<size_t>(size));
        kernels.l2_norms(c.args.dtype, norms, reinterpret_cast<const int64_t*>(squares.data.get()),
                         begin, end);
      },
      same_bytes);
}

// Two ranks' exponential codes to those of their sum.
void combine(Input& in) {
  const int bits = in.flip() ? 4 : 8;
  const auto key = in.take<uint64_t>();
  const int64_t bytes = in.number(0, 1500);
  const Memory from = in.payload(bytes), to = in.payload(bytes);
  everywhere(
      0, bytes, bytes, bytes, 0, bytes,
      [&](const Kernels& kernels, unsigned char* sum, int64_t, int64_t) {
        if (bytes) memcpy(sum, to.data.get(), to.size);
        kernels.combine(bits, from.data.get(), sum, key, bytes);
      },
      same_bytes);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  void (*const kernels[])(Input&) = {dequantize, requantize,    dequantize_means,
                                     quantize,   block_squares, l2_norms,
                                     combine,    fuzz_blocks,   sum_codes};
  kernels[in.number(0, 8)](in);
  return 0;
}
