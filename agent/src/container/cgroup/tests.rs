use super::*;

/// A stand-in for a hierarchy: paths and parsing need no kernel.
fn hierarchy() -> (tempfile::TempDir, Hierarchy) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("cgroup.controllers"),
        "cpuset cpu io memory rdma pids\n",
    )
    .unwrap();
    let hierarchy = Hierarchy::new(dir.path().into(), "cella".into()).unwrap();
    (dir, hierarchy)
}

#[test]
fn paths_stay_below_the_root() {
    let (dir, hierarchy) = hierarchy();
    let path = |p: &str| {
        hierarchy.path("id", Some(Path::new(p))).map(|p| {
            p.strip_prefix(dir.path())
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        })
    };
    assert_eq!(path("/kubepods/pod1/c").unwrap(), "kubepods/pod1/c");
    assert_eq!(path("x/y").unwrap(), "cella/x/y");
    assert_eq!(path("").unwrap(), "cella/id");
    assert_eq!(path("system.slice:cri:abc").unwrap(), "cella/cri-abc");
    assert_eq!(path(":cri:abc").unwrap(), "cella/cri-abc");
    for bad in ["/", "/..", "../x", "a/../../b"] {
        assert!(path(bad).is_err(), "{bad}");
    }
}

#[test]
fn only_known_controllers_are_handed_on() {
    let (_dir, hierarchy) = hierarchy();
    assert_eq!(hierarchy.controllers, "+cpuset +cpu +io +memory +pids");
}

#[test]
fn directories_above_are_made_once_and_an_empty_leftover_is_taken_over() {
    let (dir, hierarchy) = hierarchy();
    let cgroup = hierarchy.create("a", Some(Path::new("/p/q/a"))).unwrap();
    let control = dir.path().join("p/q/cgroup.subtree_control");
    assert_eq!(
        std::fs::read_to_string(&control).unwrap(),
        hierarchy.controllers
    );
    std::fs::remove_file(&control).unwrap();
    hierarchy.create("b", Some(Path::new("/p/q/b"))).unwrap();
    assert!(!control.exists(), "the second container finds it prepared");
    hierarchy.create("a", Some(Path::new("/p/q/a"))).unwrap();
    std::fs::write(cgroup.path().join("busy"), "").unwrap();
    assert!(hierarchy.create("a", Some(Path::new("/p/q/a"))).is_err());
}
