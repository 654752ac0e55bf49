#!/bin/bash
# Real Linux initiators against the NVMe/TCP target, as the example nvme_target
# serves it. One line per check; exits non-zero if any failed.
# kernels: 6.1 6.12
# timeout: 1800
set -u

target=$DROVER_BUILD/examples/nvme_target
kernel=$(uname -r)
work=$(mktemp -d /dev/shm/nvme-target.XXXXXX)
host=nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-00000000000a
host_id=00000000-0000-4000-8000-00000000000a
size=$((320 << 20)) # mkfs.xfs wants 300 MiB
failed=0
target_pid=

finish() {
    if [ $failed -gt 0 ]; then
        echo "--- the target's log"
        tail -n 60 "$work/log"
        echo "--- the workload"
        cat "$work/fio"
        for pid in $(pgrep fio); do
            grep State "/proc/$pid/status"
            cat "/proc/$pid/stack"
        done
        echo "--- the kernel's log"
        dmesg | tail -n 40
    fi
    rm -rf "$work"
    echo "$kernel: $failed failed"
    [ $failed -eq 0 ]
    exit
}
ok() { echo "ok      $kernel  $*"; }
bad() { echo "FAILED  $kernel  $*"; failed=$((failed + 1)); }
# check NAME COMMAND...: the command succeeds
check() {
    local name=$1
    shift
    if "$@" > "$work/out" 2>&1; then ok "$name"; else bad "$name"; sed 's/^/        /' "$work/out" | tail -n 15; fi
}
# within SECONDS COMMAND...: the command succeeds before they are over
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}

serve() { # NQN UUID [more arguments]; answers of the target go to $work/said
    exec 9>&-
    rm -f "$work/fifo"
    mkfifo "$work/fifo"
    "$target" --file "$work/volume" --subsystem "$1" --namespace "$2" \
        --host $host --host-id $host_id "${@:3}" \
        < "$work/fifo" > "$work/said" 2>> "$work/log" &
    target_pid=$!
    exec 9> "$work/fifo"
    within 20 grep -q serving "$work/said"
}
tell() { echo "$@" >&9; }
heard() { within "$1" grep -q "$2" "$work/said"; }
end_target() {
    tell stop
    wait $target_pid
}
connect() { # NQN [more options]
    timeout 60 bash -c "echo transport=tcp,traddr=127.0.0.1,trsvcid=4420,nqn=$1,hostnqn=$host,hostid=$host_id,nr_io_queues=2,keep_alive_tmo=10,reconnect_delay=1,ctrl_loss_tmo=-1${2:+,$2} > /dev/nvme-fabrics"
}
subsystem() { # NQN: its folder in sysfs
    local folder
    for folder in /sys/class/nvme-subsystem/*; do
        [ "$(cat "$folder/subsysnqn" 2> /dev/null)" = "$1" ] && echo "$folder" && return
    done
    return 1
}
disk() { # NQN: the name of its multipath head
    local folder
    folder=$(subsystem "$1") || return 1
    # The head only, not its paths (nvme0c0n1).
    ls "$folder" | grep -E '^nvme[0-9]+n1$'
}
must_have_disk() { # NQN: nothing that follows makes sense without it
    within 20 have_disk "$1" && return
    bad "a disk of $1 appears"
    finish
}
have_disk() { name=$(disk "$1") && [ -b "/dev/$name" ]; }
no_disk() { ! disk "$1" > /dev/null; }
no_subsystem() { ! subsystem "$1" > /dev/null; }
disconnect() { # NQN
    local controller
    for controller in "$(subsystem "$1")"/nvme[0-9]*; do
        case ${controller##*/} in *n*n*) continue ;; esac
        [ -e "$controller/delete_controller" ] && timeout 60 bash -c "echo 1 > $controller/delete_controller"
    done
    within 10 no_subsystem "$1"
}
is() { [ "$1" = "$2" ] || { echo "$1, expected $2"; return 1; }; }
zeroes() { # DEVICE OFFSET_MIB MIB
    cmp <(dd if="$1" bs=1M skip="$2" count="$3" iflag=direct status=none) <(head -c $(($3 << 20)) /dev/zero)
}
pattern() { # DEVICE: writes a known pattern of 8 MiB at 16 MiB and reads it back from the backing file
    dd if="$work/pattern" of="$1" bs=1M seek=16 oflag=direct conv=fsync,notrunc status=none &&
        cmp "$work/pattern" <(dd if="$1" bs=1M skip=16 count=8 iflag=direct status=none) &&
        cmp "$work/pattern" <(dd if="$work/volume" bs=1M skip=16 count=8 status=none)
}
file_system() { # TYPE DEVICE
    mkdir -p "$work/mnt"
    case $1 in xfs) mkfs.xfs -q -f "$2" ;; ext4) mkfs.ext4 -q -F "$2" ;; esac &&
        mount -t "$1" "$2" "$work/mnt" &&
        cp -r "$work/pattern" /etc "$work/mnt/" &&
        umount "$work/mnt" && mount -t "$1" "$2" "$work/mnt" &&
        cmp "$work/pattern" "$work/mnt/pattern"
    local result=$?
    fstrim "$work/mnt" || result=1
    umount "$work/mnt" || result=1
    return $result
}
verified() { # DEVICE MIB [more options of fio]
    fio --name=verify --filename="$1" --rw=randwrite --bsrange=4k-256k --bs_unaligned=0 \
        --size="$2M" --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c \
        --do_verify=1 --verify_fatal=1 --fsync=64 --randseed=7 --output-format=terse "${@:3}"
}

served_by() { # COMMAND...: the command's output is shown by the target's answer, not an error
    "$@" > "$work/answer" 2>&1 && ! grep -qiE "NVMe status|error:|failed" "$work/answer" ||
        { cat "$work/answer"; return 1; }
}
reports() { # DEVICE PATTERN: the reservation report has it
    nvme resv-report "$1" -n 1 -e > "$work/report" 2>&1 && grep -qE "$2" "$work/report" ||
        { cat "$work/report"; return 1; }
}
copied() { # DEVICE: two ranges are copied one behind the other
    dd if="$work/pattern" of="$1" bs=4k seek=100 count=8 oflag=direct conv=notrunc status=none &&
        nvme copy "$1" -n 1 -d 200 -s 104,100 -b 3,3 &&
        cmp <(dd if="$1" bs=4k skip=200 count=4 iflag=direct status=none) \
            <(dd if="$work/pattern" bs=4k skip=4 count=4 status=none) &&
        cmp <(dd if="$1" bs=4k skip=204 count=4 iflag=direct status=none) \
            <(dd if="$work/pattern" bs=4k count=4 status=none)
}

ip link set lo up
modprobe nvme-tcp || exit 2
modprobe xfs 2> /dev/null
modprobe ext4 2> /dev/null
dd if=/dev/urandom of="$work/pattern" bs=1M count=8 status=none
truncate -s $size "$work/volume"
[ "$(cat /sys/module/nvme_core/parameters/multipath)" = Y ] || bad "the kernel has NVMe multipath"

# 1. What a host does in an ordinary life.
one=nqn.2026-01.io.drover:vm:1
serve $one 11111111-1111-4111-8111-111111111111 --discovery 127.0.0.1:8009 --reservations "$work/reservations"
discovers() {
    nvme discover -t tcp -a 127.0.0.1 -s "$1" -q "$2" -I $host_id > "$work/discovered" 2>&1 &&
        grep -q "subnqn: *$one" "$work/discovered" || { cat "$work/discovered"; return 1; }
}
check "nvme discover on 8009" discovers 8009 $host
check "what is discovered says where to connect" grep -q "trsvcid: *4420" "$work/discovered"
check "nvme discover on the I/O port" discovers 4420 $host
if discovers 8009 nqn.2026-01.io.drover:other > /dev/null; then bad "another host discovers nothing"; else ok "another host discovers nothing"; fi
check "connect" connect $one
must_have_disk $one
ok "the disk is a multipath head"
name=$(disk $one)
dev=/dev/$name
check "logical block size" is "$(blockdev --getss "$dev")" 4096
check "size" is "$(blockdev --getsize64 "$dev")" $size
check "volatile write cache" is "$(cat "/sys/block/$name/queue/write_cache")" "write back"
check "uuid" grep -q 11111111-1111-4111-8111-111111111111 "/sys/block/$name/uuid"
check "a large transfer is one command" is "$(cat "/sys/block/$name/queue/max_hw_sectors_kb")" 256
check "write, read, and the file beneath" pattern "$dev"
check "blkdiscard" blkdiscard -o $((16 << 20)) -l $((4 << 20)) "$dev"
check "what was discarded reads as zeroes" zeroes "$dev" 16 4
check "blkdiscard -z" blkdiscard -z -o $((20 << 20)) -l $((4 << 20)) "$dev"
check "what was zeroed reads as zeroes" zeroes "$dev" 20 4
check "xfs" file_system xfs "$dev"
check "ext4" file_system ext4 "$dev"
check "fio verify" verified "$dev" 24
check "nvme-cli: identify controller" nvme id-ctrl "$dev"
check "nvme-cli: identify namespace" nvme id-ns "$dev"
check "nvme-cli: health log" nvme smart-log "$dev"
check "nvme-cli: effects log" nvme effects-log "$dev"
check "nvme-cli: verify" nvme verify "$dev" -s 0 -c 1023
dd if="$work/pattern" of="$dev" bs=4k count=1 oflag=direct status=none
check "nvme-cli: compare, equal" nvme compare "$dev" -s 0 -c 0 -z 4096 -d "$work/pattern"
dd if=/dev/zero of="$dev" bs=4k count=1 oflag=direct status=none
check "nvme-cli: compare, different" bash -c "! nvme compare $dev -s 0 -c 0 -z 4096 -d $work/pattern"
check "nvme-cli: an opcode that is not served is refused" bash -c "! nvme write-uncor $dev -s 0 -c 0"
check "nvme-cli: copy" copied "$dev"
check "nvme-cli: error log" served_by nvme error-log "$dev"
check "nvme-cli: firmware log" served_by nvme fw-log "$dev"
check "nvme-cli: changed namespaces log" served_by nvme changed-ns-list-log "$dev"
check "nvme-cli: reservation notification log" served_by nvme resv-notif-log "$dev"
check "nvme-cli: a log that is not kept is refused" bash -c "! nvme get-log $dev -i 0x0c -l 512"
for feature in 6 7 0xb 0xf; do
    check "nvme-cli: feature $feature" served_by nvme get-feature "$dev" -f $feature
done
check "nvme-cli: feature 0x16" served_by nvme get-feature "$dev" -f 0x16 -l 512
check "nvme-cli: feature 0x81" served_by nvme get-feature "$dev" -f 0x81 -l 16 -c 1
for feature in 0x82 0x83; do
    check "nvme-cli: feature $feature" served_by nvme get-feature "$dev" -n 1 -f $feature
done
check "resv-register" nvme resv-register "$dev" -n 1 -k 0x10 -r 0 -p 3
check "resv-report shows the registrant" reports "$dev" "regctl *: *1$"
check "resv-acquire" nvme resv-acquire "$dev" -n 1 -c 0x10 -t 1 -a 0
check "resv-report shows the type" reports "$dev" "rtype *: *1$"
check "resv-acquire with another key is refused" bash -c "! nvme resv-acquire $dev -n 1 -c 0x11 -t 1 -a 0"
check "the holder writes" dd if="$work/pattern" of="$dev" bs=4k count=1 oflag=direct status=none
kill -9 $target_pid
wait $target_pid 2> /dev/null
serve $one 11111111-1111-4111-8111-111111111111 --reservations "$work/reservations"
check "a reservation persists through kill -9" within 30 reports "$dev" "rtype *: *1$"
check "resv-acquire, preempt and abort" nvme resv-acquire "$dev" -n 1 -c 0x10 -p 0x10 -t 2 -a 2
check "resv-release" nvme resv-release "$dev" -n 1 -c 0x10 -t 2 -a 0
check "resv-register, another key" nvme resv-register "$dev" -n 1 -c 0x10 -k 0x20 -r 2
check "resv-release, clear" nvme resv-release "$dev" -n 1 -c 0x20 -a 1
check "nobody is registered" reports "$dev" "regctl *: *0$"

# 2. The volume grows.
size=$((384 << 20))
tell grow $size
grown() { [ "$(blockdev --getsize64 "$dev")" = $size ]; }
check "the host sees a resize by itself" within 20 grown

# 3. kill -9 of the target under I/O, three times: no error reaches the workload.
verified "$dev" 64 --rate=5m > "$work/fio" 2>&1 &
fio_pid=$!
for round in 1 2 3; do
    sleep 2
    kill -9 $target_pid
    wait $target_pid 2> /dev/null
    kill -0 $fio_pid 2> /dev/null || bad "kill -9, round $round: the workload was running"
    sleep 1
    serve $one 11111111-1111-4111-8111-111111111111
done
through() { ! kill -0 $fio_pid 2> /dev/null; }
within 120 through || { bad "kill -9: the workload ended in time"; finish; }
wait $fio_pid
check "kill -9 three times: every write arrived, no error" is $? 0
check "the disk is the same one" is "$(disk $one)" "$name"
check "disconnect" disconnect $one

# 4. Digests.
check "connect with header and data digests" connect $one hdr_digest,data_digest
must_have_disk $one
check "write, read with digests" pattern "/dev/$(disk $one)"
check "fio verify with digests" verified "/dev/$(disk $one)" 16
disconnect $one
for queues in 1 4; do
    check "connect with $queues queues" connect $one "nr_io_queues=$queues"
    must_have_disk $one
    check "fio verify with $queues queues" verified "/dev/$(disk $one)" 8
    disconnect $one
    check "connect with $queues queues and digests" connect $one "nr_io_queues=$queues,hdr_digest,data_digest"
    must_have_disk $one
    check "fio verify with $queues queues and digests" verified "/dev/$(disk $one)" 8
    disconnect $one
done
again() {
    local round name
    for round in 1 2 3 4 5 6 7 8; do
        connect $one && within 20 have_disk $one && disconnect $one || { echo "round $round"; return 1; }
    done
}
check "connect and disconnect eight times" again
end_target

# 5. Fence: under I/O, and nobody comes back.
two=nqn.2026-01.io.drover:vm:2
serve $two 22222222-2222-4222-8222-222222222222
connect $two
must_have_disk $two
dev=/dev/$(disk $two)
touch "$work/before"
fio --name=writer --filename="$dev" --rw=randwrite --bs=4k --size=64M --direct=1 --ioengine=libaio \
    --iodepth=8 --time_based --runtime=120 --output-format=terse > "$work/fio" 2>&1 &
fio_pid=$!
# A fio that has not opened the disk by the fence would make a file of its name.
writing() { [ "$work/volume" -nt "$work/before" ]; }
check "the workload writes before the fence" within 60 writing
tell fence
check "fence" heard 15 "^fenced .*settled=Ok"
sum=$(sha256sum < "$work/volume")
check "the workload's I/O fails" within 20 through
check "the disk disappears" within 20 no_disk $two
wait $fio_pid
told=$?
check "the workload was told" test $told -ne 0 -a $told -ne 127
tell late
check "late commands were counted" heard 5 "^late [1-9]"
check "nothing was written after the fence" is "$(sha256sum < "$work/volume")" "$sum"
sed 's/^/        /' "$work/said" | grep -E "fenced|late"
no_controller() { no_subsystem $two; }
case $kernel in
    6.1.*) sleep 12 ;; # tries again for ever by its nature
    *) check "the controller goes by itself" within 30 no_controller ;;
esac
check "the disk stays away" no_disk $two
no_subsystem $two || check "what is left can be disconnected" disconnect $two
if connect $two 2> /dev/null; then bad "a fenced identity is refused"; else ok "a fenced identity is refused"; fi
end_target
# The target was started anew and remembers the closing only from its record.
serve $two 22222222-2222-4222-8222-222222222222 --closed $two
if connect $two 2> /dev/null; then bad "a closed identity is refused after a restart"; else ok "a closed identity is refused after a restart"; fi
if connect nqn.2026-01.io.drover:vm:none 2> /dev/null; then bad "an unknown identity is refused"; else ok "an unknown identity is refused"; fi
end_target

# 6. A host that must prove itself. Debian's 6.1 cannot.
four=nqn.2026-01.io.drover:vm:4
prove() { # HASH GROUP [the host's options]
    local name # the disk's, not the check's
    serve $four 44444444-4444-4444-8444-444444444444 --secret "$secret" --controller-secret "$proof" --hash "$1" --group "$2"
    connect $four "${3:-dhchap_secret=$secret}" && within 30 have_disk $four &&
        dd if="$work/pattern" of="/dev/$(disk $four)" bs=4k count=1 oflag=direct status=none
    local result=$?
    disconnect $four
    end_target
    return $result
}
case $kernel in
    6.1.*) ;;
    *)
        secret=$(nvme gen-dhchap-key -m 1 -l 32 -n $host | tail -n 1)
        proof=$(nvme gen-dhchap-key -m 0 -l 48 -n $four | tail -n 1)
        check "DH-HMAC-CHAP, SHA-256" prove 1 0
        check "DH-HMAC-CHAP, SHA-384, ffdhe2048" prove 2 1
        check "DH-HMAC-CHAP, SHA-512, ffdhe3072, both ways" prove 3 2 "dhchap_secret=$secret,dhchap_ctrl_secret=$proof"
        serve $four 44444444-4444-4444-8444-444444444444 --secret "$secret" --controller-secret "$proof"
        if connect $four 2> /dev/null; then bad "a host without a secret is refused"; else ok "a host without a secret is refused"; fi
        wrong=$(nvme gen-dhchap-key -m 1 -l 32 -n $host | tail -n 1)
        if connect $four "dhchap_secret=$wrong" 2> /dev/null; then bad "a wrong secret is refused"; else ok "a wrong secret is refused"; fi
        if connect $four "dhchap_secret=$secret,dhchap_ctrl_secret=$wrong" 2> /dev/null; then bad "a host refuses a wrong target"; else ok "a host refuses a wrong target"; fi
        end_target
        ;;
esac

# 7. Read only.
three=nqn.2026-01.io.drover:vm:3
serve $three 33333333-3333-4333-8333-333333333333 --read-only
connect $three
must_have_disk $three
dev=/dev/$(disk $three)
check "a read-only disk says so" is "$(blockdev --getro "$dev")" 1
check "a read-only disk can be read" dd if="$dev" of=/dev/null bs=1M count=1 iflag=direct status=none
check "a read-only disk refuses writes" bash -c "! dd if=/dev/zero of=$dev bs=4k count=1 oflag=direct status=none"
disconnect $three
if host=nqn.2026-01.io.drover:other connect $three 2> /dev/null; then bad "another host is refused"; else ok "another host is refused"; fi
end_target

finish
