#!/bin/bash
# drover's initiator over iSCSI, against drover's own target, which is killed
# ten times under I/O.
# kernels: 6.1 6.12 custom
# asked: 6.1
# timeout: 900
set -u
. "$(dirname "$0")/lib/iscsid.sh"
mkdir -p /run/initiator
mount -t tmpfs -o size=1G none /run/initiator || exit 1
code=0
"$DROVER_BUILD/examples/initiator" iscsi || code=$?
iscsid_ends || code=1
umount -l /run/initiator
exit "$code"
