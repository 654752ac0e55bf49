#!/bin/sh
# The initiator against the kernel's own NVMe/TCP target, in a VM:
#   cargo build --example initiator
#   vng --run /boot/vmlinuz-6.12... --disable-kvm --cpus 2 --memory 2G \
#       --exec "sh agent/tests/vm/initiator.sh target/debug/examples/initiator"
set -eu
program=$1
ip link set lo up
for module in configfs nvmet nvmet-tcp nvme-tcp loop ext4 xfs; do modprobe "$module"; done
mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config
mkdir -p /run/initiator
mount -t tmpfs -o size=1G none /run/initiator
if ! timeout 400 "$program"; then
    dmesg | tail -40
    exit 1
fi
