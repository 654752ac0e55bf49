# For scripts of `cargo xtask bench` in a VM, to be sourced: $work is theirs.

wrong() {
    echo "$*"
    tail -n 20 "$work"/*.log 2> /dev/null || true
    dmesg | tail -n 20
    exit 1
}

# within SECONDS COMMAND...: the command succeeds before they are over
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}

# serve NAME COMMAND...: starts one of drover's examples
serve() {
    local input
    mkfifo "$work/$1.in"
    "${@:2}" < "$work/$1.in" > "$work/$1.out" 2> "$work/$1.log" &
    # Held open for as long as the script runs: the target ends with its input.
    exec {input}> "$work/$1.in"
    within 30 grep -q serving "$work/$1.out" || wrong "$1 does not serve"
}
