# Runs one program after another in the VM; the calls of `run` follow.
record=$DROVER_RECORD
failed=0

# run NUMBER NAME SECONDS COMMAND...
run() {
    local number=$1 name=$2 limit=$3 code begin took before
    shift 3
    export RESULTS=$record/$number
    mkdir -p "$RESULTS"
    echo "… $name"
    before=$(dmesg 2>/dev/null | wc -l)
    begin=$(date +%s%3N)
    timeout --kill-after=10 "$limit" "$@" >"$record/$number.log" 2>&1 </dev/null
    code=$?
    took=$(($(date +%s%3N) - begin))
    echo "$number $code $took" >>"$record/record"
    sync "$record/record"
    if [ "$code" -eq 0 ]; then
        echo "ok $name ($took ms)"
        return
    fi
    failed=1
    cat "$record/$number.log"
    dmesg 2>/dev/null | tail -n +$((before + 1)) | tail -n 40
    echo "FAILED $name (status $code, $took ms)"
}
