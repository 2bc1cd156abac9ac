//! The guest's half of port-forward: connects to a port of loopback for the host.
//!
//! Called by `pod.rs` for each connection. The connection comes first, so that the host hears of a
//! refusal. The stream that it is joined to comes afterwards, by its token (`stdio::port`).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use kata_like_failure::Failure;
use kata_like_relay::relay;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::stdio::port::{Token, Tokens};

/// The guest's loopback addresses, in this order: IPv6 only if IPv4 fails.
const LOOPBACK: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];

/// How long a server with a full queue may take to accept.
const CONNECT: Duration = Duration::from_secs(10);
/// How long the host may take to dial once it has its answer.
const DIAL: Duration = Duration::from_secs(30);

/// Connects to a port of the guest's loopback, in the agent's own network namespace, and joins the
/// connection to the stream with this token. Returns when it is connected.
pub async fn connect(tokens: &Arc<Tokens>, port: u16, token: Token) -> Result<(), Failure> {
    let mut expected = tokens.expect(token)?;
    let server = match timeout(CONNECT, dial(port)).await {
        Ok(server) => server?,
        Err(_) => {
            return Err(Failure::late(
                format!("connect to port {port} on loopback"),
                CONNECT,
            ));
        }
    };
    tokio::spawn(async move {
        match timeout(DIAL, expected.dialled()).await {
            Ok(host) => relay(server, host).await,
            Err(_) => log::warn!("forward port {port}: the host has not dialled after {DIAL:?}"),
        }
    });
    Ok(())
}

async fn dial(port: u16) -> Result<TcpStream, Failure> {
    let mut failure = None;
    for address in LOOPBACK {
        let address = SocketAddr::new(address, port);
        let connected = async {
            let server = TcpStream::connect(address).await?;
            // Where nobody listens, TCP may connect to itself: the kernel then gives our end the
            // same port.
            if server.local_addr()? == address {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            server.set_nodelay(true)?; // bytes have been held together by whoever sent them
            io::Result::Ok(server)
        };
        match connected.await {
            Ok(server) => return Ok(server),
            // Of two errors we report the first: there may be no IPv6 at all.
            Err(error) => {
                failure.get_or_insert((address, error));
            }
        }
    }
    Err(match failure {
        Some((address, error)) => Failure::failed(format!("connect to {address}"), error),
        None => Failure::bad("port", "loopback has no address"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, UnixStream};

    use crate::readiness::{BOTH, watch};

    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_server_of_either_family_is_joined_to_the_stream() {
        for address in LOOPBACK {
            let listener = TcpListener::bind((address, 0)).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let tokens = Arc::new(Tokens::default());
            connect(&tokens, port, [1; 16]).await.unwrap();
            let (mut server, _) = listener.accept().await.unwrap();
            let (mut host, stream) = UnixStream::pair().unwrap();
            let stream = OwnedFd::from(stream.into_std().unwrap());
            tokens.park([1; 16], watch(stream, BOTH).unwrap());
            host.write_all(b"question").await.unwrap();
            host.shutdown().await.unwrap();
            let exchange = async {
                let (mut question, mut answer) = (String::new(), String::new());
                server.read_to_string(&mut question).await.unwrap();
                server.write_all(b"answer").await.unwrap();
                drop(server);
                host.read_to_string(&mut answer).await.unwrap();
                (question, answer)
            };
            let said = timeout(PATIENCE, exchange).await.unwrap();
            assert_eq!(said, ("question".into(), "answer".into()), "{address}");
        }
    }

    #[tokio::test]
    async fn a_refusal_is_an_answer_and_its_token_free_again() {
        let port = {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            listener.local_addr().unwrap().port()
        };
        let tokens = Arc::new(Tokens::default());
        let error = connect(&tokens, port, [1; 16]).await.unwrap_err();
        assert_eq!(error.to_string(), format!("connect to 127.0.0.1:{port}"));
        assert!(tokens.expect([1; 16]).is_ok());
    }
}
