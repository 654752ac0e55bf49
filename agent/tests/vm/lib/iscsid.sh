# For scripts whose nodes attach over iSCSI, to be sourced: iscsid with records
# and names that are this VM's own. `iscsid_ends` ends it.
for module in iscsi_tcp sd_mod loop ext4 xfs; do modprobe "$module" || exit 1; done
mkdir -p /run/open-iscsi
mount -t tmpfs -o size=16M none /run/open-iscsi || exit 1
cp /etc/iscsi/iscsid.conf /run/open-iscsi/
echo "InitiatorName=iqn.2026-11.io.drover.vm:default" > /run/open-iscsi/initiatorname.iscsi
mount --bind /run/open-iscsi /etc/iscsi || exit 1
# In a group of its own: as it ends, it ends its group.
setsid iscsid --foreground > "$RESULTS/iscsid.log" 2>&1 &
iscsid=$!

iscsid_ends() {
    local left
    left=$(find /etc/iscsi/nodes -type f 2>/dev/null | wc -l)
    kill "$iscsid" 2>/dev/null
    umount /etc/iscsi
    umount -l /run/open-iscsi
    [ "$left" = 0 ] || { echo "$left node records are left"; return 1; }
}
