#!/usr/bin/env bash
# Asks Google Cloud for TPU slices and waits until they are there.
set -euo pipefail
SUMMARY="usage: create.sh --name NAME ... [-- FLAGS OF GCLOUD]

Asks for a slice, or for several (multislice), as one queued resource, and waits until it is
ACTIVE. A queued resource that is there already is waited for and not asked for twice. What comes
after -- is passed on to gcloud compute tpus queued-resources create.

  create.sh --project p --zone us-central2-b --name pod --accelerator-type v4-32 \\
      --runtime-version tpu-ubuntu2204-base --spot --valid-until 6h"
REQUIRED=(PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION)
OPTIONAL=(NUM_SLICES VALID_UNTIL CREATE_FLAGS POLL_SECONDS)
SWITCHES=(SPOT RESERVED)
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse "$@"
[[ -z $SPOT || -z $RESERVED ]] ||
  usage "both --spot (SPOT) and --reserved (RESERVED) are set; take one"

flags=("--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION")
if ((NUM_SLICES > 1)); then flags+=("--node-count=$NUM_SLICES" "--node-prefix=$NAME")
else flags+=("--node-id=$NAME"); fi
[[ -z $SPOT ]] || flags+=(--spot)
[[ -z $RESERVED ]] || flags+=(--reserved)
[[ -z $VALID_UNTIL ]] || flags+=("--valid-until-duration=$VALID_UNTIL")
read -ra more <<<"$CREATE_FLAGS"

look_or_die
while [[ $STATE == DELETING ]]; do  # an earlier one of that name
  sleep "$POLL_SECONDS"
  look_or_die
done
if [[ $STATE == ABSENT || -n $DRY_RUN ]]; then
  queued create "$NAME" "${flags[@]}" "${more[@]}" "${REST[@]}" --quiet ||
    die "gcloud could not create $NAME; it says why above."
else
  say "$NAME exists and is $STATE"
fi
wait_active || die "$NAME is $STATE${REASON:+: $REASON}; run delete.sh, then create.sh again."
[[ -n $DRY_RUN ]] || say "$NAME is ready; next, install.sh"
