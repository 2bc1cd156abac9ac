//! A real guest's interface over a real tap, in a network namespace of the test's own thread.

use std::fs;
use std::net::TcpStream;
use std::time::Instant;

use kata_like_boot::{VmCommand, VmReport};

use crate::parts::PATIENCE;
use crate::parts::host::{enter_new_namespace, ip, tap};
use crate::{Files, pattern, start};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Bytes and packets from the guest, and to it.
fn counters(name: &str) -> [u64; 4] {
    let table = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = table.lines().find_map(|line| {
        let (found, rest) = line.trim().split_once(':')?;
        (found == name).then(|| rest.to_owned())
    });
    let line = line.unwrap_or_else(|| panic!("no {name} in {table}"));
    let numbers: Vec<u64> = line
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    [numbers[0], numbers[1], numbers[8], numbers[9]]
}

/// An interface comes long after boot, carries long segments whole both ways, goes, and leaves
/// nothing.
#[test]
fn an_interface_carries_long_segments_both_ways_and_goes() {
    enter_new_namespace();
    let mut guest = start(Vec::new());
    guest.wait_for_dial();
    let mut files = Files::of(&guest);
    // The answer shows that the VMM has accepted the stream, which counts.
    files.done("mkdir /begun");
    let before = guest.holdings();

    for refused in [
        guest.add_interface(&tap("short"), MAC, 67),
        guest.ask(VmCommand::RemoveInterface { slot: 4 }),
        guest.ask(VmCommand::RemoveInterface { slot: 12 }),
    ] {
        assert!(matches!(refused, VmReport::Refused { .. }), "{refused:?}");
    }
    for (round, mtu) in [(1, 1400), (2, 9000)] {
        let fd = tap("tap0");
        assert_eq!(
            guest.add_interface(&fd, MAC, mtu),
            VmReport::SlotFilled { slot: 4 }
        );
        drop(fd);
        ip(&format!("address add 10.1.{round}.1/24 dev tap0"));
        ip(&format!("link set tap0 mtu {mtu} up"));
        let told = files.ask(&format!("interface virtio-mmio.4 10.1.{round}.2"));
        assert_eq!(told, format!("ok 02:00:00:00:00:02 {mtu}"));

        let started = Instant::now();
        let stream = TcpStream::connect((format!("10.1.{round}.2"), 7)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        echo(stream, &pattern(round, 8 << 20));
        let [in_bytes, in_packets, out_bytes, out_packets] = counters("tap0");
        println!(
            "8 MiB there and back, MTU {mtu}: {:?}, {in_packets} packets in, {out_packets} out",
            started.elapsed()
        );
        // Many packets are acknowledgements, and yet the average is longer than the MTU.
        for (bytes, packets) in [(in_bytes, in_packets), (out_bytes, out_packets)] {
            assert!(bytes > 8 << 20, "{bytes}");
            assert!(mtu > 1400 || bytes / packets > 1414, "{bytes} in {packets}");
        }
        files.done("unbind virtio-mmio.4");
        let removed = guest.ask(VmCommand::RemoveInterface { slot: 4 });
        assert_eq!(removed, VmReport::SlotEmptied);
        assert_eq!(guest.holdings(), before);
        assert!(
            !fs::read_to_string("/proc/thread-self/net/dev")
                .unwrap()
                .contains("tap0")
        );
    }
}

fn echo(mut stream: TcpStream, bytes: &[u8]) {
    use std::io::{Read, Write};
    let mut writer = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            writer.write_all(bytes).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        assert_eq!(back.len(), bytes.len());
        assert!(back == bytes, "other bytes came back");
    });
}
