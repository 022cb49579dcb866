#!/usr/bin/env bash
# Copies a run's report and the logs of all hosts.
set -euo pipefail
SUMMARY="usage: collect.sh --name NAME ... --workdir /SHARED/DIR --destination FOLDER|gs://...

Copies from the run's workdir the report, the log, the configuration, the stages' manifests and the
metrics (not checkpoints, parameters or data), and the job's log of every host, as
logs/sliceN-workerN.log. A gs:// destination is written with gcloud storage from here."
REQUIRED=(PROJECT ZONE NAME WORKDIR DESTINATION)
OPTIONAL=(NUM_SLICES SSH_FLAGS)
SWITCHES=()
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse "$@"
[[ $WORKDIR == /* ]] ||
  usage "--workdir (WORKDIR) is '$WORKDIR'; give the path on the hosts, from /"

count_hosts || die "gcloud cannot tell the hosts of $NAME; see status.sh."
folder=$DESTINATION
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
[[ $DESTINATION != gs://* ]] || folder=$temporary/run
[[ -n $DRY_RUN ]] || mkdir -p "$folder/logs"

ask_at 0 0 1 pack "$WORKDIR" || die "$REASON."
((${#REFUSED[@]} == 0)) || die "${REFUSED[0]}"
copy 0 0 "$NAME:lmops/collect.tgz" "$temporary/" || die "gcloud cannot copy the run."
run tar -xzf "$temporary/collect.tgz" -C "$folder"
for slice in "${!HOSTS[@]}"; do
  for ((worker = 0; worker < HOSTS[slice]; worker++)); do
    copy "$slice" "$worker" "$NAME:lmops/job/log" "$folder/logs/slice$slice-worker$worker.log" ||
      die "gcloud cannot copy the log of worker $worker of slice $slice."
  done
done
[[ $DESTINATION != gs://* ]] ||
  run gcloud storage cp --recursive "$folder/*" "${DESTINATION%/}/" "--project=$PROJECT"
[[ -n $DRY_RUN ]] || say "copied to $DESTINATION"
