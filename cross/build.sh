#!/usr/bin/env bash
# Programs for gateways: cross/build.sh [--profile release|quick] [--twice] [TARGET...]
#
#   aarch64-unknown-linux-gnu        Raspberry Pi 3 and newer with a 64-bit system; glibc 2.28
#   armv7-unknown-linux-gnueabihf    Raspberry Pi 2 and newer with a 32-bit system; glibc 2.28
#   arm-unknown-linux-musleabihf     Raspberry Pi Zero and 1, and every other; static
#
# Without targets: all three. What is needed is found on this machine or fetched into target/cross (toolchain.sh), once.
# Each program is checked (check.sh), gets its list of parts (sbom.py) and its line in SHA256SUMS, in target/cross/dist.
# `--twice` builds here and in a copy of another name with another cargo home, and compares every byte.
set -euo pipefail
cd "$(dirname "$0")/.."
source=$PWD
. cross/toolchain.sh

profile=release twice='' targets=()
while [ $# -gt 0 ]; do
  case $1 in
    --profile) profile=$2; shift 2 ;;
    --twice) twice=yes; shift ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit ;;
    -*) die "cross/build.sh knows no $1; see cross/build.sh --help" ;;
    *) targets+=("$1"); shift ;;
  esac
done
all=(aarch64-unknown-linux-gnu armv7-unknown-linux-gnueabihf arm-unknown-linux-musleabihf)
[ ${#targets[@]} -gt 0 ] || targets=("${all[@]}")
for target in "${targets[@]}"; do
  [[ " ${all[*]} " = *" $target "* ]] || die "$target is none of: ${all[*]}"
done
have readelf || install readelf binutils
have python3 || install Python python3-venv
have curl || [ -e /etc/ssl/certs/ca-certificates.crt ] || install "certificate authorities" ca-certificates

# Builds the sources in a folder for a target; prints where the program is.
build() {
  local folder=$1 target=$2 into=$3
  if [ "$std" = cross ]; then
    (cd "$folder" && CROSS_CONFIG=cross/Cross.toml CARGO_TARGET_DIR=$into \
      cross build --locked --profile "$profile" --target "$target" --bin fieldpost >&2)
  else
    (cd "$folder" && env "${environment[@]}" CARGO_NET_RETRY=5 \
      cargo build --locked --profile "$profile" --target "$target" --bin fieldpost "${options[@]}" >&2)
  fi
  echo "$into/$target/$profile/fieldpost"
}

sum() { sha256sum "$1" | cut -d' ' -f1; }

# The same sources under another name, and a cargo home under another name.
copy() {
  local folder=$1
  rm -rf "$folder"
  mkdir -p "$folder/sources" "$folder/cargo"
  tar -C "$source" --exclude=./target --exclude=./.git --exclude=.venv --exclude=node_modules -cf - . |
    tar -C "$folder/sources" -xf -
  ln -s "${CARGO_HOME:-$HOME/.cargo}/registry" "$folder/cargo/registry"
}

if [ -n "$twice" ]; then
  for target in "${targets[@]}"; do
    say "$target in $source"
    prepare "$source" "$cache/build" "$target" std,panic_abort
    here=$(sum "$(build "$source" "$target" "$cache/build")")
    folder=$cache/twice/in/another-place
    say "$target in $folder"
    copy "$folder"
    there=$(
      export CARGO_HOME=$folder/cargo
      prepare "$folder/sources" "$folder/target" "$target" std,panic_abort
      sum "$(build "$folder/sources" "$target" "$folder/target")"
    )
    rm -rf "$cache/twice"
    [ "$here" = "$there" ] || die "$target: two builds differ: $here, $there"
    echo "$target: the same from two folders, $here"
  done
  exit
fi

dist=$cache/dist
[ "$profile" = release ] || dist=$cache/$profile
most=5000000
[ "$profile" = release ] || most=20000000
mkdir -p "$dist"
rows=()
for target in "${targets[@]}"; do
  prepare "$source" "$cache/build" "$target" std,panic_abort
  say "$target: $compiler, library $std, $linker"
  began=$SECONDS
  program=$(build "$source" "$target" "$cache/build")
  took=$((SECONDS - began))
  # With a cross compiler of the distribution it is as new as that.
  if [[ $linker != zig* ]]; then export FIELDPOST_GLIBC_MAX=2.36; fi
  found=$(cross/check.sh "$program" "$target" "$most") || die "$target: the program is not fit to be given away, see above"
  read -r bytes glibc attributes <<<"$found"
  cp "$program" "$dist/fieldpost-$target.new"
  mv "$dist/fieldpost-$target.new" "$dist/fieldpost-$target"
  env "${environment[@]}" python3 cross/sbom.py "$dist/fieldpost-$target" "$target" "$compiler" > "$dist/fieldpost-$target.cdx.json"
  rows+=("$target|$std|$linker|$bytes|$glibc|$attributes|${took} s|$(sum "$dist/fieldpost-$target" | cut -c1-16)")
done
(cd "$dist" && sha256sum fieldpost-* > SHA256SUMS)
cross/check.sh --controls "$dist" >&2

say "$dist"
{
  echo "target|std|linker|bytes|glibc|attributes|built in|sha256"
  printf '%s\n' "${rows[@]}"
} | awk -F'|' '
  { for (i = 1; i <= NF; i++) { cell[NR, i] = $i; if (length($i) > width[i]) width[i] = length($i) } }
  END { for (n = 1; n <= NR; n++) { for (i = 1; i < NF; i++) printf "%-*s  ", width[i], cell[n, i]; print cell[n, NF] } }'
