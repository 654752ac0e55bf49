//! Whether the host's own software keeps its hands off drover's devices: udev,
//! multipathd and LVM, as far as they are installed (deploy/host has the rules).

use super::Check;
use super::host::Host;

/// What udev's rule knows drover's NVMe subsystems by.
const NQN: &str = "nqn.2026-11.io.drover:";
/// Where udev reads its rules.
const UDEV: [&str; 4] = [
    "etc/udev/rules.d",
    "run/udev/rules.d",
    "usr/lib/udev/rules.d",
    "lib/udev/rules.d",
];
/// The first of udev's own rules that looks at a block device.
const LOOKS: &str = "60-";

/// All that is looked at here.
pub fn checks(host: &Host) -> Vec<Check> {
    vec![udev(host), multipath(host), lvm(host)]
}

/// A file without its comments; `marks` begin one.
fn plain(text: &str, marks: &[char]) -> String {
    let lines = text.lines().map(|line| {
        let mut quoted = false;
        let end = line.char_indices().find(|(_, letter)| {
            quoted ^= *letter == '"';
            !quoted && marks.contains(letter)
        });
        &line[..end.map_or(line.len(), |(at, _)| at)]
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn udev(host: &Host) -> Check {
    if !host.has("udevadm") {
        return Check::ok("udev", "not installed");
    }
    for path in UDEV.iter().flat_map(|folder| host.files(folder, ".rules")) {
        let text = plain(&host.read(&path).unwrap_or_default(), &['#']);
        if !text.contains(NQN) || !text.contains("nowatch") {
            continue;
        }
        let name = path.rsplit('/').next().unwrap_or_default();
        if name < LOOKS {
            return Check::ok("udev", format!("/{path}"));
        }
        return Check::warning(
            "udev",
            format!("/{path} is read after udev's own rules"),
            "name it 59-drover.rules",
        );
    }
    Check::warning(
        "udev",
        "no rule leaves drover's devices alone",
        "udev probes each volume as it comes and after every writer, and may hold one that \
         hangs: copy deploy/host/59-drover.rules to /etc/udev/rules.d, then udevadm control --reload",
    )
}

fn multipath(host: &Host) -> Check {
    if !host.has("multipathd") {
        return Check::ok("multipath", "not installed");
    }
    let mut files = vec!["etc/multipath.conf".to_owned()];
    files.extend(host.files("etc/multipath/conf.d", ".conf"));
    let (mut nvme, mut scsi) = (false, false);
    for path in files {
        for device in blacklisted(&host.read(&path).unwrap_or_default()) {
            nvme |= device.product.contains("drover");
            scsi |= device.vendor == "DROVER";
        }
    }
    if nvme && scsi {
        return Check::ok("multipath", "drover's devices are on its blacklist");
    }
    Check::warning(
        "multipath",
        "drover's devices are not on its blacklist",
        "a map of multipathd's would hold a volume that a pod has: copy \
         deploy/host/drover-multipath.conf to /etc/multipath/conf.d, then multipathd reconfigure",
    )
}

/// A device section of a blacklist.
#[derive(Debug, Default, PartialEq, Eq)]
struct Device {
    vendor: String,
    product: String,
}

/// The device sections of every blacklist in a configuration of multipathd's
/// (multipath.conf(5): sections in braces, a keyword and its value a line).
fn blacklisted(text: &str) -> Vec<Device> {
    let text = plain(text, &['#', '!']);
    let mut sections: Vec<&str> = Vec::new();
    let mut devices = Vec::new();
    for line in text.lines() {
        // A brace may stand with other words in one line.
        let spaced = line.replace('{', " { ").replace('}', " } ");
        let mut words = spaced.split_whitespace().peekable();
        while let Some(word) = words.next() {
            match word {
                "}" => _ = sections.pop(),
                "{" => {}
                word if words.peek() == Some(&"{") => {
                    let known = ["blacklist", "device"];
                    let section = known.into_iter().find(|known| *known == word);
                    sections.push(section.unwrap_or("other"));
                    if sections == known {
                        devices.push(Device::default());
                    }
                }
                word if sections == ["blacklist", "device"] => {
                    let value = words.next().unwrap_or_default().trim_matches('"');
                    match (word, devices.last_mut()) {
                        ("vendor", Some(device)) => value.clone_into(&mut device.vendor),
                        ("product", Some(device)) => value.clone_into(&mut device.product),
                        _ => {}
                    }
                }
                _ => {}
            }
        }
    }
    devices
}

fn lvm(host: &Host) -> Check {
    if !host.has("lvm") {
        return Check::ok("lvm", "not installed");
    }
    let mut devices_file = false;
    for path in ["etc/lvm/lvm.conf", "etc/lvm/lvmlocal.conf"] {
        let text = plain(&host.read(path).unwrap_or_default(), &['#']);
        for line in text.lines() {
            let Some((key, value)) = line.split_once('=') else {
                continue;
            };
            match key.trim() {
                "global_filter" if value.contains("drover") => {
                    return Check::ok("lvm", format!("/{path} leaves drover's devices alone"));
                }
                "use_devicesfile" => devices_file = value.trim() == "1",
                _ => {}
            }
        }
    }
    if devices_file && host.path("etc/lvm/devices/system.devices").exists() {
        return Check::ok("lvm", "uses only the devices of its devices file");
    }
    Check::warning(
        "lvm",
        "no filter leaves drover's devices alone",
        "a volume with a volume group in it would be taken by the host: put the filter of \
         deploy/host/drover-lvm.conf into /etc/lvm/lvm.conf",
    )
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::super::host::tests::host;
    use super::*;

    const RULES: &str = include_str!("../../../../deploy/host/59-drover.rules");
    const MULTIPATH: &str = include_str!("../../../../deploy/host/drover-multipath.conf");
    const LVM: &str = include_str!("../../../../deploy/host/drover-lvm.conf");

    const TOOLS: [(&str, &str); 3] = [
        ("usr/bin/udevadm", ""),
        ("usr/sbin/multipathd", ""),
        ("usr/sbin/lvm", ""),
    ];

    fn states(files: &[(&str, &str)]) -> [State; 3] {
        let (_folder, host) = host(&[&TOOLS, files].concat());
        let checks = checks(&host);
        [0, 1, 2].map(|place: usize| checks[place].state)
    }

    #[test]
    fn what_is_not_installed_needs_no_rule() {
        let (_folder, host) = host(&[]);
        assert!(checks(&host).iter().all(|check| check.state == State::Ok));
    }

    #[test]
    fn the_rules_that_are_shipped_are_found() {
        let shipped = [
            ("etc/udev/rules.d/59-drover.rules", RULES),
            ("etc/multipath/conf.d/drover.conf", MULTIPATH),
            ("etc/lvm/lvm.conf", LVM),
        ];
        assert_eq!(states(&[]), [State::Warning; 3]);
        assert_eq!(states(&shipped), [State::Ok; 3]);
        assert!(RULES.contains(crate::initiator::NQN_PREFIX));
    }

    #[test]
    fn a_rule_that_is_out_or_comes_too_late_is_none() {
        let out = |text: &str| {
            text.lines()
                .map(|line| format!("#{line}\n"))
                .collect::<String>()
        };
        let (rules, multipath, lvm) = (out(RULES), out(MULTIPATH), out(LVM));
        let commented = [
            ("etc/udev/rules.d/59-drover.rules", rules.as_str()),
            ("etc/multipath.conf", multipath.as_str()),
            ("etc/lvm/lvm.conf", lvm.as_str()),
        ];
        assert_eq!(states(&commented), [State::Warning; 3]);
        let late = [("etc/udev/rules.d/99-drover.rules", RULES)];
        assert_eq!(states(&late)[0], State::Warning);
    }

    #[test]
    fn a_devices_file_is_as_good_as_a_filter() {
        let wanted = ("etc/lvm/lvm.conf", "devices {\n  use_devicesfile = 1\n}\n");
        assert_eq!(states(&[wanted])[2], State::Warning);
        let there = ("etc/lvm/devices/system.devices", "");
        assert_eq!(states(&[wanted, there])[2], State::Ok);
    }

    #[test]
    fn blacklists_are_read_as_they_are_written() {
        let device = |vendor: &str, product: &str| Device {
            vendor: vendor.into(),
            product: product.into(),
        };
        for (text, expected) in [
            ("", vec![]),
            ("}}} { blacklist", vec![]),
            ("blacklist {\n", vec![]),
            ("device { vendor \"DROVER\" }", vec![]),
            (
                "blacklist_exceptions { device { vendor \"DROVER\" } }",
                vec![],
            ),
            (
                "blacklist { device { vendor \"DROVER\"\n product \".*\" } }",
                vec![device("DROVER", ".*")],
            ),
            (
                "defaults {\n}\nblacklist {\n devnode \"sd\"\n device {\n  vendor DROVER # all\n }\n}\n",
                vec![device("DROVER", "")],
            ),
            ("blacklist { device { vendor } }", vec![device("}", "")]),
        ] {
            assert_eq!(blacklisted(text), expected, "{text:?}");
        }
    }
}
