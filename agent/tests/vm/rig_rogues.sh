#!/bin/bash
# Epochs handed round under writers with stale devices, while processes are
# killed at random. DROVER_VM_LONG=1: for ten minutes.
# asked: 6.12
# timeout: 1200
set -u
seconds=30
[ -z "${DROVER_VM_LONG:-}" ] || seconds=600
scratch=/dev/shm/rig-rogues
"$DROVER_BUILD/rig" rogues --drover "$DROVER" --scratch "$scratch" --seconds "$seconds"
code=$?
cp "$scratch"/logs/* "$RESULTS" 2>/dev/null
rm -rf --one-file-system "$scratch"
exit $code
