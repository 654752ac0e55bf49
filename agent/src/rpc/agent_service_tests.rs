use tokio::sync::{Notify, watch};

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

/// A node that takes its time to let go.
struct Slow {
    releases: watch::Sender<u32>,
    go: Arc<Notify>,
}

#[tonic::async_trait]
impl Workload for Slow {
    async fn release(&self, _: &VolumeId, _: Epoch) -> NodeAnswer {
        self.go.notified().await;
        self.releases.send_modify(|releases| *releases += 1);
        NodeAnswer::Clean
    }

    async fn interrupt(&self, _: &VolumeId, _: &TicketId, _: Duration) -> bool {
        true
    }

    async fn register_reader(
        &self,
        _: &VolumeId,
        _: pb::register_reader_request::Reader,
    ) -> Result<TicketId, Status> {
        Err(Status::unimplemented("no reader is registered here"))
    }

    async fn judge(&self, _: &VolumeId) -> Result<(Disk, Judgement), Status> {
        Err(Status::unimplemented("nothing is judged here"))
    }

    async fn look(
        &self,
        _: Option<VolumeId>,
        _: Option<SystemTime>,
    ) -> Result<pb::LookAnswer, Status> {
        Ok(pb::LookAnswer::default())
    }
}

#[tokio::test]
async fn a_release_goes_on_though_nobody_waits_for_it_any_more() {
    use pb::node_server::Node as _;
    let releases = watch::Sender::new(0);
    let mut seen = releases.subscribe();
    let go = Arc::new(Notify::new());
    let slow = Slow {
        releases,
        go: Arc::clone(&go),
    };
    let node = NodeService::new(Arc::new(slow));
    let request = pb::ReleaseRequest {
        volume: "vol-1".into(),
        epoch: 3,
    };
    for _ in 0..2 {
        let call = node.release(Request::new(request.clone()));
        assert!(tokio::time::timeout(SOON / 10, call).await.is_err());
    }
    go.notify_one();
    let ended = tokio::time::timeout(SOON * 100, seen.wait_for(|releases| *releases > 0)).await;
    assert!(ended.is_ok(), "it was dropped with its caller");
    drop(ended);
    node.release(Request::new(request)).await.unwrap();
    assert_eq!(*seen.borrow(), 1, "who asks again joins it");
}
