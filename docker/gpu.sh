#!/usr/bin/env bash
# gpu.sh PYTHON DIRECTORY: on a machine with a GPU, builds for it with the PyTorch that PYTHON has,
# into DIRECTORY, runs the tests that need a GPU, looks for errors of memory and of threads, and
# measures. Needs PyTorch with CUDA, nvcc and pytest, and no network. Some minutes.
set -euo pipefail

python=$1
mkdir -p "$2"
work=$(cd "$2" && pwd)
repository=$PWD
unset PYTHONPATH

step() { printf '\nhvd_gqsgd: %s (after %d s)\n' "$1" "$SECONDS"; }

step "building with $("$python" -c 'import torch; print("PyTorch", torch.__version__)')"
rm -rf "${work:?}/lib"
if ! MPICXX=${MPICXX-} "$python" -m pip install -v --no-build-isolation --no-deps --no-index \
    --target "$work/lib" . >"$work/build.log" 2>&1; then
    tail -n 40 "$work/build.log" >&2
    exit 1
fi
sed -n 's/^ *\(hvd_gqsgd: \)/\1/p' "$work/build.log"

cd "$work/lib" # which goes before any other hvd_gqsgd
"$python" -c 'import hvd_gqsgd; print(hvd_gqsgd.build_info())'
tests=("$repository"/tests/test_cuda.py "$repository"/tests/test_cuda_kernels.py)

step "running the tests that need a GPU"
"$python" -m pytest -q -rs -o cache_dir="$work/cache" --durations=5 "${tests[@]}"

if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    step "there is no GPU: nothing else can be done here"
    exit
fi

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
for tool in memcheck racecheck synccheck; do
    if [ -z "$sanitizer" ]; then
        step "compute-sanitizer was not found: not looking for errors of memory and of threads"
        break
    fi
    step "compute-sanitizer, $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 100 "$sanitizer" --tool "$tool" --error-exitcode 9 \
        "$python" -m pytest -q -p no:cacheprovider "$repository/tests/test_cuda_kernels.py" \
        -k 'cuda and float32 and not emulated' | tail -n 6 ||
        { [ $? = 124 ] && echo "hvd_gqsgd: not finished in 100 s"; }
done

step "measuring"
for options in "" "--bits 4" "--dtype bfloat16" "--block-size 256"; do
    # shellcheck disable=SC2086 # an option and its value are two words
    "$python" -m hvd_gqsgd.bench.kernels --device cuda $options
done
step "done"
