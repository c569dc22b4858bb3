#!/usr/bin/env bash
# fuzz.sh DIRECTORY [SECONDS]: gives the kernels, and the parsers of messages, whatever a peer could
# send, for about so many seconds each (default: 60). The first finding ends it; the input that makes
# it is left in DIRECTORY, and `DIRECTORY/driver 0 0 FILE` repeats it.
#
# With clang, libFuzzer looks for inputs that reach more code, and keeps them in DIRECTORY/corpus for
# the next time. With g++, whose kernels are those of all instruction sets, a driver takes that corpus
# and random inputs, which nothing guides. Both under AddressSanitizer and
# UndefinedBehaviorSanitizer. Then Hypothesis draws long (see tests/test_fuzz.py).
#
#   CLANGXX, CXX   the compilers (default: clang++, which need not be there, and c++)
set -euo pipefail

mkdir -p "$1/corpus"
work=$(realpath "$1")
seconds=${2:-60}
flags=(-std=c++17 -O1 -g1 -fno-math-errno -ffp-contract=off -Inative
    "-fsanitize=address,undefined" -fno-sanitize-recover=all)
clang=${CLANGXX:-clang++}

echo "hvd_gqsgd: building the fuzzers"
if "$clang" "${flags[@]}" -fsanitize=fuzzer tests/fuzz/{decode,blocks}.cc native/cpu/*.cc -o "$work/libfuzzer" \
    2>"$work/clang.log"; then
    "$work/libfuzzer" -max_total_time="$seconds" -max_len=1000 -print_final_stats=1 \
        -verbosity=0 -artifact_prefix="$work/" "$work/corpus"
else
    echo "hvd_gqsgd: $clang has no libFuzzer, so that nothing guides the inputs ($work/clang.log)"
fi
"${CXX:-c++}" "${flags[@]}" tests/fuzz/*.cc native/cpu/*.cc -o "$work/driver"
find "$work/corpus" -type f -print0 | xargs -0r "$work/driver" 0 0
"$work/driver" 0 "$((seconds * 1000))"
python -m pytest -q tests/test_fuzz.py --hypothesis-profile long
