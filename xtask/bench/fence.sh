#!/bin/bash
# What ends a node's access to a device, each in turn and ROUNDS times: drover's
# gate, `nvme disconnect`, `iscsiadm --logout`, and a table of errors in a
# device-mapper disk. A round is a line
#
#   value node_gate SIDE MICROSECONDS
#
# The peers are timed as an operator runs them, the command's own start included;
# nothing is in flight on their devices. The gate is closed under a reader.
# It is told: BUILD (drover's examples), ROUNDS.
set -euo pipefail

work=$(mktemp -d /dev/shm/fence.XXXXXX)
nqn=nqn.2026-01.io.drover:bench
host=nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-00000000000a
host_id=00000000-0000-4000-8000-00000000000a
iqn=iqn.2026-01.io.drover:bench
initiator=iqn.2026-01.io.drover:vm

. xtask/bench/shared.bash

# timed SIDE COMMAND...: runs it and says how long that took
timed() {
    local begin end
    begin=$(date +%s%N)
    timeout 60 "${@:2}" > /dev/null || wrong "$* failed"
    end=$(date +%s%N)
    echo "value node_gate $1 $(((end - begin) / 1000))"
}

loop() { # a new disk of 8 MiB in memory
    local file
    file=$(mktemp "$work/disk.XXXXXX")
    truncate -s 8M "$file"
    losetup -f --show "$file"
}
connected() { [ -b /dev/nvme0n1 ]; }

modprobe -a nvme-tcp iscsi_tcp sd_mod dm-mod loop
truncate -s 64M "$work/volume"
serve nvme "$BUILD/examples/nvme_target" --file "$work/volume" --listen 127.0.0.1:4420 \
    --subsystem $nqn --namespace 11111111-1111-4111-8111-111111111111 --host $host --host-id $host_id
serve iscsi "$BUILD/examples/iscsi_target" --file "$work/volume" --listen 127.0.0.1:3260 \
    --iqn $iqn --initiator $initiator
mkdir "$work/open-iscsi"
{ cat /etc/iscsi/iscsid.conf; echo "iscsid.startup = /bin/true"; } > "$work/open-iscsi/iscsid.conf"
echo "InitiatorName=$initiator" > "$work/open-iscsi/initiatorname.iscsi"
mount --bind "$work/open-iscsi" /etc/iscsi
setsid iscsid --foreground > "$work/iscsid.log" 2>&1 &
within 60 grep -q ISCSIADM_ABSTRACT_NAMESPACE /proc/net/unix || wrong "iscsid does not start"
node() { iscsiadm -m node -T $iqn -p 127.0.0.1:3260 "$@"; }
node -o new > /dev/null

for round in $(seq "$ROUNDS"); do
    disk=$(loop)
    "$BUILD/examples/gate" "${disk#/dev/}" || wrong "the gate"
    # The kernel lets go of the gate's programs a moment after they are unpinned.
    within 20 losetup -d "$disk" 2> /dev/null || wrong "losetup -d"

    nvme connect -t tcp -a 127.0.0.1 -s 4420 -n $nqn -q $host -I $host_id > /dev/null ||
        wrong "nvme connect"
    within 20 connected || wrong "no NVMe disk appears"
    timed nvme-disconnect nvme disconnect -n $nqn

    timeout 60 iscsiadm -m node -T $iqn -p 127.0.0.1:3260 --login > /dev/null || wrong "iscsiadm --login"
    timed iscsiadm-logout iscsiadm -m node -T $iqn -p 127.0.0.1:3260 --logout

    disk=$(loop)
    dmsetup create "bench$round" --table "0 16384 linear $disk 0"
    timed dmsetup-error dmsetup wipe_table "bench$round"
    dmsetup remove "bench$round"
    losetup -d "$disk"
done
