//! `proto/csi.proto` against `wire.golden`: every name, number and type of CSI
//! 1.12, one a line. A change here is a change of the protocol.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet};

/// A field's type as the file writes it.
fn type_of(field: &FieldDescriptorProto, message: &DescriptorProto) -> String {
    let name = field
        .type_name()
        .trim_start_matches(".csi.v1.")
        .trim_start_matches('.')
        .to_owned();
    if let Some(entry) = message
        .nested_type
        .iter()
        .find(|n| name.ends_with(n.name()))
        && entry.options.as_ref().is_some_and(|o| o.map_entry())
    {
        let of = |n: usize| type_of(&entry.field[n], entry);
        return format!("map<{},{}>", of(0), of(1));
    }
    let plain = match field.r#type() {
        Type::Message | Type::Enum => name,
        other => other
            .as_str_name()
            .trim_start_matches("TYPE_")
            .to_lowercase(),
    };
    if field.label() == Label::Repeated {
        format!("repeated {plain}")
    } else {
        plain
    }
}

fn write_enum(out: &mut String, prefix: &str, item: &EnumDescriptorProto) {
    let values: Vec<_> = item
        .value
        .iter()
        .map(|v| format!("{}={}", v.name(), v.number()))
        .collect();
    writeln!(out, "enum {prefix}{} {}", item.name(), values.join(", ")).unwrap();
}

fn write_message(out: &mut String, prefix: &str, message: &DescriptorProto) {
    if message.options.as_ref().is_some_and(|o| o.map_entry()) {
        return;
    }
    writeln!(out, "message {prefix}{}", message.name()).unwrap();
    for field in &message.field {
        let one_of = field
            .oneof_index
            .map(|n| format!(" oneof:{}", message.oneof_decl[n as usize].name()))
            .unwrap_or_default();
        let kind = type_of(field, message);
        writeln!(out, "  {} {} {kind}{one_of}", field.number(), field.name()).unwrap();
    }
    let inner = format!("{prefix}{}.", message.name());
    for item in &message.enum_type {
        write_enum(out, &inner, item);
    }
    for item in &message.nested_type {
        write_message(out, &inner, item);
    }
}

fn render(set: &FileDescriptorSet) -> String {
    let file = &set.file[0];
    let mut out = format!("package {}\n", file.package());
    for service in &file.service {
        writeln!(out, "service {}", service.name()).unwrap();
        for method in &service.method {
            let short = |name: &str| name.trim_start_matches(".csi.v1.").to_owned();
            let stream = if method.server_streaming() {
                "stream "
            } else {
                ""
            };
            let (from, to) = (short(method.input_type()), short(method.output_type()));
            writeln!(out, "  rpc {} {from} -> {stream}{to}", method.name()).unwrap();
        }
    }
    for item in &file.enum_type {
        write_enum(&mut out, "", item);
    }
    for message in &file.message_type {
        write_message(&mut out, "", message);
    }
    out
}

#[test]
fn the_protocol_is_csi_1_12() {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("csi.bin");
    let status = Command::new(std::env::var_os("PROTOC").unwrap_or("protoc".into()))
        .arg("-I")
        .arg(&proto)
        .arg("--descriptor_set_out")
        .arg(&out)
        .arg(proto.join("csi.proto"))
        .status()
        .unwrap();
    assert!(status.success());
    let set = FileDescriptorSet::decode(&*std::fs::read(&out).unwrap()).unwrap();
    let rendered = render(&set);
    let golden = include_str!("wire.golden");
    for (line, (is, should)) in rendered.lines().zip(golden.lines()).enumerate() {
        assert_eq!(is, should, "line {} of wire.golden", line + 1);
    }
    assert_eq!(rendered.lines().count(), golden.lines().count());
}
