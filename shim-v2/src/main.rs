//! The shim's program; the library is all of it, so that the fuzz targets can reach it.

use std::process::ExitCode;

fn main() -> ExitCode {
    containerd_shim_kata_like_v2::main()
}
