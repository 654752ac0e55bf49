//! The home side of volumes: pool and exports under the record.
