// Where there is no libFuzzer: `driver SEED RUNS [FILE...]` takes the files as inputs, and then as
// many random ones, the same for the same seed. Nothing guides it to code that was not reached yet.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  if (argc < 3) return fprintf(stderr, "%s SEED RUNS [FILE...]\n", argv[0]), 2;
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const std::vector<char> input{std::istreambuf_iterator<char>(file), {}};
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
  }
  std::mt19937 random(static_cast<uint32_t>(strtoul(argv[1], nullptr, 10)));
  const long runs = strtol(argv[2], nullptr, 10);
  for (long run = 0; run < runs; ++run) {
    std::vector<uint8_t> input(random() % 700);
    for (uint8_t& byte : input) byte = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  printf("%ld random inputs\n", runs);
}
