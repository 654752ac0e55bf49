//! Takeover, fence and end of an export.

use super::device_for_tests::until;
use super::*;

#[tokio::test]
async fn a_new_association_waits_for_the_commands_of_the_old_one() {
    let target = Target::start().await;
    let (mut admin, mut io) = target.host(NONE).await;
    target.device.block();
    io.send(small_write(3), &[1; BLOCK_BYTES]).await;
    target.device.until_waiting(1).await;

    assert_eq!(target.refused(&login("a")).await, BUSY);
    assert!(
        admin.receive().await.is_none(),
        "the old association is closed"
    );
    assert!(io.receive().await.is_none());
    assert_eq!(
        target.refused(&login("a")).await,
        BUSY,
        "as long as it takes"
    );
    target.device.release();
    target.device.until_waiting(0).await;
    let (_admin, mut io) = target.host(NONE).await;
    assert_eq!(io.run(read(3, 1), &[]).await.0, vec![1; BLOCK_BYTES]);
}

#[tokio::test]
async fn a_fence_keeps_out_settles_tells_and_ends() {
    let target = Target::start().await;
    let (mut admin, mut io) = target.host(NONE).await;
    assert_eq!(
        admin
            .status(command(0x09, 0x5a, 0, [0x0b, 1 << 8, 0]))
            .await,
        0
    );
    let event = admin.send(command(0x0c, 0x5a, 0, [0; 3]), &[]).await;
    target.device.block();
    let inside = io.send(small_write(3), &[1; BLOCK_BYTES]).await;
    target.device.until_waiting(1).await;
    // This one's data is still to come: it is not inside, and will be late.
    let sending = io.send(large_write(16), &[]).await;
    let asked = io.r2t().await;

    let unsettled = || target.exports.unsettled(&spec("a").volume);
    assert_eq!(unsettled(), None, "of an open gate");
    let closing = target.close();
    assert_eq!(closing.inside_at_close, 1);
    let one = Unsettled {
        epoch: spec("a").epoch,
        inside: 1,
    };
    assert_eq!(unsettled(), Some(one));
    assert_eq!(target.refused(&login("a")).await, REFUSED);
    assert_eq!(io.status(read(0, 1)).await, FINAL);
    assert_eq!(io.status(command(0x00, 0x5a, 0, [0; 3])).await, FINAL);
    assert_eq!(
        io.status(command(0x05, 0x5a, 0, [0; 3])).await,
        FINAL,
        "whatever it is"
    );
    assert_eq!(closing.settled(Duration::from_millis(5)).await, Err(1));
    assert_eq!(
        target.close().inside_at_close,
        1,
        "asked again, the same answer"
    );
    target.device.release();
    assert!(closing.settled(Duration::from_secs(20)).await.is_ok());
    assert_eq!(unsettled(), None);
    let done = io.receive().await.unwrap().completion();
    assert_eq!(
        (done.command, done.status),
        (inside, 0),
        "it was written, so the host is told so"
    );
    io.send_data(asked, true, &[2; 16 * BLOCK_BYTES]).await;
    let late = io.receive().await.unwrap().completion();
    assert_eq!((late.command, late.status), (sending, FINAL));
    assert_eq!(
        target.device.bytes.lock().unwrap()[0],
        0,
        "late data is not written"
    );

    let ended = closing.end().await;
    assert_eq!((ended.sessions, ended.late_refused), (2, 4));
    assert!(ended.last_write.is_some());
    let told = admin.receive().await.unwrap().completion();
    assert_eq!((told.command, told.result), (event, 0x0004_0002));
    let log = command(0x02, 0x5a, 4096, [0x03ff_0000 | 0x04, 0, 0]);
    assert_eq!(admin.run(log, &[]).await.0[0], 1);
    let list = |cns| {
        let mut entry = command(0x06, 0x5a, 4096, [cns, 0, 0]);
        entry[4] = u8::from(cns != 2);
        entry
    };
    assert_eq!(
        io.status(read(0, 1)).await,
        FINAL,
        "still told, not cut off"
    );
    assert!(
        admin.run(list(2), &[]).await.0.iter().all(|b| *b == 0),
        "no namespace"
    );
    assert!(admin.run(list(0), &[]).await.0.iter().all(|b| *b == 0));
    assert!(
        admin.receive().await.is_none(),
        "then the connections close"
    );
    assert!(io.receive().await.is_none());
    assert_eq!(target.refused(&login("a")).await, REFUSED);
    assert_eq!(target.exports.late_refused(&spec("a").name), 5);
    assert!(target.exports.close(&spec("a").name).is_none());
    assert!(
        target
            .metrics()
            .contains("drover_nvme_late_commands_total 5")
    );
}

#[tokio::test]
async fn the_end_answers_even_a_command_that_is_stuck_in_the_device() {
    let target = Target::start().await;
    let (_admin, mut io) = target.host(NONE).await;
    target.device.block();
    let stuck = io.send(small_write(3), &[1; BLOCK_BYTES]).await;
    target.device.until_waiting(1).await;
    let closing = target.close();
    assert_eq!(closing.settled(Duration::ZERO).await, Err(1));
    closing.end().await;
    let done = io.receive().await.unwrap().completion();
    assert_eq!((done.command, done.status), (stuck, FINAL));
    let still = target.exports.unsettled(&spec("a").volume);
    let (epoch, inside) = (spec("a").epoch, 1);
    assert_eq!(still, Some(Unsettled { epoch, inside }));
    target.device.release();
    until(|| target.exports.unsettled(&spec("a").volume).is_none()).await;
}

#[tokio::test]
async fn an_export_that_has_ended_lets_go_of_its_device() {
    let target = Target::start().await;
    let (admin, mut io) = target.host(NONE).await;
    target.device.block();
    io.send(small_write(3), &[1; BLOCK_BYTES]).await;
    target.device.until_waiting(1).await;
    // The host vanishes, and its command settles behind the end.
    drop((admin, io));
    target.close().end().await;
    target.device.release();
    until(|| Arc::strong_count(&target.device) == 1).await;
}
