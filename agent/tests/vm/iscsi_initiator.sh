#!/bin/bash
# drover's initiator over iSCSI, against drover's own target, which is killed
# ten times under I/O.
# timeout: 900
set -eu
for module in iscsi_tcp sd_mod loop ext4 xfs; do modprobe "$module"; done
mkdir -p /run/initiator
mount -t tmpfs -o size=1G none /run/initiator
# open-iscsi's records and names are this VM's own.
mkdir -p /run/initiator/open-iscsi
cp /etc/iscsi/iscsid.conf /run/initiator/open-iscsi/
echo "InitiatorName=iqn.2026-11.io.drover.vm:default" > /run/initiator/open-iscsi/initiatorname.iscsi
mount --bind /run/initiator/open-iscsi /etc/iscsi
# In a group of its own: as it ends, it ends its group.
setsid iscsid --foreground > "$RESULTS/iscsid.log" 2>&1 &
iscsid=$!
code=0
"$DROVER_BUILD/examples/initiator" iscsi || code=$?
left=$(find /etc/iscsi/nodes -type f 2>/dev/null | wc -l)
[ "$left" = 0 ] || { echo "$left node records are left"; code=1; }
kill "$iscsid" 2>/dev/null || true
umount /etc/iscsi
umount -l /run/initiator
exit "$code"
