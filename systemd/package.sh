#!/usr/bin/env bash
# Debian packages: systemd/package.sh [--profile release|quick] [--program FILE] [amd64|arm64|armhf...]
#
# Without an architecture: this machine's. The program is built for it (cross/build.sh for another machine's), or is the
# FILE, which says itself what it is for. armhf is built for ARMv7; a package for a Raspberry Pi Zero or 1 comes of
# `cross/build.sh arm-unknown-linux-musleabihf` and its FILE. Packages come to target/package, with their line in SHA256SUMS.
# The same sources, program and SOURCE_DATE_EPOCH (default: the time of the commit) make the same bytes.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '== %s\n' "$*" >&2; }
die() {
  echo "systemd/package.sh: $*" >&2
  exit 1
}

profile=release program='' architectures=()
while [ $# -gt 0 ]; do
  case $1 in
    --profile) profile=$2; shift 2 ;;
    --program) program=$(realpath "$2"); shift 2 ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit ;;
    amd64 | arm64 | armhf) architectures+=("$1"); shift ;;
    *) die "knows no $1; see systemd/package.sh --help" ;;
  esac
done
command -v dpkg-deb >/dev/null || die "dpkg-deb is missing: it comes with Debian"
command -v readelf >/dev/null || die "readelf is missing: sudo apt-get install binutils"

# What a program is for, as Debian calls it.
architecture() {
  case $(readelf -h "$1" | sed -nE 's/^ *Machine: *//p') in
    *X86-64) echo amd64 ;;
    AArch64) echo arm64 ;;
    ARM) echo armhf ;;
    *) die "$1 is for none of amd64, arm64 and armhf" ;;
  esac
}

triple() {
  case $1 in
    amd64) echo x86_64-unknown-linux-gnu ;;
    arm64) echo aarch64-unknown-linux-gnu ;;
    armhf) echo armv7-unknown-linux-gnueabihf ;;
  esac
}

own=$(dpkg --print-architecture)
[ -z "$program" ] || architectures=("$(architecture "$program")")
[ ${#architectures[@]} -gt 0 ] || architectures=("$own")
version=$(sed -nE '/^\[package\]/,/^\[/s/^version = "(.*)"/\1/p' Cargo.toml)
maintainer=$(sed -nE '/^\[package.metadata.deb\]/,/^\[/s/^maintainer = "(.*)"/\1/p' Cargo.toml)
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export TZ=UTC LC_ALL=C.UTF-8

# A tool of its own, below target/: another project may want another version of it.
cargo_deb=3.8.0
tools=$PWD/target/tools
if [ "$("$tools/bin/cargo-deb" --version 2>/dev/null)" != "cargo-deb $cargo_deb" ]; then
  say "installing cargo-deb $cargo_deb into target/tools"
  cargo install cargo-deb --version "$cargo_deb" --locked --debug --root "$tools"
fi

# What a program is linked with, as Debian calls it: the newest version of glibc that it names is the oldest it runs on.
# Anything that is not known here must not be forgotten in a package.
depends() {
  local library found=''
  for library in $(readelf -dW "$1" | sed -nE 's/.*\(NEEDED\).*\[(.*)\]/\1/p'); do
    case $library in
      libc.so.6 | libm.so.6 | libpthread.so.0 | libdl.so.2 | librt.so.1 | ld-linux*) ;;
      libgcc_s.so.1) found=", libgcc-s1" ;;
      *) die "$1 needs $library: say in systemd/package.sh which package brings it" ;;
    esac
  done
  local glibc
  glibc=$(readelf -VW "$1" | grep -oE 'GLIBC_[0-9.]+' | sort -uV | tail -1 || true)
  # In the order in which cargo-deb writes them. A static program (ARMv6) needs no library.
  echo "adduser${glibc:+, libc6 (>= ${glibc#GLIBC_})}$found"
}

# CHANGELOG.md in Debian's form, which knows versions and dates, and lines of 80 characters.
changelog() {
  awk -v version="$version" -v maintainer="$maintainer" -v now="$(date -R -d "@$SOURCE_DATE_EPOCH")" '
    function wrapped(first, rest, text,    words, count, line, i) {
      count = split(text, words, " ")
      line = first words[1]
      for (i = 2; i <= count; i++) {
        if (length(line) + 1 + length(words[i]) > 78) { print line; line = rest words[i] }
        else line = line " " words[i]
      }
      print line
    }
    function signed() { if (date != "") printf "\n -- %s  %s\n\n", maintainer, date }
    /^## / {
      signed()
      name = $2; gsub(/[][]/, "", name)
      if (name == "Unreleased") { name = version; date = now }
      else { "date -R -d " $4 | getline date }
      printf "fieldpost (%s-1) unstable; urgency=medium\n\n", name
      next
    }
    date == "" || /^$/ { next }
    /^### / { printf "  * %s:\n", substr($0, 5); next }
    /^- / { wrapped("    - ", "      ", substr($0, 3)); next }
    { wrapped("  * ", "    ", $0) }
    END { signed() }' CHANGELOG.md
}

say "manual pages and completions"
rm -rf target/manual
cargo run --quiet --locked --example manual -- target/manual
changelog > target/manual/changelog
command -v python3 >/dev/null || die "python3 is missing: sudo apt-get install python3"

output=$PWD/target/package
mkdir -p "$output"
for architecture in "${architectures[@]}"; do
  triple=$(triple "$architecture")
  if [ -n "$program" ]; then
    built=$program
  elif [ "$architecture" = "$own" ]; then
    cargo build --locked --profile "$profile" --bin fieldpost
    built=target/$profile/fieldpost
  else
    cross/build.sh --profile "$profile" "$triple"
    built=target/cross/$([ "$profile" = release ] && echo dist || echo "$profile")/fieldpost-$triple
  fi

  # cargo-deb reads a manifest: this one, with what the program really depends on.
  stage=$output/$architecture
  rm -rf "$stage"
  mkdir -p "$stage/target/$triple/release"
  for part in CHANGELOG.md Cargo.lock LICENSE config examples src systemd tests; do
    ln -s "$PWD/$part" "$stage/$part"
  done
  ln -s "$PWD/target/manual" "$stage/target/manual"
  cp "$built" "$stage/target/$triple/release/fieldpost"
  python3 systemd/licences.py "$triple" | gzip -9n > target/manual/third-party.gz
  depends=$(depends "$built")
  sed -E "s/^depends = .*/depends = \"$depends\"/" Cargo.toml > "$stage/Cargo.toml"

  package=$output/fieldpost_$version-1_$architecture.deb
  (cd "$stage" && CARGO_TARGET_DIR=$stage/target "$tools/bin/cargo-deb" --quiet --no-build --no-strip \
    --target "$triple" --output "$package")
  [ "$(dpkg-deb -f "$package" Depends)" = "$depends" ] ||
    die "$package depends on '$(dpkg-deb -f "$package" Depends)', and its program on '$depends'"
  rm -rf "$stage"
  say "$package: $(stat -c %s "$package") bytes; $depends"
done
(cd "$output" && sha256sum -- *.deb > SHA256SUMS)
