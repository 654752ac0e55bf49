use std::os::unix::net::UnixListener as OldListener;

use super::*;

/// What a process that was killed leaves: a socket file that nobody listens at.
fn stale(path: &Path) {
    drop(OldListener::bind(path).unwrap());
    assert!(path.exists());
}

#[tokio::test]
async fn a_socket_is_for_root_alone_and_goes_with_its_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new/folder/csi.sock");
    let (listener, claim) = listen(&path).await.unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(claim.stands());
    UnixStream::connect(&path).await.unwrap();
    drop((listener, claim));
    assert!(!path.exists());
}

#[tokio::test]
async fn a_dead_servers_socket_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("csi.sock");
    stale(&path);
    let (_listener, claim) = listen(&path).await.unwrap();
    assert!(claim.stands());
    UnixStream::connect(&path).await.unwrap();
}

#[tokio::test]
async fn a_living_servers_socket_is_left_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("csi.sock");
    // One that is not drover's, known by its answering.
    let other = OldListener::bind(&path).unwrap();
    let refused = listen(&path).await.unwrap_err();
    assert!(matches!(refused, CsiError::InUse(_)));
    assert!(
        refused.to_string().contains(path.to_str().unwrap()),
        "{refused}"
    );
    drop(other);
    // One of drover's own, known by its lock even where its socket is gone.
    let (_listener, claim) = listen(&path).await.unwrap();
    assert!(matches!(listen(&path).await, Err(CsiError::InUse(_))));
    fs::remove_file(&path).unwrap();
    assert!(matches!(listen(&path).await, Err(CsiError::InUse(_))));
    assert!(!claim.stands());
    drop(claim);
    listen(&path).await.unwrap();
}

#[tokio::test]
async fn a_socket_that_took_our_place_is_not_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("csi.sock");
    let (_listener, claim) = listen(&path).await.unwrap();
    // Made beside it first, so that it cannot be given the same inode.
    stale(&folder.path().join("other"));
    fs::rename(folder.path().join("other"), &path).unwrap();
    assert!(!claim.stands());
    drop(claim);
    assert!(path.exists());
}

#[tokio::test]
async fn what_is_no_socket_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("csi.sock");
    fs::write(&path, "precious").unwrap();
    let refused = listen(&path).await.unwrap_err();
    assert!(matches!(refused, CsiError::Path { .. }), "{refused}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    let long = folder.path().join("x".repeat(108));
    for wrong in [Path::new("csi.sock"), Path::new("/"), &long] {
        let refused = listen(wrong).await.unwrap_err();
        assert!(matches!(refused, CsiError::Path { .. }), "{refused}");
    }
}

#[test]
fn a_path_may_be_written_as_grpc_writes_it() {
    for text in [
        "/run/csi.sock",
        "unix:///run/csi.sock",
        "unix:/run/csi.sock",
    ] {
        assert_eq!(bare(Path::new(text)), Path::new("/run/csi.sock"));
    }
}
