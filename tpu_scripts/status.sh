#!/usr/bin/env bash
# Prints the state of the slices and of the job on every host.
set -euo pipefail
SUMMARY="usage: status.sh --name NAME ...

Prints the state of the queued resource and, where it is ACTIVE, a line for every host: idle,
running PID, finished CODE, stopped CODE (after stop.sh), or lost (it did not survive a restart).
Exit code 0 where all hosts answered, 3 where the queued resource is not ACTIVE."
REQUIRED=(PROJECT ZONE NAME)
OPTIONAL=(NUM_SLICES SSH_FLAGS)
SWITCHES=()
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse "$@"

look_or_die
[[ -n $DRY_RUN ]] || echo "$NAME $STATE${REASON:+: $REASON}"
[[ $STATE == ACTIVE ]] || exit 3
count_hosts || die "gcloud cannot tell the hosts of $NAME."
ask state || { replies; die "$REASON."; }
replies
