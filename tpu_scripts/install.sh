#!/usr/bin/env bash
# Installs lmops_jax on every host.
set -euo pipefail
SUMMARY="usage: install.sh --name NAME ... [--source CHECKOUT | --wheel FILE | --requirement TEXT]

Installs lmops_jax into ~/lmops/venv of every host, with its dependencies: a copy of this checkout
(the default), a wheel, or what pip finds. Checks the hosts' Python first, and refuses while a job
runs. A job starts in ~/lmops/checkout where there is one, so that gin files of the checkout are
found by the same names as here. gcloud reaches several hosts only with its key in an agent: run
ssh-add ~/.ssh/google_compute_engine first.

  install.sh --project p --zone us-central2-b --name pod
  install.sh ... --requirement 'lmops_jax[tpu] @ git+https://HOST/REPOSITORY@TAG'"
REQUIRED=(PROJECT ZONE NAME)
OPTIONAL=(NUM_SLICES PYTHON EXTRAS SOURCE WHEEL REQUIREMENT SSH_FLAGS)
SWITCHES=()
. "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse "$@"
[[ -z $WHEEL || -z $REQUIREMENT ]] ||
  usage "both --wheel (WHEEL) and --requirement (REQUIREMENT) are set; take one"
[[ -z $WHEEL || -f $WHEEL ]] || usage "--wheel (WHEEL) is '$WHEEL', which is not a file"
[[ -n $WHEEL$REQUIREMENT || -f $SOURCE/pyproject.toml ]] ||
  usage "--source (SOURCE) is '$SOURCE', which holds no pyproject.toml"

count_hosts || die "gcloud cannot tell the hosts of $NAME; see status.sh."
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
if [[ -n $REQUIREMENT ]]; then what=(requirement "$REQUIREMENT") upload=""
elif [[ -n $WHEEL ]]; then what=(wheel "${WHEEL##*/}${EXTRAS:+[$EXTRAS]}") upload=$WHEEL
else
  what=(checkout "$EXTRAS") upload=$temporary/checkout.tgz
  # Files that are deleted but not committed are listed too; tar would stop at them.
  [[ -n $DRY_RUN ]] || (
    cd "$SOURCE"
    git ls-files --cached --others --exclude-standard -z |
      while IFS= read -rd '' file; do [[ -e $file ]] && printf '%s\0' "$file"; done |
      tar --create --gzip --null --no-recursion --files-from=- --file="$upload"
  ) || die "the checkout $SOURCE cannot be packed; it must be a git repository."
fi
all() { if [[ -n $DRY_RUN ]]; then "$@"; else "$@" >"$temporary/said" 2>&1; fi; }
all remote all all "mkdir -p lmops/upload" ||
  die "gcloud cannot reach the hosts: $(tail -n 1 "$temporary/said")"
all copy all all "$HERE/host.sh" "$NAME:lmops/host.sh" ||
  die "gcloud cannot copy to the hosts: $(tail -n 1 "$temporary/said")"
[[ -z $upload ]] || all copy all all "$upload" "$NAME:lmops/upload/" ||
  die "gcloud cannot copy to the hosts: $(tail -n 1 "$temporary/said")"
ask_or_die install "$PYTHON" "${what[@]}"
replies
