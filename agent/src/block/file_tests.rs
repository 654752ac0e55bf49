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
