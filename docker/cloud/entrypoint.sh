#!/usr/bin/env bash
# entrypoint.sh COMMAND: makes a container one host of a cluster, and runs
#
#   worker             nothing but sshd
#   launch COMMAND...  COMMAND on all hosts, by horovodrun; options before it are horovodrun's: --gloo
#   hosts              print the hosts, as launch gives them to horovodrun
#   COMMAND...         any other
#
# Settings, in the environment:
#
#   HOSTS      where launch puts ranks, and how many: a:2,b:2. By default as /etc/mpi/hostfile says
#              (Kubernetes' MPI Operator makes it), or else one on each address of the name WORKERS
#   WORKERS    default: worker
#   INTERFACE  the network interface that hosts share; default: eth0
#   RATE       limit of what leaves by it, as tc writes it: 1gbit, 200mbit. Needs --cap-add NET_ADMIN
#
# All hosts need the same ~/.ssh: a volume that they share, or a secret of Kubernetes. Where there is
# no key in it yet, the first host makes one.
set -euo pipefail

interface=${INTERFACE:-eth0}
keys=$HOME/.ssh
own=$HOME/.cluster

fail() { echo "hvd_gqsgd: $*" >&2 && exit 1; }

make_key() { # whoever makes the folder makes the key; it appears in one step
    local new=$keys/.new
    mkdir "$new" 2>/dev/null || { [ -d "$new" ] && return; }
    ssh-keygen -q -t ed25519 -N '' -C cluster -f "$new/id_ed25519"
    cp "$new/id_ed25519.pub" "$keys/authorized_keys"
    mv "$new/id_ed25519" "$keys/id_ed25519"
}

find_key() {
    local file
    for file in "$keys"/id_*; do
        case $file in *.pub) ;; *) [ ! -r "$file" ] || { echo "$file" && return; } ;; esac
    done
    return 1
}

prepare_ssh() {
    local key
    find_key >/dev/null || make_key ||
        fail "no key in $keys, and it cannot be written to: mount a volume there that user $(id -u) owns"
    for _ in {1..100}; do
        find_key >/dev/null && break
        sleep 0.1
    done
    key=$(find_key) || fail "$keys/.new is there but no key: remove the volume and start anew"
    mkdir -p "$own"
    # A copy, as ssh takes no key that others could read.
    install -m 600 "$key" "$own/key"
    echo "* $(ssh-keygen -y -f "$own/key")" >"$own/known_hosts"
}

limit_link() {
    /opt/setpriv --inh-caps +net_admin --ambient-caps +net_admin \
        /opt/hosts.sh limit "$interface" "$RATE" ||
        fail "RATE=$RATE cannot be set on $interface; does the container have the capability NET_ADMIN?"
}

hosts() {
    if [ -n "${HOSTS-}" ]; then
        echo "$HOSTS"
    elif [ -e /etc/mpi/hostfile ]; then
        sed -E 's/[[:space:]]+slots=/:/; s/^[^:]+$/&:1/' /etc/mpi/hostfile | paste -sd,
    else
        getent ahostsv4 "${WORKERS:-worker}" | awk '{ print $1 ":1" }' | sort -u | paste -sd,
    fi
}

launch() {
    local list host ranks=0 nics=()
    list=$(hosts) || fail "no hosts: name them in HOSTS, or start containers named ${WORKERS:-worker}"
    for host in ${list//,/ }; do
        for _ in {1..60}; do
            ssh "${host%:*}" true 2>/dev/null && break
            sleep 1
        done
        ssh "${host%:*}" true || fail "no ssh to ${host%:*}: is a worker running there, with the same key?"
        ranks=$((ranks + ${host##*:}))
    done
    echo "hvd_gqsgd: $ranks ranks on $list" >&2
    [ "$list" = "${list%,*}" ] || nics=(--network-interface "$interface")
    # Containers on one machine all believe to own its core 0: no binding.
    exec horovodrun -np "$ranks" -H "$list" "${nics[@]}" --binding-args="--bind-to none" "$@"
}

[ -z "${RATE-}" ] || limit_link
prepare_ssh
[ "${1-}" != worker ] || exec /usr/sbin/sshd -D -e
# Any other takes ranks as well, and is asked for its health. (docker exec: sshd is there already.)
ssh localhost true 2>/dev/null || /usr/sbin/sshd
case ${1-} in
launch) shift && launch "$@" ;;
hosts) hosts ;;
*) exec "$@" ;;
esac
