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

// A run of tiles and where its words travel.
class Chunk {
 public:
  explicit Chunk(size_t bytes) : memory_(bytes) {}

  int64_t begin = 0, end = 0;  // tiles

  // Where the words of the tensor would begin if all of them were here.
  void* words(const Layout& layout, int64_t word_size) const {
    return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(memory_.data()) -
                                   static_cast<uintptr_t>(layout.word(begin) * word_size));
  }
  void start(int64_t bytes, Lane lane, MPI_Comm comm) {
    memory_.lend();
    check_mpi(MPI_Iallreduce(MPI_IN_PLACE, memory_.data(), static_cast<int>(bytes / lane.size),
                             lane.type, MPI_SUM, comm, &request_),
              "MPI_Iallreduce of codes");
  }
  // Lets MPI go on, which it does in its own calls alone.
  void poke() {
    int done;
    check_mpi(MPI_Test(&request_, &done, MPI_STATUS_IGNORE), "MPI_Test for codes");
  }
  void wait() {
    check_mpi(MPI_Wait(&request_, MPI_STATUS_IGNORE), "MPI_Wait for codes");
    memory_.take_back();
  }

 private:
  MpiMemory memory_;
  MPI_Request request_ = MPI_REQUEST_NULL;
};

}  // namespace

void linear_allreduce(const Reduction& r, int64_t chunk, MPI_Comm comm) {
  constexpr int64_t kSlices = 4;  // of a chunk, between which MPI may go on
  const Group group(comm);
  const Layout layout = layout_of(r.args);
  MpiMemory norms(static_cast<size_t>(layout.blocks()) * norm_size(r.args));
  reduce_norms(r, group, norms);

  CodeArgs args = r.args;
  args.norms = norms.data();
  args.unsigned_words = true;
  const int64_t word_size = fits_int32(args.bits) ? 4 : 8, tiles = layout.tiles();
  const int64_t each = std::max<int64_t>(1, chunk / std::min(args.block, kTile));
  const size_t bytes =
      static_cast<size_t>(std::min(each, tiles) * ceil_div(kTile, layout.lanes) * word_size);
  Chunk chunks[2] = {Chunk(bytes), Chunk(bytes)};

  const auto in_slices = [&](const Chunk& todo, Chunk& in_flight, auto run) {
    const int64_t slice = ceil_div(todo.end - todo.begin, kSlices);
    for (int64_t begin = todo.begin; begin < todo.end; begin += slice) {
      r.parallel_for(begin, std::min(begin + slice, todo.end), run);
      in_flight.poke();
    }
  };
  const auto decode = [&](Chunk& arriving, Chunk& in_flight) {
    arriving.wait();
    const void* words = arriving.words(layout, word_size);
    in_slices(arriving, in_flight, [&](int64_t begin, int64_t end) {
      r.kernels->dequantize(args, words, group.size, r.scale, r.out, begin, end);
    });
  };

  for (int64_t begin = 0, turn = 0; begin < tiles; begin += each, ++turn) {
    Chunk &now = chunks[turn % 2], &before = chunks[1 - turn % 2];
    now.begin = begin;
    now.end = std::min(begin + each, tiles);
    void* words = now.words(layout, word_size);
    in_slices(now, before, [&](int64_t from, int64_t to) {
      quantize(r, args, group, words, from, to);
    });
    now.start((layout.word(now.end) - layout.word(now.begin)) * word_size, lane_of(args.bits), comm);
    if (turn > 0) decode(before, now);
    if (now.end == tiles) decode(now, before);
  }
}

}  // namespace gqsgd
