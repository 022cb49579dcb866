#!/usr/bin/env bash
# Ends the job on every host.
set -euo pipefail
SUMMARY="usage: stop.sh --name NAME ...

Sends SIGTERM to the job on every host and waits until it has ended. Exit code 0 where there was no
job, or where every host ended with 143, as lmops does when it is told to stop (or had finished
with 0); the same launch.sh continues the run."
REQUIRED=(PROJECT ZONE NAME)
OPTIONAL=(NUM_SLICES SSH_FLAGS POLL_SECONDS STOP_SECONDS)
SWITCHES=()
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse "$@"

count_hosts || die "gcloud cannot tell the hosts of $NAME; see status.sh."
ask_or_die stop
tries=$((STOP_SECONDS / (POLL_SECONDS > 0 ? POLL_SECONDS : 1)))
while true; do
  ask_or_die state
  [[ "${REPLIES[*]}" == *" running "* ]] || break
  ((tries-- > 0)) || { replies; die "the job still runs after $STOP_SECONDS seconds."; }
  sleep "$POLL_SECONDS"
done
replies
for reply in "${REPLIES[@]}"; do
  [[ $reply =~ \ (stopped\ (143|0)|finished\ 0|idle|lost)$ ]] || die "not every host ended cleanly."
done
