// Blocks of different widths, on norms and messages as a peer may have made them up; and on plans
// that are not even of those norms, as they are data too.
#include "core/block_bits.h"
#include "input.h"

namespace gqsgd {
namespace {

// A tensor, its norms, and a plan of its blocks in a message of which it has [begin, end).
struct Blocks {
  CodeArgs args;
  int64_t norm_size;
  Layout layout;
  Memory norms;
  std::vector<uint8_t> columns;
  WidthRule rule;
  int64_t begin, end;
  std::vector<int32_t> plan;
  int64_t first, last, cut;

  explicit Blocks(Input& in, bool added = false)
      : args(tensor(in)),
        norm_size(args.dtype == DType::kFloat64 ? 8 : 4),
        layout{args.numel, args.block, 1},
        norms(in.payload(layout.blocks() * norm_size)),
        begin(in.number(0, 40)) {
    args.norms = norms.data.get();
    const auto least = static_cast<int32_t>(in.number(2, 16));
    const int64_t most_summands = ((int64_t{1} << least) - 1) / 2;
    const auto summands = static_cast<int32_t>(added ? in.number(1, most_summands) : 1);
    rule = {static_cast<int32_t>(in.number(0, kMostPower)), least,
            static_cast<int32_t>(in.number(least, 16)), summands};
    if (added) begin = 0;
    int64_t all = 0, words = 0;
    for (int64_t b = 0; b < layout.blocks(); ++b) {
      columns.push_back(static_cast<uint8_t>(columns_of(layout.tile(b).size)));
      all += columns.back();
      words += block_words(columns.back(), least, summands);
    }
    end = begin + words + in.number(0, all * 15);
    if (added) end += end % 2;
    plan.assign(2 * columns.size() + 1, static_cast<int32_t>(end));
    if (in.flip()) {
      widths(*best(), plan.data());
    } else {
      for (size_t b = 0; b < columns.size(); ++b) plan[b] = made_up(in, 18);
      for (size_t b = columns.size(); b < plan.size(); ++b) plan[b] = made_up(in, end + 20);
    }
    first = in.number(0, layout.tiles());
    last = in.number(first, layout.tiles());
    cut = in.number(first, last);
  }

  static const Kernels* best() {
    const Kernels* tables[3];
    return tables[available_kernels(tables) - 1];
  }
  static CodeArgs tensor(Input& in) {
    const auto dtype = static_cast<DType>(in.number(0, 3));
    const int64_t numel = in.number(0, in.flip() ? 70 : 5000);
    const int64_t block = in.flip() ? 256 : in.number(1, kTile);
    return {dtype, numel, block, CodeKind::kLinear, 0, 0, nullptr, false};
  }
  static int32_t made_up(Input& in, int64_t most) {
    const auto likely = static_cast<int32_t>(in.number(0, most));
    return in.number(0, 7) ? likely : in.take<int32_t>();
  }
  void widths(const Kernels& kernels, int32_t* to) const {
    const auto blocks = static_cast<int64_t>(columns.size());
    kernels.block_widths(args.dtype, args.norms, columns.data(), blocks, rule, begin, end, to,
                         to + blocks);
  }
  BlockPlan places(int64_t from) const {
    return {plan.data(), plan.data() + columns.size(), from, end, rule.summands, 1};
  }
  int64_t element(int64_t block) const {
    return block == layout.tiles() ? args.numel : layout.tile(block).begin;
  }
};

// All blocks lie in the message, one behind the other, whatever the norms are.
void block_widths(Input& in) {
  const Blocks c(in, in.flip());
  const auto blocks = static_cast<int64_t>(c.columns.size());
  const int64_t size = 2 * blocks * 4;
  everywhere(
      0, 0, 1, size, 0, size,
      [&](const Kernels& kernels, unsigned char* out, int64_t begin, int64_t end) {
        std::vector<int32_t> plan(static_cast<size_t>(2 * blocks));
        if (begin == end) return;
        c.widths(kernels, plan.data());
        int64_t at = c.begin;
        for (int64_t b = 0; b < blocks; ++b) {
          const int32_t width = plan[b];
          require(!width || (c.rule.least <= width && width <= c.rule.most), "a wrong width");
          require(plan[blocks + b] == at, "a gap between blocks");
          at += block_words(c.columns[b], width, c.rule.summands);
        }
        require(at <= c.end, "more words than there are");
        if (size) memcpy(out, plan.data(), static_cast<size_t>(size));
      },
      same_bytes);
}

void quantize_blocks(Input& in) {
  const Blocks c(in, in.flip());
  const auto key = in.take<uint64_t>();
  const auto offset = in.take<uint32_t>();
  const Memory x = in.payload(c.args.numel * size_of(c.args.dtype));
  everywhere(
      c.first, c.cut, c.last, c.end * 4, 0, c.end * 4,
      [&](const Kernels& kernels, unsigned char* out, int64_t begin, int64_t end) {
        kernels.quantize_blocks(c.args, c.places(0), x.data.get(), key, offset,
                                reinterpret_cast<uint32_t*>(out), begin, end);
      },
      same_bytes);
}

// The norms of the means, and the words behind them.
void requantize_blocks(Input& in) {
  Blocks c(in);
  if (c.args.dtype != DType::kFloat64) c.args.dtype = DType::kFloat32;
  const int64_t ranks = in.number(1, 6), words = c.end - c.begin;
  const int64_t stride = words + in.number(0, 3);
  const auto key = in.take<uint64_t>();
  const Memory sent = in.payload(((ranks - 1) * stride + words) * 4);
  const int64_t shares = (c.last - c.first) * c.norm_size, size = shares + words * 4;
  everywhere(
      c.first, c.cut, c.last, size, 0, size,
      [&](const Kernels& kernels, unsigned char* out, int64_t begin, int64_t end) {
        kernels.requantize_blocks(c.args, c.places(c.begin), {sent.data.get(), ranks, stride}, key,
                                  out, reinterpret_cast<uint32_t*>(out + shares), c.first, begin,
                                  end);
      },
      same_bytes);
}

void sum_blocks(Input& in) {
  const Blocks c(in, in.flip());
  const bool added = is_added(c.rule.summands);
  const int64_t ranks = added ? 1 : in.number(1, 6), words = c.end - c.begin;
  const int64_t stride = words + in.number(0, 3);
  BlockPlan places = c.places(c.begin);
  if (added) places.contributors = static_cast<int32_t>(in.number(1, c.rule.summands));
  const auto scale = in.take<double>();
  const Memory sent = in.payload(((ranks - 1) * stride + words) * 4);
  const int64_t size = size_of(c.args.dtype);
  everywhere(
      c.first, c.cut, c.last, c.args.numel * size, c.element(c.first) * size,
      c.element(c.last) * size,
      [&](const Kernels& kernels, unsigned char* out, int64_t begin, int64_t end) {
        kernels.sum_blocks(c.args, places, {sent.data.get(), ranks, stride}, scale, out, begin,
                           end);
      },
      [&](const Memory& a, const Memory& b) { return same(c.args.dtype, a, b); });
}

void dequantize_blocks(Input& in) {
  const Blocks c(in);
  const auto scale = in.take<double>();
  const Memory shares = in.payload((c.last - c.first) * c.norm_size);
  const Memory words = in.payload((c.end - c.begin) * 4);
  const int64_t size = size_of(c.args.dtype);
  everywhere(
      c.first, c.cut, c.last, c.args.numel * size, c.element(c.first) * size,
      c.element(c.last) * size,
      [&](const Kernels& kernels, unsigned char* out, int64_t begin, int64_t end) {
        kernels.dequantize_blocks(c.args, c.places(c.begin), shares.data.get(),
                                  reinterpret_cast<const uint32_t*>(words.data.get()), scale, out,
                                  c.first, begin, end);
      },
      [&](const Memory& a, const Memory& b) { return same(c.args.dtype, a, b); });
}

}  // namespace

void fuzz_blocks(Input& in) {
  void (*const kernels[])(Input&) = {block_widths, quantize_blocks, requantize_blocks,
                                     dequantize_blocks, sum_blocks};
  kernels[in.number(0, 4)](in);
}

}  // namespace gqsgd
