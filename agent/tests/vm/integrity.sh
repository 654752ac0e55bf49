#!/bin/bash
# What is written is what is read: fio with verify in random sizes, direct and
# through the page cache, both protocols, digests and queues; file systems;
# space that is given back; growth; disks that come and go.
# kernels: 6.1 6.12
# asked: 6.1 6.12
# timeout: 3600
source "${BASH_SOURCE%/*}/shared.bash"
volume=$work/pool/volume
mib=${long:+128}
mib=${mib:-4}
rounds=${long:+50}
rounds=${rounds:-3}
name=nqn.2026-01.io.drover:vm:data
iqn=iqn.2026-11.io.drover.vm:data

# both DEVICE [options of fio]: direct, then through the page cache
both() {
    local through=(--direct=0 --randseed=8 --end_fsync=1)
    verified "$1" "$mib" --direct=1 --verify_backlog=64 "${@:2}" &&
        verified "$1" "$mib" "${through[@]}" --do_verify=0 "${@:2}" &&
        echo 3 > /proc/sys/vm/drop_caches &&
        verified "$1" "$mib" "${through[@]}" --verify_only "${@:2}"
}
# The same with a job for each queue, each on its part of the disk.
crowd() { both "$1" --numjobs=4 --offset_increment="${mib}M" --group_reporting; }
kib_of_file() { echo $(($(stat -c %b "$volume") / 2)); }
# gives_back COMMAND...: the file is smaller by the 8 MiB that are made zeroes
gives_back() {
    dd if=/dev/urandom of="$device" bs=1M seek=160 count=8 oflag=direct conv=fsync,notrunc status=none
    local before
    before=$(kib_of_file)
    "$@" && zeroes "$device" 160 8 && [ "$(kib_of_file)" -le $((before - 8192)) ] ||
        { echo "$before KiB before, $(kib_of_file) after"; return 1; }
}
# zeroes that need not give space back
keeps_zeroes() {
    dd if=/dev/urandom of="$device" bs=1M seek=160 count=8 oflag=direct conv=fsync,notrunc status=none
    "$@" && zeroes "$device" 160 8
}
space() { # PROTOCOL
    local punched=gives_back
    # Linux before 6.2 cannot say over NVMe that a hole is meant (DEAC).
    case $1,$kernel in nvme,6.1.*) punched=keeps_zeroes ;; esac
    check "$1: blkdiscard reads as zeroes and gives the space back" \
        gives_back blkdiscard -o $((160 << 20)) -l $((8 << 20)) "$device"
    check "$1: fallocate -p: $punched" \
        $punched fallocate -p -o $((160 << 20)) -l $((8 << 20)) "$device"
    check "$1: blkdiscard -z reads as zeroes" \
        keeps_zeroes blkdiscard -z -o $((160 << 20)) -l $((8 << 20)) "$device"
    check "$1: fallocate -z reads as zeroes" \
        keeps_zeroes fallocate -z -o $((160 << 20)) -l $((8 << 20)) "$device"
}
file_systems() { # PROTOCOL
    check "$1: ext4" file_system ext4 "$device"
    check "$1: xfs" file_system xfs "$device"
}
size_is() { [ "$(blockdev --getsz "$device")" = $(($1 << 11)) ] || { blockdev --getsz "$device"; return 1; }; } # MIB

modprobe -a ext4 xfs
check "a pool" make_pool

# NVMe/TCP.
truncate -s 320M "$volume"
check "nvme: the target serves" serve $name 77777777-7777-4777-8777-777777777777 --threads 2
for queues in 1 4; do
    for digests in "" ,hdr_digest ,data_digest ,hdr_digest,data_digest; do
        # Each digest alone in long campaigns only.
        [ -n "$long" ] || case $digests in ,hdr_digest | ,data_digest) continue ;; esac
        what="nvme: $queues queues${digests:-, no digest}"
        # Linux has no more of a kind than processors (two here): two kinds make four.
        case $queues in 1) kinds=nr_io_queues=1 ;; 4) kinds=nr_io_queues=2,nr_write_queues=2 ;; esac
        connect $name "$kinds$digests" || bad "$what: connect"
        must_have_disk $name
        device=/dev/$(disk $name)
        controller=$(controllers $name)
        check "$what: so many queues" is "$(cat "$controller/queue_count")" $((queues + 1))
        if [ $queues = 4 ]; then check "$what" crowd "$device"; else check "$what" both "$device"; fi
        disconnect $name
    done
done
connect $name
must_have_disk $name
device=/dev/$(disk $name)
space nvme
file_systems nvme
tell nvme grow $((352 << 20))
check "nvme: growth is seen by itself" within 60 size_is 352
disconnect $name
nvme_rounds() {
    local round
    for round in $(seq $rounds); do
        connect $name && within 60 have_disk $name && disconnect $name || { echo "round $round"; return 1; }
    done
}
check "nvme: connect and disconnect, again and again" nvme_rounds
stop nvme

# iSCSI.
rm "$volume"
truncate -s 320M "$volume"
check "open-iscsi starts" iscsi_begin
check "iscsi: the target serves" serve_iscsi $iqn --threads 2
for digests in None,None CRC32C,None None,CRC32C CRC32C,CRC32C; do
    [ -n "$long" ] || case $digests in CRC32C,None | None,CRC32C) continue ;; esac
    what="iscsi: digests $digests"
    check "$what: log in" login $iqn "node.conn[0].iscsi.HeaderDigest=${digests%,*}" "node.conn[0].iscsi.DataDigest=${digests#*,}"
    must_have_scsi_disk $iqn
    device=/dev/$(scsi_disk $iqn)
    connection=$(ls -d "$(session $iqn)"/device/connection*/iscsi_connection/connection*)
    check "$what: both ends agree" is "$(cat "$connection/header_digest"),$(cat "$connection/data_digest")" \
        "$(sed 's/None/0/g; s/CRC32C/1/g' <<< "$digests")"
    check "$what" both "$device"
    check "$what: four jobs" crowd "$device"
    check "$what: log out" logout $iqn
done
# Unsolicited data, immediate data, neither.
for data in Yes,Yes Yes,No No,Yes; do
    [ -n "$long" ] || [ $data = Yes,No ] || continue
    what="iscsi: InitialR2T,ImmediateData=$data"
    check "$what: log in" login $iqn "node.session.iscsi.InitialR2T=${data%,*}" "node.session.iscsi.ImmediateData=${data#*,}"
    must_have_scsi_disk $iqn
    check "$what" both "/dev/$(scsi_disk $iqn)"
    check "$what: log out" logout $iqn
done
check "iscsi: log in" login $iqn
must_have_scsi_disk $iqn
device=/dev/$(scsi_disk $iqn)
space iscsi
file_systems iscsi
# Linux takes a new capacity when it is asked to (udev's rule does it on hosts
# that have one); the session stays.
before=$(session $iqn)
dmesg --clear
tell iscsi grow $((352 << 20))
announced() { dd if="$device" of=/dev/null bs=4k count=1 iflag=direct status=none; dmesg | grep -q "Capacity data has changed"; }
check "iscsi: growth is announced" within 60 announced
echo 1 > "$(scsi $iqn)/rescan"
check "iscsi: growth is seen" within 60 size_is 352
check "iscsi: in the same session" is "$(session $iqn)" "$before"
check "iscsi: log out" logout $iqn
iscsi_rounds() {
    local round
    for round in $(seq $rounds); do
        login $iqn && within 60 have_scsi_disk $iqn && logout $iqn || { echo "round $round"; return 1; }
    done
}
check "iscsi: log in and out, again and again" iscsi_rounds
stop iscsi
finish
