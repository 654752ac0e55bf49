#!/bin/bash
# The story of `cargo xtask demo`, with every claim checked.
# kernels: 6.1 6.12 custom
# asked: 6.1
# timeout: 600
set -u
scratch=/dev/shm/rig-demo
"$DROVER_BUILD/rig" demo --drover "$DROVER" --scratch "$scratch" --json
code=$?
cp "$scratch"/logs/* "$RESULTS" 2>/dev/null
rm -rf --one-file-system "$scratch"
exit $code
