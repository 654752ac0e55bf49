#!/bin/bash
# A volume attached on its own home, while the machine has no memory left: what
# is dirty can be written only through the target, which must go on without any.
# Over NVMe/TCP with the real agent, over iSCSI with the example target that
# stays in memory as an agent does.
# kernels: 6.1 6.12
# asked: 6.1 6.12
# timeout: 900
source "${BASH_SOURCE%/*}/shared.bash"
written=${long:+448} # MiB of dirty pages in all
written=${written:-192}
spare=128 # MiB that are left to the machine
deadline=240
socket=$work/csi.sock

meminfo() { awk -v key="$1:" '$1 == key { print int($2 / 1024) }' /proc/meminfo; }
# A file of memory that is taken from now on; huge pages make it quick.
take() { # NAME MIB
    mkdir -p "$work/taken"
    mountpoint -q "$work/taken" || mount -t tmpfs -o huge=always,size=100% none "$work/taken" || return
    fallocate -l "$2M" "$work/taken/$1"
}
# The pool's disk is memory that is taken already, so that writing to it needs none.
memory_pool() {
    take disk 640 && mkfs.xfs -q -K -m reflink=1 "$work/taken/disk" &&
        mkdir -p "$work/pool" && mount -o loop "$work/taken/disk" "$work/pool"
}
# Takes all memory but $spare MiB.
squeeze() {
    sync
    echo 3 > /proc/sys/vm/drop_caches
    take all $(($(meminfo MemAvailable) - spare))
    echo "        $(meminfo MemAvailable) MiB are left of $(meminfo MemTotal)"
}
loosen() { rm "$work/taken/all"; }
# Takes what is left until the kernel ends it, again and again.
hog() {
    while :; do
        bash -c 'echo 1000 > /proc/self/oom_score_adj; exec tail /dev/zero' 2> /dev/null
        sleep 0.5
    done
}
stays_in_memory() { # PID
    [ "$(cat "/proc/$1/oom_score_adj")" -le -997 ] &&
        [ "$(awk '$1 == "VmLck:" { print $2 }' "/proc/$1/status")" -gt 0 ] || { cat "/proc/$1/status"; return 1; }
}
fill() { # FOLDER: all of it dirty before any of it must be written
    local count
    for count in $(seq $((written / 8))); do cat "$work/pattern"; done > "$1/dirty" &&
        sync "$1/dirty" && "$DROVER_BUILD/examples/durable_work" write "$1" --steps 5
}
filled() { # FOLDER: what was written is there, read from the device
    local count
    echo 3 > /proc/sys/vm/drop_caches
    cmp "$1/dirty" <(for count in $(seq $((written / 8))); do cat "$work/pattern"; done) &&
        "$DROVER_BUILD/examples/durable_work" check "$1" --steps 5
}
# under_pressure NAME FOLDER: the work ends although nothing is left
under_pressure() {
    local name=$1 folder=$2 began=$SECONDS hog work_pid
    dmesg --clear
    squeeze
    hog &
    hog=$!
    fill "$folder" > "$work/fill.log" 2>&1 &
    work_pid=$!
    worked() { ! kill -0 "$work_pid" 2> /dev/null; }
    if within $deadline worked; then
        wait "$work_pid"
        check "$name: the work ends well" is $? 0
    else
        bad "$name: the work ends within $deadline s"
        echo w > /proc/sysrq-trigger
    fi
    kill "$hog"
    pkill -P "$hog"
    wait "$hog" 2> /dev/null
    loosen
    echo "        $((SECONDS - began)) s, $(dmesg | grep -c "Out of memory: Killed process") times the kernel ended somebody"
    dmesg > "$RESULTS/dmesg-${name%% *}.log"
    refused "$name: no task hung" grep "blocked for more than" "$RESULTS/dmesg-${name%% *}.log"
    refused "$name: nobody but the hog was ended" \
        bash -c "grep 'Out of memory: Killed process' $RESULTS/dmesg-${name%% *}.log | grep -v '(tail)'"
    check "$name: what was written is there" filled "$folder"
}

echo 30 > /proc/sys/kernel/hung_task_timeout_secs
# Nothing is written back before it must be.
echo 90 > /proc/sys/vm/dirty_ratio
echo 80 > /proc/sys/vm/dirty_background_ratio
modprobe ext4
dd if=/dev/urandom of="$work/pattern" bs=1M count=8 status=none
check "a pool in memory of its own" memory_pool

# NVMe/TCP, by the agent.
"$DROVER" standalone --node a --pool "$work/pool" --pool-low-water $((16 << 20)) \
    --state "$work/drover.redb" --state-dir "$work/agent" --csi-socket "$socket" \
    > "$work/drover.log" 2>&1 &
pids[drover]=$!
inputs[drover]=0
csi() { timeout 120 "$DROVER_BUILD/examples/csi_volume" --socket "$socket" --node a --folder "$work/node" "$@"; }
attached() { id=$(csi attach --size $((480 << 20))) 2>> "$work/csi.log"; }
check "the agent attaches a volume on its own home" within 90 attached
check "the agent stays in memory" stays_in_memory "${pids[drover]}"
under_pressure "nvme, the agent" "$work/node/target"
check "the agent detaches it" csi detach "$id"
kill "${pids[drover]}"
wait "${pids[drover]}"
unset "pids[drover]" "inputs[drover]"

# iSCSI, by the example.
volume=$work/pool/volume
iqn=iqn.2026-11.io.drover.vm:loopback
rm -rf "$work/pool/volumes"
truncate -s 480M "$volume"
check "open-iscsi starts" iscsi_begin
check "the target serves" serve_iscsi $iqn --resident
check "log in" login $iqn
must_have_scsi_disk $iqn
check "the target stays in memory" stays_in_memory "${pids[iscsi]}"
mkdir -p "$work/mnt"
check "a file system" bash -c "mkfs.ext4 -q -F /dev/$(scsi_disk $iqn) && mount /dev/$(scsi_disk $iqn) $work/mnt"
under_pressure "iscsi, the example" "$work/mnt"
umount "$work/mnt"
check "log out" logout $iqn
stop iscsi
finish
