#!/bin/bash
# How open-iscsi takes the loss of its target and each kind of refusal, row by
# row: drover relies on it.
# kernels: 6.1 6.12
# asked: 6.1
# timeout: 600
source "${BASH_SOURCE%/*}/shared.bash"
iqn=iqn.2026-11.io.drover.vm:loss
chap=(--chap host:0123456789abcdef)
proof=(node.session.auth.authmethod=CHAP node.session.auth.username=host node.session.auth.password=0123456789abcdef)
truncate -s 64M "$volume"

logged_in() { [ "$(cat "$(session $iqn)/state" 2> /dev/null)" = LOGGED_IN ]; }
attach() { serve_iscsi $iqn "${chap[@]}" && login $iqn "${proof[@]}" "$@" && within 60 have_scsi_disk $iqn && device=/dev/$(scsi_disk $iqn); }
writes() { dd if=/dev/urandom of="$device" bs=4k count=1 oflag=direct conv=notrunc status=none 2> "$work/dd.log" & writer=$!; }
ended() { ! kill -0 $writer 2> /dev/null; }
waits() { writes; sleep "${1:-3}"; ! ended; } # [SECONDS]
succeeds() { within "${1:-60}" ended && wait $writer; }
fails() { within "${1:-60}" ended && ! wait $writer; }
# refused_for STATUS: iscsid says that a login was, by RFC 7143, 11.13.5
refused_for() {
    local why
    case $1 in
        0201) why="failed authentication" ;;
        0202) why="failed authorization" ;;
        *) why="(${1:0:2}/${1:2:2})" ;;
    esac
    within 60 grep -qF "$why" "$work/iscsid.log" || { cat "$work/iscsid.log"; return 1; }
}
# first STATUS ARGUMENTS...: a first login at a target with these arguments fails at once
first() {
    local status=$1
    shift
    start iscsi iscsi_target --file "$volume" "$@"
    serving iscsi
    record $iqn "${proof[@]}"
    : > "$work/iscsid.log"
    refused "first login, $status: fails at once" timeout 30 iscsiadm -m node -T $iqn -p $portal --login
    check "first login, $status: for that reason" refused_for "$status"
    node $iqn -o delete
    stop iscsi
}
# again STATUS ARGUMENTS...: a session that comes back to such a target tries on, and its write waits
again() {
    local status=$1
    shift
    : > "$work/iscsid.log"
    start iscsi iscsi_target --file "$volume" "$@"
    serving iscsi
    check "login again, $status: refused for that reason" refused_for "$status"
    sleep 2
    if ended; then bad "login again, $status: a write waits"; else ok "login again, $status: a write waits"; fi
    check "login again, $status: the session stays" session $iqn
    crash iscsi
}

check "open-iscsi starts" iscsi_begin
right=(--iqn $iqn --initiator $initiator "${chap[@]}")
first 0201 --iqn $iqn --initiator $initiator --chap host:anothersecret123
first 0202 --iqn $iqn --initiator $initiator.other "${chap[@]}"
first 0203 --iqn $iqn.other --initiator $initiator "${chap[@]}"
first 0204 "${right[@]}" --closed

check "attach" attach node.session.timeo.replacement_timeout=-1
before=$(session $iqn)
cut() {
    local round
    for round in 1 2 3; do
        writes
        ss -K '( sport = :3260 )' > /dev/null
        succeeds || { echo "round $round"; return 1; }
        within 60 logged_in || { echo "round $round: $(cat "$(session $iqn)/state")"; return 1; }
    done
}
check "cut: three times, and every write arrives" cut
crash iscsi
check "gone: a write waits" waits
again 0201 --iqn $iqn --initiator $initiator --chap host:anothersecret123
again 0202 --iqn $iqn --initiator $initiator.other "${chap[@]}"
again 0203 --iqn $iqn.other --initiator $initiator "${chap[@]}"
again 0204 "${right[@]}" --closed
start iscsi iscsi_target --file "$volume" "${right[@]}"
serving iscsi
check "gone: the write arrives when the right target is back" succeeds 60
check "gone: in the same session" is "$(session $iqn)" "$before"
check "gone: the disk is the same one" is "/dev/$(scsi_disk $iqn)" "$device"

# A fence answers RESERVATION CONFLICT in a session that lives: nothing waits.
kill -STOP "${pids[iscsi]}"
check "fence: a write is on its way" waits 1
kill -CONT "${pids[iscsi]}"
succeeds > /dev/null
sum=$(sha256sum < "$volume")
tell iscsi fence
writes
check "fence: a write fails at once" fails 20
check "fence: so the initiator knows the end" heard iscsi 60 "^fenced .*known=true"
check "fence: nothing was written" is "$(sha256sum < "$volume")" "$sum"
check "fence: what is left is logged out by its name" logout $iqn
refused "fence: the session has gone" session $iqn
refused "fence: nobody comes back" login $iqn "${proof[@]}"
node $iqn -o delete
stop iscsi

# replacement_timeout: I/O fails, the session stays.
check "replacement_timeout 2: attach" attach node.session.timeo.replacement_timeout=2
crash iscsi
writes
check "replacement_timeout 2: a write fails" fails
check "replacement_timeout 2: the session stays" session $iqn
start iscsi iscsi_target --file "$volume" "${right[@]}"
serving iscsi
check "replacement_timeout 2: it comes back" within 90 logged_in
writes
check "replacement_timeout 2: and writes again" succeeds
check "log out" logout $iqn
stop iscsi
finish
