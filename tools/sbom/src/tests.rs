//! A tree of small files, and the documents of it against cargo's other answer and Cargo.lock.

use std::collections::{BTreeMap, BTreeSet};

use super::document::KERNEL;
use super::*;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The documents of a tree of made-up files.
fn documents(folder: &Path) -> (Value, Value) {
    for (path, _) in FILES {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, path.display().to_string()).unwrap();
    }
    let (kernel, agent) = (folder.join("kernel.json"), folder.join("agent"));
    let source = json!({
        "source": { "package": "linux-source-6.12", "version": "6.12.1-1~bpo12+1", "sha256": "ab" },
    });
    fs::write(&kernel, source.to_string()).unwrap();
    fs::write(&agent, "agent").unwrap();
    run(&Arguments {
        prefix: folder.to_owned(),
        kernel,
        agent,
        profile: "release".to_owned(),
    })
    .unwrap();
    let read = |name: &str| {
        let path = folder.join("share/kata-like").join(name);
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    };
    (read("sbom.json"), read("provenance.json"))
}

/// Every package that cargo's metadata can reach from one by normal dependencies: at least what is
/// linked, since features are those of the whole workspace.
fn reachable(metadata: &Value, package: &str) -> BTreeSet<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let packages: BTreeMap<String, &Value> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| (text(&package["id"]), package))
        .collect();
    let nodes: BTreeMap<String, &Value> = metadata["resolve"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| (text(&node["id"]), node))
        .collect();
    let start = packages.iter().find(|(_, it)| it["name"] == package);
    let (mut open, mut seen) = (vec![start.unwrap().0.clone()], BTreeSet::new());
    while let Some(id) = open.pop() {
        if !seen.insert(id.clone()) {
            continue;
        }
        for dependency in nodes[&id]["deps"].as_array().unwrap() {
            let kinds = dependency["dep_kinds"].as_array().unwrap();
            if kinds.iter().any(|kind| kind["kind"].is_null()) {
                open.push(text(&dependency["pkg"]));
            }
        }
    }
    let others = seen.iter().map(|id| packages[id]);
    others
        .filter(|package| !package["source"].is_null())
        .map(|package| (text(&package["name"]), text(&package["version"])))
        .collect()
}

#[test]
fn the_bill_names_what_is_linked_with_its_checksum() {
    let folder = tempfile::tempdir().unwrap();
    let (bill, _) = documents(folder.path());
    assert_eq!(
        (&bill["bomFormat"], &bill["specVersion"]),
        (&json!("CycloneDX"), &json!("1.6"))
    );
    assert!(
        bill["metadata"]["timestamp"].is_null(),
        "a date without SOURCE_DATE_EPOCH"
    );
    let components = bill["components"].as_array().unwrap();
    let by_reference: BTreeMap<&str, &Value> = components
        .iter()
        .map(|component| (component["bom-ref"].as_str().unwrap(), component))
        .collect();
    assert_eq!(by_reference.len(), components.len(), "a component twice");

    let manifest = repository().join("Cargo.toml").display().to_string();
    let asked = [
        "metadata",
        "--locked",
        "--format-version=1",
        "--manifest-path",
        &manifest,
    ];
    let metadata = told("cargo", &asked).unwrap();
    let metadata: Value = serde_json::from_str(&metadata).unwrap();
    let checksums = crates::checksums(&repository()).unwrap();
    for (path, package) in FILES {
        let hash = document::hash(&fs::read(folder.path().join(path)).unwrap());
        assert_eq!(by_reference[path]["hashes"][0]["content"], hash, "{path}");
        let all = bill["dependencies"].as_array().unwrap();
        let on = &all.iter().find(|one| one["ref"] == path).unwrap()["dependsOn"];
        let on: Vec<&str> = on
            .as_array()
            .unwrap()
            .iter()
            .map(|it| it.as_str().unwrap())
            .collect();
        assert!(
            on.iter()
                .all(|reference| by_reference.contains_key(reference)),
            "{path}"
        );
        let Some(package) = package else { continue };
        let reachable = reachable(&metadata, package);
        let crates = on
            .iter()
            .filter(|reference| reference.starts_with("pkg:cargo/"));
        let mut count = 0;
        for component in crates.map(|reference| by_reference[reference]) {
            let text = |key: &str| component[key].as_str().unwrap().to_owned();
            let key = (text("name"), text("version"));
            assert!(reachable.contains(&key), "{path}: {key:?} is not linked");
            assert_eq!(
                component["hashes"][0]["content"], checksums[&key],
                "{key:?}"
            );
            assert!(
                !text_of(&component["licenses"][0]["expression"]).is_empty(),
                "{key:?}"
            );
            count += 1;
        }
        assert!(count >= 10, "{path}: only {count} crates");
    }
}

#[test]
fn the_bill_has_no_crate_of_tests_and_builds() {
    let folder = tempfile::tempdir().unwrap();
    let (bill, _) = documents(folder.path());
    let components = bill["components"].as_array().unwrap().iter();
    let by_reference: BTreeMap<&str, &Value> = components
        .map(|component| (component["bom-ref"].as_str().unwrap(), component))
        .collect();
    let names = |path: &str| -> BTreeSet<String> {
        let all = bill["dependencies"].as_array().unwrap();
        let one = all.iter().find(|one| one["ref"] == path).unwrap();
        let on = one["dependsOn"].as_array().unwrap();
        on.iter()
            .map(|it| text_of(&by_reference[it.as_str().unwrap()]["name"]))
            .collect()
    };
    let vmm = names("libexec/kata-like/kata-like-vmm");
    assert!(
        ["kvm-ioctls", "vm-memory", "virtio-queue"]
            .iter()
            .all(|name| vmm.contains(*name))
    );
    // Of tests, of builds, macros.
    assert!(
        ["proptest", "cc", "serde_derive"]
            .iter()
            .all(|name| !vmm.contains(*name))
    );
    assert!(names("libexec/kata-like/kata-like-fsd").contains("virtiofsd"));
    assert!(names(KERNEL).contains("linux"));
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let first = documents(folder.path());
    assert_eq!(documents(folder.path()), first);
    let image = &first.1["image"];
    assert_eq!(image["init"]["sha256"], document::hash(b"agent"));
    assert!(text_of(&image["compiler"]).starts_with("rustc "));
    assert_eq!(first.1["kernel"]["source"]["sha256"], "ab");
}

#[test]
fn a_date_is_written_as_the_format_wants_it() {
    let date = |epoch: &str| document::date(Some(epoch.to_owned())).map(Option::unwrap);
    for (epoch, wanted) in [
        ("0", "1970-01-01T00:00:00Z"),
        ("951782400", "2000-02-29T00:00:00Z"),
        ("1893456000", "2030-01-01T00:00:00Z"),
        ("4107542399", "2100-02-28T23:59:59Z"),
    ] {
        assert_eq!(date(epoch).unwrap(), wanted);
    }
    assert!(
        ["", "-1", "now", "253402300800"]
            .iter()
            .all(|epoch| date(epoch).is_err())
    );
    assert_eq!(document::date(None).unwrap(), None);
}
