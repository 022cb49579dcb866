#!/usr/bin/env bash
# Gives the slices back.
set -euo pipefail
SUMMARY="usage: delete.sh --name NAME ... [--yes]

Deletes the queued resource and its TPU VMs, with the disks of the VMs. Asks for its name first."
REQUIRED=(PROJECT ZONE NAME)
OPTIONAL=()
SWITCHES=(YES)
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse "$@"

if [[ -z $YES && -z $DRY_RUN ]]; then
  read -rp "Delete $NAME in $ZONE of $PROJECT, with its hosts' disks? Type its name: " answer ||
    die "nobody answers; give --yes to delete without asking."
  [[ $answer == "$NAME" ]] || die "'$answer' is not '$NAME'; nothing is deleted."
fi
queued delete "$NAME" --force --quiet
