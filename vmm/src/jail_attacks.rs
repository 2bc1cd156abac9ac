//! What a VMM that has been taken over may try, and which layers of its jail stop it. The page
//! `docs/security.md` has the table.

use kata_like_attacks::attacks::*;
use kata_like_attacks::host::World;
use kata_like_attacks::{Attack, LANDLOCK, Subject, Wall, check};
use kata_like_jail::layers::{LEAVE_OUT, Layer, leave_out};
use rustix::process::{Resource, getpid};

use super::*;

const PAGE: &str = include_str!("../../docs/security.md");

const ATTACKS: &[Attack] = &[
    open(&[Wall::Seccomp, ROOT, LANDLOCK]),
    mount(&[Wall::Seccomp, USER, MOUNTS, LANDLOCK]),
    trace(&[Wall::Seccomp, PIDS, USER, LANDLOCK]),
    kill(&[Wall::Seccomp, PIDS, USER, LANDLOCK]),
    notify(&[Wall::Seccomp, PIDS, USER, LANDLOCK]),
    connect_tcp(&[Wall::Seccomp, NETWORK, LANDLOCK]),
    connect_abstract(&[Wall::Seccomp, NETWORK, LANDLOCK]),
    connect_named(&[Wall::Seccomp, ROOT]),
    fork(&[Wall::Seccomp, limit(Resource::Nproc)]),
    exec(&[Wall::Seccomp, ROOT, LANDLOCK]),
    share_memory(&[Wall::Seccomp, IPC, USER]),
    rename_host(&[Wall::Seccomp, HOST_NAME, USER]),
    become_root(&[Wall::Seccomp, USER]),
    user_namespace(&[Wall::Seccomp]),
    make_code(&[Wall::Seccomp]),
    take_descriptors(&[Wall::Seccomp, limit(Resource::Nofile)]),
    take_addresses(&[limit(Resource::As)]),
    write_file(&[limit(Resource::Fsize)]),
    use_leaked(&[DESCRIPTORS, limit(Resource::Fsize)]),
    dump_core(&[limit(Resource::Core)]),
    see_cgroups(&[CGROUPS]),
];

/// What `main` and `machine` do before they read the guest's kernel, and then the filter of the
/// thread that may do most.
fn jail(world: &World) -> Result<(), String> {
    let process = getpid();
    let bounds = Bounds {
        uid: 1_900_000_001,
        // Above what the test's own process has taken.
        memory_bytes: 64 << 30,
        vcpus: 1,
    };
    kata_like_jail::close_other_fds(&world.keep())
        .and_then(|()| confine(bounds, process))
        .and_then(|()| filter(&vmm::LOOP, process)?.install(Threads::Calling))
        .map_err(|error| format!("{error:?}"))
}

#[test]
fn each_layer_stops_an_attack_and_each_attack_is_stopped() {
    let subject = Subject {
        name: "VMM",
        filters: &[vmm::BOOT.name, vmm::LOOP.name],
        jail: &jail,
        has_share: false,
    };
    let table = check(&subject, ATTACKS).unwrap_or_else(|wrong| panic!("{}", wrong.join("\n")));
    assert!(PAGE.contains(&table), "docs/security.md has not\n{table}");
}

/// No thread's filter is there for nothing: a call that is in no list kills, and does not without
/// the filter.
#[test]
fn each_thread_s_filter_is_needed() {
    for thread in vmm::PROCESS.threads {
        let status = |left_out: &[Layer]| {
            kata_like_attacks::host::in_child(|| {
                leave_out(left_out);
                let closed = filter(thread, getpid()).and_then(|it| it.install(Threads::Calling));
                // SAFETY: getppid takes nothing; _exit ends the child and takes a number. A list
                // may have neither exit_group nor a handler for the test's end.
                unsafe {
                    libc::getppid();
                    libc::_exit(i32::from(closed.is_err()))
                }
            })
        };
        assert_eq!(
            status(&[]),
            kata_like_attacks::host::KILLED,
            "{}",
            thread.name
        );
        assert_eq!(status(&[Layer::Filter(thread.name)]), 0, "{}", thread.name);
    }
}

/// The mark by which a test finds out that what is installed has no layer to be left out.
#[test]
fn a_build_whose_layers_can_be_left_out_is_marked() {
    let program = std::fs::read("/proc/self/exe").unwrap();
    let mark = LEAVE_OUT.as_bytes();
    assert!(program.windows(mark.len()).any(|bytes| bytes == mark));
}
