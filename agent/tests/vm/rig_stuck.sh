#!/bin/bash
# Moves under backups that are slow, hang, lost their snapshot, or fail.
# timeout: 900
set -u
scratch=/dev/shm/rig-stuck
"$DROVER_BUILD/rig" stuck --drover "$DROVER" --scratch "$scratch"
code=$?
cp "$scratch"/logs/* "$RESULTS" 2>/dev/null
rm -rf --one-file-system "$scratch"
exit $code
