# Every task that a person runs. `make` builds, `make demo` shows, `make test` tests; `make help` lists them.
# As root on Debian each installs with apt-get what it lacks; otherwise it says what to install.

SHELL := /bin/bash
PREFIX ?= /usr/local
CARGO ?= cargo
TARGET := x86_64-unknown-linux-gnu
GUEST := target/guest
LIBEXEC := target/libexec
CELLA := target/release/cella

# What builds; what tests beside it.
BUILD_PACKAGES := build-essential libseccomp-dev cpio flex bison bc libelf-dev xz-utils linux-source-6.12
TEST_PACKAGES := busybox-static containerd containernetworking-plugins iproute2 iptables qemu-system-x86 strace
export CELLA_LIBEXEC_DIR := $(CURDIR)/$(LIBEXEC)

.PHONY: all help build host guest kernel agent deps deps-build deps-test demo test conformance lint fuzz cri-client bench bench-boot soak install clean

all: build

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t14

build: host guest ## Everything: host programs, guest kernel, guest image

host: deps-build
	$(CARGO) build --release --locked -p cella-host -p cella-vmm
	@mkdir -p $(LIBEXEC)
	@install -m755 target/release/cella-vmm $(LIBEXEC)/cella-vmm

guest: kernel agent

kernel: deps-build ## The guest kernel, from the cache if nothing changed
	guest-kernel/build.sh $(GUEST)
	@mkdir -p $(LIBEXEC)
	@cmp -s $(GUEST)/vmlinux $(LIBEXEC)/vmlinux || install -m644 $(GUEST)/vmlinux $(LIBEXEC)/vmlinux

# Static: the guest has no libraries. A target directory's flags of its own, so that the host's crates are not rebuilt.
agent: deps-build ## The guest image: the agent, static, in an archive
	LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=/usr/lib/x86_64-linux-gnu \
	CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" \
	$(CARGO) build --locked -p cella-agent --profile guest --target $(TARGET)
	@mkdir -p $(GUEST) $(LIBEXEC)
	agent/initramfs.sh target/$(TARGET)/guest/cella-agent $(GUEST)/initrd.cpio
	@install -m644 $(GUEST)/initrd.cpio $(LIBEXEC)/initrd.cpio

deps-build:
	@tests/deps.sh $(BUILD_PACKAGES)

deps-test:
	@tests/deps.sh $(BUILD_PACKAGES) $(TEST_PACKAGES)

deps: deps-test ## The Debian packages that building and testing need

demo: deps-test build ## A pod with two containers in a virtual machine of its own
	tests/demo.sh

test: deps-test build cri-client ## Every test that this machine can run; says which it could not, and why
	tests/run.sh

cri-client: ## The CRI client of the tests, where Go is
	@if command -v go >/dev/null; then cd tests/cri && go build -o ../../target/cri .; \
	else echo 'SKIPPED: the CRI client (Go)'; fi

conformance: deps-test build cri-client ## CRI's conformance suite and containerd 2 and 1.7, where Go is; an hour without KVM
	tests/conformance/run.sh

lint: ## Formatting, lints, licences and advisories
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	@# Not of the workspace: cargo-fuzz builds them with flags of its own, but every build sees whether they still fit.
	for crate in vmm host; do $(CARGO) check --locked --manifest-path $$crate/fuzz/Cargo.toml --target-dir target || exit 1; done
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny --offline check licenses bans sources; \
	else echo 'SKIPPED: cargo deny (cargo install cargo-deny)'; fi

fuzz: ## Every fuzz target for a minute (installs cargo-fuzz if it is missing)
	tests/fuzz.sh

bench: bench-boot ## Measures this host; results and a picture of them in target/bench
	$(CARGO) build --release --locked -p cella-tests --bin bench-containerd
	tests/bench.sh

soak: deps-test build cri-client ## 200 pods, 20 at a time, made and removed
	CELLA_TEST_ROUNDS=10 $(CARGO) test -p cella-tests --locked --test containerd -- --nocapture many_pods_at_once

bench-boot: deps-test build ## Guest instructions and VM exits of a boot, against their budget (RENEW=1 renews it, PROFILE=1: by function)
	tests/bench-boot.sh $(if $(RENEW),--renew) $(if $(PROFILE),--profile)

install: build ## Installs under PREFIX (default /usr/local) and /usr/libexec/cella
	install -D -m755 $(CELLA) $(DESTDIR)$(PREFIX)/bin/cella
	install -D -m755 target/release/containerd-shim-cella-v2 $(DESTDIR)$(PREFIX)/bin/containerd-shim-cella-v2
	install -D -m755 $(LIBEXEC)/cella-vmm $(DESTDIR)/usr/libexec/cella/cella-vmm
	install -D -m644 $(LIBEXEC)/vmlinux $(DESTDIR)/usr/libexec/cella/vmlinux
	install -D -m644 $(LIBEXEC)/initrd.cpio $(DESTDIR)/usr/libexec/cella/initrd.cpio
	install -d $(addprefix $(DESTDIR)$(PREFIX)/share/,man/man1 bash-completion/completions fish/vendor_completions.d zsh/site-functions)
	$(CELLA) man $(DESTDIR)$(PREFIX)/share/man/man1
	$(CELLA) completions bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/cella
	$(CELLA) completions fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/cella.fish
	$(CELLA) completions zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_cella

clean: ## Removes what was built here (not the kernel's cache)
	rm -rf target
