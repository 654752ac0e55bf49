//! Records under numbers, and answers that are asked for once.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, OnceLock, RwLock};

use serde::{Serialize, de::DeserializeOwned};

use crate::wire::{NODES, Node};

/// How many records of one kind there can be.
const MOST: usize = 1 << 16;

/// A record.
pub struct Kept<T, F> {
    /// The record.
    pub value: T,
    /// What is asked of it.
    pub facts: F,
    /// The numbers of the same with its nodes renamed, one for each permutation.
    pub renamed: Vec<u16>,
}

/// Records of one kind. They are read without a lock.
pub struct Table<T, F> {
    ids: Mutex<HashMap<String, u16>>,
    kept: Box<[OnceLock<Kept<T, F>>]>,
    facts_of: fn(&T) -> F,
}

impl<T: Serialize + DeserializeOwned, F> Table<T, F> {
    /// None yet; `facts_of` says what is asked of each.
    pub fn new(facts_of: fn(&T) -> F) -> Self {
        Self {
            ids: Mutex::default(),
            kept: (0..MOST).map(|_| OnceLock::new()).collect(),
            facts_of,
        }
    }

    /// A record by its number.
    pub fn get(&self, id: u16) -> &Kept<T, F> {
        let kept = self.kept[usize::from(id)].get();
        kept.expect("a number is given with its record")
    }

    /// The number of a record; it and all its renamings get theirs together.
    pub fn id(&self, value: &T, permutations: &[Vec<Node>]) -> u16 {
        let text = serde_json::to_string(value).expect("a record is JSON");
        let mut ids = self.ids.lock().expect("no thread panicked");
        if let Some(id) = ids.get(&text) {
            return *id;
        }
        let texts: Vec<String> = permutations.iter().map(|p| rename(&text, p)).collect();
        for text in &texts {
            let next = u16::try_from(ids.len()).expect("fewer than 65,536 records");
            ids.entry(text.clone()).or_insert(next);
        }
        for text in &texts {
            let value: T = serde_json::from_str(text).expect("a renamed record reads back");
            let facts = (self.facts_of)(&value);
            let renamed = permutations.iter().map(|p| ids[&rename(text, p)]).collect();
            self.kept[usize::from(ids[text])].get_or_init(|| Kept {
                value,
                facts,
                renamed,
            });
        }
        ids[&text]
    }
}

/// Answers that were given once.
pub struct Memo<K, V>(RwLock<HashMap<K, V>>);

impl<K: Eq + Hash, V: Clone> Memo<K, V> {
    /// None yet.
    pub fn new() -> Self {
        Self(RwLock::new(HashMap::new()))
    }

    /// The answer to a question.
    pub fn get(&self, key: K, ask: impl FnOnce() -> V) -> V {
        if let Some(known) = self.0.read().expect("no thread panicked").get(&key) {
            return known.clone();
        }
        let value = ask();
        let mut memo = self.0.write().expect("no thread panicked");
        memo.entry(key).or_insert(value).clone()
    }
}

/// A record's text with its nodes renamed. No other text has their names in it.
fn rename(text: &str, permutation: &[Node]) -> String {
    let mut renamed = text.to_owned();
    for (from, _) in permutation.iter().enumerate() {
        renamed = renamed.replace(NODES[from], &format!("\u{1}{from}\u{1}"));
    }
    for (from, to) in permutation.iter().enumerate() {
        renamed = renamed.replace(&format!("\u{1}{from}\u{1}"), NODES[usize::from(*to)]);
    }
    renamed
}

/// All ways to rename so many nodes, the one that changes nothing first.
pub fn permutations(nodes: Node) -> Vec<Vec<Node>> {
    let mut all = vec![Vec::new()];
    for _ in 0..nodes {
        all = all
            .into_iter()
            .flat_map(|begun: Vec<Node>| {
                (0..nodes)
                    .filter(|node| !begun.contains(node))
                    .map(|node| [begun.as_slice(), &[node]].concat())
                    .collect::<Vec<_>>()
            })
            .collect();
    }
    all
}
