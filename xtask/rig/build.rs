//! Compiles CSI's services to clients: the rig calls drover as kubelet does.

fn main() -> std::io::Result<()> {
    println!("cargo::rerun-if-changed=../../proto/csi.proto");
    tonic_prost_build::configure()
        .build_server(false)
        .compile_protos(&["../../proto/csi.proto"], &["../../proto"])
}
