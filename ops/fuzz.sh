#!/usr/bin/env bash
# Runs fuzz targets, one after another.
#
#   ops/fuzz.sh 30s        every target for 30 s
#   ops/fuzz.sh 30s 8      eight of them: which ones the commit's hash says, so that over time each has its turn and a run can be repeated
#
# What a target finds is kept in its testdata/fuzz, and every `go test` from then on begins with it: commit it with the remedy. What is merely new to it stays
# in Go's cache, from which the next run goes on; KEEP=20 also copies up to so many of those inputs, the shortest first, into testdata/fuzz, where every
# machine begins with them.
set -euo pipefail
time=$1 some=${2:-} keep=${KEEP:-0}

mapfile -t targets < <(git grep -o --untracked -E "^func Fuzz[A-Za-z0-9_]*" -- "*_test.go" | sed -E "s,^(.*)/[^/]*:func (.*),./\1 \2," | sort)
count=${#targets[@]}
if [ "$count" = 0 ]; then echo "fuzz: no target was found" >&2; exit 1; fi
first=0
if [ -z "$some" ] || [ "$some" -gt "$count" ]; then
  some=$count
else
  first=$((16#$(git rev-parse HEAD | cut -c1-8) % count))
fi

# remember copies the shortest inputs that are new to a target out of Go's cache, until it has so many.
remember() {
  local pkg=$1 target=$2 cache kept file files
  cache=$(go env GOCACHE)/fuzz/$(go list "$pkg")/$target
  kept=$pkg/testdata/fuzz/$target
  [ -d "$cache" ] || return 0
  mkdir -p "$kept"
  mapfile -t files < <(find "$cache" -type f -size -16k -printf '%s %p\n' | sort -n | cut -d' ' -f2-)
  for file in "${files[@]}"; do
    [ "$(find "$kept" -type f | wc -l)" -lt "$keep" ] || break
    cp -n "$file" "$kept/"
  done
  rmdir --ignore-fail-on-non-empty "$kept"
}

for ((i = 0; i < some; i++)); do
  read -r pkg target <<<"${targets[$(((first + i) % count))]}"
  echo "fuzz: $pkg $target"
  go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 1x "$pkg"
  if [ "$keep" -gt 0 ]; then remember "$pkg" "$target"; fi
done
