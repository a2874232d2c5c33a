# What compiles for the gateways: found on this machine, or fetched below target/cross. For build.sh and test.sh to
# source; it changes nothing else on the machine, except that root may install Debian packages that are missing.
#
# The standard library of a target, in this order: rustup's, where the target is installed; Debian's, unpacked with the
# compiler of the same version; the sources that Debian ships with it, built on the way; the `cross` tool.
# The linker and C compiler is zig, which carries glibc's symbols of every version; else Debian's cross compiler.
#
# bash, not sh: dash drops environment variables with a hyphen in their name, and CARGO_BIN_EXE_* may have one.

GLIBC=2.28 # the oldest that must do: Raspberry Pi OS 10, Debian 10
RUST_MIN=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$source/Cargo.toml")
cache=${FIELDPOST_CROSS_CACHE:-$source/target/cross}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

say() { printf '\n== %3d s  %s\n' "$SECONDS" "$*" >&2; }
die() { printf '\n%s\n' "$@" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -1)" = "$2" ]; }

# ---- Debian packages ---------------------------------------------------------------------------------------

apt_is_fresh=
# Installs packages for a program that is missing; whoever is not root is told which.
install() {
  local what=$1
  shift
  if [ "$(id -u)" -ne 0 ] || ! have apt-get; then
    die "$what is missing. On Debian: sudo apt-get install $*"
  fi
  say "installing $*"
  [ -n "$apt_is_fresh" ] || apt-get update -qq || true
  apt_is_fresh=yes
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# An apt of our own for one architecture, so that foreign ones are neither known to this machine's nor able to break it:
# where one list of packages is stale at the mirror, apt has none of that archive. Sources and proxies are this machine's.
private() {
  local arch=$1
  shift
  APT_CONFIG=$cache/apt/$arch/apt.conf "$@"
}
private_apt() {
  local arch=$1 own=$cache/apt/$1 native key=/usr/share/keyrings/debian-archive-keyring.gpg uri release component
  [ ! -f "$own/ready" ] || return 0
  have apt-get && have dpkg || return 1
  native=$(dpkg --print-architecture)
  if [ -f $key ]; then key=" signed-by=$key"; else key=; fi
  rm -rf "$own"
  mkdir -p "$own"/{lists/partial,cache/archives/partial}
  apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Identifier: Packages' | sort -u |
    while read -r uri release component; do
      if [[ $uri = *debian* && $component = main ]]; then
        echo "deb [arch=$arch target=Packages lang=none$key] $uri $release $component"
      fi
    done > "$own/sources.list"
  [ -s "$own/sources.list" ] || return 1
  cat > "$own/apt.conf" <<CONF
Dir::Etc::sourcelist "$own/sources.list";
Dir::Etc::sourceparts "-";
Dir::State "$own";
Dir::State::lists "$own/lists";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "$own/cache";
APT::Architecture "$native";
APT::Architectures { "$native"; "$arch"; };
APT::Sandbox::User "root";
Acquire::Retries "2";
CONF
  say "reading Debian's list of packages for $arch"
  private "$arch" apt-get update -qq && touch "$own/ready"
}

# The newest version of a package that Debian has here; nothing if it has none.
candidate() { private "$1" apt-cache policy "$2" 2>/dev/null | awk '/Candidate:/ && $2 != "(none)" { print $2 }'; }

# Packages that the named ones need and this machine has not, without the C library.
missing_libraries() {
  private "$(dpkg --print-architecture)" apt-get -s --no-install-recommends install "$@" 2>/dev/null |
    awk '/^Inst / { print $2 }' | grep -vE '^(libc6|libc-bin|libgcc-s1|libstdc\+\+6|gcc-[0-9]+-base)(:|$)' || true
}

# Downloads packages of an architecture and unpacks them into a folder. Nothing is installed.
unpack() {
  local arch=$1 into=$2 debs deb
  shift 2
  debs=$(mktemp -d "$cache/debs.XXXXXX")
  (cd "$debs" && private "$arch" apt-get -qq download "$@") || { rm -rf "$debs"; return 1; }
  mkdir -p "$into"
  for deb in "$debs"/*.deb; do dpkg -x "$deb" "$into"; done
  rm -rf "$debs"
}

# ---- compilers -----------------------------------------------------------------------------------------------

need_cargo() {
  have cargo || install "cargo, $RUST_MIN or newer (https://rustup.rs)," cargo-web
  local version
  version=$(cargo --version | cut -d' ' -f2)
  at_least "$version" "$RUST_MIN" || die "cargo is $version, and $RUST_MIN or newer is needed: https://rustup.rs"
}

# Debian's compiler with the standard libraries of its architectures, all of one version: they load into no other.
# Fails where there is none that is new enough.
debian_rust() {
  rust=$cache/debian
  [ ! -f "$rust/ready" ] || return 0
  have dpkg || return 1
  local arch foreign version short
  arch=$(dpkg --print-architecture)
  private_apt "$arch" || return 1
  version=$(candidate "$arch" rustc-web)
  [ -n "$version" ] && at_least "$version" "$RUST_MIN" || return 1
  short=$(echo "$version" | cut -d. -f1,2)
  say "fetching Debian's Rust $version, about 170 MB"
  rm -rf "$rust"
  # shellcheck disable=SC2046
  unpack "$arch" "$rust" "rustc-web=$version" "libstd-rust-web-$short=$version" "libstd-rust-web-dev=$version" \
    "rust-web-src=$version" $(missing_libraries "libstd-rust-web-$short=$version" | grep -v '^libstd-rust-web') || return 1
  for foreign in arm64 armhf; do
    [ "$foreign" != "$arch" ] || continue
    # What is not there at this version is built from the sources.
    { private_apt "$foreign" && unpack "$foreign" "$rust" "libstd-rust-web-dev:$foreign=$version"; } ||
      say "Debian has no library of $version for $foreign here now"
  done
  LD_LIBRARY_PATH=$(echo "$rust"/usr/lib/*-linux-gnu) "$rust/usr/bin/rustc" --version > "$rust/version" || return 1
  touch "$rust/ready"
}

# zig as linker and C compiler, and what translates rustc's arguments for it: at the versions in requirements.txt.
zig_tools() {
  zig=$cache/zig
  local wanted
  wanted=$(sha256sum "$source/cross/requirements.txt" | cut -d' ' -f1)
  if [ "$(cat "$zig/wanted" 2>/dev/null)" != "$wanted" ]; then
    python3 -c 'import venv, ensurepip' 2>/dev/null || install "Python's venv" python3-venv
    say "fetching zig, about 100 MB"
    python3 -m venv --clear "$zig" &&
      "$zig/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$source/cross/requirements.txt" ||
      return 1
    echo "$wanted" > "$zig/wanted"
  fi
  zig_program=$(echo "$zig"/lib/python3*/site-packages/ziglang/zig)
  [ -x "$zig_program" ]
}

# What zig is told for a target: its name, and the processor that rustc assumes.
zig_flags() {
  case $1 in
    aarch64-unknown-linux-gnu) echo "-target aarch64-linux-gnu.$GLIBC" ;;
    armv7-unknown-linux-gnueabihf)
      echo "-target arm-linux-gnueabihf.$GLIBC -mcpu=generic+v7a+vfp3-d32+thumb2-neon" ;;
    arm-unknown-linux-musleabihf) echo "-target arm-linux-musleabihf -mcpu=generic+v6+strict_align+vfp2-d32" ;;
    *) return 1 ;;
  esac
}

# Debian's cross compilers; none for ARMv6, for which theirs links code of ARMv7.
gcc_of() {
  case $1 in
    aarch64-unknown-linux-gnu) echo aarch64-linux-gnu ;;
    armv7-unknown-linux-gnueabihf) echo arm-linux-gnueabihf ;;
    *) return 1 ;;
  esac
}

executable() { cat > "$1.new" && chmod +x "$1.new" && mv "$1.new" "$1"; }

# ---- one target ----------------------------------------------------------------------------------------------

# Sets what cargo needs to build the sources in a folder into another for a target: `std`, `compiler` and `linker` in
# words, `environment` and `options` for cargo. The crates of a library that is built are the last argument.
prepare() {
  local folder=$1 into=$2 target=$3 crates=$4 name upper cc ar flags seconds='' home=${CARGO_HOME:-$HOME/.cargo} rustflags=()
  name=${target//-/_}
  upper=${name^^}
  environment=() options=() std='' linker='' compiler=''
  have cc || install "a C compiler" gcc libc6-dev
  need_cargo

  if have rustup && [[ " $(rustup target list --installed 2>/dev/null | xargs) " = *" $target "* ]]; then
    std=rustup
    compiler=$(rustc --version)
  elif debian_rust; then
    compiler=$(cat "$rust/version")
    environment+=("RUSTC=$rust/usr/bin/rustc" "LD_LIBRARY_PATH=$(echo "$rust"/usr/lib/*-linux-gnu)")
    if [ -d "$rust/usr/lib/rustlib/$target/lib" ]; then
      std=Debian
    else
      std=built
      environment+=(RUSTC_BOOTSTRAP=1)
      options+=("-Zbuild-std=$crates")
    fi
  elif have cross && { docker info || podman info; } >/dev/null 2>&1; then
    std=cross linker=container
    return
  else
    die "There is no standard library for $target. One of:" "  rustup target add $target" \
      "  Debian 12 or newer, whose rustc-web is fetched by itself" "  the cross tool with docker or podman"
  fi

  if zig_tools; then
    linker="zig $("$zig_program" version)"
    cc=$cache/bin/cc-$target ar=$cache/bin/ar
    mkdir -p "$cache/bin"
    executable "$ar" <<SCRIPT
#!/bin/sh
exec "$zig_program" ar "\$@"
SCRIPT
    executable "$cc" <<SCRIPT
#!/bin/sh
exec "$zig/bin/cargo-zigbuild" zig cc -- -fno-sanitize=all $(zig_flags "$target") "\$@"
SCRIPT
    environment+=("CARGO_ZIGBUILD_ZIG_PATH=$zig_program" "ZIG_GLOBAL_CACHE_DIR=$cache/zig-cache"
      "CARGO_ZIGBUILD_ZIG_VERSION=$("$zig_program" version)"
      "CARGO_ZIGBUILD_RUSTC_VERSION=$(echo "$compiler" | cut -d' ' -f2)"
      "CARGO_ZIGBUILD_CACHE_DIR=$cache/zigbuild")
  elif gcc_of "$target" >/dev/null; then
    cc=$(gcc_of "$target")-gcc ar=$(gcc_of "$target")-ar
    have "$cc" || install "$cc" "gcc-$(gcc_of "$target")" "libc6-dev-$([[ $target = aarch64* ]] && echo arm64 || echo armhf)-cross"
    linker="gcc $("$cc" -dumpversion)"
    # From glibc 2.33 on a 32-bit SQLite learns nothing of files dated after 2038, unless it counts seconds in 64 bits.
    if [[ $target = arm* ]]; then seconds=" -D_TIME_BITS=64 -D_FILE_OFFSET_BITS=64"; fi
  else
    die "There is no linker for $target: zig could not be fetched from PyPI (cross/requirements.txt)."
  fi
  # rustc's own start-up objects are only in rustup's library; zig brings its own.
  if [[ $target = *-musl* ]]; then rustflags+=("-Clink-self-contained=no"); fi

  # Paths of the machine that builds are nobody's business, and would make every build another one. The last that fits
  # counts, and each of these may lie within the one before.
  flags="-g0$seconds"
  local map
  for map in "$cache=/cache" "$folder=/fieldpost" "$into=/target" "$home=/cargo" "$cache/debian=/rust"; do
    rustflags+=("--remap-path-prefix=$map")
    flags+=" -ffile-prefix-map=$map"
  done
  environment+=("CC_$name=$cc" "AR_$name=$ar" "CFLAGS_$name=$flags" "CARGO_TARGET_${upper}_LINKER=$cc"
    "CARGO_TARGET_DIR=$into"
    "CARGO_ENCODED_RUSTFLAGS=$(IFS=$'\x1f'; echo "${rustflags[*]}")")
}
