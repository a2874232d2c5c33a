#!/usr/bin/env bash
# Runs a gateway's program on this machine, emulated:
#   cross/test.sh TARGET [--smoke|--suite] [--profile release|quick] [--lib] [--test NAME]... [PART_OF_A_NAME]...
#
# First the program of cross/build.sh: its version, a configuration checked, and 400 messages at QoS 2 to a real
# mosquitto, with a SIGKILL between them, counted at a subscriber. On ARMv6 the processor is that of a Pi Zero.
# Then the test suite, built for the target. What follows chooses of it: `--lib --test power`. `--smoke` is the first
# part alone, `--suite` the second.
# Tests that emulation cannot do are in `left-out`, with reasons, and are named when they are left out.
#
# The emulator is the machine's, or Debian's unpacked into target/cross. Nothing is registered with the kernel: the
# tests start programs by FIELDPOST_TEST_RUNNER. FIELDPOST_TEST_PATIENCE multiplies how long tests wait.
set -euo pipefail
cd "$(dirname "$0")/.."
source=$PWD
. cross/toolchain.sh

target=${1:-}
[ $# -gt 0 ] && shift
smoke=yes suite=yes profile=release
while [ $# -gt 0 ]; do
  case $1 in
    --smoke) suite=''; shift ;;
    --suite) smoke=''; shift ;;
    --profile) profile=$2; shift 2 ;;
    *) break ;;
  esac
done
export PATH="$PATH:/usr/sbin"

case $target in
  aarch64-unknown-linux-gnu) emulator=qemu-aarch64 sysroot=aarch64-linux-gnu packages=libc6-arm64-cross ;;
  armv7-unknown-linux-gnueabihf) emulator=qemu-arm sysroot=arm-linux-gnueabihf packages=libc6-armhf-cross ;;
  arm-unknown-linux-musleabihf) emulator=qemu-arm sysroot='' packages='' ;;
  *) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 1 ;;
esac

# ---- the emulator --------------------------------------------------------------------------------------------

emulated=$cache/emulated
program_of() { if have "$1"; then command -v "$1"; elif [ -x "$emulated/usr/bin/$1" ]; then echo "$emulated/usr/bin/$1"; fi; }
if [ -z "$(program_of "$emulator-static")" ]; then
  private_apt "$(dpkg --print-architecture)" || die "$emulator-static is missing: install qemu-user-static"
  say "fetching the emulator"
  unpack "$(dpkg --print-architecture)" "$emulated" qemu-user-static
fi
runner="$(program_of "$emulator-static")"
case $target in arm-*) runner+=" -cpu arm1176" ;; esac
if [ -n "$sysroot" ]; then
  libraries=/usr/$sysroot
  if [ ! -d "$libraries/lib" ]; then
    libraries=$emulated/usr/$sysroot
    if [ ! -d "$libraries/lib" ]; then
      private_apt "$(dpkg --print-architecture)" || die "The C library of $target is missing: install $packages"
      say "fetching the C library of $target"
      unpack "$(dpkg --print-architecture)" "$emulated" "$packages"
    fi
  fi
  runner+=" -L $libraries"
fi

# ---- the program ---------------------------------------------------------------------------------------------

have mosquitto || install mosquitto mosquitto
have mosquitto_sub || install mosquitto_sub mosquitto-clients

dist=$cache/dist
[ "$profile" = release ] || dist=$cache/$profile
program=$dist/fieldpost-$target
[ -z "$smoke" ] || [ -x "$program" ] || die "There is no $program: build it with cross/build.sh --profile $profile $target"

MESSAGES=400
folder=$(mktemp -d)
started=()
finish() {
  for process in "${started[@]}"; do kill "$process" 2>/dev/null || true; done
  rm -rf "$folder"
}
trap finish EXIT

fieldpost() { $runner "$program" "$@"; }
until_true() { # SECONDS WHAT COMMAND...
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    [ "$SECONDS" -lt "$deadline" ] || die "never $what" "$(tail -n 20 "$folder"/*.log)"
    sleep 0.2
  done
}
start_agent() {
  "${emulate[@]}" "$program" run "$folder/fieldpost.toml" 2>>"$folder/agent.log" &
  agent=$!
  started+=("$agent")
  until_true 60 "answered by the agent" answers
}
answers() { fieldpost status --config "$folder/fieldpost.toml" >/dev/null 2>&1; }
delivered() { [ "$(wc -l < "$folder/received")" -ge "$MESSAGES" ]; }
subscribed() { grep -q 'Sending SUBACK to watch' "$folder/mosquitto.log" 2>/dev/null; }

# Messages to a broker and one SIGKILL; the arguments are the emulator of the agent itself.
deliver() {
  local port emulate=("$@")
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  find "$folder" -mindepth 1 -delete
  printf '%s\n' "listener $port 127.0.0.1" "allow_anonymous true" "log_type all" "log_dest file $folder/mosquitto.log" \
    "max_inflight_messages 0" "max_queued_messages 0" > "$folder/mosquitto.conf"
  [ "$(id -u)" -ne 0 ] || echo "user root" >> "$folder/mosquitto.conf"
  printf '%s\n' '[gateway]' 'id = "g1"' '[broker]' "url = \"mqtt://127.0.0.1:$port\"" 'backoff_max = "1s"' \
    '[store]' 'path = "outbox.db"' > "$folder/fieldpost.toml"
  fieldpost check "$folder/fieldpost.toml"
  mosquitto -c "$folder/mosquitto.conf" 2>"$folder/broker.log" &
  started+=($!)
  until_true 20 "listened by mosquitto" grep -qs running "$folder/mosquitto.log"
  mosquitto_sub -p "$port" -i watch -q 2 -t x/y > "$folder/received" &
  started+=($!)
  until_true 20 "subscribed" subscribed
  start_agent
  seq 1 $((MESSAGES / 2)) | fieldpost publish --topic x/y --qos 2 --count --config "$folder/fieldpost.toml"
  kill -9 "$agent"
  wait "$agent" 2>/dev/null || true
  start_agent
  seq $((MESSAGES / 2 + 1)) $MESSAGES | fieldpost publish --topic x/y --qos 2 --count --config "$folder/fieldpost.toml"
  until_true 120 "delivered" delivered
  kill -TERM "$agent"
  wait "$agent" || die "the agent did not stop well" "$(tail -n 20 "$folder/agent.log")"
  diff <(seq 1 $MESSAGES) "$folder/received" >&2 || die "not every message came once and in order"
  echo "$MESSAGES of $MESSAGES messages came once and in order, past a SIGKILL"
}

run_program() {
  say "$target under $(basename "${runner%% *}")$(case $target in arm-*) echo " -cpu arm1176" ;; esac)"
  fieldpost --version
  # shellcheck disable=SC2086
  deliver $runner

  # A clock that was set wrong, past the end of 32 bits: the emulator itself is lied to, so that static programs are too.
  case $target in
    arm*)
      if [ ! -x "$emulated/usr/bin/$emulator" ]; then
        private_apt "$(dpkg --print-architecture)" || die "$emulator is missing"
        # shellcheck disable=SC2046
        unpack "$(dpkg --print-architecture)" "$emulated" qemu-user $(missing_libraries qemu-user | grep -v '^qemu')
      fi
      lies=$cache/lies
      mkdir -p "$lies"
      cc -shared -fPIC -O1 -o "$lies/shim.so" tests/support_faults/shim.c -ldl
      python3 -c 'import struct, sys, time
sys.stdout.buffer.write(struct.pack("<10q", *[0] * 6, (2_240_000_000 - int(time.time())) * 1000, *[0] * 3))' > "$lies/switches"
      say "the same in the year 2040"
      # shellcheck disable=SC2086
      deliver env "LD_PRELOAD=$lies/shim.so" "FIELDPOST_TEST_FAULTS=$lies/switches" \
        "LD_LIBRARY_PATH=$(echo "$emulated"/usr/lib/*-linux-gnu)" \
        "$emulated/usr/bin/$emulator" -U LD_PRELOAD -U LD_LIBRARY_PATH ${runner#*-static}
      grep -q '^2040-' "$folder/agent.log" || die "the agent's clock does not say 2040" "$(tail -n 5 "$folder/agent.log")" ;;
  esac
}
[ -z "$smoke" ] || run_program
[ -n "$suite" ] || exit 0

# ---- the tests -----------------------------------------------------------------------------------------------

cargo nextest --version >/dev/null 2>&1 || die "cargo-nextest is missing: cargo install --locked cargo-nextest"
[ -n "$sysroot" ] || die "The test suite is for targets with glibc: its faults are preloaded libraries."
prepare "$source" "$cache/build" "$target" std,panic_unwind,test,proc_macro
name=${target//-/_}
cc=$cache/bin/cc-$target
[[ $linker = zig* ]] || cc=$(gcc_of "$target")-gcc
environment+=("CARGO_TARGET_${name^^}_RUNNER=$runner" "FIELDPOST_TEST_RUNNER=$runner"
  "FIELDPOST_TEST_CC=$cc" "FIELDPOST_TEST_PATIENCE=${FIELDPOST_TEST_PATIENCE:-4}")
nextest() {
  local command=$1
  shift
  env "${environment[@]}" cargo nextest "$command" --locked --profile emulated --target "$target" "${options[@]}" "$@"
}

serial_works() {
  env "${environment[@]}" "$cc" -O1 -o "$folder/probe" cross/probe.c 2>"$folder/probe.log" || die "$(cat "$folder/probe.log")"
  $runner "$folder/probe"
}
# A filter would be joined with those below by "or".
parts=()
for argument in "$@"; do
  case $argument in -E | --filterset*) die "Say which tests by --lib, --test NAME or a part of their names, not by -E." ;; esac
  parts+=("$argument")
done
say "building the tests"
nextest list --message-format oneline "${parts[@]}" >"$folder/all"
left_out=none'()'
while IFS=';' read -r filter why; do
  filter=${filter%% } why=${why# }
  case $filter in
    '' | '#'*) continue ;;
    '[serial] '*)
      filter=${filter#*] }
      if said=$(serial_works); then continue; fi
      why+=" ($said)" ;;
  esac
  printf '\nleft out: %s\n' "$why"
  nextest list --message-format oneline -E "$filter" "${parts[@]}" 2>/dev/null | sed 's/^/  /'
  left_out+=" or ($filter)"
done < cross/left-out
say "$(wc -l < "$folder/all") tests, less those above"
nextest run --no-fail-fast -E "not ($left_out)" "${parts[@]}"
