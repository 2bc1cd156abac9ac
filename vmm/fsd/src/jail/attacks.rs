//! What an fs server that has been taken over may try, and which layers of its jail stop it. The
//! page `docs/security.md` has the table.

use std::fs::File;

use kata_like_attacks::attacks::*;
use kata_like_attacks::host::World;
use kata_like_attacks::{Attack, LANDLOCK, Subject, Wall, check};
use kata_like_jail::lists::fsd;
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::process::Resource;

use super::*;
use crate::filters::{Filters, Kind};
use crate::root;

const PAGE: &str = include_str!("../../../../docs/security.md");

const ATTACKS: &[Attack] = &[
    open(&[ROOT, LANDLOCK]),
    mount(&[Wall::Seccomp, CAPABILITIES, MOUNTS, LANDLOCK]),
    trace(&[Wall::Seccomp, PIDS, CAPABILITIES, LANDLOCK]),
    kill(&[Wall::Seccomp, PIDS, LANDLOCK]),
    notify(&[Wall::Seccomp, PIDS, LANDLOCK]),
    connect_tcp(&[Wall::Seccomp, NETWORK, LANDLOCK]),
    connect_abstract(&[Wall::Seccomp, NETWORK, LANDLOCK]),
    connect_named(&[Wall::Seccomp, ROOT]),
    fork(&[Wall::Seccomp]),
    exec(&[Wall::Seccomp, LANDLOCK]),
    share_memory(&[Wall::Seccomp, IPC]),
    rename_host(&[Wall::Seccomp, HOST_NAME, CAPABILITIES]),
    make_device(&[Wall::Seccomp, CAPABILITIES, LANDLOCK]),
    user_namespace(&[Wall::Seccomp]),
    make_code(&[Wall::Seccomp]),
    take_descriptors(&[limit(Resource::Nofile)]),
    take_addresses(&[limit(Resource::As)]),
    use_leaked(&[DESCRIPTORS]),
    dump_core(&[limit(Resource::Core)]),
    see_cgroups(&[CGROUPS]),
];

/// What `main` and `serve` do before the guest's first request, with the filter of the thread that
/// may do most.
fn jail(world: &World) -> Result<(), Box<dyn std::error::Error>> {
    let how = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, c"/mnt/share", how)?;
    // Above what the test's own process has taken.
    limit_memory(32 << 30)?;
    limit_files(3000)?;
    let mut keep = world.keep();
    keep.push(std::os::fd::AsRawFd::as_raw_fd(&tree));
    close_others(&keep)?;
    let proc_self_fd = root::enter(tree)?;
    drop_privileges()?;
    let filters = Filters::new()?;
    let place = match std::fs::metadata("/rootfs").is_ok() {
        true => "/",
        false => "/mnt/share/",
    };
    let open = |name: &str| File::open(format!("{place}{name}"));
    only_files_below(&[open("rootfs")?, open("volumes")?], &proc_self_fd)?;
    Ok(filters.close(Kind::Worker)?)
}

#[test]
fn each_layer_stops_an_attack_and_each_attack_is_stopped() {
    let subject = Subject {
        name: "fs server",
        filters: &[fsd::WORKER.name],
        jail: &|world| jail(world).map_err(|error| format!("{error:?}")),
        has_share: true,
    };
    let table = check(&subject, ATTACKS).unwrap_or_else(|wrong| panic!("{}", wrong.join("\n")));
    assert!(PAGE.contains(&table), "docs/security.md has not\n{table}");
}
