//! Reads PDUs from a connection, part by part, by lengths that [`wire`] has checked.

use std::time::Duration;

use tokio::io::{AsyncReadExt, BufReader};
use tokio::net::tcp::OwnedReadHalf;

use super::wire::{self, COMMON, DIGEST, Digests, Flaw, Frame, LONGEST_HEADER, Malformed};

/// A PDU that has begun must go on: without a byte for this long the connection ends.
const STALLED: Duration = Duration::from_secs(30);
const BUFFER: usize = 16 << 10;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The host closed it between two PDUs.
    #[error("the host closed the connection")]
    Closed,
    /// Reading or writing failed, or the host closed it within a PDU.
    #[error("{call}: {source}")]
    Io {
        /// What was being done.
        call: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// The host sent something that it must not.
    #[error("malformed PDU: {malformed}")]
    Malformed {
        /// What is wrong.
        malformed: Malformed,
        /// The PDU's header, as far as it was read.
        header: Vec<u8>,
    },
    /// The host says that this controller sent something that it must not.
    #[error("the host ended the connection with fatal error status {fes:#06x}")]
    Terminated {
        /// The host's fatal error status.
        fes: u16,
    },
    /// Nothing came or went for too long.
    #[error("{0} did not happen in time")]
    Late(&'static str),
    /// This side ended the association, and says why.
    #[error("{0}")]
    Ended(&'static str),
}

/// A PDU's header; its data is still to be read.
pub struct Pdu {
    /// Its parts.
    pub frame: Frame,
    header: [u8; LONGEST_HEADER],
}

impl Pdu {
    /// The header's first `N` bytes.
    pub fn header<const N: usize>(&self) -> &[u8; N] {
        self.header
            .first_chunk()
            .expect("no header is longer than the buffer")
    }

    /// The end of a connection by something wrong in this header.
    pub fn malformed(&self, malformed: Malformed) -> End {
        End::Malformed {
            malformed,
            header: self.header[..self.frame.header].to_vec(),
        }
    }
}

/// Reads one connection's PDUs.
pub struct Reader {
    stream: BufReader<OwnedReadHalf>,
    /// The digests in use, once agreed on.
    pub digests: Digests,
}

impl Reader {
    /// A reader of a connection that has agreed on no digests yet.
    pub fn new(stream: OwnedReadHalf) -> Self {
        let stream = BufReader::with_capacity(BUFFER, stream);
        Self {
            stream,
            digests: Digests::default(),
        }
    }

    /// Reads the next header, waiting as long as it takes to begin. Its data,
    /// if it has any, must be read next.
    pub async fn next(&mut self) -> Result<Pdu, End> {
        let mut header = [0; LONGEST_HEADER];
        let first = self.stream.read(&mut header[..1]).await;
        match first {
            Ok(0) => return Err(End::Closed),
            Ok(_) => {}
            Err(source) => {
                return Err(End::Io {
                    call: "read a PDU",
                    source,
                });
            }
        }
        self.fill(&mut header[1..COMMON]).await?;
        let common = header.first_chunk().expect("longer than the common header");
        let frame = Frame::check(common, self.digests).map_err(|malformed| End::Malformed {
            malformed,
            header: common.to_vec(),
        })?;
        self.fill(&mut header[COMMON..frame.header]).await?;
        let pdu = Pdu { frame, header };
        if frame.header_digest {
            let mut digest = [0; DIGEST];
            self.fill(&mut digest).await?;
            if crc32c::crc32c(&header[..frame.header]) != u32::from_le_bytes(digest) {
                return Err(pdu.malformed(Flaw::HeaderDigest.at(0)));
            }
        }
        let mut pad = [0; LONGEST_HEADER];
        self.fill(&mut pad[..frame.pad]).await?;
        Ok(pdu)
    }

    /// Reads a PDU's data into `data`, which is as long as its frame says.
    /// False: the data digest does not match.
    pub async fn data(&mut self, frame: &Frame, data: &mut [u8]) -> Result<bool, End> {
        self.fill(data).await?;
        if !frame.data_digest {
            return Ok(true);
        }
        let mut digest = [0; DIGEST];
        self.fill(&mut digest).await?;
        Ok(crc32c::crc32c(data) == u32::from_le_bytes(digest))
    }

    /// Reads and drops everything until the host closes the connection.
    pub async fn drain(&mut self) {
        let mut dropped = [0; 512];
        while matches!(self.stream.read(&mut dropped).await, Ok(1..)) {}
    }

    async fn fill(&mut self, mut buffer: &mut [u8]) -> Result<(), End> {
        while !buffer.is_empty() {
            let read = tokio::time::timeout(STALLED, self.stream.read(buffer)).await;
            match read.map_err(|_| End::Late("the rest of a PDU"))? {
                Ok(0) => {
                    let source = std::io::ErrorKind::UnexpectedEof.into();
                    return Err(End::Io {
                        call: "read the rest of a PDU",
                        source,
                    });
                }
                Ok(read) => buffer = &mut buffer[read..],
                Err(source) => {
                    return Err(End::Io {
                        call: "read a PDU",
                        source,
                    });
                }
            }
        }
        Ok(())
    }
}

/// A TermReq's fatal error status.
pub fn term_status(header: &[u8; 24]) -> u16 {
    wire::u16_at(header, 8)
}
