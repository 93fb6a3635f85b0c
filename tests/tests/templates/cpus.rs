//! Clones of one template with different numbers of CPUs.

use cella_host::sandbox::TemplateUse;

use super::here::Here;

/// Each clone has its pod's CPUs, and so have its containers.
pub async fn each_clone_has_its_own_number(here: &Here) {
    let image = here.host.busybox();
    // A process more costs a guest seconds where KVM has no hardware and the host other work: only one computes on each.
    for (cpus, script) in [(1, "nproc"), (2, ON_EACH), (4, "nproc")] {
        let id = format!("cpus{cpus}");
        let sandbox = here.sandbox_with(&id, |spec| (spec.pod, spec.vcpus) = (true, cpus));
        let sandbox = sandbox.await.unwrap();
        assert_eq!(sandbox.template_use(), Some(&TemplateUse::Cloned));
        assert_eq!(sandbox.info().await.unwrap().cpus_online, cpus);
        let command = ["run", "--pod", &id, &image, "sh", "-c", script];
        let said = here.host.cella(&command).expect_status(0).stdout;
        let mut lines: Vec<_> = said.lines().collect();
        lines.sort_unstable();
        match cpus {
            2 => assert_eq!(lines, ["2", "on 0", "on 1"]),
            _ => assert_eq!(lines, [cpus.to_string()]),
        }
        sandbox.stop().await.unwrap();
    }
    assert_eq!(here.templates(), [here.key().as_str()]);
}

/// Computes on each of two CPUs at once, and says on which it did: field 39 of a process's stat.
const ON_EACH: &str = "compute='i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; \
    read -r line < /proc/$$/stat; set -- $line; shift 38; echo on $1'; \
    taskset 1 sh -c \"$compute\" & taskset 2 sh -c \"$compute\" & nproc; wait";
