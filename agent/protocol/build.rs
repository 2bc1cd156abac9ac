//! Generates the messages and the service from `agent.proto`, in pure Rust: no protoc is needed.

use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=agent.proto");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR for build scripts");
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .input("agent.proto")
        .include(".")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .run()
        .expect("agent.proto is not a valid protocol description");
    for module in ["agent", "agent_ttrpc"] {
        make_includable(&Path::new(&out).join(module).with_extension("rs"));
    }
}

/// Drops inner attributes and comments: `include!` can't take them in the middle of a file.
fn make_includable(file: &Path) {
    let text = fs::read_to_string(file).expect("the generator wrote this file");
    let kept: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .collect();
    fs::write(file, kept.join("\n")).expect("OUT_DIR can be written");
}
