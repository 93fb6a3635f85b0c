//! Fifty clones of one template: all different, each cheap.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cella_host::hypervisor::kvm::Kvm;
use cella_host::sandbox::agent::{self, AGENT_PORT, Agent};
use cella_host::sandbox::dir::SandboxDir;
use cella_host::sandbox::{Sandbox, TemplateUse};
use cella_host::template::{self, Key, Shape};
use cella_proto::agent::{CreateContainerRequest, IdentityResponse, SetUpSandboxRequest};
use ttrpc::context::Context;

use super::here::{Here, LIMIT, MEMORY, block_on};
use super::pool;

const CLONES: usize = 50;
/// So many of them live at once.
const TOGETHER: usize = 20;
/// Memory that an idle clone may have for itself.
const PRIVATE_KIB: u64 = 12 << 10;
/// Two starts of sequence numbers that are closer come of one secret: half of what the kernel's clock counts in a tenth of
/// a second. By chance, one pair of fifty guests in ten thousand runs is as close at both of its connections.
const SAME_SECRET: u32 = 50_000_000 >> 6;

/// A guest's identity, and the host's clock when it was asked for.
struct Seen {
    identity: IdentityResponse,
    host_ns: i64,
}

async fn look(sandbox: &Sandbox) -> Seen {
    let identity = sandbox.identity().await.unwrap();
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    Seen {
        identity,
        host_ns: since.as_nanos().try_into().unwrap(),
    }
}

#[test]
fn clones_are_safe_and_cheap() {
    block_on(async {
        let Some(here) = Here::with_template().await else {
            return;
        };
        a_clone_takes_the_time_that_it_is_given_and_does_nothing_before(&here).await;
        pool::idle_clones_are_claimed_and_replaced(&here).await;
        a_larger_one_has_all_of_its_memory(&here).await;
        fifty_have_nothing_in_common(&here).await;
        here.host.assert_clean();
    });
}

/// What it has beyond its template is not whole memory blocks of the guest's kernel (128 MiB).
async fn a_larger_one_has_all_of_its_memory(here: &Here) {
    let memory_kib = async |id, bytes, how| {
        let sandbox = here.sandbox_with(id, |spec| spec.memory_bytes = bytes);
        let sandbox = sandbox.await.unwrap();
        assert_eq!(sandbox.template_use(), Some(&how));
        let kib = sandbox.info().await.unwrap().memory_total_kib;
        sandbox.discard().await.unwrap();
        kib
    };
    let more = 150 << 20;
    let better = Shape::serving(1, MEMORY + more, false, "");
    let plain = memory_kib("plain", MEMORY, TemplateUse::Cloned).await;
    let grown = TemplateUse::Grown(better.clone());
    let larger = memory_kib("larger", MEMORY + more, grown).await;
    // The kernel describes each page of a block, of which it has two, by 64 bytes.
    let added = larger - plain;
    let expected = (more >> 10) - (4 << 10);
    assert!(
        (expected - 1024..=more >> 10).contains(&added),
        "{added} KiB"
    );
    // With a template of its own size it has nothing to grow by.
    template::build(&here.paths, &Kvm, &better, LIMIT)
        .await
        .unwrap();
    let same = memory_kib("same", MEMORY + more, TemplateUse::Cloned).await;
    assert!(same.abs_diff(larger) < 8 << 10, "{same} KiB, {larger} KiB");
    let key = Key::of(&here.paths, &better).unwrap();
    here.store().remove(&key).unwrap();
}

async fn fifty_have_nothing_in_common(here: &Here) {
    let mut seen = Vec::new();
    let mut living = Vec::new();
    let begin = Instant::now();
    for number in 0..CLONES {
        let sandbox = here.sandbox(&format!("clone{number}")).await.unwrap();
        assert_eq!(sandbox.template_use(), Some(&TemplateUse::Cloned));
        seen.push(look(&sandbox).await);
        if living.len() < TOGETHER {
            living.push(sandbox);
        } else {
            sandbox.discard().await.unwrap();
        }
    }
    println!("{CLONES} clones in {:?}", begin.elapsed());
    all_differ(&seen);
    clocks_are_right(&seen);
    the_same_guest_is_recognised(&living[0], &seen[0]).await;
    they_share_memory(here, &living).await;
    they_outlive_their_template(here, &living).await;
    for sandbox in living {
        sandbox.discard().await.unwrap();
    }
}

fn all_differ(seen: &[Seen]) {
    let texts: [fn(&IdentityResponse) -> String; 4] = [
        |one| one.boot_id.clone(),
        |one| one.uuid.clone(),
        |one| one.hostname.clone(),
        |one| format!("{:?}", one.random),
    ];
    for (index, text) in texts.iter().enumerate() {
        let distinct: HashSet<_> = seen.iter().map(|one| text(&one.identity)).collect();
        assert_eq!(distinct.len(), seen.len(), "{index}: {distinct:?}");
    }
    assert_eq!(seen[7].identity.hostname, "host-clone7");
    for (index, one) in seen.iter().enumerate() {
        for other in &seen[..index] {
            let (one, other) = (&one.identity, &other.identity);
            assert!(!same_secret(one, other), "{one:?} {other:?}");
        }
    }
}

/// Whether two guests begin their TCP connections with numbers of the same secret.
fn same_secret(one: &IdentityResponse, other: &IdentityResponse) -> bool {
    assert_eq!((one.tcp_starts.len(), other.tcp_starts.len()), (2, 2));
    let mut pairs = one.tcp_starts.iter().zip(&other.tcp_starts);
    pairs.all(|(one, other)| one.wrapping_sub(*other).cast_signed().unsigned_abs() < SAME_SECRET)
}

/// The wall clock is the host's. The others go on where the template's stood: nobody sees the time in between.
fn clocks_are_right(seen: &[Seen]) {
    for one in seen {
        let off = one.host_ns - one.identity.wall_ns;
        assert!((0..1_000_000_000).contains(&off), "{off} ns");
        assert_eq!(
            one.identity.monotonic_ns / 1_000_000_000,
            one.identity.boottime_ns / 1_000_000_000
        );
    }
    let up = |one: &Seen| Duration::from_nanos(one.identity.monotonic_ns);
    let least = seen.iter().map(up).min().unwrap();
    let most = seen.iter().map(up).max().unwrap();
    assert!(most - least < Duration::from_secs(1), "{least:?} {most:?}");
}

/// What is held against others is worth something: for one and the same guest it comes out the same.
async fn the_same_guest_is_recognised(sandbox: &Sandbox, before: &Seen) {
    let again = look(sandbox).await;
    assert!(same_secret(&again.identity, &before.identity));
    assert_eq!(again.identity.boot_id, before.identity.boot_id);
    assert_ne!(again.identity.uuid, before.identity.uuid);
    assert_ne!(again.identity.random, before.identity.random);
}

/// An idle clone has little for itself, and all of them together what each has for itself and the template once.
async fn they_share_memory(here: &Here, living: &[Sandbox]) {
    let template = fs::metadata(here.template_dir().join("memory")).unwrap();
    let template_kib = template.blocks() / 2;
    let (mut private, mut shares) = (Vec::new(), 0);
    for sandbox in living {
        let path = format!("/proc/{}/smaps_rollup", sandbox.vmm_pid());
        let text = fs::read_to_string(path).unwrap();
        private.push(field(&text, "Private_Dirty:") + field(&text, "Private_Clean:"));
        shares += field(&text, "Pss:");
    }
    private.sort_unstable();
    println!(
        "private: {} to {} KiB; {} clones together {shares} KiB; template {template_kib} KiB",
        private[0],
        private[living.len() - 1],
        living.len(),
    );
    assert!(private.iter().all(|kib| *kib <= PRIVATE_KIB), "{private:?}");
    let bound = TOGETHER as u64 * PRIVATE_KIB + template_kib;
    assert!(shares <= bound, "{shares} KiB of {bound}");
}

fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.split_whitespace().next());
    number.unwrap().parse().unwrap()
}

/// The template's files can go: what is mapped stays.
async fn they_outlive_their_template(here: &Here, living: &[Sandbox]) {
    here.store().remove(&here.key()).unwrap();
    assert!(here.templates().is_empty());
    for sandbox in living {
        assert!(sandbox.info().await.unwrap().memory_total_kib > 0);
    }
}

/// A host whose clock was set back gives its clones that time, and their own clocks go on.
async fn a_clone_takes_the_time_that_it_is_given_and_does_nothing_before(here: &Here) {
    let dir = SandboxDir::new(&here.paths, "early").unwrap();
    let locks = dir.create().unwrap();
    let saved = here.store().open(&here.key()).unwrap().unwrap();
    let vm = here.restore(&dir, &saved).await.unwrap();
    let stream = agent::dial(&dir.vsock(), AGENT_PORT).await.unwrap();
    let agent = Agent::new(stream).await.unwrap();
    let client = agent.client();
    let container = CreateContainerRequest {
        container_id: "early".to_owned(),
        ..Default::default()
    };
    let refused = [
        client
            .identity(Context::default(), &Default::default())
            .await
            .map(drop),
        client
            .create_container(Context::default(), &container)
            .await
            .map(drop),
    ];
    for refused in refused {
        let message = refused.unwrap_err().to_string();
        assert!(message.contains("was not set up"), "{message}");
    }
    // 1 January 2001.
    let then = 978_307_200_000_000_000;
    let request = SetUpSandboxRequest {
        clock_ns: then,
        entropy: vec![7; 64],
        ..Default::default()
    };
    let set_up = client.set_up_sandbox(Context::default(), &request);
    set_up.await.unwrap();
    let mut last = 0;
    let begin = Instant::now();
    for _ in 0..5 {
        let identity = client
            .identity(Context::default(), &Default::default())
            .await
            .unwrap();
        let since = identity.wall_ns - then;
        assert!((0..5_000_000_000).contains(&since), "{since} ns");
        assert!(identity.monotonic_ns > last);
        last = identity.monotonic_ns;
    }
    // No timer of the template's is late here, and none is of this time: the guest is there for its caller.
    assert!(begin.elapsed() < Duration::from_secs(3));
    vm.stop().await.unwrap();
    drop((vm, locks));
    dir.remove().unwrap();
}
