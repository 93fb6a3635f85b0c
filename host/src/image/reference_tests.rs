use proptest::prelude::*;

use super::*;
use crate::error::ErrorKind;

fn registry(text: &str) -> RegistryRef {
    match ImageRef::parse(text) {
        Ok(ImageRef::Registry(registry)) => registry,
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn directories_and_archives() {
    let parse = |text| ImageRef::parse(text).unwrap();
    assert_eq!(
        parse("oci:/a/b"),
        ImageRef::Oci {
            dir: "/a/b".into(),
            tag: None
        }
    );
    let tag = Some("docker.io/library/x:1".to_owned());
    assert_eq!(
        parse("oci:d:docker.io/library/x:1"),
        ImageRef::Oci {
            dir: "d".into(),
            tag
        }
    );
    assert_eq!(
        parse("oci-archive:f.tar"),
        ImageRef::OciArchive {
            file: "f.tar".into(),
            tag: None
        }
    );
    assert_eq!(
        parse("docker-archive:f.tar:v1"),
        ImageRef::DockerArchive {
            file: "f.tar".into(),
            tag: Some("v1".into())
        }
    );
    assert_eq!(parse("rootfs:/a:b"), ImageRef::Rootfs("/a:b".into()));
    assert_eq!(parse("bundle:/b"), ImageRef::Bundle("/b".into()));
}

#[test]
fn registries_are_completed_as_docker_does() {
    for (text, full) in [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("me/app", "docker.io/me/app:latest"),
        ("docker.io/nginx", "docker.io/library/nginx:latest"),
        ("index.docker.io/a/b:c", "docker.io/a/b:c"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x:y", "localhost:5000/x:y"),
        ("quay.io/a/b__c/d---e.f", "quay.io/a/b__c/d---e.f:latest"),
    ] {
        assert_eq!(registry(text).to_string(), full);
    }
    let digest = format!("sha256:{}", "0a".repeat(32));
    let by_digest = registry(&format!("x@{digest}"));
    assert_eq!(
        (by_digest.tag, by_digest.digest),
        (None, Some(digest.clone()))
    );
    let both = registry(&format!("x:t@{digest}"));
    assert_eq!(
        (both.tag.as_deref(), both.digest),
        (Some("t"), Some(digest))
    );
}

#[test]
fn what_is_no_reference_is_refused() {
    let long = "a".repeat(10_000);
    let long_tag = format!("x:{}", "t".repeat(129));
    for text in [
        "",
        "oci:",
        "oci::tag",
        "oci:dir:",
        "rootfs:",
        "bundle:",
        "docker://x",
        "Busybox",
        "a//b",
        "a/",
        "/a",
        "x:",
        "x:-t",
        "x@sha256:12",
        "x@md5:00",
        "a b",
        "a\nb",
        "a..b",
        "a___b",
        "-a",
        "x.io:99999/a",
        "x.io:/a",
        "-x.io/a",
        "x.io/",
        &long,
        &long_tag,
    ] {
        let error = ImageRef::parse(text).map_err(|error| error.kind());
        assert_eq!(error, Err(ErrorKind::InvalidArgument), "{text:?}");
    }
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused_on_one_line(text in "\\PC{0,40}|[a-z.:/@_-]{0,24}") {
        match ImageRef::parse(&text) {
            Ok(reference) => {
                // What is printed means the same again.
                let printed = reference.to_string();
                prop_assert_eq!(ImageRef::parse(&printed).unwrap(), reference);
            }
            Err(error) => prop_assert!(!error.to_string().contains('\n')),
        }
    }
}
