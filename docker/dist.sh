#!/usr/bin/env bash
# dist.sh PYTHON DIRECTORY: builds the source distribution and a wheel into DIRECTORY, with the PyTorch that
# PYTHON has. Then installs into new environments, of the same Python and PyTorch: the wheel, by pip alone; the
# source distribution without MPI, and without a compiler. Each runs doctor and a training with DDP on 2
# ranks, from a folder of its own and with no program on the PATH. Some 10 minutes on 2 cores.
#
#   MPICXX   as for setup.py, for the wheel
set -euo pipefail

python=$1
mkdir -p "$2"
dist=$(cd "$2" && pwd)
repository=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\nhvd_gqsgd: %s (after %d s)\n' "$1" "$SECONDS"; }

say "building with $("$python" -c 'import torch; print("PyTorch", torch.__version__)')"
rm -f "$dist"/hvd_gqsgd-*
"$python" -m build --no-isolation --outdir "$dist" . >"$work/build.log" 2>&1 ||
    { tail -n 40 "$work/build.log" >&2 && exit 1; }
sed -n 's/^ *\(hvd_gqsgd: \)/\1/p' "$work/build.log"
"$python" -m auditwheel show "$dist"/hvd_gqsgd-*.whl

# The training is that of the README.
mkdir "$work/elsewhere"
# shellcheck disable=SC2016 # a pattern
sed -n '/^\*\*DistributedDataParallel/,/^```$/{/^```\|^\*\*/d;p}' README.md >"$work/elsewhere/ddp.py"
cd "$work/elsewhere"

torch=$("$python" -c 'import torch; print(torch.__version__)')
"$python" -m venv "$work/venv"
new=$work/venv/bin
"$new/pip" install -q "torch==$torch" || "$new/pip" install -q "torch==${torch%%+*}"

# try WHAT WANTED: WANTED stands in what doctor says.
try() {
    local alone=(env -i HOME="$work" PATH="$new" OMP_NUM_THREADS=1) said
    say "$1"
    said=$("${alone[@]}" "$new/python" -m hvd_gqsgd doctor) || { echo "$said" && exit 1; }
    echo "$said"
    grep -q "$2" <<<"$said" || { echo "dist.sh: doctor did not say: $2" >&2 && exit 1; }
    "${alone[@]}" "$new/torchrun" --standalone --nproc-per-node 2 ddp.py | tee ratio
    grep -q "^3.98 times fewer bytes" ratio
}

pip=("$new/pip" install -q --force-reinstall --no-deps)
"$new/pip" install -q "$dist"/hvd_gqsgd-*.whl
try "the wheel" "native part: built for cpu"
sources=$(ls "$dist"/hvd_gqsgd-*.tar.gz)
MPICXX='' PATH=$new:$PATH "${pip[@]}" "$sources"
try "the source distribution, without MPI" "native part: built for cpu$"
PATH=$new MPICXX='' "${pip[@]}" "$sources"
try "the source distribution, without a compiler" "native part: not built: NumPy does its work"
"$new/pip" uninstall -q -y torch
if said=$("${pip[@]}" "$sources" 2>&1); then
    echo "dist.sh: it was built without PyTorch" >&2 && exit 1
fi
grep -q "pip install torch" <<<"$said"
cd "$repository"
say "all of it works; the distributions are in $dist"
