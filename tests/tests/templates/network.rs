//! Clones of a template whose guest has found a network interface before anybody knew its network.

use cella_host::sandbox::TemplateUse;
use cella_host::template::Shape;
use cella_tests::netns::{MTU, Netns, ip, missing_for_networks_on};
use cella_tests::skip;

use super::here::{Here, MEMORY, MEMORY_FLAG, block_on};
use super::pool::{end, idle, keeper, wait_for, wait_for_idle};

/// What the guest has, one word each.
const INTERFACES: &str = "ls /sys/class/net";

#[test]
fn clones_have_the_interface_of_their_template() {
    block_on(async {
        if let Some(missing) = missing_for_networks_on("kvm") {
            return skip(&missing);
        }
        let Some(here) = Here::with(&Shape::serving(1, MEMORY, true, "")).await else {
            return;
        };
        let pods = Pods {
            image: here.host.busybox(),
            netns: Netns::new(),
            here: &here,
        };
        let reaches = format!(
            "cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address; ping -c 1 -W 20 {}.1 | grep -c ttl=",
            pods.netns.net
        );
        let reached = format!("{MTU}\n{}\n1\n", pods.netns.mac);
        let cloned = (TemplateUse::Cloned, reached.clone());
        assert_eq!(pods.run("one", &reaches).await, cloned);

        idle_ones_have_it_too(&pods, &reaches, &reached).await;

        // One has it from the template, one is found when it is needed.
        let name = &pods.netns.name;
        pods.netns.add_interface("more");
        let said = pods.run("two", &format!("{INTERFACES}; {reaches}")).await;
        let expected = format!("eth0\nlo\nmore\n{reached}");
        assert_eq!(said, (TemplateUse::Cloned, expected));
        // A namespace without interfaces is no network, for which there is no template here.
        ip(&format!("-n {name} link del more\n-n {name} link del eth0"));
        let said = pods.run("none", INTERFACES).await;
        let without = TemplateUse::Wanted(Shape::serving(1, MEMORY, false, ""));
        assert_eq!(said, (without, "lo\n".to_owned()));
        here.host.assert_clean();
    });
}

/// Pods in one namespace, one after the other.
struct Pods<'a> {
    here: &'a Here,
    netns: Netns,
    image: String,
}

impl Pods<'_> {
    /// How a pod came to be, and what a script said in it.
    async fn run(&self, id: &str, script: &str) -> (TemplateUse, String) {
        let sandbox = self.here.sandbox_with(id, |spec| {
            (spec.pod, spec.pool) = (true, true);
            spec.netns = Some(self.netns.path().into());
        });
        let sandbox = sandbox.await.unwrap();
        let how = sandbox.template_use().unwrap().clone();
        let args = ["run", "--pod", id, &self.image, "sh", "-c", script];
        let said = self.here.host.cella(&args).expect_status(0).stdout;
        sandbox.stop().await.unwrap();
        (how, said)
    }
}

/// The pool has what was asked for last: in the beginning there is no template of what the configuration asks for.
async fn idle_ones_have_it_too(pods: &Pods<'_>, reaches: &str, reached: &str) {
    let here = pods.here;
    here.host
        .configure(&format!("memory = \"{MEMORY_FLAG}\"\npool = 1\n"));
    let netns = pods.netns.path();
    let args = ["run", "--netns", &netns, &pods.image, "true"];
    here.host.cella(&args).expect_status(0);
    wait_for("a keeper", || keeper(here).is_some());
    let cloned = pods.run("asks", "true").await;
    assert_eq!(cloned.0, TemplateUse::Cloned);
    wait_for_idle("an idle one", || idle(here).len() == 1);
    let claimed = (TemplateUse::Claimed, reached.to_owned());
    assert_eq!(pods.run("claims", reaches).await, claimed);
    end(here);
}
