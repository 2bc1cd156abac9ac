//! Children that are small programs of the test, saying on the control socket what a VMM or an fs
//! server might.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use kata_like_boot::{FsdReport, VmBoot};
use kata_like_config::Config;
use kata_like_failure::Failure;
use kata_like_proxy::wire::{Answer, Method};

use super::child::{getting_on, last_act, next, start};
use super::parts::{open, read_printk};
use super::*;
use crate::spawn::Exit;

/// A program that does what `script` says with the control socket as descriptor 3.
fn program(place: &Path, script: &str) -> PathBuf {
    let path = place.join("program");
    std::fs::write(&path, format!("#!/usr/bin/perl\nuse Socket;\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn config(place: &Path) -> Config {
    let mut config = Config::defaults(place);
    for part in [&mut config.vmm, &mut config.fsd, &mut config.proxy] {
        *part = "/bin/true".into();
    }
    config
}

#[test]
fn a_missing_part_is_named() {
    let place = tempfile::tempdir().unwrap();
    let line = Parts::open(&Config::defaults(place.path()), Place::default())
        .unwrap_err()
        .one_line();
    assert!(
        line.starts_with("find the VMM ") && line.contains("No such file"),
        "{line}"
    );
    let line = open("guest kernel", place.path()).unwrap_err().one_line();
    assert!(line.ends_with("it is not a file"), "{line}");
    let config = config(place.path());
    assert_eq!(read_printk(&config.printk).unwrap(), None);
}

/// Reads the boot request, then says what it is told to say.
const TAKE: &str = "open(my $s, '+<&=', 3); recv($s, my $m, 200000, 0);";

async fn start_vmm(script: &str) -> Result<Vmm, Failure> {
    let place = tempfile::tempdir().unwrap();
    let path = program(place.path(), &format!("{TAKE}{script}"));
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    let parts = Parts {
        vmm: path,
        fsd: PathBuf::new(),
        proxy: PathBuf::new(),
        kvm: null(),
        kernel: null(),
        initrd: null(),
        printk: None,
        place: Place::default(),
    };
    let boot = VmBoot {
        version: kata_like_boot::VERSION,
        uid: 1000,
        memory_bytes: 1 << 28,
        vcpus: 1,
        huge_pages: kata_like_boot::HugePages::Transparent,
        agent_port: 1,
        stream_port: 2,
        shares: Vec::new(),
        printk: None,
    };
    let resources = Resources {
        log: tempfile::tempfile().unwrap(),
        agent: null(),
        streams: null(),
        shares: Vec::new(),
    };
    Vmm::start_in(&parts, None, &boot, resources).await
}

#[tokio::test]
async fn a_vm_that_can_t_boot_says_why() {
    let script = r#"send($s, '{"ended":{"reason":"failed","detail":"load the kernel: not an ELF\u001b image","log_tail":["a","b","c","d"]}}', 0); exit 1;"#;
    let line = start_vmm(script).await.unwrap_err().one_line();
    assert_eq!(
        line,
        "run the VM: load the kernel: not an ELF  image; the guest's log ends with: b | c | d"
    );
}

#[tokio::test]
async fn a_killed_vmm_is_told_within_a_second() {
    let vmm = start_vmm(r#"send($s, '"running"', 0); sleep 60;"#)
        .await
        .unwrap();
    assert!(!vmm.has_ended());
    vmm.child().kill();
    let why = tokio::time::timeout(Duration::from_secs(1), vmm.ended())
        .await
        .unwrap();
    assert_eq!(why, "the VMM was killed by signal 9, without a reason");
}

#[tokio::test]
async fn a_vmm_that_talks_nonsense_is_ended() {
    let vmm = start_vmm(r#"send($s, '"running"', 0); send($s, '{', 0); sleep 60;"#)
        .await
        .unwrap();
    let why = tokio::time::timeout(Duration::from_secs(3), vmm.ended())
        .await
        .unwrap();
    assert!(why.starts_with("the VMM sent what can't be read"), "{why}");
}

const ANSWERS: &str = r#"
send($s, '"running"', 0);
my $n = 0;
while (defined recv($s, $m, 200000, 0)) {
    last if $m eq '';
    if ($m eq '"read_log"') { send($s, '{"log":{"text":"","more":false}}', 0); next; }
    if ($m eq '"state"') { send($s, '{"state":{"vcpus":[null],"queues":[]}}', 0); next; }
    $n++ if GROWS;
    send($s, '{"figures":{"elapsed_ns":1,"exits":' . time() . ',"user_exits":0,"page_faults":' . $n . ',"huge_pages":0,"resident_bytes":0}}', 0);
}"#;

#[tokio::test]
async fn a_guest_that_gets_on_is_waited_for_and_a_stuck_one_is_not() {
    let patience = Duration::from_millis(300);
    let stuck = start_vmm(&ANSWERS.replace("GROWS", "0")).await.unwrap();
    let line = stuck.agent_dialled(patience).await.unwrap_err().one_line();
    assert_eq!(
        line,
        "wait for the agent: the guest has shown no progress for 300ms; \
        vCPU 0 does not come out of the guest"
    );
    let busy = start_vmm(&ANSWERS.replace("GROWS", "1")).await.unwrap();
    let begin = Instant::now();
    let line = busy.agent_dialled(patience).await.unwrap_err().one_line();
    assert!(
        line.starts_with("wait for the agent: the guest still boots")
            && line.contains("its virtual machine ran for"),
        "{line}"
    );
    assert!(begin.elapsed() >= patience * 10);
}

#[tokio::test]
async fn a_fs_server_that_refuses_is_heard() {
    let place = tempfile::tempdir().unwrap();
    let script =
        format!(r#"{TAKE} send($s, '{{"failed":{{"why":"jail the fs server: no"}}}}', 0);"#);
    let mut config = config(place.path());
    config.fsd = program(place.path(), &script);
    let (child, control) = start("fs server", &config.fsd, None, &Place::default()).unwrap();
    control.get_ref().send(&"boot", &[]).unwrap();
    let report: FsdReport = next(&control).await.unwrap();
    assert_eq!(
        report,
        FsdReport::Failed {
            why: "jail the fs server: no".into()
        }
    );
    assert_eq!(last_act(&child).await, Exit::Status(0));
}

async fn start_proxy(script: &str) -> Result<Proxy, Failure> {
    let place = tempfile::tempdir().unwrap();
    let path = program(place.path(), &format!("{TAKE}{script}"));
    let (child, control) = start("proxy", &path, None, &Place::default()).unwrap();
    let (agent, _) = std::os::unix::net::UnixStream::pair().unwrap();
    Proxy::begin(child, control, 1000, agent).await
}

#[tokio::test]
async fn a_proxy_that_answers_unasked_is_ended() {
    for script in [
        r#"send($s, '{"answer":{"id":7,"answer":"done"}}', 0);"#,
        r#"send($s, '"ready"', 0);"#,
        "send($s, '{', 0);",
    ] {
        let script = format!(r#"send($s, '"ready"', 0); {script} sleep 60;"#);
        let proxy = start_proxy(&script).await.unwrap();
        let why = tokio::time::timeout(Duration::from_secs(3), proxy.ended());
        let why = why.await.unwrap();
        assert!(why.starts_with("the proxy failed: it "), "{why}");
        let late = proxy.events().await.unwrap_err().one_line();
        assert_eq!(late, why);
    }
}

#[tokio::test]
async fn an_answer_counts_once() {
    let script = r#"send($s, '"ready"', 0); recv($s, $m, 200000, 0);
        my ($id) = $m =~ /"id":(\d+)/;
        send($s, qq({"answer":{"id":$id,"answer":"done"}}), 0) for 1, 2; sleep 60;"#;
    let proxy = start_proxy(script).await.unwrap();
    let limit = Duration::from_secs(3);
    let answer = proxy.call(Method::Pause, limit, vec![1]).await.unwrap();
    assert_eq!(answer, Answer::Done);
    let why = tokio::time::timeout(limit, proxy.ended()).await.unwrap();
    assert_eq!(why, "the proxy failed: it answers what it was not asked");
}

#[tokio::test]
async fn the_cause_is_told_and_not_its_consequence() {
    let fsd = |expected| FsdEnd {
        expected,
        why: "fs server".into(),
    };
    let vmm = async |after| {
        tokio::time::sleep(Duration::from_millis(after)).await;
        "VMM".to_owned()
    };
    // The VM is gone, and the server has closed as it should; whoever is seen first.
    assert_eq!(either_ended(vmm(50), async { fsd(true) }).await, "VMM");
    assert_eq!(either_ended(vmm(0), std::future::pending()).await, "VMM");
    // The server was killed, and the VM could not live without it.
    assert_eq!(
        either_ended(vmm(50), async { fsd(false) }).await,
        "fs server"
    );
    let later = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        fsd(false)
    };
    assert_eq!(either_ended(vmm(0), later).await, "fs server");
    assert_eq!(
        either_ended(std::future::pending(), async { fsd(true) }).await,
        "fs server"
    );
}

/// Many that start at once have little of the CPU each.
#[tokio::test]
async fn a_child_is_waited_for_as_long_as_it_works() {
    let place = tempfile::tempdir().unwrap();
    let patience = Duration::from_millis(300);
    let never = std::future::pending::<()>;
    let path = program(place.path(), "sleep 60;");
    let (child, _control) = start("program", &path, None, &Place::default()).unwrap();
    let error = getting_on("program", "x", &child, patience, never()).await;
    let line = error.unwrap_err().one_line();
    assert!(line.contains("no word from the program"), "{line}");
    child.kill();

    let path = program(place.path(), "1 while 1;");
    let (child, _control) = start("program", &path, None, &Place::default()).unwrap();
    let later = tokio::time::sleep(patience * 5);
    let done = getting_on("program", "x", &child, patience, later).await;
    assert!(done.is_ok(), "{done:?}");
    let begin = Instant::now();
    let done = getting_on("program", "x", &child, patience, never()).await;
    assert!(done.is_err() && begin.elapsed() >= patience * 10);
    child.kill();
}
