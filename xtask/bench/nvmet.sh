#!/bin/bash
# drover's NVMe/TCP target and the kernel's own under the kernel's initiator and
# fio, in turn, on the same block device in memory (brd) and on the same file in
# memory. Each value is a line
#
#   value FIGURE SIDE IOPS
#
# The sides: drover and nvmet on the device, drover-file and nvmet-file on the file.
# It is told: TARGET (drover's example), RUNS, SECONDS_EACH, FIGURES (name:depth ...).
set -euo pipefail

work=$(mktemp -d /dev/shm/nvmet.XXXXXX)
file=$work/volume
host=nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-00000000000a
host_id=00000000-0000-4000-8000-00000000000a
nqn=nqn.2026-01.io.drover:bench
config=/sys/kernel/config/nvmet

. xtask/bench/shared.bash

# export SIDE PATH NUMBER: has the kernel's target serve PATH
export_nvmet() {
    local subsystem=$config/subsystems/$nqn-$1
    mkdir "$subsystem"
    echo 1 > "$subsystem/attr_allow_any_host"
    mkdir "$subsystem/namespaces/1"
    echo -n "$2" > "$subsystem/namespaces/1/device_path"
    echo 1 > "$subsystem/namespaces/1/enable"
    ln -s "$subsystem" "$config/ports/1/subsystems/"
}

# connect SIDE PORT: two I/O queues, as many as processors
connect() {
    timeout 60 bash -c "echo transport=tcp,traddr=127.0.0.1,trsvcid=$2,nqn=$nqn-$1,hostnqn=$host,hostid=$host_id,nr_io_queues=2 > /dev/nvme-fabrics" ||
        wrong "$1 cannot be connected"
    within 20 disk "$1" > /dev/null || wrong "no disk of $1 appears"
}

# disk SIDE: the device of its namespace
disk() {
    local folder name
    for folder in /sys/class/nvme-subsystem/*; do
        [ "$(cat "$folder/subsysnqn" 2> /dev/null)" = "$nqn-$1" ] || continue
        name=$(ls "$folder" | grep -E '^nvme[0-9]+n1$') && [ -b "/dev/$name" ] && echo "/dev/$name"
        return
    done
    return 1
}

# measure FIGURE SIDE DEPTH
measure() {
    local device iops
    device=$(disk "$2") || wrong "the disk of $2 is gone"
    # The eighth field of the terse output is the reads' IOPS (fio's HOWTO, version 3).
    iops=$(timeout 120 fio --name=read --filename="$device" --readonly --rw=randread --bs=4k \
        --direct=1 --ioengine=libaio --iodepth="$3" --norandommap --time_based --ramp_time=1 \
        --runtime="$SECONDS_EACH" --output-format=terse --terse-version=3 | cut -d';' -f8) ||
        wrong "fio on $2 failed"
    echo "value $1 $2 $iops"
}

# serve_file SIDE PATH PORT: has drover serve PATH
serve_file() {
    serve "$1" "$TARGET" --file "$2" --listen "127.0.0.1:$3" --subsystem "$nqn-$1" \
        --namespace "11111111-1111-4111-8111-11111111$3" --host $host --host-id $host_id
}

modprobe -a nvme-tcp nvmet nvmet-tcp
modprobe brd rd_nr=1 rd_size=262144
mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config
head -c 256M /dev/urandom > "$file"
# Pages that were never written read faster than others.
dd if="$file" of=/dev/ram0 bs=1M oflag=direct status=none
mkdir "$config/ports/1"
echo tcp > "$config/ports/1/addr_trtype"
echo ipv4 > "$config/ports/1/addr_adrfam"
echo 127.0.0.1 > "$config/ports/1/addr_traddr"
echo 4421 > "$config/ports/1/addr_trsvcid"
export_nvmet nvmet /dev/ram0
export_nvmet nvmet-file "$file"

serve_file drover /dev/ram0 4422
serve_file drover-file "$file" 4423

connect nvmet 4421
connect nvmet-file 4421
connect drover 4422
connect drover-file 4423
for number in $(seq "$RUNS"); do
    for figure in $FIGURES; do
        for side in drover nvmet drover-file nvmet-file; do
            measure "${figure%:*}" $side "${figure#*:}"
        done
    done
done
