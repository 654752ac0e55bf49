//! What is read of files and records: the pool's, the store's, a repository's,
//! the kernel's and the operator's.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| drover::doors::records(bytes));
