//! Pods with a user namespace.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::json;

use super::sandboxes::handlers;
use super::with_pods;
use crate::pods::Pod;
use cella_tests::skip;

#[test]
fn a_pod_in_a_user_namespace() {
    let Some(daemon) = with_pods() else { return };
    if daemon.major() < 2 {
        skip("containerd 2, for user namespaces (CELLA_TEST_CONTAINERD)");
        return;
    }
    let status = daemon.cri("Status", &json!({}));
    let known = status["runtimeHandlers"].as_array().unwrap();
    let cella = known.iter().find(|one| one["name"] == "cella").unwrap();
    assert_eq!(cella["features"]["userNamespaces"], true, "{status}");
    assert_eq!(
        cella["features"]["recursiveReadOnlyMounts"], true,
        "{status}"
    );

    let map = json!([{"host_id": 100_000, "container_id": 0, "length": 65536}]);
    let users = json!({"mode": "POD", "uids": map, "gids": map});
    let with = json!({"linux": {"security_context": {"namespace_options": {
        "pid": "CONTAINER", "userns_options": users}}}});
    let volume = daemon.host.path("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("in"), "in\n").unwrap();
    let mut config = with.clone();
    config["mounts"] = json!([{"container_path": "/v", "host_path": volume, "uidMappings": map, "gidMappings": map}]);
    for handler in handlers(&daemon) {
        let pod = Pod::run_with(&daemon, handler, &with);
        let one = pod.start("one", "sleep 1000", &config);
        let ids = pod.sh(&one, "id -u; awk '{print $1, $2, $3}' /proc/self/uid_map");
        assert_eq!(ids, "0\n0 100000 65536\n");
        // Root of the image, of the volume and of what it makes itself is root.
        let owners = "touch /new /v/new && stat -c %u:%g /bin/busybox /new /v/in /v/new | sort -u";
        assert_eq!(pod.sh(&one, owners), "0:0\n");
        pod.sh(
            &one,
            "chown 1000:1000 /v/new && cat /v/in && hostname && cat /etc/resolv.conf",
        );
        let made = fs::metadata(volume.join("new")).unwrap();
        assert_eq!((made.uid(), made.gid()), (1000, 1000));
        fs::remove_file(volume.join("new")).unwrap();
        pod.remove();
    }
    daemon.end();
}
