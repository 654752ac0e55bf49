#!/bin/bash
# drover's initiator against the kernel's own NVMe/TCP target.
# kernels: 6.1 6.12 custom
# asked: 6.1
# timeout: 600
set -eu
for module in configfs nvmet nvmet-tcp nvme-tcp loop ext4 xfs; do modprobe "$module"; done
mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config
mkdir -p /run/initiator
mount -t tmpfs -o size=1G none /run/initiator
"$DROVER_BUILD/examples/initiator"
umount -l /run/initiator
