//! An agent as the controller reaches it: the ports [`Home`] and [`Node`] over gRPC.

use std::collections::HashMap;
use std::error::Error as _;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status};
use tower::ServiceExt;

use super::convert::{Malformed, span_message};
use super::pb::home_client::HomeClient;
use super::pb::node_client::NodeClient;
use super::{pb, refusal};
use crate::attach::ports::{
    COPY, Capacity, Content, Disclosure, ExportRequest, Exported, FenceRequest, Home, HomeError,
    Node, NodeAnswer, Ports, Settlement, SnapshotInfo,
};
use crate::ids::{Bytes, Epoch, HostPort, NodeId, SnapshotId, TicketId, VolumeId};

/// A connection has to be there within this, its name looked up.
const CONNECT: Duration = Duration::from_secs(1);
/// A peer is asked for a sign of life so often while a call to it is under way,
/// and has [`ALIVE`] to give it: who follows a stream learns that its other end
/// is gone, also where no packet says so.
const LIVELINESS: Duration = Duration::from_secs(10);
/// A peer that gives no sign of life for so long is dead.
const ALIVE: Duration = Duration::from_secs(5);
/// A call about one record or gate has to be answered within this.
const CALL: Duration = Duration::from_secs(5);

/// A connection to `address` that is made when it is first used, and again when it broke.
pub fn channel(address: &HostPort) -> Channel {
    watched_channel(address, LIVELINESS, ALIVE)
}

fn watched_channel(address: &HostPort, every: Duration, alive: Duration) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    endpoint
        .expect("an address makes a valid URI")
        .http2_keep_alive_interval(every)
        .keep_alive_timeout(alive)
        .connect_with_connector_lazy(tower::service_fn(move |uri| {
            connect(connector.clone(), uri)
        }))
}

/// Connects. tonic's own deadline leaves the look-up of a name out.
async fn connect(connector: HttpConnector, uri: Uri) -> io::Result<TokioIo<TcpStream>> {
    let failed = |why: String| io::Error::other(format!("connect to {uri}: {why}"));
    let connection = connector.oneshot(uri.clone());
    match tokio::time::timeout(CONNECT, connection).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => {
            let cause = error
                .source()
                .map_or_else(String::new, |e| format!(": {e}"));
            Err(failed(format!("{error}{cause}")))
        }
        Err(_) => Err(failed(format!("no answer within {CONNECT:?}"))),
    }
}

/// `message` with a deadline that both sides keep.
pub fn within<T>(deadline: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// One agent.
pub struct AgentClient {
    node: NodeId,
    address: SocketAddr,
    channel: Channel,
}

impl AgentClient {
    /// The agent of `node`, which listens at `address`.
    pub fn new(node: NodeId, address: SocketAddr) -> Self {
        Self {
            node,
            address,
            channel: channel(&address.into()),
        }
    }

    /// Its Home service, for what is no port: backups.
    pub fn home(&self) -> HomeClient<Channel> {
        HomeClient::new(self.channel.clone())
    }

    fn workload(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    fn refused(&self, status: &Status) -> HomeError {
        refusal::home_error(&self.node, status)
    }

    fn garbled(&self, malformed: &Malformed) -> HomeError {
        HomeError::Failed(format!(
            "home {} answered with a malformed message: {malformed}",
            self.node
        ))
    }
}

#[async_trait]
impl Home for AgentClient {
    async fn create(
        &self,
        volume: &VolumeId,
        size: Bytes,
        content: &Content,
    ) -> Result<(), HomeError> {
        let content = Some(content.into());
        let request = pb::CreateRequest {
            volume: volume.to_string(),
            size: size.0,
            content,
        };
        let answer = self.home().create(within(COPY, request)).await;
        answer.map(drop).map_err(|status| self.refused(&status))
    }

    async fn delete(&self, volume: &VolumeId, unused: bool) -> Result<(), HomeError> {
        let request = pb::DeleteRequest {
            volume: volume.to_string(),
            unused,
        };
        let answer = self.home().delete(within(COPY, request)).await;
        answer.map(drop).map_err(|status| self.refused(&status))
    }

    async fn expand(&self, volume: &VolumeId, size: Bytes) -> Result<Bytes, HomeError> {
        let request = pb::ExpandRequest {
            volume: volume.to_string(),
            size: size.0,
        };
        let answer = self.home().expand(within(CALL, request)).await;
        answer
            .map(|a| Bytes(a.into_inner().size))
            .map_err(|status| self.refused(&status))
    }

    async fn snapshot(
        &self,
        volume: &VolumeId,
        snapshot: &SnapshotId,
    ) -> Result<SnapshotInfo, HomeError> {
        let (volume, snapshot) = (volume.to_string(), snapshot.to_string());
        let request = within(COPY, pb::SnapshotRequest { volume, snapshot });
        let answer = self
            .home()
            .snapshot(request)
            .await
            .map_err(|status| self.refused(&status))?;
        answer
            .into_inner()
            .try_into()
            .map_err(|malformed| self.garbled(&malformed))
    }

    async fn delete_snapshot(&self, snapshot: &SnapshotId) -> Result<(), HomeError> {
        let request = pb::SnapshotName {
            snapshot: snapshot.to_string(),
        };
        let answer = self.home().delete_snapshot(within(COPY, request)).await;
        answer.map(drop).map_err(|status| self.refused(&status))
    }

    async fn capacity(&self) -> Result<Capacity, HomeError> {
        let answer = self.home().get_capacity(within(CALL, pb::Nothing {})).await;
        let answer = answer.map_err(|status| self.refused(&status))?.into_inner();
        Ok(Capacity {
            available: Bytes(answer.available),
            total: Bytes(answer.total),
        })
    }

    async fn export(&self, request: &ExportRequest) -> Result<Exported, HomeError> {
        let answer = self.home().export(within(CALL, request.into())).await;
        let answer = answer.map_err(|status| self.refused(&status))?.into_inner();
        answer
            .try_into()
            .map_err(|malformed| self.garbled(&malformed))
    }

    async fn disclose(&self, volume: &VolumeId, epoch: Epoch) -> Result<Disclosure, HomeError> {
        let request = pb::VolumeEpoch {
            volume: volume.to_string(),
            epoch: epoch.0,
        };
        let answer = self.home().get_secrets(within(CALL, request)).await;
        let answer = answer.map_err(|status| self.refused(&status))?.into_inner();
        answer
            .try_into()
            .map_err(|malformed| self.garbled(&malformed))
    }

    async fn fence(&self, request: &FenceRequest) -> Result<Settlement, HomeError> {
        let answer = self.home().fence(within(CALL, request.into())).await;
        let answer = answer.map_err(|status| self.refused(&status))?.into_inner();
        answer
            .try_into()
            .map_err(|malformed| self.garbled(&malformed))
    }
}

#[async_trait]
impl Node for AgentClient {
    async fn release(&self, volume: &VolumeId, epoch: Epoch) -> NodeAnswer {
        let request = pb::ReleaseRequest {
            volume: volume.to_string(),
            epoch: epoch.0,
        };
        match self.workload().release(within(CALL, request)).await {
            Ok(answer) => answer
                .into_inner()
                .try_into()
                .unwrap_or_else(|malformed: Malformed| {
                    NodeAnswer::Silent(format!("its answer: {malformed}"))
                }),
            Err(status) => NodeAnswer::Silent(format!(
                "agent of {} at {}: {}: {}",
                self.node,
                self.address,
                status.code(),
                status.message()
            )),
        }
    }

    async fn interrupt(&self, volume: &VolumeId, ticket: &TicketId, grace: Duration) -> bool {
        let request = pb::InterruptRequest {
            volume: volume.to_string(),
            ticket: ticket.to_string(),
            grace: Some(span_message(grace)),
        };
        let answer = self
            .workload()
            .interrupt(within(grace + CALL, request))
            .await;
        answer.is_ok_and(|answer| answer.into_inner().stopped)
    }
}

/// The agents that have registered, by node. Addresses are learned from
/// registrations only; nothing is remembered over a restart.
#[derive(Default)]
pub struct Directory {
    agents: RwLock<HashMap<NodeId, Arc<AgentClient>>>,
}

impl Directory {
    /// Notes where the agent of `node` listens now.
    pub fn learn(&self, node: &NodeId, address: SocketAddr) {
        if self
            .agent(node)
            .is_some_and(|agent| agent.address == address)
        {
            return;
        }
        let agent = Arc::new(AgentClient::new(node.clone(), address));
        let mut agents = self.agents.write().unwrap_or_else(PoisonError::into_inner);
        agents.insert(node.clone(), agent);
    }

    /// The agent of `node`, if it has registered.
    pub fn agent(&self, node: &NodeId) -> Option<Arc<AgentClient>> {
        self.agents
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(node)
            .cloned()
    }

    /// Every agent that has registered.
    pub fn agents(&self) -> Vec<(NodeId, Arc<AgentClient>)> {
        let agents = self.agents.read().unwrap_or_else(PoisonError::into_inner);
        agents
            .iter()
            .map(|(node, agent)| (node.clone(), Arc::clone(agent)))
            .collect()
    }
}

impl Ports for Directory {
    fn home(&self, node: &NodeId) -> Option<Arc<dyn Home>> {
        self.agent(node).map(|agent| agent as Arc<dyn Home>)
    }

    fn node(&self, node: &NodeId) -> Option<Arc<dyn Node>> {
        self.agent(node).map(|agent| agent as Arc<dyn Node>)
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    /// Longer than anything here takes, whatever else the machine has to do.
    const PATIENCE: Duration = Duration::from_secs(60);

    async fn ask(address: &HostPort) -> Result<(), Status> {
        let request = within(PATIENCE, pb::Nothing {});
        let mut client = HomeClient::new(channel(address));
        client.get_capacity(request).await.map(drop)
    }

    #[tokio::test]
    async fn an_address_may_be_a_name() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let address = format!("localhost:{port}").parse().unwrap();
        tokio::select! {
            accepted = listener.accept() => drop(accepted.unwrap()),
            answer = ask(&address) => panic!("answered before it connected: {answer:?}"),
        }
    }

    /// By code and word the arbiter and the command line know that nobody is there;
    /// they are not those of a call that came to its own deadline.
    async fn is_unavailable_soon(address: &str, why: &str) {
        let refused = ask(&address.parse().unwrap()).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
        let message = refused.message();
        assert!(
            message.contains("connect") && message.contains(why),
            "{message}"
        );
    }

    #[tokio::test]
    async fn an_address_that_leads_nowhere_is_unavailable_soon() {
        is_unavailable_soon("nowhere.invalid:9750", "nowhere.invalid").await;
        is_unavailable_soon("[fe80::1%3]:9750", "[fe80::1%3]").await;
        is_unavailable_soon("127.0.0.1:1", "refused").await;
    }

    #[tokio::test]
    async fn a_silent_address_is_unavailable_soon() {
        // A full backlog drops whoever else connects.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(0).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mut queued = Vec::new();
        let patience = Duration::from_millis(200);
        while let Ok(stream) = tokio::time::timeout(patience, TcpStream::connect(&address)).await {
            queued.push(stream.unwrap());
        }
        is_unavailable_soon(&address, "no answer").await;
    }

    #[tokio::test]
    async fn a_call_without_a_deadline_ends_when_its_peer_is_dead() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().into();
        let soon = Duration::from_millis(100);
        let mut client = HomeClient::new(watched_channel(&address, soon, soon));
        let request = pb::ResumeBackupRequest::default();
        let called = client.resume_backup(request);
        let (connected, answer) = tokio::join!(
            // Held open and never read: nothing says that nobody is there.
            listener.accept(),
            tokio::time::timeout(PATIENCE, called),
        );
        let answer = answer.expect("the call waits for ever").map(drop);
        answer.unwrap_err();
        drop(connected);
    }
}
