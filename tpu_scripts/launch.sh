#!/usr/bin/env bash
# Runs one lmops command on every host of the slices.
set -euo pipefail
SUMMARY="usage: launch.sh --name NAME ... [--keep-alive] -- ARGUMENTS OF lmops

Starts the same lmops command on all hosts, detached, with its output in ~/lmops/job/log of each;
tail.sh follows it, stop.sh ends it. Refused where a job runs already.

The command needs a --workdir that begins with / and lies on storage which all hosts have mounted
under that path. lmops uses it as a plain folder: it renames folders, and locks a file against a
second run, which NFS (Filestore) offers between hosts, and Lustre where mounted with flock. gs://
is no path and is refused. A bucket mounted by gcsfuse does not lock between hosts, and renames
folders in one step only with hierarchical namespace; --assume-shared lets it through, at your risk.
None of these has been tried with many hosts yet. The gin file must have a mesh, and a system that
runs in several processes.

--keep-alive makes the slice where it is not there (as create.sh and install.sh, whose settings it
then needs), stays in the foreground, and when the slice is pre-empted makes it anew and launches
the same command, which continues at its last checkpoint. It ends when the command does: with its
exit code, or with 143 after stop.sh.

  launch.sh --project p --zone us-central2-b --name pod -- \\
      run train/finetune.gin --workdir /mnt/nfs/run --gin.MODEL=\"'/mnt/nfs/model'\" ..."
REQUIRED=(PROJECT ZONE NAME)
OPTIONAL=(NUM_SLICES JOB_ENV SSH_FLAGS POLL_SECONDS MAX_RESTARTS GRACE_POLLS ACCELERATOR_TYPE
  RUNTIME_VERSION VALID_UNTIL CREATE_FLAGS PYTHON EXTRAS SOURCE WHEEL REQUIREMENT)
SWITCHES=(KEEP_ALIVE ASSUME_SHARED SPOT RESERVED)
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse "$@"
[[ -z $KEEP_ALIVE ]] || require ACCELERATOR_TYPE RUNTIME_VERSION

job_command

start() {
  local shared=any several=()
  # A dry run cannot count the hosts and shows what a pod gets.
  if ((NUM_HOSTS > 1)) || [[ -n $DRY_RUN ]]; then
    several=(LMOPS_DISTRIBUTED=1)  # the list of hosts is in Cloud TPU's metadata only
    shared=shared
  fi
  [[ -z $KEEP_ALIVE ]] || shared=shared
  [[ -z $ASSUME_SHARED ]] || shared=any
  ask_or_die check "$shared" "$RUN_DIR"
  ask_or_die start env "${several[@]}" "${VARIABLES[@]}" lmops "${REST[@]}"
  replies
}

# Makes the slices where they are not there, and anew where they were taken away.
prepare() {
  look_or_die
  if [[ -n $PREEMPTED || $STATE == SUSPENDING || $STATE == SUSPENDED || $STATE == FAILED ]]; then
    queued delete "$NAME" --force --quiet || return 1
    STATE=ABSENT PREEMPTED=""
  fi
  if [[ $STATE != ACTIVE ]]; then
    bare=1
    "$HERE/create.sh" || return 1
  fi
  if [[ -n $bare ]]; then
    "$HERE/install.sh" || return 1
    bare=""
  fi
  count_hosts
}

# Sets OUTCOME to running, succeeded, stopped, interrupted or failed, and CODE, from the replies.
judge() {
  local reply code running=0 stopped=0
  OUTCOME=succeeded CODE=0
  for reply in "${REPLIES[@]}"; do
    code=${reply##* }
    case $reply in
      *" running "*) running=1 ;;
      *" stopped "*) stopped=1 ;;
      *" finished 0") ;;
      # lmops: 143 when told to stop, 75 when another process of the job has gone.
      *" finished 143" | *" finished 137" | *" finished 75" | *" lost" | *" idle")
        OUTCOME=interrupted ;;
      *" finished "*)  # perhaps only because a peer was interrupted
        [[ $OUTCOME == interrupted ]] || OUTCOME=failed
        ((CODE)) || CODE=$code ;;
    esac
  done
  ((stopped)) && OUTCOME=stopped CODE=143
  ((running)) && OUTCOME=running
  return 0
}

# Looks until the job is over (returns 0) or has to be launched again (returns 1, with WHY).
watch() {
  local doubtful=0 patience before=""
  OUTCOME=running
  while true; do
    sleep "$POLL_SECONDS"
    # A host that dies takes its peers' processes with it, and the state of its slice may follow
    # later: an end that is not a success is believed after some looks only.
    patience=$GRACE_POLLS
    [[ $OUTCOME != silent && $OUTCOME != unknown ]] || patience=$((6 * GRACE_POLLS))
    if ((doubtful > patience)); then
      case $OUTCOME in
        failed) say "the job failed: $(replies | tr '\n' ',')"; exit "$CODE" ;;
        unknown | silent) die "$REASON; the slices and the job are left as they are." ;;
        *) WHY="its processes ended ($OUTCOME)"; return 1 ;;
      esac
    fi
    if ! look; then
      OUTCOME=unknown REASON="gcloud cannot describe $NAME: $REASON"
      doubtful=$((doubtful + 1))
      continue
    fi
    case $STATE in
      ACTIVE) ;;
      SUSPENDING | SUSPENDED | FAILED | ABSENT) WHY="$NAME is $STATE"; return 1 ;;
      *) doubtful=0; continue ;;
    esac
    if ask state; then
      judge
    else
      OUTCOME=silent
      # The queued resource may be ACTIVE for a while yet.
      if count_hosts && [[ -n $PREEMPTED ]]; then WHY="$PREEMPTED is PREEMPTED"; return 1; fi
    fi
    [[ $OUTCOME == "$before" ]] || say "$NAME is ACTIVE, the job is $OUTCOME"
    before=$OUTCOME
    case $OUTCOME in
      running) doubtful=0 ;;
      succeeded) replies; return 0 ;;
      stopped) replies; exit 143 ;;
      *) doubtful=$((doubtful + 1)) ;;
    esac
  done
}

if [[ -n $KEEP_ALIVE && -n $DRY_RUN ]]; then
  "$HERE/create.sh"
  "$HERE/install.sh"
fi
if [[ -z $KEEP_ALIVE || -n $DRY_RUN ]]; then
  count_hosts || die "gcloud cannot tell the hosts of $NAME; see status.sh."
  start
  [[ -n $DRY_RUN ]] || say "follow it with tail.sh --name $NAME"
  [[ -n $KEEP_ALIVE ]] || exit 0
  look
  ask state
  queued delete "$NAME" --force --quiet  # and all over again, where it was pre-empted
  exit 0
fi
bare="" restarts=0 PREEMPTED=""
while true; do
  if prepare && (start); then
    if watch; then exit 0; fi
  else
    ((restarts)) || die "nothing has been launched."  # later it may be a lack of capacity
    WHY="the job could not be launched again"
    sleep "$POLL_SECONDS"
  fi
  restarts=$((restarts + 1))
  ((restarts <= MAX_RESTARTS)) || die "$WHY, and that was the last of --max-restarts $MAX_RESTARTS."
  say "$WHY; restart $restarts"
done
