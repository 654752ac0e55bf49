#!/bin/bash
# A node's link is cut under writes; it is declared lost, and comes back.
# kernels: 6.1 6.12
# asked: 6.1
# timeout: 600
set -u
scratch=/dev/shm/rig-partition
"$DROVER_BUILD/rig" partition --drover "$DROVER" --scratch "$scratch"
code=$?
cp "$scratch"/logs/* "$RESULTS" 2>/dev/null
rm -rf --one-file-system "$scratch"
exit $code
