#!/usr/bin/env bash
# Submits `safemoe run` to a GKE cluster by xpk, on a TPU slice of any number of hosts.
#
#   launch/xpk_run.sh NAME --cluster=C --zone=Z --tpu-type=T --docker-image=IMAGE [XPK_FLAG...] \
#     -- SAFEMOE_RUN_OPTION...
#
#   launch/xpk_run.sh pod --cluster=mine --zone=us-west4-a --tpu-type=v5litepod-16 --spot \
#     --docker-image=IMAGE --env-file=secrets.env -- \
#     --config experiments/llama31_8b.py --workdir gs://bucket/llama31_8b
#
# IMAGE is that of launch/Dockerfile, in a registry that the cluster reads. XPK_FLAG is any of
# `xpk workload create`; what stands here is only what safemoe needs: a job that has saved (75) is
# restarted, 20 times at most, and has ten minutes to save in. --dry-run prints the command and does
# nothing. Afterwards: xpk workload list, and xpk workload delete --workload NAME.
#
# NEVER RUN ON A CLUSTER so far; xpk 1.16.0's own parser takes the command.
set -Eeuo pipefail

# shellcheck source-path=SCRIPTDIR source=_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh"

if [[ "${1:-}" == @(--help|-h|) ]]; then help && exit; fi
NAME="$1" FLAGS=()
shift
while (($#)); do
  case "$1" in
    --) JOB=("${@:2}") && break ;;
    --dry-run) DRY_RUN=1 ;;
    *) FLAGS+=("$1") ;;
  esac
  shift
done
check_name
for flag in cluster zone tpu-type docker-image; do
  [[ " ${FLAGS[*]}" == *" --$flag="* ]] || die "no --$flag; see $0 --help"
done
check_job
[[ "$DRY_RUN" ]] || command -v xpk >/dev/null || die "xpk is not on the PATH; pip install xpk"
execute xpk workload create "--workload=$NAME" "${FLAGS[@]}" --restart-on-exit-codes=75 \
  --max-restarts=20 --termination-grace-period-seconds=600 \
  "--command=safemoe run $(quoted "${JOB[@]}")"
