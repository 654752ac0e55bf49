#!/bin/bash
# Regular moves over iSCSI, with the same things thrown in as over NVMe/TCP.
# asked: 6.12
# timeout: 900
set -u
. "$(dirname "$0")/lib/iscsid.sh"
scratch=/dev/shm/rig-moves-iscsi
"$DROVER_BUILD/rig" moves --protocol iscsi --drover "$DROVER" --scratch "$scratch" --moves 6
code=$?
iscsid_ends || code=1
cp "$scratch"/logs/* "$RESULTS" 2>/dev/null
rm -rf --one-file-system "$scratch"
exit $code
