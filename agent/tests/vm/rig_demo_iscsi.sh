#!/bin/bash
# The story of `cargo xtask demo` over iSCSI, with every claim checked.
# kernels: 6.1 6.12 custom
# asked: 6.1
# timeout: 900
set -u
. "$(dirname "$0")/lib/iscsid.sh"
scratch=/dev/shm/rig-demo-iscsi
"$DROVER_BUILD/rig" demo --protocol iscsi --drover "$DROVER" --scratch "$scratch" --json
code=$?
iscsid_ends || true
cp "$scratch"/logs/* "$RESULTS" 2>/dev/null
rm -rf --one-file-system "$scratch"
exit $code
