#!/usr/bin/env bash
# The service under a real systemd: boots one in a container made for it, with a real mosquitto, and shows what
# systemd/fieldpost.service promises as TAP.
#
# usage: tests/systemd.sh [BINARY]                  default: target/debug/fieldpost
#        tests/systemd.sh --without restart|feed|clock [BINARY]
#                                                   a negative control: a unit without Restart=, a watchdog that is not
#                                                   fed, a time service that has not set the clock; it must fail
#        tests/systemd.sh --controls [BINARY]       every control; succeeds when each fails where it must
#
# Exit status 0: everything holds; 1: something does not; 77: it could not be tried here, and why is said.
# Needs root, and of Debian systemd-container and mmdebstrap, which it installs where they are missing. The container's
# files (300 MB, made once) are kept in target/systemd-rootfs. What runs inside is tests/support_systemd/inside.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

# Longest run of one container, in seconds.
most=300
suite=${SUITE:-bookworm}
root=${CARGO_TARGET_DIR:-target}/systemd-rootfs
packages=systemd,systemd-sysv,dbus,procps,mosquitto,mosquitto-clients

fail() {
    echo "Bail out! $*"
    exit 1
}
# For a machine on which no container can be made.
cannot() {
    echo "Bail out! NOT RUN: $*"
    exit 77
}

install_missing() {
    local missing=()
    command -v systemd-nspawn >/dev/null || missing+=(systemd-container)
    command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
    [ ${#missing[@]} = 0 ] && return
    command -v apt-get >/dev/null || cannot "missing: ${missing[*]} (names of Debian's packages)"
    echo "# installing ${missing[*]}" >&2
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
        >&2 || cannot "${missing[*]} cannot be installed"
}

# A Debian with systemd and mosquitto. Its last step is the mark that it is complete.
make_root() {
    [ -e "$root/complete-$packages" ] && return
    rm -rf "$root"
    mkdir -p "$(dirname "$root")"
    echo "# making $root, once" >&2
    mmdebstrap --quiet --variant=minbase --include="$packages" "$suite" "$root" >&2 || cannot "mmdebstrap could not make $root"
    # Empty, so that systemd makes a new one with each boot.
    : >"$root/etc/machine-id"
    # mosquitto is started by the test.
    rm -f "$root"/etc/systemd/system/multi-user.target.wants/*
    touch "$root/complete-$packages"
}

# One container, from boot to poweroff; its TAP on standard output.
run() {
    local binary=$1 without=$2 share status=0
    share=$(mktemp -d)
    # shellcheck disable=SC2064 # as it is now
    trap "rm -rf '$share'" RETURN
    install -m755 "$binary" "$share/fieldpost"
    install -m644 systemd/fieldpost.service "$share/fieldpost.service"
    install -m644 systemd/fieldpost.sysusers "$share/fieldpost.conf"
    install -m755 tests/support_systemd/inside.sh "$share/inside.sh"
    : >"$share/tap"
    mkdir "$share/dropin"
    case $without in
    restart) sed -i '/^Restart=/d' "$share/fieldpost.service" ;;
    feed) printf '[Service]\nUnsetEnvironment=WATCHDOG_USEC\n' >"$share/dropin/control.conf" ;;
    clock) : >"$share/no-time-service" ;;
    esac
    printf '[Unit]\nAfter=dbus.service\n[Service]\nType=oneshot\nExecStart=/ci/inside.sh\nStandardOutput=null\n' \
        >"$share/ci.service"
    # --volatile=overlay: the container's files are never written, each run begins anew. --register=no --keep-unit: no
    # systemd is needed outside. The variable: a cgroup of version 2 inside, whatever is outside. The system calls are
    # those by which the clock is asked, so that it is the unit that forbids them and not the container.
    SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 timeout --kill-after=10 "$most" systemd-nspawn --quiet --directory="$root" \
        --volatile=overlay --register=no --keep-unit --machine="fieldpost-$$" --link-journal=no --private-network \
        --system-call-filter="adjtimex clock_adjtime clock_adjtime64" \
        --bind="$share:/ci" --bind-ro="$share/fieldpost:/usr/bin/fieldpost" \
        --bind-ro="$share/fieldpost.service:/usr/lib/systemd/system/fieldpost.service" \
        --bind-ro="$share/fieldpost.conf:/usr/lib/sysusers.d/fieldpost.conf" \
        --bind-ro="$share/ci.service:/etc/systemd/system/ci.service" \
        --boot systemd.unit=ci.service systemd.wants=dbus.service </dev/null >"$share/boot" 2>&1 || status=$?
    cat "$share/tap"
    if ! [ -s "$share/tap" ]; then
        sed 's/^/# /' "$share/boot" | tail -30
        cannot "systemd did not boot in a container here (systemd-nspawn: $status)"
    fi
    [ "$status" = 0 ]
}

# Every control, with the line at which it must fail.
controls() {
    local outcome=0 tap what line
    while IFS='|' read -r what line; do
        tap=$(run "$1" "$what") && tap+=$'\n(it succeeded)'
        printf '# without %s:\n%s\n' "$what" "$tap"
        if grep -q "^not ok [0-9]* - $line" <<<"$tap" && [ "$(grep -c '^not ok' <<<"$tap")" = 1 ]; then
            echo "ok - without $what it fails where it must: $line"
        else
            echo "not ok - without $what it fails, and at: $line"
            outcome=1
        fi
    done <<'CONTROLS'
restart|killed with SIGKILL it is started again
feed|the watchdog is fed
clock|the clock is right once the time service says so
CONTROLS
    return $outcome
}

without=none
case ${1:-} in
--controls) without=every; shift ;;
--without)
    without=${2:-}
    case $without in restart | feed | clock) ;; *) fail "--without restart, --without feed or --without clock" ;; esac
    shift 2
    ;;
-*) fail "unknown: $1" ;;
esac
binary=${1:-${CARGO_TARGET_DIR:-target}/debug/fieldpost}
[ -x "$binary" ] || fail "$binary is not there: cargo build"
[ "$(id -u)" = 0 ] || cannot "a container needs root"
install_missing
make_root
case $without in
every) controls "$binary" ;;
*) run "$binary" "$without" ;;
esac
