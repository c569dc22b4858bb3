#include <algorithm>

#include "mpi/common.h"

namespace gqsgd {
namespace {

// Unsigned integers that are added as they are. Lanes of a byte or less never spill out of theirs.
struct Lane {
  MPI_Datatype type;
  int64_t size;
};

Lane lane_of(int bits) {
  if (8 % bits == 0) return {MPI_UINT8_T, 1};
  if (bits == 16) return {MPI_UINT16_T, 2};
  return {MPI_UINT64_T, 8};
}

// A run of tiles and where their words travel. In place, but for many ranks: then Open MPI 5 has no
// algorithm for MPI_Iallreduce that shares the work among the links, and for few it has none
// anyway.
class Chunk {
 public:
  Chunk(size_t bytes, bool in_place)
      : sent_(in_place ? 0 : bytes), received_(bytes), in_place_(in_place) {}

  int64_t begin = 0, end = 0;  // tiles

  // Where the words of the whole tensor would begin if all of them were there, given the byte at
  // which those of this chunk begin.
  void* sent(int64_t byte) const { return before(in_place_ ? received_ : sent_, byte); }
  const void* received(int64_t byte) const { return before(received_, byte); }

  void start(int64_t bytes, Lane lane, MPI_Comm comm) {
    sent_.lend();
    received_.lend();
    check_mpi(
        MPI_Iallreduce(in_place_ ? MPI_IN_PLACE : sent_.data(), received_.data(),
                       static_cast<int>(bytes / lane.size), lane.type, MPI_SUM, comm, &request_),
        "MPI_Iallreduce of codes");
  }
  // Lets MPI go on, which it does in its own calls alone.
  void poke() {
    int done;
    check_mpi(MPI_Test(&request_, &done, MPI_STATUS_IGNORE), "MPI_Test for codes");
  }
  void wait() {
    check_mpi(MPI_Wait(&request_, MPI_STATUS_IGNORE), "MPI_Wait for codes");
    sent_.take_back();
    received_.take_back();
  }

 private:
  static void* before(const MpiMemory& memory, int64_t byte) {
    return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(memory.data()) -
                                   static_cast<uintptr_t>(byte));
  }
  MpiMemory sent_, received_;
  bool in_place_;
  MPI_Request request_ = MPI_REQUEST_NULL;
};

}  // namespace

void linear_allreduce(const Reduction& r, int64_t chunk, MPI_Comm comm) {
  constexpr int64_t kSlices = 4;  // of a chunk, between which MPI may go on
  constexpr int kManyRanks = 4;
  const Group group(comm);
  const Layout layout = layout_of(r.args);
  MpiMemory norms(static_cast<size_t>(layout.blocks()) * norm_size(r.args));
  CodeArgs args = r.args;
  args.norms = norms.data();
  args.unsigned_words = true;
  const int64_t word_size = fits_int32(args.bits) ? 4 : 8;
  const int64_t tiles = layout.tiles();
  const int64_t each = std::max<int64_t>(1, chunk / std::min(args.block, kTile));
  const int64_t words = std::min(each, tiles) * ceil_div(std::min(args.block, kTile), layout.lanes);
  const size_t bytes = static_cast<size_t>(words * word_size);
  const bool in_place = group.size < kManyRanks;
  Chunk chunks[2] = {Chunk(bytes, in_place), Chunk(bytes, in_place)};
  reduce_norms(r, group, norms);  // from here on other ranks wait for this one

  const auto byte_of = [&](int64_t tile) { return layout.word(tile) * word_size; };
  const auto in_slices = [&](const Chunk& todo, Chunk& in_flight, auto run) {
    const int64_t slice = ceil_div(todo.end - todo.begin, kSlices);
    for (int64_t begin = todo.begin; begin < todo.end; begin += slice) {
      r.parallel_for(begin, std::min(begin + slice, todo.end), run);
      in_flight.poke();
    }
  };
  const auto send = [&](Chunk& chunk, Chunk& in_flight) {
    void* to = chunk.sent(byte_of(chunk.begin));
    in_slices(chunk, in_flight,
              [&](int64_t begin, int64_t end) { quantize(r, args, group, to, begin, end); });
    chunk.start(byte_of(chunk.end) - byte_of(chunk.begin), lane_of(args.bits), comm);
  };
  const auto receive = [&](Chunk& chunk, Chunk& in_flight) {
    chunk.wait();
    const void* from = chunk.received(byte_of(chunk.begin));
    in_slices(chunk, in_flight, [&](int64_t begin, int64_t end) {
      r.kernels->dequantize(args, from, group.size, r.scale, r.out, begin, end);
    });
  };

  for (int64_t begin = 0, turn = 0; begin < tiles; begin += each, ++turn) {
    Chunk &now = chunks[turn % 2], &before = chunks[1 - turn % 2];
    now.begin = begin;
    now.end = std::min(begin + each, tiles);
    send(now, before);
    if (turn > 0) receive(before, now);
    if (now.end == tiles) receive(now, before);
  }
}

}  // namespace gqsgd
