#!/bin/bash
# The story of `cargo xtask demo` over iSCSI, with every claim checked.
# kernels: 6.1 6.12 custom
# asked: 6.1
# timeout: 900
set -u
. "$(dirname "$0")/lib/iscsid.sh"
scratch=/dev/shm/rig-demo-iscsi
# What an iscsiadm leaves that was killed at the wrong moment.
mkdir -p /run/lock/iscsi
touch /run/lock/iscsi/lock
ln -f /run/lock/iscsi/lock /run/lock/iscsi/lock.write || exit 1
"$DROVER_BUILD/rig" demo --protocol iscsi --drover "$DROVER" --scratch "$scratch" --json
code=$?
iscsid_ends || true
cp "$scratch"/logs/* "$RESULTS" 2>/dev/null
if ! grep -qs "removed the lock on open-iscsi's records" "$RESULTS"/[ab].log; then
    echo "nobody removed the lock that a dead iscsiadm left"
    code=1
fi
rm -rf --one-file-system "$scratch"
exit $code
