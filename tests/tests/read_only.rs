//! What is read-only is so by the host's word: root in the guest, with every remount, changes
//! nothing of it.

use std::fs;
use std::path::Path;

use kata_like_tests::{Directory, Host, TestResult, failure, is_oracle, kata_like_only};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// Root in the guest, with every remount, can't write to a read-only volume: the host itself
/// refuses.
#[test]
fn read_only_is_the_hosts_word() -> TestResult {
    let host = Host::shared()?;
    let volume = Directory::new(&host)?;
    fs::write(volume.join("file"), "kept\n")?;
    let mount = volume.at("/data", "rbind:ro");
    let script = "mount -o remount,bind,rw /data; echo changed >/data/file; touch /data/new";
    let options = ["--mount", mount.as_str(), "--cap-add", "CAP_SYS_ADMIN"];
    let output = host
        .run(&host.name("read-only"), &options, &["sh", "-c", script])
        .output()?;
    if is_oracle() {
        return Ok(()); // a program that may remount may write
    }
    assert_ne!(output.status, 0);
    assert!(
        output.error_text().contains("Read-only file system"),
        "{}",
        output.both()
    );
    assert_eq!(fs::read_to_string(volume.join("file"))?, "kept\n");
    assert!(!volume.join("new").exists());
    Ok(())
}

/// A file system of the host, mounted.
struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    fn on(path: &'a Path) -> TestResult<Self> {
        fs::create_dir(path)?;
        mount("none", path, "tmpfs", MountFlags::empty(), None)?;
        Ok(Self(path))
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

/// `rro` is for every mount below, of each for itself; `ro` for the top alone. One container has
/// the same volume in both ways.
#[test]
fn recursively_read_only_is_the_hosts_word_for_all_below() -> TestResult {
    let host = Host::shared()?;
    let volume = Directory::new(&host)?;
    let (below, deep) = (volume.join("below"), volume.join("below/deep"));
    let _below = Tmpfs::on(&below)?;
    let _deep = Tmpfs::on(&deep)?;
    let mounts = [
        volume.at("/top", "rbind:rprivate:ro"),
        volume.at("/all", "rbind:rprivate:rro"),
    ];
    let mut options = vec!["--cap-add", "CAP_SYS_ADMIN"];
    for mount in &mounts {
        options.extend(["--mount", mount]);
    }
    let pod = host.start("recursive", &options, &["sleep", "1000"])?;
    let writes = |place: &str| -> TestResult<bool> {
        let output = pod.exec(&["touch", &format!("{place}/new")])?;
        match output.status {
            0 => Ok(true),
            _ if output.error_text().contains("Read-only file system") => Ok(false),
            _ => Err(failure(output.both())),
        }
    };
    let result = (|| -> TestResult {
        for place in ["/top", "/all", "/all/below", "/all/below/deep"] {
            assert!(!writes(place)?, "{place}");
        }
        // As docs/limitations.md has it: to the guest the mounts below are as the volume.
        assert_eq!(writes("/top/below")?, is_oracle());
        for place in [
            "/top",
            "/top/below",
            "/all",
            "/all/below",
            "/all/below/deep",
        ] {
            let remount = ["mount", "-o", "remount,bind,rw", place];
            assert_eq!(pod.exec(&remount)?.status, 0, "{place}");
        }
        if is_oracle() {
            return Ok(()); // a program that may remount may write
        }
        assert!(writes("/top/below")?, "the host has it writable");
        for place in ["/top", "/all", "/all/below", "/all/below/deep"] {
            assert!(!writes(place)?, "{place}");
        }
        assert!(!deep.join("new").exists() && !volume.join("new").exists());
        Ok(())
    })();
    pod.remove()?;
    result
}

/// What the host mounts later would come without the flag.
#[test]
fn recursively_read_only_with_later_mounts_is_refused() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let volume = Directory::new(&host)?;
    let mount = volume.at("/data", "rbind:rslave:rro");
    let output = host
        .run(&host.name("refused"), &["--mount", &mount], &["true"])
        .output()?;
    assert_ne!(output.status, 0);
    let text = output.error_text();
    let named = text.contains("(/data).options rro with rslave is not supported: ");
    assert!(named, "{text}");
    Ok(())
}
