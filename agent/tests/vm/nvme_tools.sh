#!/bin/bash
# nvme-cli against the target: every log page, feature, reservation and I/O
# command, each answer looked at for its meaning.
# kernels: 6.1 6.12
# asked: 6.1
# timeout: 400
source "${BASH_SOURCE%/*}/shared.bash"
volume=$work/pool/volume
name=nqn.2026-01.io.drover:vm:tools
uuid=abababab-1111-4111-8111-111111111111
stranger=nqn.2026-01.io.drover:other

block() { dd if="$1" bs=4k skip="$2" count=1 iflag=direct status=none; } # DEVICE LBA
random() { dd if=/dev/urandom bs=4k count="${1:-1}" status=none; } # [BLOCKS]
zero_block() { cmp -n 4096 /dev/zero <(block "$dev" "$1"); } # LBA
written() { nvme write "$dev" -s "$1" -c 0 -z 4096 -d "$work/one" > /dev/null; } # LBA
field() { says "^ *$1[[:space:]]*: *$2" "${@:3}"; } # NAME PATTERN COMMAND...
feature() { says "current value: ?(0x)?0*$2" nvme get-feature "$ctrl" -f "$1" "${@:3}"; } # ID VALUE [more arguments]
log_bytes() { nvme get-log "$ctrl" -i "$1" -l "$2" -b 2> /dev/null | head -c "$2" | wc -c; } # ID LENGTH
# not_kept ID: a log page that is not offered is refused as the specification says (109h)
not_kept() { nvme get-log "$ctrl" -i "$1" -l 512 2>&1 | grep -qiE "0x?[24]?109|INVALID_LOG_PAGE|invalid log page"; }

check "a pool" make_pool 512
truncate -s 256M "$volume"
random > "$work/one"
random 4 > "$work/four"
check "the target serves" serve $name $uuid --discovery 127.0.0.1:8009 --reservations "$work/reservations"
check "connect" connect $name
must_have_disk $name
dev=/dev/$(disk $name)
ctrl=/dev/$(basename "$(controllers $name)")

# Discovery.
discover() { nvme discover -t tcp -a 127.0.0.1 -s "$1" -q "$2" -I $host_id; } # PORT HOST
for port in 8009 4420; do
    check "discover on $port: the subsystem" field subnqn "$name" discover $port $host
    check "discover on $port: where it is" field trsvcid 4420 discover $port $host
    check "discover on $port: by TCP" field trtype tcp discover $port $host
done
finds() { discover 8009 $stranger 2>&1 | grep "$name"; }
refused "discover: another host finds nothing" finds

# Identify.
check "id-ctrl: model" field mn drover nvme id-ctrl "$ctrl"
check "id-ctrl: an I/O controller" field cntrltype 1 nvme id-ctrl "$ctrl"
check "id-ctrl: the subsystem" field subnqn $name nvme id-ctrl "$ctrl"
check "id-ctrl: queue entries" field sqes 0x66 nvme id-ctrl "$ctrl"
check "id-ctrl: a volatile write cache" field vwc 0x7 nvme id-ctrl "$ctrl"
check "id-ctrl: keep alive" field kas "[1-9]" nvme id-ctrl "$ctrl"
check "id-ctrl: Compare, Write Zeroes, DSM, reservations, Verify, Copy" says "reservations supported" nvme id-ctrl -H "$ctrl"
check "id-ns: size" field nsze 0x10000 nvme id-ns "$dev"
check "id-ns: blocks of 4 KiB" says "lbads:12.*in use" nvme id-ns "$dev"
check "id-ns: reservations that persist" field rescap 0xff nvme id-ns "$dev"
check "id-ns: NGUID" field nguid "${uuid//-/}" nvme id-ns "$dev"
check "ns-descs: UUID" field uuid "$uuid" nvme ns-descs "$dev"
check "ns-descs: NGUID" field nguid "${uuid//-/}" nvme ns-descs "$dev"
check "list-ns" says "0x1" nvme list-ns "$ctrl"
check "get-ns-id" says "namespace-id: ?1$" nvme get-ns-id "$dev"
check "list: the disk and its size" says "${dev##*/}.*drover.*268\.4" nvme list
check "list-subsys: live over TCP" says "traddr=127.0.0.1,trsvcid=4420.* live" nvme list-subsys
# Not show-regs: nvme-cli 2.3 takes INVALID FIELD for "not there" without DNR only, and nvmet sets it as well.
check "get-property: version 1.4" says "value: 10400" nvme get-property --offset=8 "$ctrl"
refused "get-property: a register of PCIe's" nvme get-property --offset=12 "$ctrl"

# Log pages.
check "error log" says "error log entries" nvme error-log "$ctrl"
check "error log: no errors" field error_count 0 nvme error-log "$ctrl"
check "smart log: nothing critical" field critical_warning 0 nvme smart-log "$ctrl"
check "smart log: all spare" field available_spare 100% nvme smart-log "$ctrl"
check "firmware log: one slot" field afi 0x1 nvme fw-log "$ctrl"
check "firmware log: its version" says "frs1.*\(0\." nvme fw-log "$ctrl"
for command in "Get Log Page" "Identify" "Abort" "Set Features" "Asynchronous Event Request" "Keep Alive"; do
    check "effects log: $command" says "\[$command *\] *:? *0*1" nvme effects-log --csi=0 "$ctrl"
done
for command in Flush Write Read Compare "Write Zeroes" "Dataset Management" Verify "Reservation Register" "Reservation Report" \
    "Reservation Acquire" "Reservation Release" Copy; do
    check "effects log: $command" says "\[$command *\] *:? *0*[1-3]" nvme effects-log --csi=0 "$ctrl"
done
tell nvme grow $((288 << 20))
grown() { [ "$(blockdev --getsize64 "$dev")" = $((288 << 20)) ]; }
check "growth is seen" within 60 grown
check "changed namespaces log: the kernel has read it" is "$(nvme changed-ns-list-log "$ctrl")" ""
check "reservation notification log" says "log page count[[:space:]]*: *0" nvme resv-notif-log "$ctrl"
for id in 1 2 3 4 5 0x80; do
    check "log $id: as long as it is asked for" is "$(log_bytes $id 64)" 64
done
# ANA, persistent events, and what comes with them are not offered, and said so.
for id in 0x0c 0x0d 0x09 0x81; do
    check "log $id: not kept" not_kept $id
done

# Features.
check "feature 06h: the write cache is on" feature 6 1
check "feature 06h: off" nvme set-feature "$ctrl" -f 6 -v 0
check "feature 06h: it is off" feature 6 0
check "feature 06h: on" nvme set-feature "$ctrl" -f 6 -v 1
check "feature 07h: two queues" feature 7 10001
check "feature 0bh: events" says "0x0*b.*0x[0-9a-f]*1[0-9a-f]{2}$" nvme get-feature "$ctrl" -f 0xb
check "feature 0fh: keep alive of 10 s" feature 0xf 2710
check "feature 0fh: can be set" nvme set-feature "$ctrl" -f 0xf -v 20000
check "feature 0fh: it is" feature 0xf 4e20
check "feature 16h: host behaviour" nvme get-feature "$ctrl" -f 0x16 -l 512
check "feature 81h: the host's id" says "00 00 00 00 00 00 40 00 80 00 00 00 00 00 00 0a" nvme get-feature "$ctrl" -f 0x81 -l 16 -c 1
check "feature 82h: reservation notices" nvme get-feature "$dev" -n 1 -f 0x82
check "feature 83h: reservations persist" nvme set-feature "$dev" -n 1 -f 0x83 -v 1
check "feature 83h: they do" says "current value: ?(0x)?0*1$" nvme get-feature "$dev" -n 1 -f 0x83
refused "feature 81h: cannot be set" nvme set-feature "$ctrl" -f 0x81 -v 1 -l 8 -d /dev/zero
refused "a feature that is not there" nvme get-feature "$ctrl" -f 0x10

# I/O commands.
check "write" nvme write "$dev" -s 8 -c 3 -z 16384 -d "$work/four"
check "write, FUA" nvme write "$dev" -s 8 -c 3 -z 16384 -d "$work/four" -f
check "flush" nvme flush "$dev" -n 1
check "what was written is in the file" cmp "$work/four" <(dd if="$volume" bs=4k skip=8 count=4 iflag=direct status=none)
check "read" nvme read "$dev" -s 8 -c 3 -z 16384 -d "$work/back"
check "what is read was written" cmp "$work/four" "$work/back"
check "compare, the same" nvme compare "$dev" -s 8 -c 3 -z 16384 -d "$work/four"
refused "compare, other data" nvme compare "$dev" -s 9 -c 0 -z 4096 -d "$work/one"
check "verify" nvme verify "$dev" -s 0 -c 1023
refused "verify beyond the end" nvme verify "$dev" -s 1000000 -c 0
written 20 && written 21 && written 22
check "write zeroes" nvme write-zeroes "$dev" -s 20 -c 0
check "write zeroes, deallocate" nvme write-zeroes "$dev" -s 21 -c 0 -d
check "dsm, deallocate" nvme dsm "$dev" -n 1 -s 22 -b 1 -d
for lba in 20 21 22; do check "block $lba reads as zeroes" zero_block $lba; done
check "copy" nvme copy "$dev" -d 200 -s 10,8 -b 1,1
check "what was copied" cmp <(dd if="$dev" bs=4k skip=200 count=4 iflag=direct status=none) \
    <(tail -c 8192 "$work/four"; head -c 8192 "$work/four")
refused "write uncorrectable is not served" nvme write-uncor "$dev" -s 0 -c 0

# Reservations: all six types, and each action.
report() { nvme resv-report "$dev" -n 1 -e; }
check "resv-report: nobody" field regctl "0$" report
check "resv-register" nvme resv-register "$dev" -n 1 -k 0x10 -r 0 -p 3
check "resv-report: one registrant" field regctl "1$" report
check "resv-report: its key" says "rkey *: *(0x)?10\b" report
check "resv-report: it persists" field ptpls "1$" report
for type in 1 2 3 4 5 6; do
    check "resv-acquire: type $type" nvme resv-acquire "$dev" -n 1 -c 0x10 -t $type -a 0
    check "resv-report: type $type" field rtype "$type\b" report
    check "type $type: the holder writes" written 30
    refused "resv-release: another type" nvme resv-release "$dev" -n 1 -c 0x10 -t $((type % 6 + 1)) -a 0
    check "resv-release: type $type" nvme resv-release "$dev" -n 1 -c 0x10 -t $type -a 0
done
refused "resv-acquire: another key" nvme resv-acquire "$dev" -n 1 -c 0x11 -t 1 -a 0
check "resv-acquire" nvme resv-acquire "$dev" -n 1 -c 0x10 -t 1 -a 0
crash nvme
serve $name $uuid --reservations "$work/reservations"
persists() { field rtype "1\b" report && field regctl "1$" report; }
check "a reservation persists through kill -9" within 60 persists
check "resv-acquire: preempt" nvme resv-acquire "$dev" -n 1 -c 0x10 -p 0x10 -t 2 -a 1
check "resv-report: preempted" field rtype "2\b" report
check "resv-acquire: preempt and abort" nvme resv-acquire "$dev" -n 1 -c 0x10 -p 0x10 -t 3 -a 2
check "resv-register: another key" nvme resv-register "$dev" -n 1 -c 0x10 -k 0x20 -r 2
check "resv-report: the key is another" says "rkey *: *(0x)?20\b" report
check "resv-release: clear" nvme resv-release "$dev" -n 1 -c 0x20 -a 1
check "resv-report: nobody again" field regctl "0$" report
check "resv-register, once more" nvme resv-register "$dev" -n 1 -k 0x30 -r 0
check "resv-register: unregister" nvme resv-register "$dev" -n 1 -c 0x30 -r 1
check "resv-report: nobody at the end" field regctl "0$" report

# Abort, reset, disconnect.
check "abort of a command that is not there" says "0x0*1" nvme admin-passthru "$ctrl" --opcode=8 --cdw10=0x00630000
check "reset" nvme reset "$ctrl"
live() { [ "$(cat "$(controllers $name)/state")" = live ]; }
check "reset: live again" within 60 live
check "reset: it reads" cmp "$work/four" <(dd if="$dev" bs=4k skip=8 count=4 iflag=direct status=none)
refused "subsystem-reset is not served" nvme subsystem-reset "$ctrl"
check "disconnect" says "disconnected 1" nvme disconnect -n $name
stop nvme
finish
