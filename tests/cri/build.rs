//! Generates the messages from `cri.proto`, in pure Rust: no protoc is needed.

fn main() {
    println!("cargo:rerun-if-changed=cri.proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .include(".")
        .input("cri.proto")
        .cargo_out_dir("messages")
        .run_from_script();
}
