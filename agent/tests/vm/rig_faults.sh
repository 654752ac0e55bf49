#!/bin/bash
# Agents and controllers killed at bad moments, and what is mistyped.
# timeout: 900
set -u
scratch=/dev/shm/rig-faults
"$DROVER_BUILD/rig" faults --drover "$DROVER" --scratch "$scratch"
code=$?
cp "$scratch"/logs/* "$RESULTS" 2>/dev/null
rm -rf --one-file-system "$scratch"
exit $code
