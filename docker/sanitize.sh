#!/usr/bin/env bash
# sanitize.sh DIRECTORY: builds the native parts with AddressSanitizer and
# UndefinedBehaviorSanitizer, in a copy of the package in DIRECTORY, and runs the tests of native
# code on it, over MPI too if there is a part for it. The first finding ends it.
#
#   MPICXX   as for setup.py
set -euo pipefail

mkdir -p "$1"
work=$(realpath "$1")
tests=$PWD/tests
flags="-fsanitize=address,undefined -fno-sanitize-recover=all"

echo "hvd_gqsgd: building the native parts with sanitizers; the log is in $work/build.log"
CFLAGS="$flags -g1" LDFLAGS=$flags python setup.py build --build-base "$work/build" \
    --build-lib "$work/lib" >"$work/build.log" 2>&1 ||
    { tail -n 40 "$work/build.log" >&2 && exit 1; }

cd "$work/lib" # which goes before any other hvd_gqsgd
unset PYTHONPATH
compiler=${CXX:-c++}
sanitized() {
    # Python itself is not instrumented, so the libraries must come before it. It never frees all
    # of its memory; and as asan looks for what throws exceptions early on, that must be there.
    env ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \
        LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so)" \
        "$@"
}

sanitized python - <<END
import hvd_gqsgd
assert hvd_gqsgd.__file__.startswith("$work"), f"this is not the build to test: {hvd_gqsgd}"
print("hvd_gqsgd: testing", *hvd_gqsgd.build_info()["parts"])
END
sanitized python -m pytest -q -p no:cacheprovider "$tests"/test_{combine,kernels,norms,dither}.py \
    "$tests"/test_{exponential,fuzz,two_phase,untrusted}.py
if ls hvd_gqsgd/_mpi.*.so >/dev/null 2>&1; then
    export -f sanitized
    export compiler
    OMPI_MCA_mpi_yield_when_idle=1 mpirun --map-by :OVERSUBSCRIBE --bind-to none -n 3 \
        bash -c 'sanitized python -m pytest -q -p no:cacheprovider "$1"' - "$tests/ranks/test_mpi.py"
fi
