//! Name servers on the loopback of the pod's network namespace, such as Docker's and compose's at
//! 127.0.0.11: who they are, and how one is asked.
//!
//! The guest has a loopback of its own, on which they are not. Whatever a container's resolv.conf
//! names there is served by the agent if somebody in the namespace listens at that address; if
//! nobody does, it is left to the containers, one of which may be a name server itself. Docker's
//! listens at ports that its rules for the namespace lead port 53 to.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::read::{failed, inside};
use kata_like_failure::Failure;

/// The port of name servers.
const PORT: u16 = 53;
/// The only address of loopback that is itself reached over TCP: Docker's.
const DOCKER_S: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11));
/// How many name servers the C library takes from a file (MAXNS of resolv.h).
const SERVERS: usize = 3;
/// No longer file is read.
const LENGTH: u64 = 64 << 10;
/// How long a name server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// A resolv.conf: where its path leads if `root` is the root directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolvConf {
    /// The directory that no link leads out of.
    pub root: PathBuf,
    /// The path below it.
    pub path: PathBuf,
}

impl ResolvConf {
    /// The name servers in it that are loopback addresses. A file that is not there names none.
    /// Blocks.
    pub fn on_loopback(&self) -> io::Result<Vec<IpAddr>> {
        match self.read() {
            Ok(text) => Ok(on_loopback(&text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn read(&self) -> io::Result<String> {
        let path = self.path.strip_prefix("/").unwrap_or(&self.path);
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, &self.root, directory, Mode::empty())?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let file = rustix::fs::openat2(&root, path, flags, Mode::empty(), within)?;
        if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
            return Ok(String::new());
        }
        let mut bytes = Vec::new();
        File::from(file).take(LENGTH).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn on_loopback(text: &str) -> Vec<IpAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then(|| words.next())?
    });
    let mut found = Vec::new();
    for server in servers.take(SERVERS) {
        if let Ok(address) = server.parse::<IpAddr>()
            && address.is_loopback()
            && !found.contains(&address)
        {
            found.push(address);
        }
    }
    found
}

/// Whether somebody in the namespace takes datagrams at this address: at any port of the address
/// itself, for rules can lead there, or at port 53 of all addresses. Blocks.
pub fn is_served(namespace: BorrowedFd, address: IpAddr) -> Result<bool, Failure> {
    inside(namespace, || {
        for table in ["udp", "udp6"] {
            let path = Path::new("/proc/thread-self/net").join(table);
            let text = match fs::read_to_string(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue, // no IPv6
                read => read.map_err(failed("list the sockets"))?,
            };
            let takes = |at: SocketAddr| match at.ip().is_unspecified() {
                true => at.port() == PORT && at.is_ipv6() >= address.is_ipv6(),
                false => at.ip().to_canonical() == address,
            };
            if text.lines().filter_map(local).any(takes) {
                return Ok(true);
            }
        }
        Ok(false)
    })
}

/// The local address in a line of the table: words of 32 bits as they lie in memory, and a port.
fn local(line: &str) -> Option<SocketAddr> {
    let (address, port) = line.split_whitespace().nth(1)?.split_once(':')?;
    let mut bytes = Vec::new();
    for start in (0..address.len()).step_by(8) {
        let word = u32::from_str_radix(address.get(start..start + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let four = <[u8; 4]>::try_from(bytes.as_slice()).map(|bytes| Ipv4Addr::from(bytes).into());
    let address = four.or_else(|_| {
        <[u8; 16]>::try_from(bytes.as_slice()).map(|bytes| Ipv6Addr::from(bytes).into())
    });
    Some(SocketAddr::new(
        address.ok()?,
        u16::from_str_radix(port, 16).ok()?,
    ))
}

/// Puts a question to the name server at this address of the namespace, and takes its answer: by
/// UDP, and with `tcp` by TCP where that leads there. It has no deadline: the caller has.
pub async fn ask(
    namespace: OwnedFd,
    address: IpAddr,
    tcp: bool,
    question: Vec<u8>,
) -> Result<Vec<u8>, Failure> {
    let server = SocketAddr::new(address, PORT);
    // Else it would be port-forward that accepts (`forward::steer`), and the guest be asked by
    // itself.
    let answer = match tcp && address == DOCKER_S {
        true => {
            let stream = open(namespace, move || connected(server)).await?;
            ask_stream(stream, &question).await
        }
        false => {
            let socket = open(namespace, move || addressed(server)).await?;
            ask_socket(socket, &question).await
        }
    };
    answer.map_err(failed("ask the name server"))
}

/// Opens a socket in the namespace.
async fn open<T: Send + 'static>(
    namespace: OwnedFd,
    open: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    const STEP: &str = "open a socket to the name server";
    let work = move || inside(namespace.as_fd(), || open().map_err(failed(STEP)));
    let opened = tokio::task::spawn_blocking(work).await;
    opened.map_err(|panic| Failure::failed(STEP, panic))?
}

fn connected(server: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, CONNECT)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

async fn ask_stream(stream: TcpStream, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = tokio::net::TcpStream::from_std(stream)?;
    write_message(&mut stream, question).await?;
    read_message(&mut stream).await
}

fn addressed(server: SocketAddr) -> io::Result<UdpSocket> {
    let any = match server {
        SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(server)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

async fn ask_socket(socket: UdpSocket, question: &[u8]) -> io::Result<Vec<u8>> {
    let socket = tokio::net::UdpSocket::from_std(socket)?;
    socket.send(question).await?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    let length = socket.recv(&mut answer).await?;
    answer.truncate(length);
    Ok(answer)
}

/// Reads a DNS message behind its length (RFC 1035, 4.2.2).
pub async fn read_message(from: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Vec<u8>> {
    let mut message = vec![0; from.read_u16().await?.into()];
    from.read_exact(&mut message).await?;
    Ok(message)
}

/// Writes a DNS message behind its length.
pub async fn write_message(
    to: &mut (impl AsyncWriteExt + Unpin),
    message: &[u8],
) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    to.write_all(&[&length.to_be_bytes(), message].concat())
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn only_servers_on_loopback_are_found_as_the_c_library_reads() {
        let docker = "# Generated\nsearch example\nnameserver 127.0.0.11\noptions ndots:0\n";
        assert_eq!(on_loopback(docker), addresses(&["127.0.0.11"]));
        let mixed = "nameserver 10.0.0.2\n#nameserver 127.0.0.2\nnameserver\t::1 \nnameserver ::1\nnameserver 127.0.0.4\n";
        assert_eq!(on_loopback(mixed), addresses(&["::1"]));
        assert!(on_loopback("nameserver\nnameserver 127.1\n").is_empty());
    }

    #[test]
    fn a_file_is_found_within_its_root_only() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(folder.path().join("secret"), "nameserver 127.0.0.9\n").unwrap();
        let conf = ResolvConf {
            root: root.clone(),
            path: "/etc/resolv.conf".into(),
        };
        assert!(conf.on_loopback().unwrap().is_empty());
        std::os::unix::fs::symlink("../../secret", root.join("etc/resolv.conf")).unwrap();
        assert!(conf.on_loopback().unwrap().is_empty());
        fs::write(root.join("secret"), "nameserver 127.0.0.7\n").unwrap();
        assert_eq!(conf.on_loopback().unwrap(), addresses(&["127.0.0.7"]));
    }

    #[test]
    fn addresses_are_read_as_the_kernel_writes_them() {
        let line =
            "  64: 0B00007F:E2A5 00000000:0000 07 00000000:00000000 00:00000000 0 0 0 31 2 0 0";
        assert_eq!(local(line), Some("127.0.0.11:58021".parse().unwrap()));
        let line =
            "  64: 00000000000000000000000001000000:0035 00000000000000000000000000000000:0000 07";
        assert_eq!(local(line), Some("[::1]:53".parse().unwrap()));
        assert_eq!(local("  sl  local_address rem_address   st"), None);
        assert_eq!(local(""), None);
    }
}
