#!/usr/bin/env bash
# Runs the README's two commands as a newcomer would: in a fresh clone, with an empty environment,
# an empty home and an empty cache, and prints how long each took.
#
#     tests/fresh_clone.sh [REQUIREMENT]
#
# The README gets the small CPU build of torch first. On a machine that does not reach PyTorch's
# index, name what to install instead, for instance torch==2.13.0.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
mkdir "$place/home"

clean() { # runs a command in the clone; of the caller's variables pip's and HOGWILD_CUDA... come along
  (cd "$place/clone" && env -i PATH="$PATH" HOME="$place/home" TERM="${TERM:-dumb}" \
    LANG="${LANG:-C.UTF-8}" $(env | grep -E '^(PIP_|HOGWILD_CUDA)' || true) bash -euo pipefail -c "$1")
}

timed() { # timed TITLE COMMAND
  printf '\n==== %s\n%s\n' "$1" "$2"
  local start=$SECONDS
  clean "$2"
  printf '==== %s: %d s\n' "$1" $((SECONDS - start))
}

command_of() { python3 "$repository/tests/readme_commands.py" "$1"; }

git clone --quiet "$repository" "$place/clone"
if [ $# -gt 0 ]; then
  timed "torch (in place of the README's line)" \
    "python3 -m venv .venv && .venv/bin/pip install -q '$1'"
else
  timed "torch" "$(command_of torch)"
fi
timed "the main job" "$(command_of run)"
timed "the main job again" ".venv/bin/hogwild run --max-steps 64"
timed "the tests" "$(command_of test)"
printf '\n==== environment %s, cache %s\n' \
  "$(du -sh "$place/clone/.venv" | cut -f1)" "$(du -sh "$place/home" | cut -f1)"
