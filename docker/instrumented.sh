#!/usr/bin/env bash
# instrumented.sh HOW DIRECTORY: builds the native parts in a copy of the package in DIRECTORY, and runs
# the tests of native code on it, over MPI too if there is a part for it. HOW is
#
#   sanitize  with AddressSanitizer and UndefinedBehaviorSanitizer; the first finding ends it
#   coverage  with counters, by GCC; reports the lines that were run. The kernels are templates, compiled
#             for each instruction set and type: a line counts that was run in any of them
#
#   MPICXX   as for setup.py
set -euo pipefail

how=$1
mkdir -p "$2"
work=$(realpath "$2")
repository=$PWD
tests=$PWD/tests
compiler=${CXX:-c++}
case $how in
sanitize)
    flags="-fsanitize=address,undefined -fno-sanitize-recover=all"
    # Python itself is not instrumented, so the libraries must come before it. It never frees all
    # of its memory; and as asan looks for what throws exceptions early on, that must be there.
    loaded="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so)"
    environment=(ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 LD_PRELOAD="$loaded")
    ;;
coverage)
    flags="--coverage -fprofile-update=atomic"
    environment=(OMP_NUM_THREADS=2)
    find "$work" -name '*.gcda' -delete # of an earlier run
    ;;
*) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" && exit 2 ;;
esac

echo "hvd_gqsgd: building the native parts for $how; the log is in $work/build.log"
CFLAGS="$flags -g1" LDFLAGS=$flags python setup.py build --build-base "$work/build" \
    --build-lib "$work/lib" >"$work/build.log" 2>&1 ||
    { tail -n 40 "$work/build.log" >&2 && exit 1; }

cd "$work/lib" # which goes before any other hvd_gqsgd
unset PYTHONPATH

env "${environment[@]}" python - <<END
import hvd_gqsgd
assert hvd_gqsgd.__file__.startswith("$work"), f"this is not the build to test: {hvd_gqsgd}"
print("hvd_gqsgd: testing", *hvd_gqsgd.build_info()["parts"])
END
pytest=(env "${environment[@]}" python -m pytest -q -p no:cacheprovider)
"${pytest[@]}" "$tests"/test_{bucket_ops,combine,kernels,kernel_errors,layout,norms,dither,exponential,fuzz,two_phase,untrusted}.py
if ls hvd_gqsgd/_native/_mpi.*.so >/dev/null 2>&1; then
    OMPI_MCA_mpi_yield_when_idle=1 mpirun --map-by :OVERSUBSCRIBE --bind-to none -n 3 \
        "${pytest[@]}" "$tests/ranks/test_mpi.py"
fi
[ "$how" != coverage ] ||
    python -m gcovr --merge-lines --root "$repository" --filter "$repository/native/" --object-directory "$work/build" \
        "$work/build"
