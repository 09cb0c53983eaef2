#!/usr/bin/env bash
# Installs what Trivet needs to build, run and test on Debian or Ubuntu, and says what it does.
# Safe to repeat: with everything present it prints one line and touches nothing.
#
#   ops/install.sh run     what `make demo` needs
#   ops/install.sh test    that, and what `make test` and `make bench` need
set -euo pipefail

want=${1:-run}

# command or file that proves the package : Debian package
needs=(
  "gcc:gcc"
  "/usr/include/stdlib.h:libc6-dev"
  "openssl:openssl"
  "curl:curl"
  "mariadbd:mariadb-server"
  "/usr/lib/galera/libgalera_smm.so:galera-4"
  "rsync:rsync"
  "/usr/lib/softhsm/libsofthsm2.so:softhsm2"
)
if [ "$want" = test ]; then
  needs+=("haproxy:haproxy" "wrk:wrk" "git:git" "spin:spin" "strace:strace" "ss:iproute2" "/usr/lib/$(uname -m)-linux-gnu/libsoftokn3.so:libnss3")
fi

have() {
  case "$1" in
    /*) [ -e "$1" ] ;;
    *) command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] ;;
  esac
}

if ! command -v go >/dev/null 2>&1; then
  echo "install: Go is missing. Install Go 1.26 or later from https://go.dev/dl/ and put it on PATH." >&2
  exit 1
fi
version=$(go env GOVERSION); version=${version#go}
if [ "$(printf '%s\n1.26\n' "$version" | sort -V | head -n 1)" != 1.26 ]; then
  echo "install: Go $version is too old; Trivet needs Go 1.26 or later from https://go.dev/dl/." >&2
  exit 1
fi

missing=()
for need in "${needs[@]}"; do
  have "${need%%:*}" || missing+=("${need##*:}")
done
if [ ${#missing[@]} -eq 0 ]; then
  echo "install: everything is here (Go $version, $(mariadbd --version 2>/dev/null | grep -o '[0-9.]*-MariaDB' | head -n 1), SoftHSM, Galera)"
  exit 0
fi

if ! command -v apt-get >/dev/null 2>&1; then
  echo "install: missing: ${missing[*]} (Debian package names). This is not Debian or Ubuntu: install their equivalents with your package manager, then run this again." >&2
  exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null 2>&1; then
    echo "install: missing: ${missing[*]}. Run as root: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

echo "install: adding Debian packages: ${missing[*]}"
# The packages' own services must not start: Trivet starts its own processes.
# policy-rc.d is Debian's switch for that; one that is already there is left alone.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
  "${as_root[@]}" chmod 755 "$policy"
  # shellcheck disable=SC2064
  trap "${as_root[*]} rm -f $policy" EXIT
fi
log=$(mktemp)
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 "$@"; }
if ! { apt update && apt install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  echo "install: apt-get failed; its whole output is in $log" >&2
  exit 1
fi
rm -f "$log"
echo "install: done"
