//! How many descriptors the process may have: as many as it is allowed.
//!
//! A distribution's soft limit (1024, for the sake of select(2)) is less than
//! what a home's sessions and those that only knock may take together.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit to the hard one; what the kernel refuses is logged.
pub(super) fn raise() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| (soft, hard))
    });
    match raised {
        Ok((soft, hard)) => tracing::debug!(soft, hard, "descriptors: the hard limit is used"),
        Err(errno) => {
            tracing::warn!(%errno, "raise RLIMIT_NOFILE: many connections may exhaust descriptors");
        }
    }
}
