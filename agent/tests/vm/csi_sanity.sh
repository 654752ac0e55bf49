#!/bin/bash
# csi-sanity against `drover standalone` with real attaches. The report and
# drover's log go to $RESULTS; the exit status is csi-sanity's.
# timeout: 1800
set -u
work=/run/drover-sanity
csi_sanity=${CSI_SANITY:-csi-sanity}
mkdir -p "$work/pool" "$work/state"

# Sparse, so its size costs no memory; large enough for the largest volumes that
# csi-sanity makes.
truncate --size 64G /tmp/pool.img
mkfs.xfs -q -K -m reflink=1 /tmp/pool.img || exit 1
mount -o loop /tmp/pool.img "$work/pool" || exit 1

# The one place with drover's flags.
"$DROVER" standalone \
    --node a \
    --pool "$work/pool" \
    --state "$work/state/drover.redb" \
    --state-dir "$work/state/agent" \
    --csi-socket "$work/csi.sock" \
    --metrics-address 127.0.0.1:9420 \
    >"$RESULTS/drover.log" 2>&1 &
drover=$!

ready() { curl --silent --fail --max-time 2 http://127.0.0.1:9420/readyz >/dev/null; }
for _ in $(seq 300); do
    ready && break
    kill -0 $drover 2>/dev/null || break
    sleep 0.2
done
if ! ready; then
    echo "drover standalone ended, or was not ready within 60 s:"
    tail -n 40 "$RESULTS/drover.log"
    exit 1
fi

focus=()
[ -n "${FOCUS:-}" ] && focus=(--ginkgo.focus "$FOCUS")
"$csi_sanity" \
    --csi.endpoint "unix://$work/csi.sock" \
    --csi.stagingdir "$work/staging" \
    --csi.mountdir "$work/mount" \
    --csi.testvolumesize $((1 << 30)) \
    --csi.testvolumeexpandsize $((2 << 30)) \
    --ginkgo.no-color --ginkgo.timeout 28m \
    --ginkgo.json-report "$RESULTS/report.json" \
    ${focus[@]+"${focus[@]}"}
code=$?

kill -TERM $drover
for _ in $(seq 100); do
    kill -0 $drover 2>/dev/null || break
    sleep 0.1
done
if kill -0 $drover 2>/dev/null; then
    echo "drover did not end within 10 s of SIGTERM"
    kill -KILL $drover
    code=1
fi
[ $code -eq 0 ] || tail -n 60 "$RESULTS/drover.log"
umount "$work/pool"
rm -f /tmp/pool.img
exit $code
