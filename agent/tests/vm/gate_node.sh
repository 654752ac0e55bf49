#!/bin/bash
# The node's own gate against stale writers of every kind, over a home that fences nothing.
# kernels: 6.1 6.12
# timeout: 600
set -eu
for module in configfs nvmet nvmet-tcp nvme-tcp loop ext4 xfs; do modprobe "$module"; done
mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config
mkdir -p /run/initiator
mount -t tmpfs -o size=1G none /run/initiator
"$DROVER_BUILD/examples/initiator" gate
umount -l /run/initiator
