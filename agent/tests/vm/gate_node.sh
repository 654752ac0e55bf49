#!/bin/bash
# The node's own gate against stale writers of every kind, over a home that fences nothing.
# kernels: 6.1 6.12 custom
# timeout: 600
set -eu
for module in configfs nvmet nvmet-tcp nvme-tcp loop ext4 xfs; do modprobe "$module"; done
mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config
mkdir -p /run/initiator
mount -t tmpfs -o size=1G none /run/initiator
# Where the kernel lets a program override what a function returns, it must.
bio=
if { zcat /proc/config.gz || cat "/boot/config-$(uname -r)"; } 2> /dev/null \
    | grep -qx CONFIG_BPF_KPROBE_OVERRIDE=y; then
    bio=bio
fi
"$DROVER_BUILD/examples/initiator" gate $bio
umount -l /run/initiator
