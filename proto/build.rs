//! Generates Rust from the `.proto` files, without protoc: messages by `protobuf-codegen`'s pure parser, the
//! agent's service by `ttrpc-codegen`.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = std::env::var("OUT_DIR")?;
    let vmm = Path::new(&out).join("vmm");
    std::fs::create_dir_all(&vmm)?;
    protobuf_codegen::Codegen::new()
        .pure()
        .out_dir(&vmm)
        .inputs([
            "proto/vmm.proto",
            "proto/pod_sandbox.proto",
            "proto/snapshot.proto",
        ])
        .include("proto")
        .customize(protobuf_codegen::Customize::default().gen_mod_rs(true))
        .run()?;
    let agent = Path::new(&out).join("agent");
    std::fs::create_dir_all(&agent)?;
    ttrpc_codegen::Codegen::new()
        .out_dir(&agent)
        .inputs(["proto/agent.proto"])
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            ..Default::default()
        })
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .run()?;
    // ttrpc-codegen lists its services alone in the mod.rs that it can write.
    std::fs::write(
        agent.join("mod.rs"),
        "pub mod agent;\npub mod agent_ttrpc;\n",
    )?;
    Ok(())
}
