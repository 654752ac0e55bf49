//! What a peer sends that it must not, and peers that send nothing.

use super::*;

#[tokio::test]
async fn what_is_malformed_ends_its_own_connection_only() {
    let target = Target::start().await;
    let (_admin, mut witness) = target.host(NONE).await;
    let over_long = wire::common(Kind::CapsuleCmd, 0, NONE, IN_CAPSULE + 4);
    let cases: [([u8; 8], (u16, u32)); 6] = [
        (over_long, (5, 4)),
        (
            wire::common(Kind::H2CData, 0, NONE, MAX_H2C_DATA + 4),
            (5, 4),
        ),
        ([4, 0, 72, 0, 71, 0, 0, 0], (1, 4)),
        ([8, 0, 24, 0, 24, 0, 0, 0], (1, 0)),
        ([4, 1, 72, 0, 76, 0, 0, 0], (1, 1)),
        ([4, 0, 24, 0, 24, 0, 0, 0], (1, 2)),
    ];
    for (bytes, expected) in cases {
        let mut host = TestHost::open(target.address, NONE).await;
        host.raw(&bytes).await;
        assert_eq!(host.terminated().await, expected, "{bytes:?}");
    }
    // PDUs that have no place here.
    let mut host = TestHost::open(target.address, NONE).await;
    host.raw(&wire::ic_resp(NONE)).await;
    assert_eq!(host.terminated().await, (2, 0));
    // A truncated PDU: the rest never comes.
    let mut host = TestHost::open(target.address, NONE).await;
    host.raw(&wire::common(Kind::CapsuleCmd, 0, NONE, 0)).await;
    drop(host);
    // A wrong header digest.
    let mut host = TestHost::open(target.address, BOTH).await;
    let mut pdu = wire::common(Kind::CapsuleCmd, 0, BOTH, 0).to_vec();
    pdu.resize(76, 0);
    host.raw(&pdu).await;
    assert_eq!(host.terminated().await, (3, 0));

    assert_eq!(
        witness.status(read(0, 1)).await,
        0,
        "nobody else is touched"
    );
    let metrics = target.metrics();
    assert!(
        metrics.contains(r#"malformed_pdus_total{reason="too-long"} 2"#),
        "{metrics}"
    );
}

#[tokio::test]
async fn data_out_of_order_or_unasked_ends_the_connection() {
    let whole = [3; 4 * BLOCK_BYTES];
    type Case = (fn(Data) -> Data, usize, bool, (u16, u32));
    let wrong: [Case; 6] = [
        (
            |d| Data {
                offset: 4096,
                length: 4096,
                ..d
            },
            4096,
            false,
            (4, 12),
        ),
        (
            |d| Data {
                tag: d.tag + 9,
                ..d
            },
            whole.len(),
            true,
            (1, 10),
        ),
        (
            |d| Data {
                command: d.command + 9,
                ..d
            },
            whole.len(),
            true,
            (1, 8),
        ),
        (|d| Data { length: 4096, ..d }, whole.len(), true, (1, 16)),
        (|d| Data { length: 4096, ..d }, 4096, true, (1, 1)),
        (|d| d, whole.len(), false, (1, 1)),
    ];
    for (change, length, last, expected) in wrong {
        let target = Target::start().await;
        let (_admin, mut io) = target.host(NONE).await;
        io.send(large_write(4), &[]).await;
        let asked = io.r2t().await;
        io.send_data(change(asked), last, &whole[..length]).await;
        assert_eq!(io.terminated().await, expected);
        assert_eq!(
            target.device.bytes.lock().unwrap()[0],
            0,
            "nothing was written"
        );
    }
    let target = Target::start().await;
    let (_admin, mut io) = target.host(NONE).await;
    io.send(large_write(4), &[]).await;
    let asked = io.r2t().await;
    io.send_data(
        Data {
            length: 20480,
            ..asked
        },
        true,
        &[3; 20480],
    )
    .await;
    assert_eq!(io.terminated().await, (4, 16), "more than was asked for");
}

#[tokio::test]
async fn damaged_data_fails_its_command_and_nothing_else() {
    let target = Target::start().await;
    let (_admin, mut io) = target.host(BOTH).await;
    let mut pdu = wire::common(Kind::CapsuleCmd, 0, BOTH, BLOCK as u32).to_vec();
    pdu.extend_from_slice(&small_write(0));
    pdu.extend_from_slice(&crc32c::crc32c(&pdu.clone()).to_le_bytes());
    pdu.extend_from_slice(&[1; BLOCK_BYTES]);
    pdu.extend_from_slice(&[0xde, 0xad, 0xbe, 0xef]);
    io.raw(&pdu).await;
    assert_eq!(io.receive().await.unwrap().completion().status, 0x22);
    assert_eq!(io.run(read(0, 1), &[]).await.0, vec![0; BLOCK_BYTES]);
}

#[tokio::test]
async fn more_commands_than_the_queue_holds_end_the_connection() {
    let target = Target::start().await;
    let (_admin, mut io) = target.host(NONE).await;
    for _ in 0..33 {
        // The data never comes, so each stays.
        io.send(large_write(4), &[]).await;
    }
    let mut asked = 0;
    loop {
        match io.receive().await.unwrap().kind {
            Kind::R2T => asked += 1,
            kind => break assert_eq!(kind, Kind::C2HTermReq),
        }
    }
    assert!(asked <= 32, "{asked} of a queue of 32");
}

#[tokio::test]
async fn who_does_not_connect_in_time_is_closed() {
    let target = Target::with(Exports::with(
        reactors(),
        Waits {
            handshake: Duration::from_millis(50),
            ..Waits::default()
        },
    ))
    .await;
    let mut host = TestHost::open(target.address, NONE).await;
    assert!(host.receive().await.is_none());
    let mut silent = tokio::net::TcpStream::connect(target.address)
        .await
        .unwrap();
    let mut byte = [0];
    let read = tokio::io::AsyncReadExt::read(&mut silent, &mut byte);
    let read = tokio::time::timeout(Duration::from_secs(20), read)
        .await
        .expect("closed in time");
    assert_eq!(read.unwrap(), 0);
}
