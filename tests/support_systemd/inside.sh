#!/bin/bash
# Runs inside the container of tests/systemd.sh, as a unit of its systemd. Writes TAP to /ci/tap and ends the container
# with exit status 0 or 1. It stops at the first thing that does not hold, and shows what the machine says about it.
#
# Nothing is slept for: each condition has a deadline, and what must not happen is watched for as long as it takes.
set -u
exec >>/ci/tap 2>&1

unit=fieldpost.service
unit_file=/usr/lib/systemd/system/fieldpost.service
dropins=/etc/systemd/system/fieldpost.service.d
config=/etc/fieldpost/fieldpost.toml
password=c4nary-p4ssword
# Highest exposure of `systemd-analyze security`, in tenths: see the unit for what is allowed and why.
exposure_max=15
# Seconds within which anything happens, on a busy machine.
patience=60
n=0

is() { systemctl show --property "$1" --value "$unit"; }
pid() { is MainPID; }

# Whether the condition holds within so many seconds.
within() {
    local end=$((SECONDS + $1))
    until eval "$2"; do
        [ $SECONDS -lt $end ] || return 1
        read -rt 0.1 <>/ci/never
    done
    return 0 # not what the read gave
}

ok() {
    n=$((n + 1))
    if eval "$2"; then
        echo "ok $n - $1"
    else
        echo "not ok $n - $1"
        {
            systemctl show "$unit" -p ActiveState,SubState,Result,StatusText,MainPID,NRestarts,ExecMainStatus
            journalctl --no-pager --output short-monotonic | grep -v audit | tail -40
            [ -e /run/probe ] && cat /run/probe
        } | sed 's/^/#   /'
        echo "1..$n"
        systemctl --no-block exit 1
        exit 1
    fi
}

mkfifo /ci/never
began=$SECONDS
systemctl start dbus.service
echo "# $(systemctl --version | head -1)"

# ---- the machine: user, configuration, secret, broker

systemd-sysusers
install -d -m750 -o root -g fieldpost /etc/fieldpost
cat >$config <<TOML
[gateway]
id = "g1"
[broker]
url = "mqtt://127.0.0.1:1883"
username = "g1"
password_file = "broker.password"
backoff_max = "1s"
[[modbus]]
name = "line1"
transport = "rtu"
device = "/run/serial"
[[modbus.unit]]
name = "meter1"
unit = 1
every = "1s"
points = [{ name = "a", register = "input", address = 0, type = "u16" }]
TOML
chgrp fieldpost $config
chmod 640 $config
cp $config /root/good.toml
# What the group dialout alone may open; it is no serial port, which is found out after it was opened.
install -m660 -g dialout /dev/null /run/serial
install -d -m700 /etc/credstore
(umask 077 && printf '%s\n' $password >/etc/credstore/fieldpost.broker.password)
useradd --groups fieldpost technician
useradd stranger
mkdir -p $dropins
# Shorter than a gateway's, so that the test is.
printf '[Service]\nWatchdogSec=6s\n' >$dropins/test.conf
cp /ci/dropin/* $dropins/ 2>/dev/null
mosquitto_passwd -b -c /run/mosquitto.users g1 $password
mosquitto_passwd -b /run/mosquitto.users watch watch
chown mosquitto /run/mosquitto.users
printf '%s\n' 'listener 1883 127.0.0.1' 'password_file /run/mosquitto.users' 'max_queued_messages 0' \
    'max_inflight_messages 0' >/run/mosquitto.conf
systemd-run --quiet --unit=broker mosquitto -c /run/mosquitto.conf
hear() { mosquitto_sub -h 127.0.0.1 -u watch -P watch "$@"; }
within $patience 'hear -t x -W 1 -E 2>/dev/null' || echo "# mosquitto does not answer"
systemctl daemon-reload

# ---- start

ok "the unit is clean: systemd-analyze verify" \
    'said=$(systemd-analyze verify --man=no $unit 2>&1) && [ -z "$said" ] || { echo "# $said"; false; }'
figure=$(systemd-analyze security --offline=true --no-pager $unit_file | tail -1)
echo "# ${figure#*→ }"
ok "its exposure is at most $((exposure_max / 10)).$((exposure_max % 10))" \
    'systemd-analyze security --offline=true --threshold=$exposure_max $unit_file >/dev/null'
start_ms=$(date +%s%3N)
ok "start waits until it is ready" 'systemctl start $unit && [ "$(is ActiveState)" = active ]'
echo "# ready after $(($(date +%s%3N) - start_ms)) ms"
ok "the control socket answers by then" 'fieldpost status >/dev/null'
ok "the password came by a systemd credential: it is connected, and the status says so" \
    'within $patience "[[ \$(is StatusText) == \"connected to mqtt://127.0.0.1:1883, 0 queued, \"* ]]"'
echo "# status: $(is StatusText)"
ok "a serial port is opened by way of the group dialout" \
    'within $patience "[[ \$(is StatusText) == *line1\ is\ down* ]]" && [[ $(is StatusText) != *ermission* ]]'

ok "its log is in the journal with its priorities, and without times of its own" '
    journalctl --unit $unit --priority warning --output cat | grep -q "^line1: down: " &&
    journalctl --unit $unit --output cat | grep -q "^connected to the broker" &&
    ! journalctl --unit $unit --priority warning --output cat | grep -q "^connected to the broker" &&
    ! journalctl --unit $unit --output cat | grep -Eq "^(<[0-7]>|20[0-9]{2}-)"'

# For twice as long as it would let the agent live.
ok "the watchdog is fed" '
    fed=$(is WatchdogTimestampMonotonic)
    within 20 "[ \$((\$(is WatchdogTimestampMonotonic) - $fed)) -gt 12000000 ]" && [ "$(is NRestarts)" = 0 ]'

# ---- who may do what

ok "folders and files have their owners and modes" '
    modes=$(stat -c "%a %U:%G %n" /etc/fieldpost /var/lib/fieldpost /run/fieldpost /var/lib/fieldpost/*)
    echo "$modes" | sed "s/^/# /"
    [ "$modes" = "750 root:fieldpost /etc/fieldpost
750 fieldpost:fieldpost /var/lib/fieldpost
750 fieldpost:fieldpost /run/fieldpost
660 fieldpost:fieldpost /var/lib/fieldpost/control.sock
600 fieldpost:fieldpost /var/lib/fieldpost/outbox.db
600 fieldpost:fieldpost /var/lib/fieldpost/outbox.db-wal
600 fieldpost:fieldpost /var/lib/fieldpost/outbox.db.reserve" ]'
ok "who is in the group may ask and publish" \
    'runuser -u technician -- fieldpost status >/dev/null && runuser -u technician -- fieldpost publish --topic t/o x >/dev/null'
ok "a stranger may not" '! runuser -u stranger -- fieldpost status 2>/dev/null'
credential=/run/credentials/$unit/broker.password
ok "the credential is for the agent alone" '
    [ "$(runuser -u fieldpost -- cat $credential)" = $password ] &&
    ! runuser -u technician -- cat $credential 2>/dev/null && ! runuser -u stranger -- cat $credential 2>/dev/null'
ok "the password is in no environment, no command line and no log" \
    '! grep -aq $password /proc/$(pid)/environ /proc/$(pid)/cmdline && ! journalctl -u $unit | grep -q $password'
of_process() { sed -n "s/^$1:\s*//p" "/proc/$(pid)/status"; }
ok "it is no root, has no capability and cannot get one" '
    [ "$(of_process CapEff) $(of_process CapBnd) $(of_process NoNewPrivs)" = "0000000000000000 0000000000000000 1" ] &&
    [ "$(stat -c %U /proc/$(pid))" = fieldpost ]'
ok "system calls are filtered" '[ "$(of_process Seccomp)" = 2 ]'
ok "no core is written, which would hold the password" 'grep -q "^Max core file size *0 *0 " /proc/$(pid)/limits'

# ---- inside the sandbox: the same unit with another program

cat >/run/probe.pl <<'PERL'
use POSIX ();
my %calls = (x86_64 => [159, 305], aarch64 => [171, 266], armv7l => [124, 372], armv6l => [124, 372]);
my ($adjtimex, $clock_adjtime) = @{ $calls{ (POSIX::uname())[4] } or die };
my $where = (POSIX::uname())[4] =~ /64/ ? 40 : 20;
sub ask { my ($call, $modes, @clock) = @_; my $timex = pack("L x252", $modes);
    my $answer = syscall($call, @clock, $timex);
    return $answer < 0 ? "refused" : (unpack("l", substr($timex, $where, 4)) & 0x40 ? "unsynchronised" : "synchronised"); }
print "adjtimex ", ask($adjtimex, 0), "\n", "clock_adjtime ", ask($clock_adjtime, 0, 0), "\n";
print "set ", ask($clock_adjtime, 0x10, 0), "\n";
sub can { my ($what, $file) = @_; my $in; print "$what ", (open($in, "<", $file) && defined(<$in>) ? "read" : "refused: $!"), "\n"; }
can("boot_id", "/proc/sys/kernel/random/boot_id");
can("meminfo", "/proc/meminfo");
can("sysfs", "/sys/devices/system/cpu/online");
print "write ", (open(my $f, ">", "/usr/bin/x") ? "possible" : "refused"), "\n";
print "namespace ", (syscall({ x86_64 => 272, aarch64 => 97, armv7l => 337, armv6l => 337 }->{ (POSIX::uname())[4] }, 0x10000000) < 0 ? "refused" : "possible"), "\n";
PERL
cp /run/probe.pl /var/lib/probe.pl
sed -e 's/^Type=.*/Type=oneshot/' -e '/^ExecReload=/d;/^WatchdogSec=/d;/^Restart/d;/^NotifyAccess=/d;/^\(State\|Runtime\)Directory/d' \
    -e 's|^ExecStart=.*|ExecStart=/usr/bin/perl /var/lib/probe.pl|' $unit_file >/run/systemd/system/probe.service
{
    echo '[Service]'
    echo 'StandardOutput=file:/run/probe'
    echo 'TimeoutStartSec=30s'
} >>/run/systemd/system/probe.service
systemctl daemon-reload
systemctl start probe.service
sed 's/^/# in the sandbox: /' /run/probe
kernel=$(perl /run/probe.pl | sed -n 's/^clock_adjtime //p')
echo "# outside of it: clock_adjtime $kernel"
ok "the clock cannot be set, nothing be written, no namespace be made" \
    '[ "$kernel" != refused ] && [ "$(grep -c "^\(set\|write\|namespace\) refused" /run/probe)" = 3 ]'
ok "boot id, memory and what the board says in /sys can be read" \
    '[ "$(grep -c "^\(boot_id\|meminfo\|sysfs\) read" /run/probe)" = 3 ]'

# ---- killed and frozen: nothing is lost

# Numbers from $1 to $2, as messages; $3 makes the text another one when a number is handed in again.
messages() { seq "$1" "$2" | sed "s/\$/ $3/" 2>/dev/null; }
hand_in() { messages "$@" | fieldpost publish --topic t/ci --qos 2 >"/run/accepted.$3" 2>>/run/refused; }
# The session, so that nothing is missed; then who writes down what arrives.
hear -i watch -c -q 2 -t t/ci -E
hear -i watch -c -q 2 -t t/ci >/run/heard &
hand_in 1 20000 a &
producer=$!
within $patience '[ $(wc -l </run/heard) -gt 500 ]'
before=$(pid)
kill -9 "$before"
wait $producer
accepted=$(grep -cx accepted /run/accepted.a)
echo "# $accepted messages had been accepted when it was killed"
ok "killed with SIGKILL it is started again" \
    'within $patience "[ \$(is NRestarts) = 1 -a \$(is ActiveState) = active ]" && [ "$(pid)" != $before ]'
hand_in $((accepted + 1)) $((accepted + 500)) b
{ messages 1 "$accepted" a; messages $((accepted + 1)) $((accepted + 500)) b; } | sort >/run/expected
missing() { sort -u /run/heard | comm -23 /run/expected -; }
ok "nothing that was accepted is lost, and nothing arrives twice" '
    [ $accepted -gt 0 ] && [ $(grep -cx accepted /run/accepted.b) = 500 ] &&
    within $patience "[ -z \"\$(missing)\" ]" && [ -z "$(sort /run/heard | uniq -d)" ]'
echo "# $(wc -l </run/heard) messages arrived"

before=$(pid)
kill -STOP "$before"
ok "frozen, it is ended by the watchdog and started again" '
    within $patience "[ \$(is NRestarts) = 2 -a \$(is ActiveState) = active ]" && [ "$(pid)" != $before ] &&
    journalctl -u $unit | grep -q "Watchdog timeout"'

# ---- reload, bad configurations, stop

before=$(pid)
ok "reload keeps the process" '
    systemctl reload $unit && [ "$(pid)" = $before ] && [ "$(is ActiveState)" = active ] &&
    within $patience "fieldpost status >/dev/null" && [ "$(is NRestarts)" = 2 ]'
sed -i 's/^id = .*/id = ""/' $config
ok "a bad configuration is refused by reload, and the agent goes on" \
    '! systemctl reload $unit 2>/dev/null && [ "$(pid)" = $before ] && fieldpost status >/dev/null'
# What systemd-timesyncd does when it has set the clock.
[ -e /ci/no-time-service ] || { mkdir -p /run/systemd/timesync && touch /run/systemd/timesync/synchronized; }
ok "a stop is clean" '
    within $patience "[[ \$(is StatusText) == connected* ]]" && systemctl stop $unit &&
    [ "$(is Result) $(is ExecMainStatus)" = "success 0" ]'
ok "and says goodbye: retained offline, stopped" '
    state=$(hear -t fieldpost/g1/state -C 1 -W 10) && echo "# $state" &&
    [[ $state == *\"offline\"* && $state == *\"stopped\"* ]]'
ok "the clock is right once the time service says so" '[[ $state == *\"clock\":\"ok\"* ]]'
ok "a bad configuration is refused at the start with 78, and not tried again" '
    ! systemctl start $unit 2>/dev/null && [ "$(is ExecMainStatus)" = 78 ] &&
    ! within 8 "[ \$(is SubState) != failed ]" && [ "$(is NRestarts)" = 0 ]'
ok "the log says what is wrong with it" 'journalctl -u $unit | grep -q "fieldpost.toml:2"'

# ---- a loop of crashes does not end in a dead gateway

cp /root/good.toml $config
printf '[Service]\nRestartSec=100ms\n' >$dropins/loop.conf
systemctl daemon-reload
systemctl start $unit
for round in 1 2 3 4 5 6 7 8; do
    kill -9 "$(pid)"
    within $patience "[ \$(is NRestarts) = $round -a \$(is ActiveState) = active ]" || break
done
ok "it is started again however often it fails" \
    '[ "$(is ActiveState)" = active ] && [ "$(is NRestarts)" = 8 ] && fieldpost status >/dev/null'

echo "1..$n"
echo "# $((SECONDS - began)) s"
systemctl --no-block exit 0
