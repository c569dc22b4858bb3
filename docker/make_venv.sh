#!/usr/bin/env bash
# make_venv.sh PYTHON DIRECTORY: checks what the set-up needs, then makes a virtual environment.
# If PYTHON has PyTorch, the environment sees it; otherwise it starts empty.
set -euo pipefail

python=$1
venv=$2

fail() {
    printf '\nhvd_gqsgd: %s\n' "$@" >&2
    exit 1
}

# --- what the set-up needs ---------------------------------------------------------------------

case $PWD in
*[[:space:]]*) fail "the path '$PWD' has a space, which MPI's compiler wrappers cannot take.
Clone into a path without spaces." ;;
esac

command -v "$python" >/dev/null || fail "$python was not found.
Install Python 3.10 or newer, or say which one to use: make PYTHON=/path/to/python3.12 ..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$python is $("$python" --version 2>&1); Python 3.10 or newer is needed.
Say which one to use: make PYTHON=/path/to/python3.12 ..."

read -ra cxx <<<"${CXX:-c++}"
command -v "${cxx[0]}" >/dev/null || fail "the C++ compiler ${cxx[0]} was not found.
Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or name one in CXX."
echo '#include <optional>
int main() { return std::optional<int>(0).value(); }' |
    "${cxx[@]}" -std=c++17 -x c++ -fsyntax-only - ||
    fail "${cxx[*]} does not compile C++17; install a newer one, or name another in CXX."

include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$include/Python.h" ] || fail "the headers of $python are missing ($include/Python.h).
Install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)."

# --- the environment ---------------------------------------------------------------------------

if [ -x "$venv/bin/python" ]; then
    # It may be active, and so the very PYTHON: go back to the one that it was made with.
    if [ "$("$python" -c 'import sys; print(sys.prefix)')" = "$(cd "$venv" && pwd -P)" ]; then
        python=$("$python" -c 'import sys; print(sys._base_executable)')
    fi
    echo "hvd_gqsgd: making $venv anew"
    rm -rf "$venv"
fi

options=()
if "$python" -c 'import torch' 2>/dev/null; then
    options=(--system-site-packages)
fi

# Some distributions ship venv without what it needs to install pip.
if error=$("$python" -m venv "${options[@]}" "$venv" 2>&1); then
    :
elif command -v virtualenv >/dev/null; then
    virtualenv --quiet --clear --python "$python" "${options[@]}" "$venv"
elif "$python" -m pip --version >/dev/null 2>&1; then
    tools=$(mktemp -d)
    trap 'rm -rf "$tools"' EXIT
    "$python" -m pip install --quiet --target "$tools" virtualenv
    PYTHONPATH=$tools "$python" -m virtualenv --quiet --clear "${options[@]}" "$venv"
else
    rm -rf "$venv"
    fail "$python has no working venv, no pip, and virtualenv was not found.
Install one of them (Debian, Ubuntu: apt install python3-venv). What venv said: $error"
fi

if [ ${#options[@]} -gt 0 ]; then
    # Where PYTHON is itself in a virtual environment, "system" is not where its PyTorch is.
    "$python" -c 'import sysconfig as s; print(*{s.get_path("purelib"), s.get_path("platlib")}, sep="\n")' \
        >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/made-from.pth"
    "$venv/bin/python" -c 'import torch' || fail "$python has PyTorch, but $venv does not see it.
Use a Python without PyTorch (make PYTHON=...), and it will be installed into $venv."
fi
