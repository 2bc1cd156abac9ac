//! A name server at a loopback address of the guest, which answers with what the host answers.
//!
//! Called by `pod.rs` for an address that a container's resolv.conf names and that has a server in
//! the pod's namespace on the host, such as Docker's 127.0.0.11. We look into no question, and the
//! guest never dials the host: the host hears of each question as an event and dials for it.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use kata_like_failure::{Failure, Step};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::container::Surroundings;
use crate::events::Event;
use crate::readiness::{read_exact, write_all};
use crate::stdio::port::Token;

/// The port of name servers.
const PORT: u16 = 53;

/// How long an answer may take, and how long a connection may be silent. Most clients wait for five
/// seconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// How many questions by UDP may be under way; others wait in the socket. As many connections may
/// be open.
const AT_ONCE: usize = 64;

/// Takes questions at this address from now on.
pub async fn serve(address: IpAddr, around: Arc<Surroundings>) -> Result<(), Failure> {
    let listen = |what| format!("listen at {address}, {what} port {PORT}");
    let datagrams = UdpSocket::bind((address, PORT)).await;
    let datagrams = Arc::new(datagrams.step(|| listen("UDP"))?);
    let connections = TcpListener::bind((address, PORT)).await;
    let connections = connections.step(|| listen("TCP"))?;
    let server = Arc::new(Server { address, around });
    tokio::spawn(take_datagrams(datagrams, server.clone()));
    tokio::spawn(take_connections(connections, server));
    Ok(())
}

async fn take_datagrams(socket: Arc<UdpSocket>, server: Arc<Server>) {
    let under_way = Arc::new(Semaphore::new(AT_ONCE));
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        // The semaphore is never closed, so this is always a permit.
        let permit = under_way.clone().acquire_owned().await;
        let (question, from) = match socket.recv_from(&mut buffer).await {
            Ok((length, from)) => (buffer.get(..length).unwrap_or_default().to_vec(), from),
            Err(error) => {
                pause(&error).await;
                continue;
            }
        };
        let (socket, server) = (socket.clone(), server.clone());
        tokio::spawn(async move {
            let _permit = permit;
            match server.ask(&question, false).await {
                // The client may have gone.
                Ok(answer) => drop(socket.send_to(&answer, from).await),
                Err(error) => log::debug!("answer a question for a name: {error}"),
            }
        });
    }
}

async fn take_connections(listener: TcpListener, server: Arc<Server>) {
    let open = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let permit = open.clone().acquire_owned().await;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                pause(&error).await;
                continue;
            }
        };
        let server = server.clone();
        tokio::spawn(async move {
            let _permit = permit;
            if let Err(error) = take_questions(stream, &server).await {
                log::debug!("answer questions for names: {error}");
            }
        });
    }
}

/// After a lack of memory or of files: the next try may find some again.
async fn pause(error: &io::Error) {
    log::warn!("take a question for a name: {error}");
    sleep(Duration::from_millis(100)).await;
}

/// Answers one question after the other, until the connection is closed.
async fn take_questions(mut stream: TcpStream, server: &Server) -> io::Result<()> {
    loop {
        let read = async {
            let length = stream.read_u16().await?;
            let mut question = vec![0; length.into()];
            stream.read_exact(&mut question).await?;
            Ok::<_, io::Error>(question)
        };
        let question = match timeout(PATIENCE, read).await? {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            question => question?,
        };
        let answer = server.ask(&question, true).await?;
        timeout(PATIENCE, stream.write_all(&framed(&answer)?)).await??;
    }
}

/// The host's name server, seen from the guest.
struct Server {
    address: IpAddr,
    around: Arc<Surroundings>,
}

impl Server {
    async fn ask(&self, question: &[u8], tcp: bool) -> io::Result<Vec<u8>> {
        let question = framed(question)?;
        let mut token = Token::default();
        rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())?;
        let expected = self.around.tokens.expect(token);
        let mut expected = expected.map_err(io::Error::other)?;
        self.around.events.push(Event::NameQuestion {
            token,
            address: self.address,
            tcp,
        });
        let exchange = async {
            let socket = expected.dialled().await;
            write_all(&socket, &question).await?;
            let mut length = [0; 2];
            read_exact(&socket, &mut length).await?;
            let mut answer = vec![0; u16::from_be_bytes(length).into()];
            read_exact(&socket, &mut answer).await?;
            Ok(answer)
        };
        timeout(PATIENCE, exchange).await?
    }
}

/// Puts the length before it, as over TCP.
fn framed(message: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    Ok([&length.to_be_bytes(), message].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::readiness::{BOTH, watch};
    use crate::stdio::port::Tokens;
    use crate::storage::VolumeHolders;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    /// The host's side: whatever is asked comes back with a word more.
    async fn host(around: Arc<Surroundings>) {
        loop {
            let Event::NameQuestion {
                token,
                address,
                tcp,
            } = around.events.next().await
            else {
                panic!("another event");
            };
            assert!(address.is_loopback());
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let (ours, theirs) =
                socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
            around.tokens.park(token, watch(theirs, BOTH).unwrap());
            let ours = watch(ours, BOTH).unwrap();
            let mut length = [0; 2];
            read_exact(&ours, &mut length).await.unwrap();
            let mut question = vec![0; u16::from_be_bytes(length).into()];
            read_exact(&ours, &mut question).await.unwrap();
            question.extend(if tcp { b" by TCP" } else { b" by UDP" });
            write_all(&ours, &framed(&question).unwrap()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_question_comes_back_as_the_host_s_answer() {
        let around = Arc::new(Surroundings {
            events: Default::default(),
            tokens: Arc::new(Tokens::default()),
            volumes: VolumeHolders::default(),
        });
        tokio::spawn(host(around.clone()));
        // nobody's: the test needs the right to port 53
        let address = IpAddr::from([127, 77, 0, 11]);
        serve(address, around.clone()).await.unwrap();
        let taken = serve(address, around).await.unwrap_err();
        assert_eq!(taken.to_string(), "listen at 127.77.0.11, UDP port 53");

        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect((address, PORT)).await.unwrap();
        let mut answer = [0; 100];
        for word in ["one", "other"] {
            socket.send(word.as_bytes()).await.unwrap();
            let length = timeout(PATIENCE, socket.recv(&mut answer)).await;
            let length = length.unwrap().unwrap();
            assert_eq!(&answer[..length], format!("{word} by UDP").as_bytes());
        }
        let mut stream = TcpStream::connect((address, PORT)).await.unwrap();
        for word in ["one", "other"] {
            let question = framed(word.as_bytes()).unwrap();
            stream.write_all(&question).await.unwrap();
            let length = stream.read_u16().await.unwrap();
            let mut answer = vec![0; length.into()];
            stream.read_exact(&mut answer).await.unwrap();
            assert_eq!(answer, format!("{word} by TCP").as_bytes());
        }
    }
}
