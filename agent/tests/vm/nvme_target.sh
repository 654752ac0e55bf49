#!/bin/bash
# What Linux hosts ask of the NVMe/TCP target in an ordinary life, and a fence:
# data, growth, kill -9 under I/O, secrets, read-only disks.
# kernels: 6.1 6.12
# timeout: 1200
source "${BASH_SOURCE%/*}/shared.bash"
size=$((320 << 20)) # mkfs.xfs wants 300 MiB

pattern() { # DEVICE: writes a known pattern of 8 MiB at 16 MiB and reads it back from the backing file
    dd if="$work/pattern" of="$1" bs=1M seek=16 oflag=direct conv=fsync,notrunc status=none &&
        cmp "$work/pattern" <(dd if="$1" bs=1M skip=16 count=8 iflag=direct status=none) &&
        cmp "$work/pattern" <(dd if="$volume" bs=1M skip=16 count=8 status=none)
}
modprobe nvme-tcp || exit 2
modprobe xfs 2> /dev/null
modprobe ext4 2> /dev/null
dd if=/dev/urandom of="$work/pattern" bs=1M count=8 status=none
truncate -s $size "$volume"
[ "$(cat /sys/module/nvme_core/parameters/multipath)" = Y ] || bad "the kernel has NVMe multipath"

# 1. What a host does in an ordinary life.
one=nqn.2026-01.io.drover:vm:1
serve $one 11111111-1111-4111-8111-111111111111 --discovery 127.0.0.1:8009
discovers() {
    nvme discover -t tcp -a 127.0.0.1 -s "$1" -q "$2" -I $host_id > "$work/discovered" 2>&1 &&
        grep -q "subnqn: *$one" "$work/discovered" || { cat "$work/discovered"; return 1; }
}
check "nvme discover on 8009" discovers 8009 $host
check "what is discovered says where to connect" grep -q "trsvcid: *4420" "$work/discovered"
check "nvme discover on the I/O port" discovers 4420 $host
refused "another host discovers nothing" discovers 8009 nqn.2026-01.io.drover:other
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

# 2. The volume grows.
size=$((384 << 20))
tell nvme grow $size
grown() { [ "$(blockdev --getsize64 "$dev")" = $size ]; }
check "the host sees a resize by itself" within 60 grown

# 3. kill -9 of the target under I/O, three times: no error reaches the workload.
verified "$dev" 64 --direct=1 --rate=5m > "$work/fio" 2>&1 &
fio_pid=$!
for round in 1 2 3; do
    sleep 2
    crash nvme
    kill -0 $fio_pid 2> /dev/null || bad "kill -9, round $round: the workload was running"
    sleep 1
    serve $one 11111111-1111-4111-8111-111111111111
done
through() { ! kill -0 $fio_pid 2> /dev/null; }
within 120 through || { bad "kill -9: the workload ended in time"; cat "$work/fio"; finish; }
wait $fio_pid
check "kill -9 three times: every write arrived, no error" is $? 0
check "the disk is the same one" is "$(disk $one)" "$name"
check "disconnect" disconnect $one
stop nvme

# 4. Fence: under I/O, and nobody comes back.
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
writing() { [ "$volume" -nt "$work/before" ]; }
check "the workload writes before the fence" within 60 writing
tell nvme fence
check "fence" heard nvme 60 "^fenced .*settled=Ok"
sum=$(sha256sum < "$volume")
check "the workload's I/O fails" within 60 through
check "the disk disappears" within 60 no_disk $two
wait $fio_pid
told=$?
check "the workload was told" test $told -ne 0 -a $told -ne 127
tell nvme late
check "late commands were counted" heard nvme 20 "^late [1-9]"
check "nothing was written after the fence" is "$(sha256sum < "$volume")" "$sum"
sed 's/^/        /' "$work/nvme.out" | grep -E "fenced|late"
no_controller() { no_subsystem $two; }
case $kernel in
    6.1.*) sleep 12 ;; # tries again for ever by its nature
    *) check "the controller goes by itself" within 60 no_controller ;;
esac
check "the disk stays away" no_disk $two
no_subsystem $two || check "what is left can be disconnected" disconnect $two
refused "a fenced identity is refused" connect $two
stop nvme
# The target was started anew and remembers the closing only from its record.
serve $two 22222222-2222-4222-8222-222222222222 --closed $two
refused "a closed identity is refused after a restart" connect $two
refused "an unknown identity is refused" connect nqn.2026-01.io.drover:vm:none
stop nvme

# 5. A host that must prove itself. Debian's 6.1 cannot.
four=nqn.2026-01.io.drover:vm:4
prove() { # HASH GROUP [the host's options]
    local name # the disk's, not the check's
    serve $four 44444444-4444-4444-8444-444444444444 --secret "$secret" --controller-secret "$proof" --hash "$1" --group "$2"
    connect $four "${3:-dhchap_secret=$secret}" && within 60 have_disk $four &&
        dd if="$work/pattern" of="/dev/$(disk $four)" bs=4k count=1 oflag=direct status=none
    local result=$?
    disconnect $four
    stop nvme
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
        refused "a host without a secret is refused" connect $four
        wrong=$(nvme gen-dhchap-key -m 1 -l 32 -n $host | tail -n 1)
        refused "a wrong secret is refused" connect $four "dhchap_secret=$wrong"
        refused "a host refuses a wrong target" connect $four "dhchap_secret=$secret,dhchap_ctrl_secret=$wrong"
        stop nvme
        ;;
esac

# 6. Read only.
three=nqn.2026-01.io.drover:vm:3
serve $three 33333333-3333-4333-8333-333333333333 --read-only
connect $three
must_have_disk $three
dev=/dev/$(disk $three)
check "a read-only disk says so" is "$(blockdev --getro "$dev")" 1
check "a read-only disk can be read" dd if="$dev" of=/dev/null bs=1M count=1 iflag=direct status=none
check "a read-only disk refuses writes" bash -c "! dd if=/dev/zero of=$dev bs=4k count=1 oflag=direct status=none"
disconnect $three
stranger() { host=nqn.2026-01.io.drover:other connect $three; }
refused "another host is refused" stranger
stop nvme

finish
