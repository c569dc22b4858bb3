#!/usr/bin/env bash
# entrypoint.sh COMMAND: on this machine,
#
#   test ARGS...   runs the tests: pytest's arguments; by default all
#   doctor         hvd-gqsgd doctor
#   COMMAND...     runs any other on a rank for each GPU, by horovodrun; options before it are
#                  horovodrun's: --gloo
#
# RANKS, in the environment, is another number of ranks; where there is no GPU the default is 2.
set -euo pipefail

# Ranks that share the memory of a machine, and its cores: no binding, as cores may be fewer.
binding="--bind-to none"

case ${1-} in
test) shift && exec python -m pytest "${@:-tests}" ;;
doctor) shift && exec hvd-gqsgd doctor "$@" ;;
"") sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" && exit 2 ;;
esac

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
[ "$gpus" != 0 ] || echo "hvd_gqsgd: no GPU (docker run --gpus all shows them): $ranks ranks on CPUs" >&2
exec horovodrun -np "$ranks" -H "localhost:$ranks" --binding-args="$binding" "$@"
