use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use proptest::prelude::*;
use redb::StorageBackend;
use redb::backends::InMemoryBackend;

use super::*;

fn key(kind: Kind, id: &str) -> Key {
    Key {
        kind,
        id: id.to_owned(),
    }
}

fn refusal(path: &Path) -> String {
    match EmbeddedStore::open(path) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(error) => error.to_string(),
    }
}

#[derive(Debug, Clone)]
enum Step {
    Put { id: u8, right: bool, bytes: Vec<u8> },
    Delete { id: u8, right: bool },
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..4u8, prop::bool::weighted(0.8), prop::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(id, right, bytes)| Step::Put { id, right, bytes }),
        2 => (0..4u8, prop::bool::weighted(0.8)).prop_map(|(id, right)| Step::Delete { id, right }),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..30)
}

/// A version that no record has.
const WRONG: Version = Version(u64::MAX);

async fn follow(steps: Vec<Step>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let mut store = EmbeddedStore::open(&path).unwrap();
    let mut model: BTreeMap<String, Stored> = BTreeMap::new();
    let mut highest = 0;
    for step in steps {
        match step {
            Step::Put { id, right, bytes } => {
                let id = format!("r{id}");
                let now = model.get(&id).map(|stored| stored.version);
                let expected = if right { now } else { Some(WRONG) };
                let result = store
                    .put(&key(Kind::Volume, &id), expected, bytes.clone())
                    .await;
                if right {
                    let version = result.unwrap();
                    assert!(version.0 > highest, "version {} came again", version.0);
                    highest = version.0;
                    model.insert(id, Stored { version, bytes });
                } else {
                    assert!(matches!(result, Err(StoreError::Conflict(_))));
                }
            }
            Step::Delete { id, right } => {
                let id = format!("r{id}");
                let now = model.get(&id).map(|stored| stored.version);
                let expected = if right { now.unwrap_or(WRONG) } else { WRONG };
                let result = store.delete(&key(Kind::Volume, &id), expected).await;
                if right && now.is_some() {
                    result.unwrap();
                    model.remove(&id);
                } else {
                    assert!(matches!(result, Err(StoreError::Conflict(_))));
                }
            }
            Step::Reopen => {
                drop(store);
                store = EmbeddedStore::open(&path).unwrap();
            }
        }
        let listed: BTreeMap<String, Stored> = store
            .list(Kind::Volume)
            .await
            .unwrap()
            .into_iter()
            .map(|(key, stored)| (key.id, stored))
            .collect();
        assert_eq!(listed, model);
        for id in ["r0", "r1", "r2", "r3"] {
            let found = store.get(&key(Kind::Volume, id)).await.unwrap();
            assert_eq!(found.as_ref(), model.get(id));
        }
        assert!(store.list(Kind::Note).await.unwrap().is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn it_behaves_as_a_map_with_versions(steps in steps()) {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(follow(steps));
    }
}

#[tokio::test]
async fn of_two_writers_at_one_version_one_wins() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(EmbeddedStore::open(folder.path().join("state")).unwrap());
    let record = key(Kind::Volume, "v");
    let first = store.put(&record, None, b"0".to_vec()).await.unwrap();
    let race = (0..8u8).map(|i| {
        let (store, record) = (Arc::clone(&store), record.clone());
        tokio::spawn(async move { store.put(&record, Some(first), vec![i]).await.is_ok() })
    });
    let won = futures::future::join_all(race).await;
    assert_eq!(
        won.into_iter().filter(|won| *won.as_ref().unwrap()).count(),
        1
    );
}

#[test]
fn a_store_in_use_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let _first = EmbeddedStore::open(&path).unwrap();
    let said = refusal(&path);
    assert!(said.contains("another process uses this store"), "{said}");
    assert!(said.contains(path.to_str().unwrap()), "{said}");
}

#[test]
fn nothing_is_left_beside_a_new_store() {
    let folder = tempfile::tempdir().unwrap();
    drop(EmbeddedStore::open(folder.path().join("state")).unwrap());
    let names: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["state"]);
}

#[tokio::test]
async fn a_truncated_store_is_refused_and_not_begun_afresh() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    {
        let store = EmbeddedStore::open(&path).unwrap();
        for i in 0..50 {
            let record = key(Kind::Volume, &format!("v{i}"));
            store.put(&record, None, vec![7; 2000]).await.unwrap();
        }
    }
    let whole = fs::read(&path).unwrap();
    for length in [0, 1, 100, 512, 4096, 5000, 20_000] {
        fs::write(&path, &whole[..length]).unwrap();
        let said = refusal(&path);
        assert!(said.contains(path.to_str().unwrap()), "{length}: {said}");
    }
    fs::write(&path, &whole).unwrap();
    EmbeddedStore::open(&path).unwrap();
}

#[test]
fn a_foreign_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("notes.txt");
    fs::write(&text, "shopping list\n".repeat(1000)).unwrap();
    assert!(refusal(&text).contains("not a whole drover store"));
    let other = folder.path().join("other.redb");
    drop(Database::create(&other).unwrap());
    assert!(refusal(&other).contains("not drover's"));
    assert!(refusal(folder.path()).contains("not a regular file"));
    let nowhere = folder.path().join("no/such/folder/state");
    assert!(refusal(&nowhere).contains("No such file"));
}

/// A disk whose syncs can be held up.
#[derive(Debug)]
struct Held {
    memory: InMemoryBackend,
    gate: Arc<Mutex<Option<Receiver<()>>>>,
}

impl StorageBackend for Held {
    fn len(&self) -> Result<u64, std::io::Error> {
        self.memory.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), std::io::Error> {
        self.memory.read(offset, out)
    }
    fn set_len(&self, len: u64) -> Result<(), std::io::Error> {
        self.memory.set_len(len)
    }
    fn sync_data(&self) -> Result<(), std::io::Error> {
        if let Some(gate) = self.gate.lock().unwrap().as_ref() {
            let _ = gate.recv();
        }
        self.memory.sync_data()
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), std::io::Error> {
        self.memory.write(offset, data)
    }
}

#[tokio::test]
async fn a_hung_disk_is_unavailable_and_comes_back() {
    let gate = Arc::new(Mutex::new(None));
    let backend = Held {
        memory: InMemoryBackend::new(),
        gate: Arc::clone(&gate),
    };
    let database = Builder::new().create_with_backend(backend).unwrap();
    begin(&database).unwrap();
    let mut store = EmbeddedStore::over(Path::new("held"), database, Duration::from_millis(50));
    let (open, held): (Sender<()>, _) = channel();
    *gate.lock().unwrap() = Some(held);
    let record = key(Kind::Volume, "v");
    for _ in 0..3 {
        match store.put(&record, None, vec![1]).await {
            Err(StoreError::Unavailable(said)) => assert!(said.contains("hung"), "{said}"),
            other => panic!("{other:?}"),
        }
    }
    // Only the first was begun; it takes effect late, the others never do.
    drop(open);
    // From here on nothing hangs, and a machine with much else to do is no such disk.
    store.deadline = Duration::from_secs(60);
    let stored = loop {
        if let Ok(Some(stored)) = store.get(&record).await {
            break stored;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(stored.bytes, [1]);
    store
        .put(&record, Some(stored.version), vec![2])
        .await
        .unwrap();
}
