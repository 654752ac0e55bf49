#!/bin/bash
# The power fails: dm-log-writes below the pool's XFS keeps what is durable and
# when; at the boundaries of that log the pool and the volume's file system are
# mounted again, checked, and must have all that had been fsynced by then.
# kernels: 6.1 6.12
# asked: 6.1
# timeout: 7200
# Of each story some boundaries are looked at, all steps among them; with
# DROVER_VM_LONG=1 every one, and all pairs of protocol and file system.
source "${BASH_SOURCE%/*}/shared.bash"
points=${long:+100000}
points=${points:-3}
steps=${long:+24}
steps=${steps:-6}
tool=$DROVER_BUILD/examples
volume=$work/pool/volume

# The pool's disk as it was before the log began: an XFS with the volume on it.
make_disk() {
    make_pool && truncate -s 320M "$volume" && umount "$work/pool" && mv "$work/pool.img" "$work/before"
}
# lose PROTOCOL FS [more of the target's arguments]: the story that is logged to $work/log
lose() {
    local disk log mapped=/dev/mapper/pool-log device
    cp --sparse=always "$work/before" "$work/disk" || return
    truncate -s 0 "$work/log" && truncate -s 1G "$work/log"
    disk=$(losetup --show -f "$work/disk") && log=$(losetup --show -f "$work/log") || return
    dmsetup create pool-log --table "0 $(blockdev --getsz "$disk") log-writes $disk $log" &&
        mount "$mapped" "$work/pool" || return
    attach_"$1" "${@:3}" || { echo "not attached"; return 1; }
    device=/dev/$(disk_"$1")
    mkdir -p "$work/mnt"
    mkfs_"$2" "$device" && mount "$device" "$work/mnt" || return
    "$tool/durable_work" write "$work/mnt" --steps "$steps" --mark pool-log || return
    umount "$work/mnt"
    detach_"$1"
    stop "$1"
    umount "$work/pool" && dmsetup remove pool-log && losetup -d "$disk" "$log"
}
mkfs_ext4() { mkfs.ext4 -q -F -E lazy_itable_init=0 "$1"; }
mkfs_xfs() { mkfs.xfs -q -f "$1"; }
name=nqn.2026-01.io.drover:vm:power
iqn=iqn.2026-11.io.drover.vm:power
attach_nvme() { serve $name 66666666-6666-4666-8666-666666666666 "$@" && connect $name && within 60 have_disk $name; }
disk_nvme() { disk $name; }
detach_nvme() { disconnect $name; }
attach_iscsi() { serve_iscsi $iqn "$@" && login $iqn && within 60 have_scsi_disk $iqn; }
disk_iscsi() { scsi_disk $iqn; }
detach_iscsi() { logout $iqn; }

# The boundaries to look at, a line each: the entry's number, and the last step
# that had been made durable. Of all up to the last step so many, the last one
# first: what comes behind it is the end of the work in good order.
boundaries() {
    "$tool/replay_log" "$work/log" | awk -v points="$points" '
        { entry[++n] = $1 }
        $2 == "mark" && sub("step-", "", $3) { step = $3; last = n }
        { at[n] = step + 0 }
        END {
            every = last <= points ? 1 : last / points
            for (i = last; i >= 1; i -= every) print entry[int(i)], at[int(i)]
        }' | sort -nu
}
# holds FS STEP: $work/disk as it is now, mounted anew, has all steps up to STEP
holds() {
    local result=0 loop
    cp --sparse=always "$work/disk" "$work/copy" && mount -o loop "$work/copy" "$work/pool" || return
    loop=$(losetup --show -f "$volume") || return
    # Before the first step there may be no file system yet.
    if [ "$2" -gt 0 ] || blkid -p "$loop" > /dev/null 2>&1; then
        if mount "$loop" "$work/mnt"; then
            "$tool/durable_work" check "$work/mnt" --steps "$2" && sound "$1" "$loop" || result=1
            umount "$work/mnt"
        elif [ "$2" -gt 0 ]; then
            result=1
        fi
    fi
    losetup -d "$loop"
    umount "$work/pool" && xfs_repair -n "$work/copy" || result=1
    return $result
}
# replayed FS: holds, at every boundary
replayed() {
    local entry step from=1 count=0
    cp --sparse=always "$work/before" "$work/disk"
    while read -r entry step <&3; do
        "$tool/replay_log" "$work/log" "$work/disk" --from $from --to "$entry" || return
        from=$((entry + 1))
        holds "$1" "$step" > "$work/held" 2>&1 || { echo "entry $entry, step $step"; cat "$work/held"; return 1; }
        count=$((count + 1))
    done 3< <(boundaries)
    echo "        $count of $("$tool/replay_log" "$work/log" | wc -l) boundaries"
    [ $count -gt 0 ]
}
story() { # PROTOCOL FS
    check "$1, $2: the work is done" lose "$1" "$2"
    check "$1, $2: at every boundary all that was fsynced is there" replayed "$2"
    cat "$work/out"
}

modprobe -a dm-log-writes ext4 || exit 2
check "a disk with a pool" make_disk
check "open-iscsi starts" iscsi_begin
story nvme ext4
story iscsi xfs
if [ -n "$long" ]; then
    story nvme xfs
    story iscsi ext4
fi

# The proof can fail: a target that answers flushes and does nothing loses data.
points=1
for protocol in nvme ${long:+iscsi}; do
    check "$protocol: the work is done without flushes" lose $protocol ext4 --lose-flushes
    refused "$protocol: without flushes something is lost" replayed ext4
    grep -m 3 -E "lost|mount|wrong" "$work/out" | sed 's/^/        /'
done
finish
