//! Clones of one template with different numbers of CPUs.

use std::fs;

use cella_host::hypervisor::kvm::Kvm;
use cella_host::sandbox::TemplateUse;
use cella_host::template::{self, Shape};

use super::here::{Here, LIMIT, MEMORY, MEMORY_FLAG, block_on};
use super::pool::{end, idle, wait_for_idle};

/// Computes on each of two CPUs at once, and says on which it did: field 39 of a process's stat.
const ON_EACH: &str = "compute='i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; \
    read -r line < /proc/$$/stat; set -- $line; shift 38; echo on $1'; \
    taskset 1 sh -c \"$compute\" & taskset 2 sh -c \"$compute\" & nproc; wait";

#[test]
fn one_template_serves_pods_of_several_cpus() {
    block_on(async {
        let Some(here) = Here::new() else { return };
        let shape = Shape::serving(2, MEMORY, false, "");
        let built = template::build(&here.paths, &Kvm, &shape, LIMIT).await;
        let (key, _) = built.unwrap();
        each_clone_has_its_own_number(&here).await;
        idle_ones_have_the_cpus_that_were_asked_for(&here).await;
        assert_eq!(here.templates(), [key.as_str()]);
        here.host.assert_clean();
    });
}

/// Each clone has its pod's CPUs, and so have its containers.
async fn each_clone_has_its_own_number(here: &Here) {
    let image = here.host.busybox();
    // A process more costs a guest seconds where KVM has no hardware and the host other work: only one computes on each.
    for (cpus, script, expected) in [
        (2, ON_EACH, &["2", "on 0", "on 1"][..]),
        (4, "nproc", &["4"]),
    ] {
        let id = format!("cpus{cpus}");
        let sandbox = here.sandbox_with(&id, |spec| (spec.pod, spec.vcpus) = (true, cpus));
        let sandbox = sandbox.await.unwrap();
        assert_eq!(sandbox.template_use(), Some(&TemplateUse::Cloned));
        assert_eq!(sandbox.info().await.unwrap().cpus_online, cpus);
        let command = ["run", "--pod", &id, &image, "sh", "-c", script];
        let said = here.host.cella(&command).expect_status(0).stdout;
        let mut lines: Vec<_> = said.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, expected);
        sandbox.stop().await.unwrap();
    }
}

/// A machine that runs cannot get more: in the beginning they have those of the configuration.
async fn idle_ones_have_the_cpus_that_were_asked_for(here: &Here) {
    let claim = async |id, cpus| {
        let wanted = here.sandbox_with(id, |spec| (spec.pool, spec.vcpus) = (true, cpus));
        let sandbox = wanted.await.unwrap();
        assert_eq!(sandbox.info().await.unwrap().cpus_online, cpus);
        let how = sandbox.template_use().cloned();
        sandbox.discard().await.unwrap();
        how
    };
    let lines = format!("memory = \"{MEMORY_FLAG}\"\ncpus = 2\npool = 1\n");
    here.host.configure(&lines);
    let image = here.host.busybox();
    here.host.cella(&["run", &image, "true"]).expect_status(0);
    wait_for_idle("an idle one", || idle(here).len() == 1);
    assert_eq!(claim("two", 2).await, Some(TemplateUse::Claimed));
    assert_eq!(claim("three", 3).await, Some(TemplateUse::Cloned));
    wait_for_idle("one with three", || idle_with_cpus(here, 3));
    assert_eq!(claim("three", 3).await, Some(TemplateUse::Claimed));
    end(here);
}

fn idle_with_cpus(here: &Here, cpus: u32) -> bool {
    let states = idle(here).into_iter().map(|id| {
        let state = here.paths.run_dir.join(id).join("sandbox.json");
        fs::read_to_string(state).unwrap_or_default()
    });
    let text = format!("\"vcpus\": {cpus},");
    { states }.any(|state| state.contains(&text))
}
