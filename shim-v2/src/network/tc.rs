//! Frames from one interface to another and back, by traffic control: whatever comes in at one goes
//! out at the other, before the host's own stack sees it.
//!
//! As `tc qdisc add dev FROM clsact; tc filter add dev FROM ingress pref P u32 match u32 0 0 action
//! mirred egress redirect dev TO`, both ways. What is on a tap goes with it.

use std::io;

use kata_like_netlink::{Message, Socket};

/// The place of our filters, which nobody else takes by chance.
const PRIORITY: u32 = 0x4b4c;

/// Parents and handle (include/uapi/linux/pkt_sched.h): TC_H_CLSACT, its handle, and its ingress
/// side, which is that of a plain ingress qdisc, too.
const CLSACT: u32 = 0xffff_fff1;
const HANDLE: u32 = 0xffff_0000;
const INGRESS: u32 = 0xffff_fff2;

const ETH_P_ALL: u16 = 3;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
/// struct tc_u32_sel that ends the search (TC_U32_TERMINAL), with one key whose mask is 0: it
/// matches whatever there is.
const ANYTHING: [u8; 32] = {
    let mut selector = [0; 32];
    selector[0] = 1; // flags
    selector[2] = 1; // nkeys
    selector
};
const TC_ACT_STOLEN: u32 = 4;
const TCA_EGRESS_REDIR: u32 = 1;

/// The redirection of an interface that stays.
#[derive(Debug)]
#[must_use]
pub struct Redirect {
    link: u32,
    /// Whether the qdisc is ours, too.
    own_qdisc: bool,
}

impl Redirect {
    /// The interface's number.
    pub fn link(&self) -> u32 {
        self.link
    }

    /// The interface's number, if it has got a qdisc for this.
    pub fn own_qdisc(&self) -> Option<u32> {
        self.own_qdisc.then_some(self.link)
    }

    /// Takes it away. An interface that is gone has taken it along.
    pub fn undo(&self, socket: &mut Socket) -> io::Result<()> {
        let done = match self.own_qdisc {
            true => socket.change(qdisc(libc::RTM_DELQDISC, 0, self.link)),
            false => socket.change(filter(libc::RTM_DELTFILTER, 0, self.link)),
        };
        absent_is_done(done)
    }
}

/// Joins an interface to a tap. What was made is undone if a step fails.
pub fn redirect(socket: &mut Socket, link: u32, tap: u32) -> io::Result<Redirect> {
    undo_stale(socket, link, false)?; // or it would come first
    let own_qdisc = add_qdisc(socket, link)?;
    let redirect = Redirect { link, own_qdisc };
    let joined = add_filter(socket, link, tap)
        .and_then(|()| add_qdisc(socket, tap))
        .and_then(|_| add_filter(socket, tap, link));
    if let Err(error) = joined {
        let _ = redirect.undo(socket);
        return Err(error);
    }
    Ok(redirect)
}

/// Takes from an interface what a shim that was killed has left there, if it has: the filter, and
/// with `own_qdisc` what it is in.
pub fn undo_stale(socket: &mut Socket, link: u32, own_qdisc: bool) -> io::Result<()> {
    match socket.change(filter(libc::RTM_DELTFILTER, 0, link)) {
        Ok(()) if own_qdisc => absent_is_done(socket.change(qdisc(libc::RTM_DELQDISC, 0, link))),
        done => absent_is_done(done),
    }
}

fn absent_is_done(done: io::Result<()>) -> io::Result<()> {
    const GONE: [io::ErrorKind; 2] = [io::ErrorKind::NotFound, io::ErrorKind::InvalidInput];
    match done {
        Err(error) if GONE.contains(&error.kind()) => Ok(()),
        // ENODEV has no kind of its own.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other,
    }
}

/// `false` if there is one already: somebody else's, with filters of their own.
fn add_qdisc(socket: &mut Socket, link: u32) -> io::Result<bool> {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    match socket.change(qdisc(libc::RTM_NEWQDISC, flags, link)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

fn add_filter(socket: &mut Socket, link: u32, to: u32) -> io::Result<()> {
    let mut message = filter(libc::RTM_NEWTFILTER, libc::NLM_F_CREATE, link);
    message.nest(libc::TCA_OPTIONS, |options| {
        options.attribute(TCA_U32_SEL, &ANYTHING);
        options.nest(TCA_U32_ACT, |actions| {
            actions.nest(1, |action| {
                action.attribute(TCA_ACT_KIND, b"mirred\0");
                action.nest(TCA_ACT_OPTIONS, |options| {
                    // struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex
                    let parameters = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, to];
                    let bytes: Vec<u8> =
                        parameters.into_iter().flat_map(u32::to_ne_bytes).collect();
                    options.attribute(TCA_MIRRED_PARMS, &bytes);
                });
            });
        });
    });
    socket.change(message)
}

fn qdisc(kind: u16, flags: i32, link: u32) -> Message {
    let mut message = Message::new(kind, flags, &tcmsg(link, HANDLE, CLSACT, 0));
    message.attribute(libc::TCA_KIND, b"clsact\0");
    message
}

fn filter(kind: u16, flags: i32, link: u32) -> Message {
    let info = PRIORITY << 16 | u32::from(ETH_P_ALL.to_be());
    let mut message = Message::new(kind, flags, &tcmsg(link, 0, INGRESS, info));
    message.attribute(libc::TCA_KIND, b"u32\0");
    message
}

/// struct tcmsg.
fn tcmsg(link: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let words = [0, link, handle, parent, info];
    words.into_iter().flat_map(u32::to_ne_bytes).collect()
}
