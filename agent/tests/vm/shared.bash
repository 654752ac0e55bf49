# What the scripts of this folder share: checks, the example targets, and the
# kernel's own initiators. They source it; the driver runs *.sh only.
#
# A script works in $work, in memory, and ends with `finish`. What it leaves
# behind, attached or mounted or running, is cleaned up as it ends.
set -u
export RUST_BACKTRACE=0
kernel=$(uname -r)
work=$(mktemp -d /dev/shm/drover.XXXXXX)
RESULTS=${RESULTS:-$work}
failed=0
# Longer campaigns: DROVER_VM_LONG=1 cargo xtask test --vm NAME
long=${DROVER_VM_LONG:-}

# --- checks -----------------------------------------------------------------

ok() { echo "ok      $kernel  $*"; }
bad() { echo "FAILED  $kernel  $*"; failed=$((failed + 1)); }
# check NAME COMMAND...: the command succeeds
check() {
    local check_name=$1
    shift
    if "$@" > "$work/out" 2>&1; then ok "$check_name"; else bad "$check_name"; sed 's/^/        /' "$work/out" | tail -n 25; fi
}
# refused NAME COMMAND...: the command fails, and in time
refused() {
    local check_name=$1
    shift
    "$@" > "$work/out" 2>&1
    case $? in
        0 | 124 | 126 | 127) bad "$check_name"; sed 's/^/        /' "$work/out" | tail -n 15 ;;
        *) ok "$check_name" ;;
    esac
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
is() { [ "$1" = "$2" ] || { echo "$1, expected $2"; return 1; }; }
# says PATTERN COMMAND...: the command succeeds and prints a line like that
says() {
    local pattern=$1
    shift
    "$@" > "$work/said" 2>&1 && grep -qiE -- "$pattern" "$work/said" && return
    echo "status $?, or no line like \"$pattern\", of: $*"
    cat "$work/said"
    return 1
}
finish() {
    if [ $failed -gt 0 ]; then
        for log in "$work"/*.log; do
            [ -s "$log" ] || continue
            echo "--- ${log##*/}"
            tail -n 40 "$log"
        done
    fi
    echo "$kernel: $failed failed"
    [ $failed -eq 0 ]
    exit
}
clean_up() {
    local name mounted
    trap - EXIT
    # What is held by a target must not wait for it when it has gone.
    for mounted in $(awk -v w="$work/" 'index($2, w) == 1 { print $2 }' /proc/mounts | grep -v "^$work/pool"); do
        timeout 20 umount "$mounted" 2> /dev/null || umount -l "$mounted"
    done
    for name in /sys/class/nvme-subsystem/*/nvme*; do
        case ${name##*/} in *n*n*) continue ;; esac
        [ -e "$name/delete_controller" ] && timeout 20 bash -c "echo 1 > $name/delete_controller"
    done
    [ -z "${iscsid:-}" ] || iscsi_end
    for name in "${!pids[@]}"; do crash "$name"; done
    awk -v w="$work/" 'index($2, w) == 1 { print $2 }' /proc/mounts | tac | xargs -rn 1 umount -l
    rm -rf --one-file-system "$work"
} 2> /dev/null
trap clean_up EXIT

# --- targets ----------------------------------------------------------------

declare -A pids=() inputs=()
# start NAME EXAMPLE ARGUMENTS...: one of the example targets
start() {
    local name=$1 input
    rm -f "$work/$name.in"
    mkfifo "$work/$name.in"
    : > "$work/$name.out"
    "$DROVER_BUILD/examples/$2" "${@:3}" \
        < "$work/$name.in" > "$work/$name.out" 2>> "$work/$name.log" &
    pids[$name]=$!
    exec {input}> "$work/$name.in"
    inputs[$name]=$input
}
serving() { within "${2:-60}" grep -q serving "$work/$1.out"; } # NAME [SECONDS]
tell() { echo "${@:2}" >&"${inputs[$1]}"; }                     # NAME WORDS...
heard() { within "$2" grep -qE "$3" "$work/$1.out"; }           # NAME SECONDS PATTERN
gone() {
    local input=${inputs[$1]}
    wait "${pids[$1]}"
    exec {input}>&-
    unset "pids[$1]" "inputs[$1]"
}
runs() { [ -n "${pids[$1]:-}" ]; } # NAME
stop() { runs "$1" && tell "$1" stop && gone "$1"; }
crash() { runs "$1" && kill -9 "${pids[$1]}" && gone "$1"; } 2> /dev/null
# make_pool [MIB]: XFS with reflink at $work/pool, as a pool is
make_pool() {
    mkdir -p "$work/pool"
    truncate -s "${1:-1024}M" "$work/pool.img"
    mkfs.xfs -q -K -m reflink=1 "$work/pool.img" && mount -o loop "$work/pool.img" "$work/pool"
}

# --- NVMe/TCP ---------------------------------------------------------------

host=nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-00000000000a
host_id=00000000-0000-4000-8000-00000000000a
volume=$work/volume # what is served
# serve NQN UUID [more arguments]: the target called nvme
serve() {
    start nvme nvme_target --file "$volume" --subsystem "$1" --namespace "$2" \
        --host $host --host-id $host_id "${@:3}"
    serving nvme
}
connect() { # NQN [more options]
    timeout 60 bash -c "echo transport=tcp,traddr=127.0.0.1,trsvcid=4420,nqn=$1,hostnqn=$host,hostid=$host_id,nr_io_queues=2,keep_alive_tmo=10,reconnect_delay=1,ctrl_loss_tmo=-1${2:+,$2} > /dev/nvme-fabrics"
}
subsystem() { # NQN: its folder in sysfs
    local folder
    for folder in /sys/class/nvme-subsystem/*; do
        [ "$(cat "$folder/subsysnqn" 2> /dev/null)" = "$1" ] && echo "$folder" && return
    done
    return 1
}
controllers() { # NQN: the folders of its controllers
    local folder controller
    folder=$(subsystem "$1") || return
    for controller in "$folder"/nvme[0-9]*; do
        case ${controller##*/} in *n*n*) continue ;; esac
        [ -e "$controller/delete_controller" ] && echo "$controller"
    done
}
disk() { # NQN: the name of its multipath head
    local folder
    folder=$(subsystem "$1") || return 1
    # The head only, not its paths (nvme0c0n1).
    ls "$folder" | grep -E '^nvme[0-9]+n1$'
}
have_disk() { local name && name=$(disk "$1") && [ -b "/dev/$name" ]; }
no_disk() { ! disk "$1" > /dev/null; }
no_subsystem() { ! subsystem "$1" > /dev/null; }
must_have_disk() { # NQN: nothing that follows makes sense without it
    within 60 have_disk "$1" && return
    bad "a disk of $1 appears"
    finish
}
disconnect() { # NQN
    local controller
    for controller in $(controllers "$1"); do
        timeout 60 bash -c "echo 1 > $controller/delete_controller"
    done
    within 60 no_subsystem "$1"
}

# --- iSCSI ------------------------------------------------------------------

portal=127.0.0.1:3260
initiator=iqn.2026-11.io.drover.vm:host
iscsid=
iscsi_begin() { # open-iscsi, with records and names that are this script's own
    modprobe -a iscsi_tcp sd_mod sg || return
    mkdir -p "$work/open-iscsi"
    { cat /etc/iscsi/iscsid.conf; echo "iscsid.startup = /bin/true"; } > "$work/open-iscsi/iscsid.conf"
    echo "InitiatorName=$initiator" > "$work/open-iscsi/initiatorname.iscsi"
    mount --bind "$work/open-iscsi" /etc/iscsi || return
    # In a group of its own: as it ends, it ends its group.
    setsid iscsid --foreground >> "$work/iscsid.log" 2>&1 &
    iscsid=$!
    within 60 grep -q ISCSIADM_ABSTRACT_NAMESPACE /proc/net/unix
}
iscsid_ended() { ! kill -0 "$iscsid"; }
iscsi_end() {
    timeout 60 iscsiadm -m node --logout
    kill "$iscsid"
    within 10 iscsid_ended || kill -9 "$iscsid"
    iscsid=
    umount -l /etc/iscsi
} > /dev/null 2>&1
# serve_iscsi IQN [more arguments]: the target called iscsi
serve_iscsi() {
    start iscsi iscsi_target --file "$volume" --iqn "$1" --initiator $initiator "${@:2}"
    serving iscsi
}
node() { iscsiadm -m node -T "$1" -p $portal "${@:2}"; } # IQN ARGUMENTS...
# record IQN [KEY=VALUE...]: makes the node record
record() {
    local setting
    node "$1" -o new > /dev/null || return
    for setting in "${@:2}"; do
        node "$1" -o update -n "${setting%%=*}" -v "${setting#*=}" || return
    done
}
login() { record "$@" && timeout 60 iscsiadm -m node -T "$1" -p $portal --login; } # IQN [KEY=VALUE...]
logout() { # IQN
    timeout 60 iscsiadm -m node -T "$1" -p $portal --logout
    node "$1" -o delete
}
session() { # IQN: its folder in sysfs
    local folder
    for folder in /sys/class/iscsi_session/session*; do
        [ "$(cat "$folder/targetname" 2> /dev/null)" = "$1" ] && echo "$folder" && return
    done
    return 1
}
scsi() { # IQN: the folder of its LUN 0 in sysfs
    local folder
    folder=$(session "$1") || return
    ls -d "$folder"/device/target*/*:0 2> /dev/null | grep .
}
scsi_disk() { local folder && folder=$(scsi "$1") && ls "$folder/block" 2> /dev/null | grep .; } # IQN
have_scsi_disk() { local name && name=$(scsi_disk "$1") && [ -b "/dev/$name" ]; }
must_have_scsi_disk() { # IQN
    within 60 have_scsi_disk "$1" && return
    bad "a disk of $1 appears"
    finish
}

# --- work on a disk ---------------------------------------------------------

zeroes() { # DEVICE OFFSET_MIB MIB
    cmp <(dd if="$1" bs=1M skip="$2" count="$3" iflag=direct status=none) <(head -c $(($3 << 20)) /dev/zero)
}
file_system() { # TYPE DEVICE [STEPS]: made, worked on, mounted again, trimmed
    mkdir -p "$work/mnt"
    case $1 in xfs) mkfs.xfs -q -f "$2" ;; ext4) mkfs.ext4 -q -F "$2" ;; esac &&
        mount -t "$1" "$2" "$work/mnt" &&
        cp -r /etc "$work/mnt/" && "$DROVER_BUILD/examples/durable_work" write "$work/mnt" --steps "${3:-9}" &&
        umount "$work/mnt" && mount -t "$1" "$2" "$work/mnt" &&
        "$DROVER_BUILD/examples/durable_work" check "$work/mnt" --steps "${3:-9}" &&
        diff -r /etc/ssl "$work/mnt/etc/ssl" && sound "$1" "$2"
    local result=$?
    fstrim "$work/mnt" || result=1
    umount "$work/mnt" || result=1
    return $result
}
sound() { # TYPE DEVICE: nothing is wrong with a file system; it is mounted at $work/mnt again
    umount "$work/mnt" &&
        case $1 in xfs) xfs_repair -n "$2" ;; ext4) e2fsck -fn "$2" ;; esac &&
        mount -t "$1" "$2" "$work/mnt"
}
verified() { # DEVICE MIB [more options of fio]: random sizes, each read back and checked
    fio --name=verify --filename="$1" --rw=randwrite --bssplit=4k/40:8k/15:20k/15:64k/20:256k/10 \
        --size="$2M" --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 \
        --fsync=64 --randseed=7 --thread --output-format=terse "${@:3}"
}
