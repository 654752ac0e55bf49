#!/bin/bash
# Regular moves, with snapshots, growth, backups and restarts thrown in.
# timeout: 900
set -u
scratch=/dev/shm/rig-moves
"$DROVER_BUILD/rig" moves --drover "$DROVER" --scratch "$scratch" --moves 12
code=$?
cp "$scratch"/logs/* "$RESULTS" 2>/dev/null
rm -rf --one-file-system "$scratch"
exit $code
