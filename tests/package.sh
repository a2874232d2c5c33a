#!/usr/bin/env bash
# The life of a package in a real Debian: tests/package.sh [--suite bookworm] [DEB...]
#
# Installed, configured, run as its own user, upgraded while messages wait, removed, installed again, purged. A package for
# this machine in a container with a booted systemd; one for ARM in an emulated Debian without (qemu-user boots none).
# Without a DEB: this machine's, made by systemd/package.sh, and whether the same one comes out twice.
# Then packages that are spoilt on purpose: each must fail in the claim that it breaks.
#
# Debian is fetched once for each architecture, into target/debian. Needs root; installs what else it needs.
# Each line is a claim, as in TAP. Exit status 0 when every claim holds and every spoilt package was noticed.
set -euo pipefail

# ---- inside the container: inside NAME, with the packages in /package

inside() {
  export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive
  config=/etc/fieldpost/fieldpost.toml data=/var/lib/fieldpost received=/package/received
  number=0 failed=0
  last=$(cat /package/last)
  booted=''
  [ ! -d /run/systemd/system ] || booted=yes

  # claim TEXT COMMAND...: one line, and what the command printed when it does not hold.
  claim() {
    local text=$1 said
    shift
    number=$((number + 1))
    if said=$("$@" 2>&1); then
      echo "ok $number - $text"
    else
      echo "not ok $number - $text"
      sed 's/^/#   /' <<<"$said" | tail -n 20
      failed=1
    fi
    # Of a package that is spoilt on purpose nothing more is asked.
    if [ "$text" = "$last" ]; then
      echo "1..$number"
      exit $failed
    fi
  }
  # Asks until the command succeeds; a minute is far more than any of them needs, also in emulation.
  eventually() {
    local deadline=$((SECONDS + 60))
    until "$@" >/dev/null 2>&1; do
      [ $SECONDS -lt $deadline ] || { "$@"; return 1; }
      sleep 0.1
    done
  }
  is() { [ "$1" = "$2" ] || { echo "expected '$2', found '$1'"; return 1; }; }
  no() { ! "$@"; }
  said() { grep -q -- "$1" /package/said || { cat /package/said; return 1; }; }

  apt() { apt-get -qq -y --no-install-recommends -o Dpkg::Options::=--force-confold "$@" </dev/null >/package/said 2>&1 || { cat /package/said; return 1; }; }
  mode() { stat -c '%a %U:%G' "$1"; }
  groups_of() { id -nG "$1" | tr ' ' '\n' | sort | paste -sd ' '; }
  status() { dpkg-query -W -f '${db:Status-Status}' fieldpost 2>/dev/null || echo none; }
  version() { dpkg-query -W -f '${Version}' fieldpost; }

  # The agent: under systemd, or by hand as the package's user.
  start() {
    if [ -n "$booted" ]; then systemctl start fieldpost; else
      runuser -u fieldpost -- /usr/bin/fieldpost run "$config" >>/package/agent.log 2>&1 &
    fi
    eventually answers
  }
  answers() { fieldpost status >/dev/null; }
  agent() { pgrep -u fieldpost -x fieldpost; }
  stop() {
    if [ -n "$booted" ]; then systemctl stop fieldpost; else
      kill "$(agent)"
      eventually no agent
    fi
  }
  connected() { fieldpost status --json | grep -q '"state": *"connected"'; }
  waits() { fieldpost queue ls --json | awk -F: '/"messages"/ { sum += $2 } END { exit !(sum == '"$1"') }'; }

  # The broker, and a listener with a session of its own, so that nothing is missed while it is away.
  broker() {
    mosquitto -c /package/mosquitto.conf >>/package/mosquitto.log 2>&1 &
    mosquitto=$!
    eventually mosquitto_pub -h 127.0.0.1 -t about/broker -m up
  }
  no_broker() {
    kill "$mosquitto"
    wait "$mosquitto" || true
  }
  publish() { fieldpost publish --topic package/t --qos 2 "$1"; }
  arrives() { eventually grep -qx "$1" "$received"; }
  arrived_once() { is "$(grep -cx "$1" "$received")" 1; }

  edit() {
    sed -i -e '/^#url = /c url = "mqtt://127.0.0.1:1883"\nbackoff_max = "1s"' "$config"
  }

  # What comes with the program.
  comforts() {
    claim "man shows the program's page" sh -c 'man fieldpost | grep -q "EXIT STATUS"'
    claim "and every setting" sh -c 'man fieldpost.toml | grep -q failback_every'
    claim "without a warning" is "$(for page in /usr/share/man/man[15]/fieldpost*; do man --warnings "$page" 2>&1 >/dev/null; done)" ""
    claim "bash completes" bash -c '. /usr/share/bash-completion/completions/fieldpost && complete -p fieldpost'
    claim "zsh completes" zsh -fc 'autoload -U compinit && compinit -D -u && [ "$_comps[fieldpost]" = _fieldpost ]'
    claim "fish completes" fish -c 'complete -C "fieldpost q" | string match -q "queue*"'
    claim "udev takes the rules" rules_are_good
    echo 'SUBSYTEM=="tty", ENV{X}="1"' > /etc/udev/rules.d/71-misspelt.rules
    claim "udev would have refused a misspelt one" no rules_are_good
    rm /etc/udev/rules.d/71-misspelt.rules
  }
  # Since systemd 253 udev has a command for it; before, its rehearsal for any device reads every file.
  rules_are_good() {
    if udevadm verify --help >/dev/null 2>&1; then
      udevadm verify --no-style /usr/lib/udev/rules.d/70-fieldpost.rules /etc/udev/rules.d/
    else
      udevadm test /sys/class/tty/tty0 >/package/udev 2>&1 || true
      grep -q 'Reading rules file: .*/70-fieldpost.rules' /package/udev && ! grep -E '7[01]-[a-z]+\.rules:[0-9]+' /package/udev
    fi
  }

  # Debian's containers forbid that services start while packages are installed; this is about exactly that.
  rm -f /usr/sbin/policy-rc.d
  printf 'listener 1883 127.0.0.1\nallow_anonymous true\npersistence true\npersistence_location /package/broker/\nuser root\n' > /package/mosquitto.conf
  mkdir -p /package/broker
  : > "$received"

  # -- installed, and configured by nobody yet
  claim "an older version installs" apt install /package/old.deb
  claim "whoever installs is told what to do" said "Write your broker and your devices into $config"
  claim "the user can log in nowhere" is "$(getent passwd fieldpost | cut -d: -f7)" /usr/sbin/nologin
  claim "the user is in dialout and in no other group" is "$(groups_of fieldpost)" "dialout fieldpost"
  claim "the configuration's folder is closed to others" is "$(mode /etc/fieldpost)" "750 root:fieldpost"
  claim "the configuration can be read by the service and changed by root" is "$(mode $config)" "640 root:fieldpost"
  claim "the data folder is the service's" is "$(mode $data)" "750 fieldpost:fieldpost"
  claim "the configuration is a conffile" grep -qx "$config" /var/lib/dpkg/info/fieldpost.conffiles
  claim "the service is enabled for the next boot" test -e /etc/systemd/system/multi-user.target.wants/fieldpost.service
  claim "what is installed runs as its user" runuser -u fieldpost -- fieldpost --version
  check_unconfigured() { runuser -u fieldpost -- fieldpost check $config; is $? 78; }
  claim "the shipped configuration is refused with what is missing" check_unconfigured
  if [ -n "$booted" ]; then
    claim "nothing was started" is "$(systemctl is-active fieldpost)" inactive
    claim "nothing is called failed" no systemctl --quiet is-failed fieldpost
    claim "a start without a configuration is refused" no systemctl start fieldpost
    claim "and not tried again" is "$(systemctl show -P SubState fieldpost)" failed
    claim "the journal says what is missing" sh -c 'journalctl -u fieldpost --no-pager | grep -F "\`url\` is missing"'
    comforts
  fi

  # -- configured
  edit
  sum=$(sha256sum < $config)
  broker
  mosquitto_sub -h 127.0.0.1 -c -i listener -q 2 -t 'package/#' >> "$received" &
  claim "with a broker in its configuration the agent starts" start
  claim "as its own user" is "$(stat -c %U "/proc/$(agent)")" fieldpost
  claim "it connects" eventually connected
  claim "a message of QoS 2 is accepted" publish first
  claim "and arrives" arrives first

  # -- upgraded while a message waits
  no_broker
  claim "without a broker a message is accepted" publish across-the-upgrade
  claim "and waits" waits 1
  [ -n "$booted" ] || stop
  claim "the upgrade succeeds" apt install /package/new.deb
  claim "it is the new version" is "$(version)" "$(cat /package/version)"
  claim "the edited configuration is as it was" is "$(sha256sum < $config)" "$sum"
  claim "the new default is beside it" test -f $config.dpkg-dist
  if [ -n "$booted" ]; then
    claim "the new program runs after the upgrade" eventually sh -c 'cmp /proc/$(pgrep -u fieldpost -x fieldpost)/exe /usr/bin/fieldpost'
  else
    claim "the new program starts" start
  fi
  claim "the message still waits" eventually waits 1
  broker
  claim "it arrives once the broker is back" arrives across-the-upgrade

  # -- an upgrade that does not understand the configuration
  if [ -n "$booted" ]; then
    pid=$(agent)
    echo 'surprise = 1' >> $config
    claim "a version that refuses the configuration installs" apt install --reinstall /package/new.deb
    claim "whoever installs sees why" said surprise
    claim "and that the service goes on" said "goes on running"
    claim "the service that ran still runs" is "$(agent)" "$pid"
    sed -i '$d' $config
    # Variables of the service's environment may stand in the configuration.
    mkdir -p /etc/systemd/system/fieldpost.service.d
    printf '[Service]\nEnvironment=PLACE=hall2\n' > /etc/systemd/system/fieldpost.service.d/place.conf
    sed -i 's/^id = .*/id = "${PLACE}"/' $config
    systemctl daemon-reload
    systemctl restart fieldpost
    claim "the service runs with a variable in its configuration" eventually answers
    pid=$(agent)
    claim "a version that accepts it with that variable installs" apt install --reinstall /package/new.deb
    claim "and is started" eventually sh -c "test \"\$(pgrep -u fieldpost -x fieldpost)\" -ne $pid"
    rm -r /etc/systemd/system/fieldpost.service.d
    sed -i 's/^id = .*/id = "{hostname}"/' $config
    systemctl daemon-reload
    systemctl restart fieldpost
    claim "the service is back" eventually answers
  fi

  # -- removed and installed again
  sum=$(sha256sum < $config)
  no_broker
  claim "without a broker a message is accepted again" publish across-the-removal
  [ -n "$booted" ] || stop
  claim "the package can be removed" apt remove fieldpost
  claim "nothing of it runs" no agent
  claim "the program is gone" no test -e /usr/bin/fieldpost
  claim "its configuration is still there" is "$(sha256sum < $config)" "$sum"
  claim "its data are still there" test -s $data/outbox.db
  claim "it can be installed again" apt install /package/new.deb
  broker
  [ -n "$booted" ] || start
  claim "it runs again, as it is configured" eventually answers
  claim "what waited arrives" arrives across-the-removal

  # -- purged with nothing waiting
  claim "nothing waits" eventually waits 0
  [ -n "$booted" ] || stop
  claim "the package can be purged" apt purge fieldpost
  claim "the package is gone" is "$(status)" none
  claim "and the user" no getent passwd fieldpost
  rest() { find / -xdev \( -path /proc -o -path /sys -o -path /package -o -path /var/log -o -path /var/cache -o -path '/tmp/*' \) -prune -o -name '*fieldpost*' -print; }
  claim "and every file" is "$(rest)" ""

  # -- purged while messages wait
  claim "it can be installed as on the first day" apt install /package/new.deb
  edit
  no_broker
  claim "it starts without a broker" start
  claim "a message is accepted" publish across-the-purge
  [ -n "$booted" ] || stop
  claim "the package can be purged while it waits" apt purge fieldpost
  claim "whoever purges is told what was kept and where" said "$data is kept: 1 messages"
  claim "a purge keeps what was never delivered" test -s $data/outbox.db
  claim "for the same user" is "$(mode $data)" "750 fieldpost:fieldpost"
  claim "the package comes back" apt install /package/new.deb
  edit
  broker
  claim "it starts" start
  claim "what was kept arrives" arrives across-the-purge
  claim "a last message arrives" publish last
  claim "after all the others" arrives last
  for message in first across-the-upgrade across-the-removal across-the-purge last; do
    claim "$message arrived exactly once" arrived_once $message
  done

  # -- purged by somebody who says so
  no_broker
  claim "a message for nobody is accepted" publish for-nobody
  [ -n "$booted" ] || stop
  claim "the package can be purged with everything" env FIELDPOST_PURGE=1 apt-get -qq -y purge fieldpost
  claim "then what was never delivered is gone too" no test -e $data

  echo "1..$number"
  return $failed
}

if [ "${1:-}" = inside ]; then
  rc=0
  (inside) >/package/result 2>/package/errors || rc=1
  # Ends a booted container; without systemd the exit status is enough.
  [ ! -d /run/systemd/system ] || systemctl exit $rc
  exit $rc
fi

# ---- outside

here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here"
say() { printf '== %s\n' "$*"; }
die() {
  echo "tests/package.sh: $*" >&2
  exit 1
}

suite=bookworm packages=()
while [ $# -gt 0 ]; do
  case $1 in
    --suite) suite=$2; shift 2 ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit ;;
    *) [ -f "$1" ] || die "there is no $1"; packages+=("$(realpath "$1")"); shift ;;
  esac
done

[ "$(id -u)" -eq 0 ] || die "needs root, for containers of Debian"
missing=()
command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
command -v systemd-nspawn >/dev/null || missing+=(systemd-container)
command -v lintian >/dev/null || missing+=(lintian)
command -v readelf >/dev/null || missing+=(binutils)
command -v qemu-aarch64-static >/dev/null || missing+=(qemu-user-static)
command -v update-binfmts >/dev/null || missing+=(binfmt-support)
command -v arch-test >/dev/null || missing+=(arch-test)
if [ ${#missing[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || die "needs ${missing[*]}"
  say "installing ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

work=$(mktemp -d "$here/target/package-test.XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
own=$(dpkg --print-architecture)
failed=0

# A Debian of that architecture, from the cache or the network.
debian() {
  local architecture=$1 root=$here/target/debian/$suite-$1 with=adduser,procps,mosquitto,mosquitto-clients
  if [ "$architecture" = "$own" ]; then
    with+=,systemd,systemd-sysv,udev,man-db,bash-completion,zsh,fish
  elif [ ! -e "/proc/sys/fs/binfmt_misc/qemu-$(emulator "$architecture")" ]; then
    [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
    update-binfmts --import "qemu-$(emulator "$architecture")"
    update-binfmts --enable "qemu-$(emulator "$architecture")"
  fi
  if [ ! -e "$root.complete" ]; then
    say "fetching Debian $suite for $architecture" >&2
    rm -rf "$root"
    mkdir -p "$(dirname "$root")"
    mmdebstrap --quiet --variant=minbase --architectures="$architecture" --include="$with" "$suite" "$root" >&2
    # Empty: a container makes one of its own.
    : > "$root/etc/machine-id"
    touch "$root.complete"
  fi
  echo "$root"
}

emulator() {
  case $1 in
    arm64) echo aarch64 ;;
    armhf) echo arm ;;
    amd64) echo x86_64 ;;
  esac
}

# repack FROM TO COMMAND...: the package with a change, which the command makes in the folder it is unpacked in.
repack() {
  local from=$1 to=$2
  shift 2
  rm -rf "$work/tree"
  dpkg-deb -R "$from" "$work/tree"
  (cd "$work/tree" && "$@")
  dpkg-deb --root-owner-group -Zgzip -b "$work/tree" "$to" >/dev/null
}

# An older version: another program, which does the same, and another default configuration.
make_older() {
  sed -i 's/^Version: .*/Version: 0.0.1-1/' DEBIAN/control
  printf 'older' >> usr/bin/fieldpost
  echo '# This stood in an older version.' >> etc/fieldpost/fieldpost.toml
}

# live PACKAGE [CLAIM]: its life in a container, up to that claim; leaves the claims in $work/life/result.
live() {
  local package=$1 last=${2:-} architecture root life=$work/life rc=0
  architecture=$(dpkg-deb -f "$package" Architecture)
  root=$(debian "$architecture")
  rm -rf "$life"
  mkdir -p "$life"
  cp "$package" "$life/new.deb"
  repack "$package" "$life/old.deb" make_older
  dpkg-deb -f "$package" Version > "$life/version"
  echo "$last" > "$life/last"
  cp tests/package.sh "$life/"
  local container=(systemd-nspawn --quiet --directory="$root" --volatile=overlay --register=no --keep-unit
    --machine="fieldpost-package-$$" --link-journal=no --private-network --bind="$life:/package")
  if [ "$architecture" = "$own" ]; then
    printf '[Service]\nType=oneshot\nExecStart=/bin/bash /package/package.sh inside\n' > "$life/package.service"
    container+=(--bind-ro="$life/package.service:/etc/systemd/system/package.service" --boot systemd.unit=package.service)
  else
    container+=(--as-pid2 /bin/bash /package/package.sh inside)
  fi
  # systemd in the container wants control groups of version 2 also where the host has version 1.
  SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 timeout --kill-after=10 1200 "${container[@]}" </dev/null >"$life/log" 2>&1 || rc=$?
  if ! grep -q '^1\.\.' "$life/result" 2>/dev/null; then
    cat "$life/result" "$life/errors" 2>/dev/null || true
    tail -n 20 "$life/log"
    echo "not ok - the container came to the end (exit status $rc)"
    rc=1
  fi
  return $rc
}

# spoilt CLAIM COMMAND...: a package in which the command breaks something must fail in that claim.
spoilt() {
  local claim=$1
  shift
  repack "$native" "$work/spoilt.deb" "$@"
  live "$work/spoilt.deb" "$claim" >/dev/null || true
  if grep -qE "^not ok [0-9]+ - $claim\$" "$work/life/result"; then
    echo "ok - a spoilt package is noticed: $claim"
  else
    echo "not ok - a spoilt package is not noticed: $claim"
    sed 's/^/#   /' "$work/life/result" | grep -v '#   ok' || true
    failed=1
  fi
}
purge_everything() { sed -i 's/\[ "$waiting" != 0 \]/false/' DEBIAN/postrm; }
forget_the_conffile() { rm DEBIAN/conffiles; }
restart_whatever() { sed -i 's/if problems=$(check 2>&1); then/if problems=; then/' DEBIAN/postinst; }

if [ ${#packages[@]} -eq 0 ]; then
  systemd/package.sh
  package=$(ls -t target/package/*_"$own".deb | head -1)
  cp "$package" "$work/first.deb"
  systemd/package.sh
  if cmp -s "$package" "$work/first.deb"; then echo "ok - the same package comes out twice"; else
    echo "not ok - the same package comes out twice"
    failed=1
  fi
  packages=("$package")
fi

native=''
for package in "${packages[@]}"; do
  say "$(basename "$package"), $(stat -c %s "$package") bytes, in Debian $suite"
  if lintian --fail-on error,warning "$package"; then echo "ok - lintian finds no errors and no warnings"; else
    echo "not ok - lintian finds no errors and no warnings"
    failed=1
  fi
  live "$package" || failed=1
  cat "$work/life/result" 2>/dev/null || true
  [ "$(dpkg-deb -f "$package" Architecture)" != "$own" ] || native=$package
done

if [ -n "$native" ]; then
  say "packages that are spoilt on purpose"
  spoilt "a purge keeps what was never delivered" purge_everything
  spoilt "the edited configuration is as it was" forget_the_conffile
  spoilt "the service that ran still runs" restart_whatever
fi
exit $failed
