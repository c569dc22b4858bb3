#include <algorithm>
#include <atomic>
#include <cstring>

#include "mpi/common.h"

namespace gqsgd {
namespace {

// What MPI adds: one tile's codes, behind the key that the dither of the sum is drawn from. The key
// of a sum is the sum of the keys, so that it tells which ranks are in it, and no two sums of one
// tile share their dither.
struct Packet {
  static constexpr int64_t kKey = sizeof(uint64_t);
  int64_t bytes;  // a multiple of 8

  explicit Packet(const CodeArgs& args) {
    const int64_t longest = std::min({args.block, args.numel, kTile});
    bytes = kKey + ceil_div(ceil_div(longest, lanes_per_word(args.bits)), 2) * 8;
  }
};

// MPI hands an operator nothing but the data. Every table of kernels gives the same bits.
std::atomic<const Kernels*> combine_kernels{nullptr};

template <int kBits>
void combine_packets(void* from, void* to, int* count, MPI_Datatype* type) {
  int bytes;
  MPI_Type_size(*type, &bytes);
  const Kernels* kernels = combine_kernels;
  auto* in = static_cast<const unsigned char*>(from);
  auto* inout = static_cast<unsigned char*>(to);
  for (int i = 0; i < *count; ++i, in += bytes, inout += bytes) {
    uint64_t key, other;
    memcpy(&key, inout, sizeof(key));
    memcpy(&other, in, sizeof(other));
    key += other;
    memcpy(inout, &key, sizeof(key));
    kernels->combine(kBits, in + Packet::kKey, inout + Packet::kKey, mix64(key),
                     bytes - Packet::kKey);
  }
}

class PacketType {
 public:
  explicit PacketType(int64_t bytes) {
    check_mpi(MPI_Type_contiguous(static_cast<int>(bytes), MPI_BYTE, &type), "MPI_Type_contiguous");
    check_mpi(MPI_Type_commit(&type), "MPI_Type_commit");
  }
  PacketType(const PacketType&) = delete;
  PacketType& operator=(const PacketType&) = delete;
  ~PacketType() { MPI_Type_free(&type); }
  MPI_Datatype type;
};

class CombineOp {
 public:
  CombineOp(int bits, const Kernels* kernels) {
    combine_kernels = kernels;
    const int commutes = 1;
    check_mpi(MPI_Op_create(bits == 8 ? combine_packets<8> : combine_packets<4>, commutes, &op),
              "MPI_Op_create");
  }
  CombineOp(const CombineOp&) = delete;
  CombineOp& operator=(const CombineOp&) = delete;
  ~CombineOp() { MPI_Op_free(&op); }
  MPI_Op op;
};

}  // namespace

void exponential_allreduce(const Reduction& r, MPI_Comm comm) {
  const Group group(comm);
  const Layout layout = layout_of(r.args);
  MpiMemory norms(static_cast<size_t>(layout.blocks()) * norm_size(r.args));
  CodeArgs args = r.args;
  args.norms = norms.data();
  args.headroom = headroom_for(group.size);
  const Packet packet(args);
  const int64_t each = ceil_div(layout.tiles(), group.size);
  MpiMemory all(static_cast<size_t>(each * group.size * packet.bytes));
  MpiMemory own(static_cast<size_t>(each * packet.bytes));
  MpiMemory words(static_cast<size_t>(layout.words()) * 4);
  reduce_norms(r, group, norms);  // from here on other ranks wait for this one
  if (args.numel == 0) return;

  // Codes that are zeros, in tiles that none has, and behind the last element of a tile.
  memset(all.data(), 0, static_cast<size_t>(each * group.size * packet.bytes));
  const uint64_t key =
      dither_key(r.seed, r.step, r.tensor, kCombineStream + static_cast<uint64_t>(group.rank));
  r.parallel_for(0, layout.tiles(), [&](int64_t begin, int64_t end) {
    quantize(r, args, group, words.data(), begin, end);
    for (int64_t t = begin; t < end; ++t) {
      const Layout::Tile tile = layout.tile(t);
      unsigned char* to = all.data() + t * packet.bytes;
      const uint64_t keyed = tile_key(key, static_cast<uint64_t>(t));
      memcpy(to, &keyed, sizeof(keyed));
      memcpy(to + Packet::kKey, words.data() + tile.word * 4, static_cast<size_t>(tile.words) * 4);
    }
  });

  const PacketType packets(packet.bytes);
  const CombineOp sum(args.bits, r.kernels);
  const int count = static_cast<int>(each);
  all.lend();
  own.lend();
  check_mpi(MPI_Reduce_scatter_block(all.data(), own.data(), count, packets.type, sum.op, comm),
            "MPI_Reduce_scatter_block of codes");
  check_mpi(MPI_Allgather(own.data(), count, packets.type, all.data(), count, packets.type, comm),
            "MPI_Allgather of codes");
  all.take_back();
  own.take_back();

  r.parallel_for(0, layout.tiles(), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Layout::Tile tile = layout.tile(t);
      memcpy(words.data() + tile.word * 4, all.data() + t * packet.bytes + Packet::kKey,
             static_cast<size_t>(tile.words) * 4);
    }
    r.kernels->dequantize(args, words.data(), group.size, r.scale, r.out, begin, end);
  });
}

}  // namespace gqsgd
