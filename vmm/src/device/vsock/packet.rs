//! Headers of vsock packets (virtio 1.2, section 5.10.6) and the rules that do not depend on a connection.

/// Bytes of a header on the wire.
pub const HEADER_LEN: usize = 44;

/// The most data that one packet carries, in bytes; what Linux uses.
pub const MAX_PAYLOAD: u32 = 64 * 1024;

/// The host's context id.
pub const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`, the only socket type offered.
pub const TYPE_STREAM: u16 = 1;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// Refuses or ends one at once.
    Reset = 3,
    /// Says what the sender will no longer do: [`SHUTDOWN_RECEIVE`], [`SHUTDOWN_SEND`].
    Shutdown = 4,
    /// Carries data.
    ReadWrite = 5,
    /// Tells the sender's credit.
    CreditUpdate = 6,
    /// Asks for a [`Op::CreditUpdate`].
    CreditRequest = 7,
}

/// Flag of [`Op::Shutdown`]: the sender will not receive any more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of [`Op::Shutdown`]: the sender will not send any more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both flags of [`Op::Shutdown`].
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

impl Op {
    /// The operation of a header's `op` field; `None` for one that the specification does not know.
    pub fn from_wire(op: u16) -> Option<Self> {
        Some(match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr`. Nothing in it is checked: a guest writes what it likes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data that follow.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// Operation, see [`Op`].
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Size of the sender's receive buffer in bytes.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of its receive buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header off the wire.
    pub fn parse(wire: &[u8; HEADER_LEN]) -> Self {
        let mut fields = Fields { rest: wire };
        Self {
            src_cid: u64::from_le_bytes(fields.take()),
            dst_cid: u64::from_le_bytes(fields.take()),
            src_port: u32::from_le_bytes(fields.take()),
            dst_port: u32::from_le_bytes(fields.take()),
            len: u32::from_le_bytes(fields.take()),
            kind: u16::from_le_bytes(fields.take()),
            op: u16::from_le_bytes(fields.take()),
            flags: u32::from_le_bytes(fields.take()),
            buf_alloc: u32::from_le_bytes(fields.take()),
            fwd_cnt: u32::from_le_bytes(fields.take()),
        }
    }

    /// Formats the header for the wire.
    pub fn format(&self) -> [u8; HEADER_LEN] {
        let mut wire = [0; HEADER_LEN];
        let mut at = wire.iter_mut();
        let mut put = |bytes: &[u8]| {
            // The bytes lead: the one that `zip` takes from its left when its right has ended would be lost.
            for (from, to) in bytes.iter().zip(at.by_ref()) {
                *to = *from;
            }
        };
        put(&self.src_cid.to_le_bytes());
        put(&self.dst_cid.to_le_bytes());
        put(&self.src_port.to_le_bytes());
        put(&self.dst_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        wire
    }

    /// The reset that answers a packet which belongs to no connection.
    pub fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

struct Fields<'a> {
    rest: &'a [u8],
}

impl Fields<'_> {
    // The next `N` bytes; zeros past the end, which `HEADER_LEN` excludes.
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.rest.split_first_chunk::<N>() {
            Some((bytes, rest)) => {
                self.rest = rest;
                *bytes
            }
            None => [0; N],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_has_them() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 0x1112_1314_1516_1718,
            src_port: 0x2122_2324,
            dst_port: 0x3132_3334,
            len: 0x4142_4344,
            kind: 0x5152,
            op: 0x6162,
            flags: 0x7172_7374,
            buf_alloc: 0x8182_8384,
            fwd_cnt: 0x9192_9394,
        };
        let wire = header.format();
        assert_eq!(wire[..8], [8, 7, 6, 5, 4, 3, 2, 1], "little endian src_cid");
        assert_eq!(wire[16..20], [0x24, 0x23, 0x22, 0x21]);
        assert_eq!(wire[28..32], [0x52, 0x51, 0x62, 0x61], "type, then op");
        assert_eq!(wire[40..], [0x94, 0x93, 0x92, 0x91], "fwd_cnt ends it");
        assert_eq!(Header::parse(&wire), header);
    }

    #[test]
    fn operations_that_do_not_exist_are_none() {
        for op in 1..=7 {
            assert_eq!(Op::from_wire(op).map(|op| op as u16), Some(op));
        }
        for op in [0, 8, 255, u16::MAX] {
            assert_eq!(Op::from_wire(op), None);
        }
    }

    #[test]
    fn a_reset_goes_back_to_the_sender_and_promises_nothing() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 10,
            dst_port: 20,
            len: 5,
            kind: TYPE_STREAM,
            op: Op::ReadWrite as u16,
            buf_alloc: 9,
            fwd_cnt: 9,
            flags: 1,
        };
        let reset = Header {
            src_cid: 2,
            dst_cid: 3,
            src_port: 20,
            dst_port: 10,
            kind: TYPE_STREAM,
            op: 3,
            ..Header::default()
        };
        assert_eq!(header.reset_reply(), reset);
    }
}
