#!/bin/bash
# sg3_utils and iscsiadm against the target: inquiry and all its pages, capacity,
# mode pages, opcodes, LUNs, persistent reservations of all types, resets, and
# the block commands, each answer looked at for its meaning.
# kernels: 6.1 6.12
# asked: 6.1 6.12
# timeout: 400
source "${BASH_SOURCE%/*}/shared.bash"
volume=$work/pool/volume
iqn=iqn.2026-11.io.drover.vm:tools
uuid=5d2c2f6e-3c47-4f0c-9a55-6d1c7f0a3b11
second=iqn.2026-11.io.drover.vm:second

random() { dd if=/dev/urandom bs=4k count="${1:-1}" status=none; }      # [BLOCKS]
block() { dd if="$dev" bs=4k skip="$1" count=1 iflag=direct status=none; } # LBA
write_block() { dd if="$work/one" of="$dev" bs=4k seek="$1" count=1 oflag=direct conv=notrunc status=none; } # LBA
zero_block() { cmp -n 4096 /dev/zero <(block "$1"); } # LBA
serves() { sg_opcodes -u "$sg" 2> /dev/null | grep -qiE "^ *$1 "; } # OPCODE
ends_with() { "${@:2}" > /dev/null 2>&1; is $? "$1"; } # STATUS COMMAND...

check "a pool" make_pool 512
truncate -s 256M "$volume"
random > "$work/one"
random > "$work/two"
check "open-iscsi starts" iscsi_begin
check "the target serves" serve_iscsi $iqn --initiator $second --uuid $uuid --reservations "$work/reservations"

# Discovery: what this initiator may use, and nothing else.
check "discovery" says "^127.0.0.1:3260,1 $iqn$" iscsiadm -m discovery -t st -p $portal
node $iqn -o delete
check "log in" login $iqn
must_have_scsi_disk $iqn
dev=/dev/$(scsi_disk $iqn)
sg=/dev/$(ls "$(scsi $iqn)/scsi_generic")
check "the session is logged in" says "iscsi session state: logged_in" iscsiadm -m session -P 1

# Inquiry, and its pages.
check "inquiry: vendor" says "vendor identification: DROVER" sg_inq "$sg"
check "inquiry: SPC-4, not removable" says "rmb=0.*version=0x06" sg_inq "$sg"
check "inquiry: the standards" says "iscsi" sg_inq -d "$sg"
for page in 0x00:sv 0x80:sn 0x83:di 0x86:ei 0xb0:bl 0xb1:bdc 0xb2:lbpv; do
    check "page ${page%:*} is listed" says "\[${page#*:}\]" sg_vpd --page=sv "$sg"
    check "page ${page%:*} can be read" sg_inq --page=${page%:*} "$sg"
done
refused "page 0xb7, which is not listed" sg_inq --page=0xb7 "$sg"
check "page 80h: the serial number" says "${uuid//-/}" sg_vpd --page=sn "$sg"
check "page 83h: a name in NAA format" says "0x3[0-9a-f]{15}" sg_vpd --page=di "$sg"
check "page 83h: the port's iSCSI name" says "$iqn,t,0x0*1" sg_vpd --page=di "$sg"
check "page 86h: a volatile cache" says "v_sup=1" sg_vpd --page=ei "$sg"
check "page B0h: unmap" says "maximum unmap lba count: [1-9]" sg_vpd --page=bl "$sg"
check "page B0h: compare and write" says "maximum compare and write length: [1-9]" sg_vpd --page=bl "$sg"
check "page B0h: zero blocks are none" says "wsnz.*: 1" sg_vpd --page=bl "$sg"
check "page B1h: no rotation" says "non-rotating" sg_vpd --page=bdc "$sg"
check "page B2h: unmap by all three" says "lbpu.*: 1" sg_vpd --page=lbpv "$sg"
check "page B2h: zeroes" says "lbprz.*: 1" sg_vpd --page=lbpv "$sg"
check "page B2h: thin" says "thin" sg_vpd --page=lbpv "$sg"

# Capacity, modes, opcodes, LUNs.
check "capacity" says "number of logical blocks=65536" sg_readcap "$sg"
check "capacity (16)" says "number of logical blocks=65536" sg_readcap --16 "$sg"
check "capacity (16): thin, zeroes" says "lbpme=1, lbprz=1" sg_readcap --16 "$sg"
check "capacity (16): no protection" says "prot_en=0" sg_readcap --16 "$sg"
check "modes: caching, WCE" says "08 12 [0-9a-f][4-7]" sg_modes --page=8 "$sg"
check "modes (6): caching" says "08 12 [0-9a-f][4-7]" sg_modes -6 --page=8 "$sg"
check "modes: DPOFUA" says "dpofua=1" sg_modes --page=8 "$sg"
check "modes: control" says "0a 0a" sg_modes --page=0xa "$sg"
check "modes: all" sg_modes --page=0x3f "$sg"
refused "modes: a page that is not there" sg_modes --page=0x1c "$sg"
for opcode in 00 12 25 28 2a 2f 35 41 42 89 8a 93 a0; do
    check "opcodes: $opcode" serves "$opcode"
done
check "opcodes: one" says "supported" sg_opcodes --opcode=0x2a "$sg"
check "opcodes: one that is not" says "not supported" sg_opcodes --opcode=0x83 "$sg"
check "luns" says "imp[a-z]+ 1 lun" sg_luns "$sg"
check "luns: none is well known" says "length = 0" sg_luns --select=1 "$sg"
check "ready" says "with 0 errors" sg_turs --num=8 "$sg"
check "sense: none" sg_requests "$sg"
refused "logs are not offered" sg_logs -a "$sg"

# Persistent reservations, with another initiator to keep out.
iscsiadm -m iface -I second -o new > /dev/null
iscsiadm -m iface -I second -o update -n iface.initiatorname -v $second > /dev/null
iscsiadm -m node -T $iqn -p $portal -I second -o new > /dev/null
check "another initiator logs in" timeout 60 iscsiadm -m node -T $iqn -p $portal -I second --login
second_sg() {
    local folder
    for folder in /sys/class/iscsi_session/session*; do
        [ "$(cat "$folder/initiatorname")" = $second ] && other=/dev/$(ls "$folder"/device/target*/*:0/scsi_generic 2> /dev/null) &&
            [ "$other" != /dev/ ] && return
    done
    return 1
}
check "it has a disk" within 60 second_sg
sg_turs --num=4 "$other" > /dev/null 2>&1 # its unit attentions
head -c 4096 /dev/zero > "$work/zero"
put() { sg_write_same --16 --lba=64 --num=1 --in="$work/one" --xferlen=4096 "$1"; } # DEVICE
out() { sg_persist --out "$@" "$sg"; }
check "capabilities" says "(ptpl_c|persist through power loss capable).*1" sg_persist --in -c "$sg"
check "capabilities: all six types" says "exclusive access, all registrants: 1" sg_persist --in -c "$sg"
check "keys: none" says "no registered|there are no" sg_persist --in -k "$sg"
check "register" out --register --param-sark=0x123
check "keys: one" says "0x123" sg_persist --in -k "$sg"
for type in 1:"Write Exclusive" 3:"Exclusive Access" 5:"Write Exclusive, registrants only" \
    6:"Exclusive Access, registrants only" 7:"Write Exclusive, all registrants" 8:"Exclusive Access, all registrants"; do
    check "reserve, type ${type%%:*}" out --reserve --param-rk=0x123 --prout-type="${type%%:*}"
    check "reservation: ${type#*:}" says "type: ${type#*:}" sg_persist --in -r "$sg"
    check "full status: the holder" says "reservation holder" sg_persist --in -s "$sg"
    check "type ${type%%:*}: the holder writes" put "$sg"
    # 24: RESERVATION CONFLICT.
    check "type ${type%%:*}: another does not" ends_with 24 put "$other"
    check "release, type ${type%%:*}" out --release --param-rk=0x123 --prout-type="${type%%:*}"
done
check "another's key is no key" ends_with 24 sg_persist --out --reserve --param-rk=0x5 --prout-type=1 "$sg"
check "register and ignore" sg_persist --out --register-ignore --param-sark=0x5 "$other"
check "keys: two" says "0x5" sg_persist --in -k "$sg"
check "reserve" out --reserve --param-rk=0x123 --prout-type=5
check "preempt" sg_persist --out --preempt --param-rk=0x5 --param-sark=0x123 --prout-type=5 "$other"
sg_turs --num=2 "$sg" > /dev/null 2>&1 # told of it
check "it is the other's" says "0x5" sg_persist --in -r "$sg"
check "who was preempted does not write" ends_with 24 put "$sg"
check "register again, through power loss" out --register-ignore --param-sark=0x123 --param-aptpl
check "preempt and abort" out --preempt-abort --param-rk=0x123 --param-sark=0x5 --prout-type=6
check "it is the first one's again" says "0x123" sg_persist --in -r "$sg"
crash iscsi
serve_iscsi $iqn --initiator $second --uuid $uuid --reservations "$work/reservations"
kept() { sg_turs "$sg" > /dev/null 2>&1; says "0x123" sg_persist --in -r "$sg"; }
check "a reservation persists through kill -9" within 90 kept
check "clear" out --clear --param-rk=0x123
check "keys: none again" says "no registered|there are no" sg_persist --in -k "$sg"
timeout 60 iscsiadm -m node -T $iqn -p $portal -I second --logout > /dev/null

# Block commands.
sg_turs --num=2 "$sg" > /dev/null 2>&1
write_block 512
check "write same (16)" sg_write_same --16 --lba=520 --num=4 --in="$work/one" --xferlen=4096 "$sg"
check "write same (10)" sg_write_same --10 --lba=524 --num=4 --in="$work/one" --xferlen=4096 "$sg"
for lba in 520 523 527; do check "block $lba is what was written" cmp "$work/one" <(block $lba); done
check "write same (16), unmap" sg_write_same --16 --unmap --lba=520 --num=2 --in="$work/zero" --xferlen=4096 "$sg"
check "unmap" sg_unmap --lba=524 --num=2 "$sg"
for lba in 520 521 524 525; do check "block $lba reads as zeroes" zero_block $lba; done
check "block 522 is still there" cmp "$work/one" <(block 522)
check "verify" sg_verify --lba=0 --count=256 "$sg"
check "verify, the same bytes" sg_verify --lba=522 --count=1 --ebytchk=1 --ndo=4096 --in="$work/one" "$sg"
# 14: MISCOMPARE.
check "verify, other bytes" ends_with 14 sg_verify --lba=522 --count=1 --ebytchk=1 --ndo=4096 --in="$work/two" "$sg"
check "compare and write" sg_compare_and_write --lba=522 --num=1 --inc="$work/one" --inw="$work/two" --xferlen=8192 "$sg"
check "it was written" cmp "$work/two" <(block 522)
check "compare and write, other bytes" ends_with 14 sg_compare_and_write --lba=522 --num=1 --inc="$work/one" --inw="$work/one" --xferlen=8192 "$sg"
check "it was not written" cmp "$work/two" <(block 522)
check "write and verify" sg_write_verify --lba=530 --num=1 --ilen=4096 --in="$work/two" "$sg"
check "it was written as well" cmp "$work/two" <(block 530)
check "synchronize cache" sg_sync "$sg"
check "lba status: mapped" says "mapped" sg_get_lba_status --lba=530 "$sg"
check "lba status: deallocated" says "deallocated" sg_get_lba_status --lba=524 "$sg"
refused "sanitize is not offered" sg_sanitize --quick --overwrite --zero "$sg"
for reset in "-d, the unit" "-t, the target"; do
    check "reset ${reset}" sg_reset ${reset%%,*} "$sg"
    # The first command afterwards hears of it.
    sg_turs "$sg" > /dev/null 2>&1
    check "reset ${reset}: ready" says "with 0 errors" sg_turs --num=2 "$sg"
done
check "after all of it: the data" cmp "$work/two" <(block 530)
check "log out" logout $iqn
stop iscsi
finish
