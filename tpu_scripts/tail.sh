#!/usr/bin/env bash
# Follows the job's log on one host or on all.
set -euo pipefail
SUMMARY="usage: tail.sh --name NAME ... [--node N --worker N | --node all --worker all]

Follows the log of the job, each line with the name of its host, until the job ends. The first host
is the one that prints progress."
REQUIRED=(PROJECT ZONE NAME)
OPTIONAL=(NODE WORKER TAIL_LINES SSH_FLAGS)
SWITCHES=(NO_FOLLOW)
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse "$@"

follow=" follow"
[[ -z $NO_FOLLOW ]] || follow=""
# shellcheck disable=SC2153  # parse sets them
remote "$NODE" "$WORKER" "bash lmops/host.sh tail $TAIL_LINES$follow"
