#!/bin/bash
# A home's disk that hangs with writes inside, a move, and the operator's word.
# asked: 6.12
# timeout: 600
set -u
scratch=/dev/shm/rig-unsettled
"$DROVER_BUILD/rig" unsettled --drover "$DROVER" --scratch "$scratch"
code=$?
cp "$scratch"/logs/* "$RESULTS" 2>/dev/null
rm -rf --one-file-system "$scratch"
exit $code
