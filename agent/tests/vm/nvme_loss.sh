#!/bin/bash
# How Linux takes the loss of its NVMe/TCP target and each kind of refusal, row by
# row: drover relies on it. The fence's own rows are in nvme_target.sh.
# kernels: 6.1 6.12
# asked: 6.1
# timeout: 600
source "${BASH_SOURCE%/*}/shared.bash"
name=nqn.2026-01.io.drover:vm:loss
uuid=55555555-5555-4555-8555-555555555555
truncate -s 64M "$volume"

state() { cat "$(controllers $name)/state" 2> /dev/null; }
state_is() { [ "$(state)" = "$1" ]; }
no_controller() { no_subsystem $name; }
# attach [options of the host]
attach() { serve $name $uuid && connect $name "${1:-}" && within 60 have_disk $name && device=/dev/$(disk $name); }
detach() { disconnect $name; stop nvme; } > /dev/null 2>&1
# writes: one write on its way; its end is in $writer
writes() { dd if=/dev/urandom of="$device" bs=4k count=1 oflag=direct conv=notrunc status=none 2> "$work/dd.log" & writer=$!; }
ended() { ! kill -0 $writer 2> /dev/null; }
waits() { writes; sleep "${1:-3}"; ! ended; } # [SECONDS]
succeeds() { within "${1:-60}" ended && wait $writer; }
fails() { within "${1:-60}" ended && ! wait $writer; }

# A connection that is cut: the host comes back by itself.
check "cut: attach" attach
cut() {
    local round
    for round in 1 2 3; do
        writes
        ss -K '( sport = :4420 )' > /dev/null
        succeeds || { echo "round $round"; return 1; }
        within 60 state_is live || { echo "round $round: $(state)"; return 1; }
    done
}
check "cut: three times, and every write arrives" cut
# A target that is there and does not answer.
silent() {
    kill -STOP "${pids[nvme]}"
    waits 2 || { kill -CONT "${pids[nvme]}"; echo "it did not wait"; return 1; }
    # KATO (2 s) runs out, and the host resets the connection.
    within 60 lost
    local result=$?
    kill -CONT "${pids[nvme]}"
    succeeds 60 && [ $result = 0 ]
}
lost() { [ "$(state)" != live ]; }
detach
check "silent: attach with a keep alive of 2 s" attach keep_alive_tmo=2
check "silent: the host gives the connection up, and the write arrives when the target wakes" silent

# A target that goes: waited for without end.
crash nvme
check "gone: a write waits" waits
check "gone: the host tries to connect" state_is connecting
serve $name $uuid
check "gone: the write arrives when the target is back" succeeds
check "gone: the disk is the same one" is "/dev/$(disk $name)" "$device"

# fast_io_fail_tmo: I/O fails, the controller stays.
folder=$(controllers $name)
if [ -e "$folder/fast_io_fail_tmo" ]; then
    check "fast_io_fail_tmo: off by default" is "$(cat "$folder/fast_io_fail_tmo")" off
    echo 1 > "$folder/fast_io_fail_tmo"
    crash nvme
    writes
    check "fast_io_fail_tmo: a write fails" fails
    check "fast_io_fail_tmo: the controller goes on trying" state_is connecting
    serve $name $uuid
    check "fast_io_fail_tmo: it comes back" within 60 state_is live
    writes
    check "fast_io_fail_tmo: and writes again" succeeds
else
    bad "fast_io_fail_tmo is in sysfs"
fi
detach

# ctrl_loss_tmo: the controller goes, and its I/O with it.
for seconds in 0 3; do
    check "ctrl_loss_tmo $seconds: attach" attach ctrl_loss_tmo=$seconds
    [ $seconds = 0 ] || writes
    crash nvme
    check "ctrl_loss_tmo $seconds: the controller goes" within 90 no_controller
    check "ctrl_loss_tmo $seconds: and the disk" within 60 no_disk $name
done

# Refused as it comes back, for good (DNR).
check "refused: attach" attach
crash nvme
check "refused: a write waits" waits 1
serve $name $uuid --closed $name
case $kernel in
    6.1.*)
        sleep 5
        check "refused: 6.1 tries again for ever" state_is connecting
        ! ended && ok "refused: the write waits" || bad "refused: the write waits"
        check "refused: it can be disconnected" disconnect $name
        ;;
    *) check "refused: the controller goes by itself" within 60 no_controller ;;
esac
check "refused: the write fails" fails
stop nvme

# Refused at first: at once.
serve $name $uuid
refused "first: an unknown subsystem" connect nqn.2026-01.io.drover:vm:none
stranger() { host=nqn.2026-01.io.drover:other connect $name; }
refused "first: another host" stranger
stop nvme
serve $name $uuid --closed $name
refused "first: a closed identity" connect $name
stop nvme

# A host whose secret is no longer the right one (Debian's 6.1 cannot prove itself).
case $kernel in
    6.1.*) ;;
    *)
        key() { nvme gen-dhchap-key -m 1 -l 32 -n $host | tail -n 1; }
        secret=$(key)
        serve $name $uuid --secret "$secret"
        check "secret: attach" connect $name "dhchap_secret=$secret"
        must_have_disk $name
        device=/dev/$(disk $name)
        crash nvme
        check "secret: a write waits" waits 1
        serve $name $uuid --secret "$(key)"
        check "secret: with another one the controller goes by itself" within 60 no_controller
        check "secret: the write fails" fails
        stop nvme
        ;;
esac
finish
