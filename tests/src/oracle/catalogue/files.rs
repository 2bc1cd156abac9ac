//! Paths of an image that lead elsewhere, and files in the place of others.

use serde_json::json;

use super::super::Case;
use super::super::Kind::InPod;
use super::case;

#[rustfmt::skip] // a case a paragraph
pub const CASES: &[Case] = &[
    // Relative: runc 1.1 makes the links of /dev where an absolute one leads on the host. The
    // runner's unit tests have a container with an absolute one.
    case("/dev is a link into the root", InPod, |spec| spec.plant("dev", "srv")),
    case("/dev is a link to /proc", InPod, |spec| spec.plant("dev", "/proc")),
    case("/proc is a link", InPod, |spec| spec.plant("proc", "/tmp")),
    case("/sys is a link", InPod, |spec| spec.plant("sys", "/tmp")),
    case("/etc is a link", InPod, |spec| {
        spec.plant("etc", "/tmp");
        spec.volume("file", "/etc/hosts", &["bind", "ro"]);
    }),
    case("/run is a link out of the root", InPod, |spec| spec.plant("run", "../../../../../../../srv")),
    case("a volume on a link", InPod, |spec| {
        spec.plant("etc/link", "secret");
        spec.volume("file", "/etc/link", &["bind", "ro"]);
    }),
    case("a volume on a link to nowhere", InPod, |spec| {
        spec.plant("etc/resolv.conf", "../run/resolv.conf");
        spec.without_mount("/run");
        spec.volume("file", "/etc/resolv.conf", &["bind", "ro"]);
    }),
    case("a volume on a link out of the root", InPod, |spec| {
        spec.plant("srv", "../../../../../../../../made/by/the/link");
        spec.volume("", "/srv", &["rbind"]);
    }),
    case("a volume on a link to itself", InPod, |spec| {
        spec.plant("srv", "srv");
        spec.volume("", "/srv", &["rbind"]);
    }),
    case("a masked path is a link", InPod, |spec| {
        spec.plant("etc/link", "secret");
        spec.linux("maskedPaths", json!(["/etc/link"]));
    }),
    case("a read-only path is a link", InPod, |spec| {
        spec.plant("srv", "/etc");
        spec.linux("readonlyPaths", json!(["/srv"]));
    }),
    case("a working directory is a link", InPod, |spec| {
        spec.plant("srv", "/tmp");
        spec.process("cwd", json!("/srv"));
    }),
    case("a working directory is an open file", InPod, |spec| spec.process("cwd", json!("/proc/self/fd/7"))),
    case("a working directory is a file", InPod, |spec| spec.process("cwd", json!("/etc/secret"))),
    case("the command is a directory", InPod, |spec| spec.process("args", json!(["/etc"]))),
    case("the command can't be executed", InPod, |spec| spec.process("args", json!(["/etc/secret"]))),
    case("the command is no program", InPod, |spec| {
        spec.program("srv/text", "no program");
        spec.process("args", json!(["/srv/text"]));
    }),
    case("the command's interpreter is missing", InPod, |spec| {
        spec.program("srv/script", "#!/no/such/program\n");
        spec.process("args", json!(["/srv/script"]));
    }),
];
