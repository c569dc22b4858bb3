#!/usr/bin/env bash
# test.sh IMAGE [OPTIONS...]: builds docker/IMAGE (pcie or cloud), and runs in it the tests of several ranks
# over MPI, the digits example and `hvd-gqsgd doctor`; then, of cloud, the tests and the example on 4
# containers over ssh, with MPI and with Gloo. OPTIONS are for the build; without a GPU:
#
#   docker/test.sh cloud
#   docker/test.sh pcie --build-arg BASE_IMAGE=debian:bookworm-slim
#
# Docker or podman runs the containers. Where neither can, as in a container, buildah does, as root: in
# chroot, on the emulated hosts of hvd_gqsgd/bench/hosts.sh.
#
#   ENGINE   docker, podman or buildah; default: the first that works
#   RATE     limit of the links between the 4 containers (default: 1gbit)
#   RUN      options for all runs, such as --gpus all
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=${1-}
[ -f "docker/$name/Dockerfile" ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" && exit 2; }
shift
image=hvd-gqsgd:$name
prefix=hvd-gqsgd-test-$$
rate=${RATE:-1gbit}
keys=/home/gqsgd/.ssh
emulated=hvd_gqsgd/bench/hosts.sh
read -ra more <<<"${RUN-}"

say() { printf '\n--- %s (after %d s)\n' "$*" "$SECONDS"; }
fail() { echo "test.sh: $*" >&2 && exit 1; }

engine=${ENGINE-}
if [ -z "$engine" ]; then
    if docker info >/dev/null 2>&1; then
        engine=docker
    elif podman info --format '{{.Host.OCIRuntime.Path}}' 2>/dev/null | xargs -r test -x; then
        engine=podman
    else
        engine=buildah
    fi
fi
command -v "$engine" >/dev/null || fail "no docker daemon answers, and there is neither podman nor buildah"

# --- with docker, podman -------------------------------------------------------------------------

build() { "$engine" build --file "docker/$name/Dockerfile" --tag "$image" "$@" .; }
size() { "$engine" image inspect --format '{{.Size}}' "$image"; }
one() { "$engine" run --rm --shm-size 1g --entrypoint "" "${more[@]}" "$image" "$@"; }
up() { # up HOST...
    "$engine" network create --internal "$prefix" >/dev/null
    "$engine" volume create "$prefix" >/dev/null
    local host
    for host; do
        "$engine" run --detach --name "$prefix-$host" --hostname "$host" --network "$prefix" \
            --network-alias "$host" --volume "$prefix:$keys" --cap-add CAP_NET_ADMIN --shm-size 1g \
            --env RATE="$rate" "${more[@]}" "$image" worker >/dev/null
    done
}
on() { # on HOST HOSTS COMMAND...: the container is one of HOSTS already
    local host=$1 hosts=$2
    shift 2
    "$engine" exec --env HOSTS="$hosts" "$prefix-$host" /opt/entrypoint.sh "$@"
}
down() {
    local container
    for container in $("$engine" ps --all --quiet --filter "name=$prefix-"); do
        "$engine" rm --force "$container" >/dev/null
    done
    "$engine" network rm "$prefix" >/dev/null 2>&1 || true
    "$engine" volume rm "$prefix" >/dev/null 2>&1 || true
}

# --- with buildah --------------------------------------------------------------------------------

if [ "$engine" = buildah ]; then
    export BUILDAH_ISOLATION=chroot
    build() { # the format: only Docker's has health checks
        buildah bud --format docker --network host --layers \
            --file "docker/$name/Dockerfile" --tag "$image" "$@" .
    }
    size() { buildah images --json "$image" | sed -n 's/.*"size": "\(.*\)".*/\1/p'; }
    make() { buildah from --pull-never --name "$prefix-$1" "$image" >/dev/null; }
    one() {
        buildah inspect "$prefix-one" >/dev/null 2>&1 || make one
        buildah run --hostname localhost "${more[@]}" "$prefix-one" -- "$@"
    }
    up() {
        volume=$(mktemp -d)
        chown 10001 "$volume"
        "$emulated" up $#
        local host
        for host; do
            make "$host"
            "$emulated" on "$host" buildah run --hostname "$host" --cap-add CAP_NET_ADMIN \
                --volume "$volume:$keys" --env RATE="$rate" "$prefix-$host" -- /opt/entrypoint.sh worker &
        done
    }
    on() {
        local host=$1 hosts=$2
        shift 2
        "$emulated" on "$host" buildah run --hostname "$host" --volume "$volume:$keys" \
            --env HOSTS="$hosts" "$prefix-$host" -- /opt/entrypoint.sh "$@"
    }
    down() {
        "$emulated" down
        local container
        for container in $(buildah containers --format '{{.ContainerName}}' | grep "^$prefix-"); do
            buildah rm "$container" >/dev/null
        done
        rm -rf "${volume:-/nonexistent}"
    }
fi

# --- the tests -----------------------------------------------------------------------------------

# What the Dockerfiles have in common stands in both.
common() { sed -n '/^FROM .* AS horovod$/,/^# --- the image/p' "docker/$1/Dockerfile"; }
diff <(common pcie) <(common cloud) || fail "the Dockerfiles differ in what they have in common"

trap down EXIT
say "building $image with $engine"
build "$@"
say "built $image: $(size)"

# More ranks than cores, perhaps.
mpi=(mpirun --map-by :OVERSUBSCRIBE --bind-to none --mca mpi_yield_when_idle 1 -np 4)
tests=(python -m pytest -q --color no -p no:cacheprovider tests/ranks -m)
digits=(python examples/digits_cnn.py --epochs 4)

say "whoever it runs as, and keys in it"
# shellcheck disable=SC2016 # the shell in the container expands it
one sh -ec '[ "$(id -u)" = 10001 ]
    ! find / -xdev \( -name "ssh_host_*_key" -o -path "*/.ssh/*" \) -type f 2>/dev/null | grep .' ||
    fail "$image runs as root, or holds keys"
say "doctor"
one hvd-gqsgd doctor
say "the tests, on 4 ranks of one container"
one "${mpi[@]}" "${tests[@]}" "not few"
say "the digits example, on 4 ranks of one container"
one "${mpi[@]}" "${digits[@]}"
if [ "$name" = pcie ]; then
    say "the digits example, as the image starts it"
    one /opt/entrypoint.sh "${digits[@]}"
    exit
fi

hosts=(a b c d)
[ "$engine" != buildah ] || hosts=(h0 h1 h2 h3)
list=$(printf '%s:1,' "${hosts[@]}")
list=${list%,}
say "4 containers, with links of $rate"
up "${hosts[@]}"
for controller in --mpi --gloo; do
    say "the digits example on 4 containers, horovodrun $controller"
    on "${hosts[0]}" "$list" launch "$controller" "${digits[@]}"
done
# Where operations take long, as over Gloo in test_ranks.py: those tests that matter most.
say "the tests on 4 containers"
on "${hosts[0]}" "$list" "${mpi[@]}" --host "$list" --mca btl_tcp_if_include eth0 "${tests[@]}" core
say "all of it works"
