use std::io::Write;
use std::os::unix::fs::MetadataExt;

use super::*;

const SIZE: Bytes = Bytes(16 * BLOCK);

fn open(folder: &Path) -> (FileDevice, PathBuf) {
    let path = folder.join("volume");
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path);
    let file = file.unwrap();
    file.set_len(SIZE.0).unwrap();
    (FileDevice::new(file, &path, SIZE).unwrap(), path)
}

fn block(device: &FileDevice, lba: u64) -> Vec<u8> {
    let mut buffer = vec![1; BLOCK as usize];
    device.read(Lba(lba), &mut buffer).unwrap();
    buffer
}

fn holds_what_is_written(folder: &Path) {
    let (device, path) = open(folder);
    // An odd address, as a protocol's buffer may well have.
    let odd = vec![7u8; 2 * BLOCK as usize + 1];
    device.write(Lba(3), &odd[1..], false).unwrap();
    device.write(Lba(9), &odd[1..], true).unwrap();
    device.flush().unwrap();
    let bytes = std::fs::read(&path).unwrap();
    for (lba, bytes) in bytes.chunks(BLOCK as usize).enumerate() {
        let expected = if matches!(lba, 3 | 4 | 9 | 10) { 7 } else { 0 };
        assert!(bytes.iter().all(|b| *b == expected), "block {lba}");
    }
    assert_eq!(block(&device, 4), vec![7; BLOCK as usize]);

    let before = std::fs::metadata(&path).unwrap().blocks();
    device.write_zeroes(Lba(3), 1, false).unwrap();
    assert_eq!(block(&device, 3), vec![0; BLOCK as usize]);
    assert!(std::fs::metadata(&path).unwrap().blocks() >= before);
    device.deallocate(Lba(4), 1).unwrap();
    device.write_zeroes(Lba(9), 2, true).unwrap();
    assert!(std::fs::metadata(&path).unwrap().blocks() < before);
    for lba in [4, 9, 10] {
        assert_eq!(block(&device, lba), vec![0; BLOCK as usize]);
    }
    device.write_zeroes(Lba(16), 0, true).unwrap();
}

#[test]
fn what_is_written_is_read_back() {
    holds_what_is_written(tempfile::tempdir().unwrap().path());
}

#[test]
fn a_memory_file_system_serves_as_well() {
    holds_what_is_written(tempfile::tempdir_in("/dev/shm").unwrap().path());
}

#[test]
fn blocks_beyond_the_end_are_refused_and_growing_admits_them() {
    let folder = tempfile::tempdir().unwrap();
    let (device, path) = open(folder.path());
    let mut two = vec![0; 2 * BLOCK as usize];
    for lba in [15, 16, u64::MAX / BLOCK, u64::MAX / BLOCK + 1, u64::MAX] {
        let error = device.read(Lba(lba), &mut two).unwrap_err();
        assert!(matches!(error, DeviceError::OutOfRange { .. }), "{error}");
        let error = device.write(Lba(lba), &two, false).unwrap_err();
        assert!(matches!(error, DeviceError::OutOfRange { .. }), "{error}");
        let error = device.deallocate(Lba(lba), u64::MAX).unwrap_err();
        assert!(matches!(error, DeviceError::OutOfRange { .. }), "{error}");
    }
    let error = device.read(Lba(0), &mut two[1..]).unwrap_err();
    assert!(
        matches!(
            error,
            DeviceError::Io {
                errno: Errno::EINVAL,
                ..
            }
        ),
        "{error}"
    );

    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(SIZE.0 + BLOCK)
        .unwrap();
    device.grow(Bytes(SIZE.0 + BLOCK + 100));
    device.grow(Bytes(BLOCK));
    assert_eq!(device.size(), Bytes(SIZE.0 + BLOCK));
    device.read(Lba(15), &mut two).unwrap();
}

#[test]
fn a_file_that_was_cut_gives_an_error_and_not_zeroes() {
    let folder = tempfile::tempdir().unwrap();
    let (device, path) = open(folder.path());
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(BLOCK)
        .unwrap();
    let mut buffer = vec![0; BLOCK as usize];
    device.read(Lba(0), &mut buffer).unwrap();
    let error = device.read(Lba(1), &mut buffer).unwrap_err();
    assert!(error.to_string().contains("beyond the end"), "{error}");
}

#[test]
fn a_full_file_system_says_so() {
    let full = File::options()
        .read(true)
        .write(true)
        .open("/dev/full")
        .unwrap();
    let device = FileDevice::new(full, Path::new("/dev/full"), SIZE).unwrap();
    let error = device
        .write(Lba(0), &[1; BLOCK as usize], false)
        .unwrap_err();
    assert!(matches!(error, DeviceError::NoSpace), "{error}");
}

#[test]
fn after_a_failed_flush_nothing_is_served() {
    // A pipe cannot be flushed (EINVAL), and can be written.
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(&[1]).unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(writer));
    let device = FileDevice::new(pipe, Path::new("pipe"), SIZE).unwrap();
    let error = device.flush().unwrap_err();
    assert!(matches!(error, DeviceError::FlushFailed(_)), "{error}");
    assert!(error.to_string().contains("fdatasync pipe"), "{error}");
    let mut buffer = vec![0; BLOCK as usize];
    for error in [
        device.read(Lba(0), &mut buffer).unwrap_err(),
        device.write(Lba(0), &buffer, false).unwrap_err(),
        device.write_zeroes(Lba(0), 1, true).unwrap_err(),
        device.flush().unwrap_err(),
    ] {
        assert!(matches!(error, DeviceError::FlushFailed(_)), "{error}");
    }
    drop(reader);
}

#[test]
fn a_size_of_part_blocks_is_refused() {
    let file = tempfile::tempfile().unwrap();
    assert!(FileDevice::new(file, Path::new("x"), Bytes(BLOCK + 1)).is_err());
}

/// Which blocks are mapped, as runs from the first one on.
fn mapping(device: &FileDevice) -> Vec<(u64, bool)> {
    let (mut runs, mut next) = (Vec::new(), 0);
    let end = device.size().0 / BLOCK;
    while next < end {
        let run = device.mapping(Lba(next), end - next).unwrap();
        assert!(run.blocks > 0 && next + run.blocks <= end);
        runs.push((run.blocks, run.mapped));
        next += run.blocks;
    }
    runs
}

fn tells_what_is_mapped(folder: &Path) {
    let (device, path) = open(folder);
    assert_eq!(mapping(&device), [(16, false)]);
    let data = vec![7; 3 * BLOCK as usize];
    device.write(Lba(4), &data, false).unwrap();
    device
        .write(Lba(15), &data[..BLOCK as usize], false)
        .unwrap();
    let told = [(4, false), (3, true), (8, false), (1, true)];
    assert_eq!(mapping(&device), told);
    device.deallocate(Lba(5), 1).unwrap();
    assert_eq!(mapping(&device)[1..4], [(1, true), (1, false), (1, true)]);
    // Space that is kept and reads as zeroes, and what is written there again.
    device.write_zeroes(Lba(8), 4, false).unwrap();
    assert_eq!(block(&device, 9), vec![0; BLOCK as usize]);
    device
        .write(Lba(9), &data[..BLOCK as usize], false)
        .unwrap();
    assert!(device.mapping(Lba(9), 1).unwrap().mapped);
    let asked = device.mapping(Lba(0), 2).unwrap();
    assert_eq!(
        (asked.blocks, asked.mapped),
        (2, false),
        "no more than was asked about"
    );
    assert!(device.mapping(Lba(16), 1).is_err());
    // What was lost is not called unmapped.
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(8 * BLOCK)
        .unwrap();
    assert!(device.mapping(Lba(7), 9).is_err());
}

#[test]
fn what_is_mapped_is_told() {
    tells_what_is_mapped(tempfile::tempdir().unwrap().path());
}

#[test]
fn what_is_mapped_is_told_in_memory_as_well() {
    tells_what_is_mapped(tempfile::tempdir_in("/dev/shm").unwrap().path());
}

/// Writers never see a block that they were told is written called unmapped,
/// whatever is written and given back beside them.
#[test]
fn no_written_block_is_called_unmapped_while_others_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let (device, _) = open(folder.path());
    let data = vec![1; BLOCK as usize];
    std::thread::scope(|scope| {
        for lba in 0..4_u64 {
            let (device, data) = (&device, &data);
            scope.spawn(move || {
                for _ in 0..300 {
                    device.write(Lba(3 * lba), data, false).unwrap();
                    assert!(device.mapping(Lba(3 * lba), 1).unwrap().mapped);
                    let around = device.mapping(Lba(3 * lba), 16 - 3 * lba).unwrap();
                    assert!(around.mapped);
                    device.deallocate(Lba(3 * lba), 1).unwrap();
                    assert!(!device.mapping(Lba(3 * lba), 1).unwrap().mapped);
                }
            });
        }
    });
}
