//! HTTP/1.1 requests that switch a connection to another protocol.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Asks the server of `url` to speak another protocol, with these header lines, each with its line
/// end. No read or write on the connection may take longer than `deadline`. The answer must contain
/// `chosen`.
pub(crate) fn upgrade(
    url: &str,
    headers: &str,
    chosen: &str,
    deadline: Duration,
) -> io::Result<TcpStream> {
    let (host, path) = url
        .strip_prefix("http://")
        .and_then(|rest| rest.split_once('/'))
        .ok_or_else(|| io::Error::other(format!("{url:?} is no plain HTTP address")))?;
    let mut socket = TcpStream::connect(host)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(deadline))?;
    socket.set_write_timeout(Some(deadline))?;
    let request =
        format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\n{headers}\r\n");
    socket.write_all(request.as_bytes())?;
    // Byte by byte: the bytes after the head belong to the new protocol.
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && head.len() < 8192 {
        socket.read_exact(&mut byte)?;
        head.extend(byte);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    if !head.starts_with("HTTP/1.1 101") || !head.to_ascii_lowercase().contains(chosen) {
        return Err(io::Error::other(format!("no stream: {head:?}")));
    }
    Ok(socket)
}
