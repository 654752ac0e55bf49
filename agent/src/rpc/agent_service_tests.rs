use tokio::sync::watch;

use super::*;
use crate::ids::TicketId;

const SOON: Duration = Duration::from_millis(200);

fn job() -> Job {
    Job::Restore(RestoreSpec {
        id: "restore-1".parse::<TicketId>().unwrap(),
        volume: "vol-1".parse().unwrap(),
        repo: RepositorySpec {
            path: "/repository".into(),
            password: Secret::new("secret"),
            limit_upload: None,
        },
        which: Which::Restic("0123456789abcdef".into()),
        target: "/target".into(),
        size: None,
    })
}

#[tokio::test]
async fn the_last_message_comes_when_the_ticket_has_ended() {
    let now = watch::Sender::new(Progress::starting(Bytes(4096)));
    let ending = watch::Sender::new(End::Ahead);
    let followed = Followed {
        job: job(),
        progress: now.subscribe(),
        end: ending.subscribe(),
    };
    let mut following = follow(followed, Duration::from_secs(60));
    let first = following.next().await.unwrap().unwrap();
    assert_eq!(first.phase, "starting");

    now.send_modify(|progress| progress.phase = Phase::Done);
    ending.send_replace(End::AtRest);
    let early = tokio::time::timeout(SOON, following.next()).await;
    assert!(early.is_err(), "the ticket still stands");

    ending.send_replace(End::Told);
    let last = following.next().await.unwrap().unwrap();
    assert_eq!(last.phase, "done");
    assert!(following.next().await.is_none());
}

#[tokio::test]
async fn a_controller_that_hears_nothing_does_not_keep_a_follower_for_ever() {
    let now = watch::Sender::new(Progress::starting(Bytes(4096)));
    now.send_modify(|progress| progress.phase = Phase::Failed);
    let ending = watch::Sender::new(End::AtRest);
    let followed = Followed {
        job: job(),
        progress: now.subscribe(),
        end: ending.subscribe(),
    };
    let messages: Vec<_> = follow(followed, SOON).collect().await;
    assert_eq!(messages.len(), 1);
}
