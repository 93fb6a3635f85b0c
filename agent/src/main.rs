//! /init of the guest. Outside of a guest, `cella-agent --unix DIR CGROUPS` serves on unix sockets in DIR for the tests,
//! with the cgroup v2 hierarchy at CGROUPS.

use std::path::PathBuf;
use std::process::ExitCode;

use cella_agent::server::{self, Options};
use cella_agent::transport::Transport;
use cella_agent::{guest, icount, power};

fn main() -> ExitCode {
    let entry = server::Entry::now();
    power::install_panic_hook();
    let mut arguments = std::env::args_os().skip(1);
    let options = match (arguments.next(), arguments.next(), arguments.next()) {
        (Some(flag), Some(dir), Some(cgroups)) if flag == "--unix" => Options {
            transport: Transport::Unix(PathBuf::from(dir)),
            in_guest: false,
            cgroup_root: PathBuf::from(cgroups),
            icount: false,
            template: false,
        },
        _ if rustix::process::getpid().is_init() => Options {
            transport: Transport::Vsock,
            in_guest: true,
            cgroup_root: PathBuf::from(guest::CGROUP_ROOT),
            icount: std::env::var_os(icount::VARIABLE).is_some(),
            template: std::env::var_os(server::TEMPLATE_VARIABLE).is_some(),
        },
        _ => {
            power::report("cella-agent: this is the init process of Cella's guests\n");
            return ExitCode::from(125);
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build();
    let served = match runtime {
        Ok(runtime) => runtime.block_on(server::serve(options.clone(), entry)),
        Err(source) => Err(cella_agent::error::Error::System {
            what: "making the runtime".to_owned(),
            source,
        }),
    };
    if let Err(error) = served {
        power::report(&format!("cella-agent: {}\n", error.message()));
    }
    if options.in_guest {
        // A guest whose PID 1 cannot serve is over.
        power::reset();
    }
    ExitCode::FAILURE
}
