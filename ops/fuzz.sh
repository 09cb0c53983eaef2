#!/usr/bin/env bash
# Runs fuzz targets, one after another.
#
#   ops/fuzz.sh 30s        every target for 30 s
#   ops/fuzz.sh 30s 2      two of them: which ones the commit's hash says, so that over time each has its turn and a run can be repeated
#
# What a target finds is kept in its testdata/fuzz, and every `go test` from then on begins with it: commit it with the remedy. What is merely new to it stays
# in Go's cache, from which the next run goes on.
set -euo pipefail
time=$1 some=${2:-}

mapfile -t targets < <(git grep -o --untracked -E "^func Fuzz[A-Za-z0-9_]*" -- "*_test.go" | sed -E "s,^(.*)/[^/]*:func (.*),./\1 \2," | sort)
count=${#targets[@]}
if [ "$count" = 0 ]; then echo "fuzz: no target was found" >&2; exit 1; fi
first=0
if [ -z "$some" ]; then
  some=$count
else
  first=$((16#$(git rev-parse HEAD | cut -c1-8) % count))
fi
for ((i = 0; i < some; i++)); do
  read -r pkg target <<<"${targets[$(((first + i) % count))]}"
  echo "fuzz: $pkg $target"
  go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 1x "$pkg"
done
