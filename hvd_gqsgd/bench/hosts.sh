#!/usr/bin/env bash
# Emulates N hosts on this machine, joined by a switch, each link limited in both directions. For
# benchmarks: MPI sees N machines, and every byte between two of them crosses a link.
#
#   hosts.sh up N [RATE]     make hosts h0 ... h<N-1>; RATE as tc writes it: 1gbit, 200mbit
#   hosts.sh rate RATE       limit all links anew; none: no limit
#   hosts.sh limit DEV RATE  limit what DEV of this machine or container sends; none: no limit
#   hosts.sh link HOST down  take a host's link down; up: bring it up again
#   hosts.sh on HOST CMD...  run a command on a host
#   hosts.sh mpirun ARGS...  run Open MPI's mpirun on h0, HVD_GQSGD_SLOTS ranks a host (default: 1)
#   hosts.sh gloo ARGS...    the same with horovodrun --gloo
#   hosts.sh down            end all that runs on the hosts and remove them
#
# A host is a process with network, host name, IPC and mount namespaces, and a /dev/shm, of its own.
# Launchers enter the others by `hosts.sh shell` in the place of ssh. Needs iproute2, util-linux, and
# root. HVD_GQSGD_HOSTS names the set of hosts, if there is to be more than one on this machine.
set -euo pipefail

self=$(realpath "$0")
name=${HVD_GQSGD_HOSTS:-gqsgd}
state=/run/hvd_$name-hosts
prefix=$name- # of network namespaces
switch=${prefix}switch
net=10.77.0

fail() { echo "hosts.sh: $*" >&2 && exit 1; }
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" && exit 2; }
hosts() { cat "$state/hosts" 2>/dev/null; }

on() { # on HOST CMD...
    local host=$1 pid
    shift
    pid=$(cat "$state/$host.pid") || fail "there is no host $host"
    exec nsenter -t "$pid" -n -u -i -m env -C "$PWD" "$@"
}

# Token buckets hold 250 microseconds of line rate: deeper ones would let short messages pass
# unlimited, shallower ones lose rate to the timer. Packets must be smaller than the bucket.
limit() { # limit NAMESPACE DEVICE RATE; no NAMESPACE: this one
    tc ${1:+-n "$1"} qdisc del dev "$2" root 2>/dev/null || true
    [ "$3" != none ] || return 0
    local bits burst
    bits=$(numfmt --from=si "$(tr 'kmg' 'KMG' <<<"${3%bit}")") || fail "bad rate $3"
    burst=$((bits / 8 / 4000 > 6400 ? bits / 8 / 4000 : 6400))
    ip ${1:+-n "$1"} link set "$2" gso_max_size $((burst / 2 > 65536 ? 65536 : burst / 2))
    tc ${1:+-n "$1"} qdisc add dev "$2" root tbf rate "$3" burst "$burst" latency 50ms
}

rate() {
    local host list
    list=$(hosts) || fail "no hosts are up"
    for host in $list; do
        limit "$prefix$host" eth0 "$1"
        limit "$switch" "$host" "$1"
    done
}

up() { # up N RATE
    [ "$(id -u)" = 0 ] || fail "needs root"
    [[ $1 =~ ^[1-9][0-9]?$ ]] || fail "N must be from 1 to 99, got $1"
    [ ! -e "$state" ] || fail "hosts are up already (hosts.sh down)"
    mkdir -m 700 "$state"
    trap down EXIT
    ip netns add "$switch"
    ip -n "$switch" link add br0 type bridge stp_state 0 forward_delay 0
    ip -n "$switch" link set br0 up
    echo "127.0.0.1 localhost" >"$state/etc-hosts"
    local i host ns
    for i in $(seq 0 $(($1 - 1))); do
        host=h$i ns=${prefix}h$i
        ip netns add "$ns"
        echo "$host" >>"$state/hosts"
        echo "$net.$((i + 10)) $host" >>"$state/etc-hosts"
        ip -n "$ns" link add eth0 type veth peer name "$host" netns "$switch"
        ip -n "$switch" link set "$host" master br0 up
        ip -n "$ns" addr add "$net.$((i + 10))/24" dev eth0
        ip -n "$ns" link set lo up
        ip -n "$ns" link set eth0 up
    done
    for host in $(hosts); do
        # shellcheck disable=SC2016 # the shell of the host expands it
        setsid ip netns exec "$prefix$host" unshare --uts --ipc --mount sh -ec '
            hostname "$1"
            mount -t tmpfs tmpfs /dev/shm
            mount --bind "$2/etc-hosts" /etc/hosts
            echo $$ >"$2/$1.pid"
            exec sleep infinity' boot "$host" "$state" </dev/null >"$state/$host.log" 2>&1 &
        disown
        until [ -s "$state/$host.pid" ]; do
            kill -0 $! || fail "$host did not start: $(cat "$state/$host.log")"
            sleep 0.05
        done
    done
    rate "$2"
    trap - EXIT
}

down() {
    local host
    for host in $(hosts || true) switch; do
        ip netns pids "$prefix$host" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
        ip netns del "$prefix$host" 2>/dev/null || true
    done
    rm -rf "$state"
}

# send,inplace: with the PUT protocol that Open MPI prefers over TCP, two ranks that exchange data
# send in turn, because the reply that starts the peer's transfer is queued behind the own data. This
# slows down large messages, and would overstate the gain of compression. Ranks are not bound to
# cores, as every host would bind its first rank to core 0.
run() {
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 TMPDIR=/dev/shm
    local list
    list=$(hosts | sed "s/\$/:${HVD_GQSGD_SLOTS:-1}/" | paste -sd,)
    on h0 mpirun --prtemca plm_ssh_agent "$self shell" --host "$list" --bind-to none \
        --mca pml ob1 --mca btl self,sm,tcp --mca btl_tcp_if_include eth0 \
        --mca btl_tcp_flags send,inplace --mca mpi_yield_when_idle 1 -x PATH "$@"
}

# horovodrun calls ssh by no other name: `ssh OPTIONS HOST OPTIONS COMMAND`, each option with a value.
gloo() {
    export TMPDIR=/dev/shm
    mkdir -p "$state/bin"
    cat >"$state/bin/ssh" <<END
#!/bin/sh
while [ "\${1#-}" != "\$1" ]; do shift 2; done
host=\$1 && shift
while [ "\${1#-}" != "\$1" ]; do shift 2; done
exec "$self" shell "\$host" "\$@"
END
    chmod +x "$state/bin/ssh"
    local list
    local slots=${HVD_GQSGD_SLOTS:-1}
    list=$(hosts | sed "s/\$/:$slots/")
    on h0 env PATH="$state/bin:$PATH" horovodrun --gloo -np "$(($(wc -l <<<"$list") * slots))" \
        -H "$(paste -sd, <<<"$list")" --network-interfaces eth0 "$@"
}

case ${1-} in
up) [ $# -ge 2 ] || usage; up "$2" "${3-none}" ;;
rate) [ $# = 2 ] || usage; rate "$2" ;;
limit) [ $# = 3 ] || usage; limit "" "$2" "$3" ;;
on) [ $# -ge 3 ] || usage; shift; on "$@" ;;
shell) host=$2; shift 2; on "$host" sh -c "$*" ;; # words for a shell, as ssh takes them
mpirun) shift; run "$@" ;;
gloo) shift; gloo "$@" ;;
link) [ $# = 3 ] || usage; ip -n "$switch" link set "$2" "$3" ;;
down) down ;;
*) usage ;;
esac
