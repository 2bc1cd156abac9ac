//! A thousand roots and volumes come and go while a thread swaps directories and links in them.

use std::sync::atomic::{AtomicBool, AtomicUsize};

use rustix::fs::{RenameFlags, renameat_with};

use super::*;

const ROUNDS: usize = 1000;

/// A directory with a mount in it, beside a link to a directory of the host that has the same.
fn make_pair(place: &Path, canary: &Path) {
    fs::create_dir_all(place.join("spot/sub")).unwrap();
    fs::write(place.join("spot/file"), "ours").unwrap();
    std::os::unix::fs::symlink(canary, place.join("link")).unwrap();
}

fn mount_of(kind: &str, place: &Path) {
    rustix::mount::mount("none", place, kind, MountFlags::empty(), None).unwrap();
}

/// What must not change: the mounts at and below the canary, and its files.
fn state_of(canary: &Path) -> (usize, String, String) {
    (
        mounts_below(canary),
        fs::read_to_string(canary.join("file")).unwrap(),
        fs::read_to_string(canary.join("sub/file")).unwrap(),
    )
}

/// The volume holds a file system of the host's kernel below the directory that is swapped, so it
/// is looked through and something is unmounted each time.
#[test]
fn what_is_swapped_meanwhile_leads_nowhere() {
    apart(|place| {
        let canary = place.join("canary");
        fs::create_dir_all(canary.join("sub")).unwrap();
        fs::write(canary.join("file"), "the host's").unwrap();
        mount_of("tmpfs", &canary.join("sub"));
        fs::write(canary.join("sub/file"), "the host's").unwrap();
        let (image, source) = (place.join("image"), place.join("source"));
        make_pair(&image, &canary);
        make_pair(&source, &canary);
        mount_of("proc", &source.join("spot/sub"));
        let before = state_of(&canary);

        let state = state(place);
        let share = Share::create(&state, &Labels::default()).unwrap();
        let mounts = mounts_below(place);
        let (stop, swaps) = (AtomicBool::new(false), AtomicUsize::new(0));
        let (mut refused, mut seen_proc) = (0, 0);
        std::thread::scope(|scope| {
            for tree in [&image, &source] {
                let (stop, swaps) = (&stop, &swaps);
                scope.spawn(move || {
                    let (spot, link) = (tree.join("spot"), tree.join("link"));
                    while !stop.load(Ordering::Relaxed) {
                        renameat_with(CWD, &spot, CWD, &link, RenameFlags::EXCHANGE).unwrap();
                        swaps.fetch_add(1, Ordering::Relaxed);
                        std::thread::yield_now();
                    }
                });
            }
            let rounds = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                for round in 0..ROUNDS {
                    let bundle = place.join(format!("bundle-{round}"));
                    fs::create_dir_all(bundle.join("rootfs")).unwrap();
                    let name = format!("container-{round}");
                    let made = share.add_rootfs(&name, &bundle, &[bind_of(&image)]);
                    let root = made.map_err(|error| error.one_line()).unwrap();
                    // It may find no rest, and says so.
                    match share.add_volume(&volume("volume", &source, ReadOnly::No)) {
                        Ok(held) => {
                            let shown = share.path.join("volumes/volume");
                            // Either name is the directory now, and the other one the link.
                            for name in ["spot", "link"] {
                                let inside = shown.join(name).join("sub/self");
                                seen_proc += usize::from(fs::symlink_metadata(inside).is_ok());
                            }
                            drop(held);
                        }
                        Err(error) => {
                            let line = error.one_line();
                            assert!(line.contains("change all the time"), "{line}");
                            refused += 1;
                        }
                    }
                    root.into_iter().rev().for_each(drop);
                    fs::remove_dir(bundle.join("rootfs")).unwrap();
                }
            }));
            stop.store(true, Ordering::Relaxed);
            rounds.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        });
        let swaps = swaps.into_inner();
        println!("{ROUNDS} rounds beside {swaps} swaps, {refused} volumes refused");
        assert!(swaps > ROUNDS && refused < ROUNDS / 2, "{swaps} {refused}");
        assert_eq!(seen_proc, 0, "the host's kernel was in the share");
        assert_eq!(state_of(&canary), before);
        assert_eq!(mounts_below(place), mounts, "a mount was left, or taken");
        drop(share);
    });
}
