//! In network namespaces that end with their threads, with a server of the test's in the place of
//! the guest. Needs root.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream as StdTcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

fn ip(arguments: &str) -> String {
    let done = Command::new("ip").args(arguments.split(' ')).output();
    let done = done.unwrap();
    assert!(done.status.success(), "ip {arguments}: {done:?}");
    String::from_utf8(done.stdout).unwrap()
}

/// The kernel makes the route to an address of IPv6 after it has answered, in a work queue
/// (net/ipv6/addrconf.c, `addrconf_dad_work`).
fn until_local(address: &str) {
    let end = std::time::Instant::now() + PATIENCE;
    while !ip("-6 route show table local").contains(&format!("local {address} ")) {
        assert!(std::time::Instant::now() < end, "{address} stays unknown");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Does something in a thread with a namespace of its own, on a runtime.
fn in_new_namespace<F: Future<Output = ()>>(test: impl FnOnce(File) -> F + Send + 'static) {
    let thread = std::thread::spawn(move || {
        kata_like_linux::namespace::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
        let namespace = File::open("/proc/thread-self/ns/net").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test(namespace));
    });
    thread.join().unwrap();
}

/// The guest: port 7 is refused, another's number is told, and then all that comes is sent back.
async fn guest(port: u16) -> Result<UnixStream, Failure> {
    if port == 7 {
        return Err(Failure::new(Kind::Failed, "refused"));
    }
    let (host, mut guest) = UnixStream::pair().unwrap();
    tokio::spawn(async move {
        guest.write_all(&port.to_be_bytes()).await?;
        let (mut from, mut to) = guest.split();
        tokio::io::copy(&mut from, &mut to).await
    });
    Ok(host)
}

async fn dial(address: &str) -> io::Result<TcpStream> {
    let address: SocketAddr = address.parse().unwrap();
    TcpStream::connect(address).await
}

/// The port that the guest was asked for.
async fn told(stream: &mut TcpStream) -> u16 {
    let read = tokio::time::timeout(PATIENCE, stream.read_u16());
    read.await.unwrap().unwrap()
}

#[test]
fn every_port_of_loopback_is_the_guests_in_both_families() {
    in_new_namespace(async |namespace| {
        let own = Listener::serve(listen_in(namespace.as_fd(), true).unwrap(), guest).unwrap();
        for address in [
            "127.0.0.1:80",
            "127.0.0.1:1",
            "127.0.0.1:65535",
            "127.9.8.7:8080",
            "[::1]:443",
            "[::ffff:127.0.0.1]:81",
        ] {
            let mut stream = dial(address).await.unwrap();
            let port = address.parse::<SocketAddr>().unwrap().port();
            assert_eq!(told(&mut stream).await, port, "{address}");
            stream.write_all(b"hello").await.unwrap();
            stream.shutdown().await.unwrap();
            let mut back = String::new();
            stream.read_to_string(&mut back).await.unwrap();
            assert_eq!(back, "hello");
        }
        drop(own);
        tokio::task::yield_now().await;
        let error = dial("127.0.0.1:80").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    });
}

#[test]
fn nothing_but_loopback_is_steered() {
    in_new_namespace(async |namespace| {
        ip("link add eth0 type veth peer name far0");
        ip("link set far0 up");
        ip("link set eth0 up");
        ip("address add 10.1.0.2/24 dev eth0");
        ip("address add fd00::2/64 dev eth0 nodad");
        until_local("fd00::2");
        let listener = listen_in(namespace.as_fd(), true).unwrap();
        let _forward = listener.serve(guest).unwrap();
        for address in ["10.1.0.2:80", "[fd00::2]:80", "127.0.0.11:53"] {
            let error = dial(address).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{address}");
        }
        // Nor another protocol, in which a socket of the namespace's own is to be found.
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let to = socket.local_addr().unwrap();
        socket.send_to(b"x", to).unwrap();
        assert_eq!(socket.recv(&mut [0]).unwrap(), 1);
    });
}

#[test]
fn what_the_guest_refuses_is_reset_at_once() {
    in_new_namespace(async |namespace| {
        let listener = listen_in(namespace.as_fd(), true).unwrap();
        let _forward = listener.serve(guest).unwrap();
        for address in ["127.0.0.1:7", "[::1]:7"] {
            let mut stream = dial(address).await.unwrap();
            let read = tokio::time::timeout(PATIENCE, stream.read_u8()).await;
            let error = read.unwrap().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{address}");
        }
    });
}

#[test]
fn a_namespace_that_is_not_the_pods_own_is_left_as_it_is() {
    in_new_namespace(async |namespace| {
        let listener = listen_in(namespace.as_fd(), false).unwrap();
        let _forward = listener.serve(guest).unwrap();
        let error = dial("127.0.0.1:80").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NetworkUnreachable);
    });
}

#[test]
fn without_ipv6_there_is_ipv4() {
    in_new_namespace(async |namespace| {
        std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
        let listener = listen_in(namespace.as_fd(), true).unwrap();
        let _forward = listener.serve(guest).unwrap();
        assert_eq!(told(&mut dial("127.0.0.1:80").await.unwrap()).await, 80);
    });
}

#[test]
fn a_second_namespace_has_its_own() {
    in_new_namespace(async |namespace| {
        let listener = listen_in(namespace.as_fd(), true).unwrap();
        let _forward = listener.serve(guest).unwrap();
        let refused = std::thread::spawn(|| {
            kata_like_linux::namespace::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
            ip("link set lo up");
            StdTcpStream::connect("127.0.0.1:80").map(drop)
        });
        let error = refused.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        assert_eq!(told(&mut dial("127.0.0.1:80").await.unwrap()).await, 80);
    });
}

#[test]
fn more_than_the_most_are_reset_until_others_end() {
    const FEW: usize = 3;
    in_new_namespace(async |namespace| {
        let listener = listen_in(namespace.as_fd(), true).unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        let connect = move |port| {
            counted.fetch_add(1, Ordering::Relaxed);
            guest(port)
        };
        let socket = TcpListener::from_std(listener.socket.into()).unwrap();
        tokio::spawn(accept(socket, FEW, Arc::new(connect)));
        let mut open = Vec::new();
        for _ in 0..FEW {
            let mut stream = dial("127.0.0.1:80").await.unwrap();
            assert_eq!(told(&mut stream).await, 80);
            open.push(stream);
        }
        let mut more = dial("127.0.0.1:80").await.unwrap();
        let read = tokio::time::timeout(PATIENCE, more.read_u8()).await;
        assert_eq!(
            read.unwrap().unwrap_err().kind(),
            ErrorKind::ConnectionReset
        );
        assert_eq!(asked.load(Ordering::Relaxed), FEW);
        drop(open.pop());
        let served = async {
            loop {
                let mut stream = dial("127.0.0.1:80").await.unwrap();
                if stream.read_u16().await.is_ok() {
                    return;
                }
            }
        };
        tokio::time::timeout(PATIENCE, served).await.unwrap();
    });
}

/// As the `ip` and `nc` of a person would: blocking calls of another thread of the namespace's.
#[test]
fn hundreds_at_once_are_carried() {
    in_new_namespace(async |namespace| {
        let listener = listen_in(namespace.as_fd(), true).unwrap();
        let _forward = listener.serve(guest).unwrap();
        let dialled = tokio::task::spawn_blocking(move || {
            rustix::thread::move_into_link_name_space(namespace.as_fd(), None).unwrap();
            let mut all = Vec::new();
            for port in 1000..1300u16 {
                let mut stream = StdTcpStream::connect(("127.0.0.1", port)).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.write_all(b"x").unwrap();
                all.push((port, stream));
            }
            for (port, mut stream) in all {
                let mut told = [0; 3];
                stream.read_exact(&mut told).unwrap();
                let [high, low] = port.to_be_bytes();
                assert_eq!(told, [high, low, b'x']);
            }
        });
        dialled.await.unwrap();
    });
}
