//! Targets that work on rings: the queue itself, and devices over it.
//!
//! A guest's fault costs a device its queues, as in a slot of the VMM, and the run goes on. The
//! host's fault is a defect, since no guest may cause one.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::LazyLock;

use rustix::fs::{MemfdFlags, memfd_create};

use super::driver::{ALL, Driver, RING};
use super::input::Input;
use crate::virtio::block::Disk;
use crate::virtio::block::request::serve;
use crate::virtio::net::receive::Receive;
use crate::virtio::net::send::Send;
use crate::virtio::net::tap::Tap;
use crate::virtio::{Chain, DeviceError, RING_FEATURES};

/// Whether the guest broke a rule.
pub fn broken<T>(result: Result<T, DeviceError>) -> bool {
    match result {
        Ok(_) => false,
        Err(DeviceError::Host { step, source }) => {
            panic!("the guest made it fail: {step}: {source}")
        }
        Err(_) => true,
    }
}

/// Chains from rings of any content, read and written in any portion.
pub fn queue(data: &[u8]) {
    static NOTHING: LazyLock<[File; 2]> = LazyLock::new(|| {
        let open = |path| File::options().read(true).write(true).open(path);
        ["/dev/null", "/dev/zero"].map(|path| open(path).expect("open a device"))
    });
    let [null, zero] = &*NOTHING;
    let mut input = Input::new(data);
    let mut driver = Driver::new(1);
    let event_idx = input.byte() & 1 != 0;
    let mut queue = driver.queue(0, event_idx);
    let mut taken: Vec<Chain> = Vec::new();
    while !input.is_empty() {
        let act = input.byte();
        let amount = usize::from(act >> 4) * 0x100 + usize::from(act);
        let full = taken.len() >= usize::from(RING);
        let result = match (act % 16, taken.last_mut()) {
            (0..=5, _) => {
                driver.act(&mut input);
                Ok(())
            }
            (6 | 7, _) if !full => queue.next_chain().map(|chain| {
                let all = usize::from(RING) * ALL;
                assert!(
                    chain
                        .iter()
                        .all(|chain| chain.readable() <= all && chain.writable() <= all)
                );
                taken.extend(chain);
            }),
            (8, Some(chain)) => {
                let mut bytes = vec![0; amount];
                let (held, fits) = (chain.readable(), chain.readable() >= amount);
                assert_eq!(chain.read_exact(&mut bytes).is_ok(), fits, "{held}");
                Ok(())
            }
            (9, Some(chain)) => {
                let fits = chain.writable() >= amount;
                assert_eq!(chain.write_all(&vec![7; amount]).is_ok(), fits);
                Ok(())
            }
            (10, Some(chain)) => {
                let held = chain.readable();
                let sent = chain.read_into(null, amount).expect("write to nothing");
                assert_eq!(chain.readable(), held - sent);
                Ok(())
            }
            (11, Some(chain)) => {
                let (held, written) = (chain.writable(), chain.written());
                let got = chain.write_from(zero, amount).expect("read nothing");
                assert_eq!(chain.writable(), held - got);
                assert_eq!(chain.written() as usize, written as usize + got);
                Ok(())
            }
            (12, Some(chain)) => {
                chain.skip_writable(amount);
                Ok(())
            }
            (13, Some(_)) => {
                let chain = taken.pop().expect("one is there");
                queue.undo(chain);
                Ok(())
            }
            (14, _) => queue
                .give_back_all(taken.drain(..))
                .and_then(|()| queue.signal()),
            _ => queue.rearm().map(|_| ()),
        };
        if result.is_err() {
            taken.clear();
            queue = driver.queue(0, event_idx);
        }
    }
}

/// Frames both ways, with any header, in any chains.
pub fn net(data: &[u8]) {
    let mut input = Input::new(data);
    let features = RING_FEATURES | u64::from(input.half());
    let (near, far) = UnixDatagram::pair().expect("make a pair of sockets");
    for socket in [&near, &far] {
        socket
            .set_nonblocking(true)
            .expect("make a socket non-blocking");
    }
    let tap = Tap::of_socket(near.into());
    let mut driver = Driver::new(2);
    let ways = |driver: &mut Driver| {
        let receive = Receive::new(driver.queue(0, false), features, 1500);
        (receive, Send::new(driver.queue(1, false), features))
    };
    let (mut receive, mut send) = ways(&mut driver);
    let mut buffer = vec![0; 1 << 17];
    while !input.is_empty() {
        let act = input.byte();
        let slot = u16::from(act >> 4);
        let result = match act % 8 {
            0 | 1 => {
                driver.act(&mut input);
                Ok(false)
            }
            2 => {
                let mut frame = input.bytes(12).to_vec();
                frame.resize(12 + usize::from(input.half()) % 0xf00, 3);
                driver.request(1, slot, &frame, 0);
                Ok(false)
            }
            3 => {
                driver.request(0, slot, &[], u32::from(input.half()));
                Ok(false)
            }
            4 => {
                let mut frame = input.bytes(12).to_vec();
                frame.resize(usize::from(input.half()) + usize::from(slot), 3);
                let _ = far.send(&frame);
                Ok(false)
            }
            5 => {
                let _ = far.recv(&mut buffer);
                Ok(false)
            }
            6 => receive.serve(&tap, 8).map(|_| false),
            _ => send.serve(&tap, 8),
        };
        if broken(result) {
            (receive, send) = ways(&mut driver);
        }
    }
}

/// Requests to a disk, whose file stays as long as it is, and as it is if it is read-only.
pub fn block(data: &[u8]) {
    const SIZE: u64 = 64 << 10;
    let mut input = Input::new(data);
    let (read_only, flush) = (input.byte() & 1 != 0, input.byte() & 1 != 0);
    let memory = memfd_create("disk", MemfdFlags::CLOEXEC).expect("make a file");
    let file = File::from(memory);
    file.set_len(SIZE).expect("make it longer");
    let own = file.try_clone().expect("duplicate a descriptor");
    let disk = Disk::new(OwnedFd::from(file), SIZE, 512, read_only).expect("a disk");
    let mut driver = Driver::new(1);
    let mut queue = driver.queue(0, false);
    while !input.is_empty() {
        let act = input.byte();
        let slot = u16::from(act >> 4);
        if act.is_multiple_of(4) {
            driver.act(&mut input);
            continue;
        }
        if act % 4 == 1 {
            let mut request = u32::from(input.byte() % 12).to_le_bytes().to_vec();
            request.extend([0; 4]);
            request.extend(u64::from(input.byte()).to_le_bytes());
            let out = 512 * usize::from(input.byte() % 4);
            request.resize(16 + out + usize::from(slot % 2), 0xee);
            driver.request(0, slot, &request, 512 * u32::from(input.byte() % 4) + 1);
        }
        let result = queue.next_chain().map_err(DeviceError::from);
        let result = result.and_then(|chain| {
            let Some(mut chain) = chain else {
                return Ok(());
            };
            let room = chain.writable();
            serve(&mut chain, &disk, flush, || false)?;
            assert_eq!(
                chain.written() as usize,
                room,
                "the status is the last byte"
            );
            queue.give_back(chain)?;
            Ok(queue.signal()?)
        });
        if broken(result) {
            queue = driver.queue(0, false);
        }
    }
    assert_eq!(own.metadata().expect("look at the file").len(), SIZE);
    if read_only {
        let mut content = vec![0; SIZE as usize];
        let read = std::os::unix::fs::FileExt::read_at(&own, &mut content, 0);
        assert_eq!(read.expect("read the file"), content.len());
        assert!(
            content.iter().all(|byte| *byte == 0),
            "a read-only disk was written"
        );
    }
}
