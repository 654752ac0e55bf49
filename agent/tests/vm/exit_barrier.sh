#!/bin/bash
# The exit barrier with real initiators: a write that a killed target had in the
# kernel's hands lands before its successor serves, so that nothing newer is
# undone by it. The write is held in the block layer by a limit of the first
# target's cgroup alone (blk-throttle), and let go by lifting that.
# kernels: 6.1 6.12
# timeout: 400
source "${BASH_SOURCE%/*}/shared.bash"
volume=$work/pool/volume
slow=/sys/fs/cgroup/drover-slow
old=nqn.2026-01.io.drover:vm:old
new=nqn.2026-01.io.drover:vm:new
other=nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-00000000000b
other_id=00000000-0000-4000-8000-00000000000b
writer=

group() { echo +io > /sys/fs/cgroup/cgroup.subtree_control && mkdir -p $slow; }
may_write() { # BYTES_PER_SECOND, more than 1: so much of what the group has written goes on
    echo "$(lsblk -no MAJ:MIN "$(findmnt -no SOURCE "$work/pool")" | tr -d ' ') wbps=$1" > $slow/io.max
}
block() { dd "$@" bs=4k count=1 status=none; }
fill_with() { head -c 4096 < <(yes "$1") > "$work/$1"; }
on_disk() { # WORD: the block that is written to holds it
    cmp -s "$work/$1" <(block if="$volume" skip=100 iflag=direct)
}
write_block() { block if="$work/$1" of="/dev/$2" seek=100 oflag=direct conv=fsync,notrunc; } # WORD DISK
written() { awk '$1 == "write_bytes:" { print $2 }' "/proc/${pids[nvme]}/io"; }
# has_written BYTES: the target has given the kernel more than that to write. A
# direct write is counted as it is submitted, before it is held (iomap_dio_bio_iter
# in fs/iomap/direct-io.c).
has_written() { [ "$(written)" -gt "$1" ]; }
# killed [more arguments of the heir]: the first target is killed with a write in
# the kernel's hands, and its successor started
killed() {
    local before
    write_block base "$(disk $old)" && on_disk base && may_write 2 || return
    echo "${pids[nvme]}" > $slow/cgroup.procs
    before=$(written)
    write_block older "$(disk $old)" &
    writer=$!
    within 60 has_written "$before" || { echo "the write has not come to the target"; return 1; }
    sleep 3
    kill -0 $writer && on_disk base || { echo "the write is not held"; return 1; }
    # Not waited for: a thread that is inside the write ends with it.
    kill -9 "${pids[nvme]}"
    unset "pids[nvme]" "inputs[nvme]"
    start heir nvme_target --file "$volume" --subsystem $new --namespace 99999999-9999-4999-8999-999999999999 \
        --host $other --host-id $other_id --closed $old --lock "$work/pool/lock" "$@"
}
# round NAME [more arguments of both targets]
round() {
    check "$1: the first target serves" serve $old 88888888-8888-4888-8888-888888888888 --lock "$work/pool/lock" "${@:2}"
    connect $old
    must_have_disk $old
    check "$1: it is killed with a write in hand" killed "${@:2}"
}
newer_write() {
    host=$other host_id=$other_id connect $new && within 60 have_disk $new && write_block newer "$(disk $new)"
}
end_round() {
    disconnect $new
    disconnect $old
    kill $writer
    wait $writer
    stop heir
} > /dev/null 2>&1

check "a pool" make_pool 512
check "a cgroup" group
for word in base older newer; do fill_with $word; done
dd if=/dev/zero of="$volume" bs=1M count=8 conv=fsync status=none
for engine in io-uring threads; do
    round $engine --engine $engine
    refused "$engine: its successor does not serve" serving heir 5
    check "$engine: for the write has not landed" on_disk base
    check "$engine: the write is let go" may_write max
    check "$engine: the successor serves" serving heir
    check "$engine: the write has landed by then" on_disk older
    check "$engine: another host writes" newer_write
    sleep 2
    check "$engine: the newer write is there" on_disk newer
    end_round
done

# The proof can fail: a lock that the ring does not hold is no barrier.
round "no barrier" --engine io-uring --unregistered
check "no barrier: the successor serves" serving heir
check "no barrier: the write has not landed" on_disk base
check "no barrier: another host writes" newer_write
check "no barrier: the newer write is there" on_disk newer
check "no barrier: the older write is let go" may_write max
check "no barrier: and undoes the newer one" within 60 on_disk older
end_round
rmdir $slow
finish
