#!/usr/bin/env bash
# What must be true of a program before it is given to anybody: cross/check.sh PROGRAM TARGET [MAX_BYTES]
#
# Prints `bytes glibc attributes` and says on standard error what is wrong; then the exit status is 1.
# `cross/check.sh --controls DIST` shows that it notices: programs spoilt or of another target must be refused.
set -euo pipefail

GLIBC_MAX=${FIELDPOST_GLIBC_MAX:-2.28}
BYTES_MAX=5000000

check() {
  local program=$1 target=$2 most=${3:-$BYTES_MAX} wrong=0 bytes glibc attributes header symbols needs paths
  complain() {
    echo "$program: $*" >&2
    wrong=1
  }
  # Into variables, not pipes: `grep -q` ends before readelf does, which would count as a failure.
  header=$(readelf -hW "$program")
  needs=$(readelf -lW "$program" && readelf -dW "$program")
  symbols=$(readelf -W --dyn-syms "$program")
  attributes=$(readelf -A "$program" | sed -nE 's/.*Tag_(CPU_arch|FP_arch|ABI_VFP_args): *(.*)/\2/p' | tr '\n' ' ')
  attributes=${attributes% }
  has() { grep -qE "$1" <<<"$2"; }
  case $target in
    aarch64-*)
      has 'Class: *ELF64' "$header" && has 'Machine: *AArch64' "$header" || complain "is not for AArch64"
      attributes=AArch64 ;;
    armv7-*)
      has 'Machine: *ARM$' "$header" || complain "is not for ARM"
      has '^v7 ' "$attributes" || complain "is not for ARMv7 but for '$attributes'"
      # The tag for this is that of the first object, glibc's start-up code, which has none.
      has 'VFP registers|ld-linux-armhf' "$attributes$needs" || complain "does not pass floats in registers" ;;
    arm-*)
      has 'Machine: *ARM$' "$header" || complain "is not for ARM"
      # What says v7 anywhere ends with SIGILL on a Pi Zero.
      has '^v6(K|KZ)? VFPv2 ' "$attributes" || complain "is not for ARMv6 with VFPv2 but for '$attributes'"
      has 'VFP registers' "$attributes" || complain "does not pass floats in registers" ;;
    *) complain "no checks are known for $target" ;;
  esac

  glibc=$(readelf -VW "$program" | grep -oE 'GLIBC_[0-9.]+' | sort -uV | tail -1 | cut -d_ -f2 || true)
  case $target in
    *-musl*)
      # A static program has no interpreter and needs no library.
      ! has 'INTERP|NEEDED' "$needs" || complain "is not static"
      glibc=static ;;
    *)
      [ -n "$glibc" ] || complain "names no version of glibc"
      [ "$(printf '%s\n%s\n' "$glibc" "$GLIBC_MAX" | sort -V | tail -1)" = "$GLIBC_MAX" ] ||
        complain "needs glibc $glibc, and $GLIBC_MAX must do: $(grep -oE "[^ ]+@GLIBC_$glibc" <<<"$symbols" | tr '\n' ' ')"
      has ' fdatasync@' "$symbols" ||
        complain "syncs with fsync: LIBSQLITE3_FLAGS of .cargo/config.toml were not in effect" ;;
  esac

  bytes=$(stat -c %s "$program")
  [ "$bytes" -le "$most" ] || complain "has $bytes bytes, and $most are allowed"

  # SQLite says how it was compiled.
  grep -qaF OMIT_LOAD_EXTENSION "$program" && grep -qaF OMIT_JSON "$program" && ! grep -qaF ENABLE_FTS "$program" ||
    complain "has an SQLite without our LIBSQLITE3_FLAGS (.cargo/config.toml)"

  # Sources of crates are told as /cargo/registry/src/..., which is everybody's; texts stand side by side in a program.
  paths=$(LC_ALL=C sed 's#/cargo/registry/src/#/cargo/#g' "$program" |
    LC_ALL=C grep -aoE "(/home/|/root/|\.cargo/|registry/src/|${HOME:-/root}/|$PWD/)[[:graph:]]{0,100}" | sort -u | head -5 || true)
  [ -z "$paths" ] || complain "holds paths of the machine it was built on:"$'\n'"$paths"

  echo "$bytes $glibc $attributes"
  return $wrong
}

controls() {
  local dist=$1 spoilt program target failed=0 seen=0
  spoilt=$(mktemp -d)
  trap 'rm -rf "$spoilt"' RETURN
  refused() {
    local what=$1
    shift
    seen=$((seen + 1))
    if (check "$@") >/dev/null 2>&1; then
      echo "cross/check.sh does not notice $what" >&2
      failed=1
    fi
  }
  for program in "$dist"/fieldpost-*; do
    case $program in *.json) continue ;; esac
    target=${program##*/fieldpost-}
    (cat "$program" && echo "/root/.cargo/registry/src/x/x.rs") > "$spoilt/path"
    refused "a path in $target" "$spoilt/path" "$target"
    refused "that $target is too large" "$program" "$target" 1000000
    sed 's/OMIT_JSON/0MIT_JS0N/g' "$program" > "$spoilt/sqlite"
    refused "that the SQLite of $target has other flags" "$spoilt/sqlite" "$target"
    for other in aarch64-unknown-linux-gnu armv7-unknown-linux-gnueabihf arm-unknown-linux-musleabihf; do
      [ "$other" = "$target" ] || refused "that $target is not $other" "$program" "$other"
    done
    case $target in *-musl*) ;; *) GLIBC_MAX=2.16 refused "that $target needs a newer glibc" "$program" "$target" ;; esac
  done
  [ "$seen" -gt 0 ] && [ "$failed" = 0 ] && echo "$seen spoilt programs were refused"
}

if [ "${1:-}" = --controls ]; then controls "$2"; else check "$@"; fi
