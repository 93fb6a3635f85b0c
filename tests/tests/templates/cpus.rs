//! Clones of one template with different numbers of CPUs.

use cella_host::sandbox::TemplateUse;

use super::here::Here;

/// Each clone has its pod's CPUs, and containers run on all of them.
pub async fn each_clone_has_its_own_number(here: &Here) {
    let image = here.host.busybox();
    for cpus in [1, 2, 4] {
        let id = format!("cpus{cpus}");
        let sandbox = here.sandbox_with(&id, |spec| (spec.pod, spec.vcpus) = (true, cpus));
        let sandbox = sandbox.await.unwrap();
        assert_eq!(sandbox.template_use(), Some(&TemplateUse::Cloned));
        assert_eq!(sandbox.info().await.unwrap().cpus_online, cpus);
        let script = on_each(cpus);
        let command = ["run", "--pod", &id, &image, "sh", "-c", &script];
        let said = here.host.cella(&command).expect_status(0).stdout;
        let mut ran: Vec<_> = said.lines().collect();
        ran.sort_unstable();
        let mut expected = vec![format!("all {cpus}")];
        expected.extend((0..cpus).map(|cpu| format!("on {cpu}")));
        assert_eq!(ran, expected);
        sandbox.stop().await.unwrap();
    }
    assert_eq!(here.templates(), [here.key().as_str()]);
}

/// A script that computes on each of `cpus` CPUs at once, and says on which it did: field 39 of a process's stat.
fn on_each(cpus: u32) -> String {
    let compute = "i=0; while [ $i -lt 50000 ]; do i=$((i + 1)); done; \
        read -r line < /proc/$$/stat; set -- $line; shift 38; echo on $1";
    let each = (0..cpus).map(|cpu| format!("taskset {:x} sh -c '{compute}' & ", 1 << cpu));
    format!("{}echo all $(nproc); wait", each.collect::<String>())
}
