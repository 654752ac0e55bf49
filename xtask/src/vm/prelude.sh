# What every command in the VM finds done. Each line may fail on its own: what
# the command then lacks, it says itself.
ip link set lo up
modprobe -a loop nvme-tcp dm-mod xfs
for mounted in "tracefs /sys/kernel/tracing" "bpf /sys/fs/bpf" "cgroup2 /sys/fs/cgroup"; do
    set -- $mounted
    mountpoint -q "$2" || mount -t "$1" "$1" "$2"
done
# nvme-cli's and open-iscsi's identities of the host are not this VM's.
mkdir -p /run/drover-vm
export HOME=/run/drover-vm TMPDIR=/tmp
ulimit -n 65536
