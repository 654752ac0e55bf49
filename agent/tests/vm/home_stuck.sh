#!/bin/bash
# A disk below the pool that does not answer while commands are inside: their
# number is told, the gate stays closed, and a fence waits for them, or for an
# operator's word. Writes to the volume's data hang, all else goes on (dm-delay);
# or the whole disk hangs (device-mapper, suspended).
# kernels: 6.1 6.12
# asked: 6.1
# timeout: 600
source "${BASH_SOURCE%/*}/shared.bash"
hang_for=${long:+150}
hang_for=${hang_for:-6}
data=$work/pool/volumes/vol-bench/data

pool() {
    local sectors
    mkdir -p "$work/pool" && truncate -s 1G "$work/pool.img" && loop=$(losetup --show -f "$work/pool.img") || return
    sectors=$(blockdev --getsz "$loop")
    dmsetup create pool-disk --table "0 $sectors linear $loop 0" &&
        mkfs.xfs -q -K -m reflink=1 /dev/mapper/pool-disk && mount /dev/mapper/pool-disk "$work/pool"
}
home() {
    start home home --pool "$work/pool" --listen 127.0.0.1:4420 --host $host --host-id $host_id --mib 64 &&
        serving home && dd if=/dev/zero of="$data" bs=1M count=64 conv=notrunc,fsync status=none
}
# The volume's data becomes a device of its own below the pool's.
split() {
    local sectors first count
    sectors=$(blockdev --getsz /dev/mapper/pool-disk)
    # One extent: "  0:  0.. 16383:  24..  16407:  16384:  last,eof", in blocks of 4 KiB.
    read -r first count < <(filefrag -v -b4096 "$data" | awk -F'[:.]+ *' '$1 ~ /^ *[0-9]+$/ { n++; print $4 * 8, $6 * 8 } END { exit n != 1 }') || return
    free="0 $count linear $loop $first"
    delayed="0 $count delay $loop $first 0 $loop $first 3600000 $loop $first 0"
    dmsetup create pool-data --table "$free" &&
        dmsetup suspend pool-disk &&
        dmsetup reload pool-disk --table "0 $first linear $loop 0
$first $count linear /dev/mapper/pool-data 0
$((first + count)) $((sectors - first - count)) linear $loop $((first + count))" &&
        dmsetup resume pool-disk
}
# Writes to the data hang; what a delay has in hand goes on as it is taken out.
hang_data() { become "$delayed"; }
free_data() { become "$free"; }
become() { # TABLE
    dmsetup suspend --nolockfs pool-data && dmsetup reload pool-data --table "$1" && dmsetup resume pool-data
}
hang_disk() { dmsetup suspend --noflush --nolockfs pool-disk; }
free_disk() { dmsetup resume pool-disk; }
in_flight() { # COUNT: so many writes are in the pool's disk
    [ "$(awk '{ print $2 }' "/sys/block/$(basename "$(readlink -f /dev/mapper/pool-disk)")/inflight")" -ge "$1" ]
}
epoch=0
loads=
# ask PATTERN WORDS...: the home is told something, and answers like that
ask() {
    local pattern=$1 before
    shift
    before=$(wc -l < "$work/home.out")
    tell home "$@" && within 60 answered "$before" && says "$pattern" answer "$before"
}
answer() { tail -n +$(($1 + 1)) "$work/home.out"; }
answered() { [ -n "$(answer "$1")" ]; }
grant() { epoch=$((epoch + 1)) && ask "^exported" export $epoch; }
# load COUNT QUEUES: so many writes at a time through the export that was granted last
load() {
    local name
    name=$(awk '$1 == "exported" { name = $2 } END { print name }' "$work/home.out")
    "$DROVER_BUILD/load" run --wire nvme --address 127.0.0.1:4420 --target "$name" --initiator $host --host-id $host_id \
        --mix write --depth $(($1 / $2)) --queues "$2" --seconds 500 > "$work/load.log" 2>&1 &
    loads=$!
}
end_load() { kill $loads && wait $loads; } 2> /dev/null
inside() { grant && hang_data && load "$@" && within 60 in_flight "$1"; } # COUNT QUEUES
# A disk that is suspended counts nothing: its hang comes under the load.
inside_disk() { grant && load 32 1 && within 60 in_flight 1 && hang_disk && sleep 2; }
# fence PATTERN: asked again where it is not done in time and goes on, as it says
# then: a machine with much else to do is no disk that hangs.
fence() {
    local late="not done within" end=$((SECONDS + 60))
    until ask "$1" fence $epoch; do
        [[ $1 != *"$late"* && $(tail -n 1 "$work/home.out") == *"$late"* && $SECONDS -lt $end ]] || return
    done
}
accept() { ask "$2" accept $epoch "$1"; }   # COUNT PATTERN
waits() { # COUNT: as long as the data hangs
    local end=$((SECONDS + hang_for))
    while [ $SECONDS -lt $end ]; do
        fence "^refused $1 commands are still inside" || return
    done
}

check "a pool whose disk can hang" pool
check "a home" home
check "the volume's data is a device of its own" split
for shape in "1 1" "32 1" "1024 16"; do
    read -r count queues <<< "$shape"
    check "$count inside: they are" inside "$count" "$queues"
    check "$count inside: a fence says so, and waits" waits "$count"
    check "$count inside: the disk goes on" free_data
    check "$count inside: it settles" fence "^fenced [0-9]+ $count Drained 0"
    end_load
done

check "the word: 32 inside" inside 32 1
check "the word: of no fence is refused" accept 32 "^refused .*no fence of epoch $epoch"
check "the word: the fence waits" fence "^refused 32 commands"
check "the word: on fewer is refused" accept 31 "^refused 32 commands"
check "the word: on these ends the wait" accept 32 "^accepted [0-9]+ 32 Operator 32"
check "the word: the fence answers like that" fence "^fenced [0-9]+ 32 Operator 32"
end_load
check "the word: the next holder gets it though the disk hangs" grant
check "the word: the disk goes on" free_data
check "the word: and is fenced in its turn" fence "^fenced [0-9]+ 0 Drained 0"

check "the whole disk: writes are inside" inside_disk
check "the whole disk: a fence has an answer all the same" fence "^refused .*not done within"
check "the whole disk: it goes on" free_disk
check "the whole disk: it settles" fence "^fenced [0-9]+ [1-9][0-9]* Drained 0"
end_load
stop home
umount "$work/pool" && dmsetup remove pool-disk && dmsetup remove pool-data
losetup -d "$loop"
finish
