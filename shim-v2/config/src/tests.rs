//! Files as operators write them: right ones, and each way to get one wrong.

use std::fs;

use super::*;

fn load(files: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let etc = tempfile::tempdir().unwrap();
    fs::create_dir(etc.path().join("config.d")).unwrap();
    for (name, text) in files {
        fs::write(etc.path().join(name), text).unwrap();
    }
    Config::load_from(etc.path(), Path::new("/usr/local"))
}

fn refusal(text: &str) -> String {
    load(&[("config.toml", text)]).unwrap_err().to_string()
}

#[test]
fn without_files_the_installed_tree_is_used() {
    let missing = Path::new("/nonexistent/kata-like");
    let config = Config::load_from(missing, Path::new("/opt/kl")).unwrap();
    assert_eq!(config, Config::defaults(Path::new("/opt/kl")));
    assert_eq!(
        config.vmm,
        Path::new("/opt/kl/libexec/kata-like/kata-like-vmm")
    );
    assert_eq!(config.kernel, Path::new("/opt/kl/share/kata-like/vmlinux"));
    assert!((1..=4).contains(&config.max_vcpus));
}

#[test]
fn the_prefix_is_that_of_the_program() {
    let prefix = |program: &str| prefix_of(Path::new(program));
    assert_eq!(prefix("/opt/kl/bin/kata-like"), Some("/opt/kl".into()));
    assert_eq!(
        prefix("/opt/kl/bin/kata-like (deleted)"),
        Some("/opt/kl".into())
    );
    assert_eq!(prefix("/build/debug/kata-like"), None);
}

#[test]
fn a_drop_in_overrides_key_by_key_in_the_order_of_names() {
    let config = load(&[
        ("config.toml", "memory_mib = 512\nmax_vcpus = 3\n"),
        ("config.d/20-b.toml", "memory_mib = 256\n"),
        (
            "config.d/10-a.toml",
            "memory_mib = 128\nhugepages = \"hugetlb\"\n",
        ),
        ("config.d/30-c.toml.disabled", "memory_mib = 64\n"),
    ])
    .unwrap();
    assert_eq!((config.memory_mib, config.max_vcpus), (256, 3));
    assert_eq!(config.hugepages, HugePages::Hugetlb);
}

#[test]
fn every_refusal_names_file_line_and_key_in_one_line() {
    for (text, line, key) in [
        ("\nmemroy_mib = 512\n", 2, "memroy_mib"),
        ("memory_mib = \"much\"\n", 1, "memory_mib"),
        ("memory_mib = 0\n", 1, "memory_mib"),
        ("memory_mib = 129\n", 1, "memory_mib"),
        ("memory_mib = -2\n", 1, "memory_mib"),
        ("memory_mib = 4294967296\n", 1, "memory_mib"),
        ("# few\nmax_vcpus = 33\n", 2, "max_vcpus"),
        ("max_vcpus = 300\n", 1, "max_vcpus"),
        ("hugepages = \"always\"\n", 1, "hugepages"),
        ("log_level = \"loud\"\n", 1, "log_level"),
        ("boot_deadline_seconds = 0\n", 1, "boot_deadline_seconds"),
        ("kernel = \"vmlinux\"\n", 1, "kernel"),
        ("kernel = \"/a\"\nkernel = \"/b\"\n", 2, "kernel"),
        ("[kernel]\npath = \"/a\"\n", 1, "[kernel]"),
        ("kernel_params = \"quiet\"\n", 1, "kernel_params"),
        ("memory_mib\n", 1, "memory_mib"),
    ] {
        let error = refusal(text);
        let place = format!("config.toml line {line}, key `{key}`: ");
        assert!(error.contains(&place), "{text:?}: {error}");
        assert!(!error.contains('\n'), "{text:?}: {error}");
    }
}

#[test]
fn a_file_that_is_no_configuration_is_refused() {
    let long = format!("# {}", "x".repeat(300 * 1024));
    assert!(refusal(&long).contains("longer than"));
    let etc = tempfile::tempdir().unwrap();
    fs::write(etc.path().join("config.toml"), [0xff, 0xfe]).unwrap();
    let error = Config::load_from(etc.path(), Path::new("/usr/local")).unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }));
}

/// The file that is installed says what holds without it: each of its keys, uncommented, changes
/// nothing.
#[test]
fn the_default_file_says_the_defaults() {
    let text = include_str!("../config.toml");
    let config = load(&[("config.toml", text)]).unwrap();
    assert_eq!(config, Config::defaults(Path::new("/usr/local")));

    let keys: String = text
        .lines()
        .filter_map(|line| line.strip_prefix('#'))
        .filter(|line| line.starts_with(|first: char| first.is_ascii_lowercase()))
        .map(|line| format!("{line}\n"))
        .collect();
    let defaults = Config {
        max_vcpus: 4,
        selinux: true,
        ..Config::defaults(Path::new("/usr/local"))
    };
    assert_eq!(load(&[("config.toml", &keys)]).unwrap(), defaults);
    assert_eq!(
        keys.lines().count(),
        12,
        "a key is missing from the file:\n{keys}"
    );
}
