# The index of what can be done here: `make help`.
#
#   make install PREFIX=/usr DESTDIR=/tmp/package     where to, and a root to stage it below
#   make build PROFILE=dev                            quick to compile; not what is shipped
#   make kernel KERNEL_SRC=/path/to/linux             another source tree than Debian's package

PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
PROFILE ?= release
CARGO ?= cargo
CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR

# The agent is static, and needs an explicit target for it: else proc macros would have to be static, too. It is in
# every guest's memory: packed relocations take a quarter of a megabyte off, and so does the lack of unwind tables,
# which a program that ends with its first panic can do without.
agent_flags := -C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs -C force-unwind-tables=no
guest_target := x86_64-unknown-linux-gnu
# What is shipped has a profile of its own in the guest; any other profile holds for the agent, too.
guest_profile = $(if $(filter release,$(PROFILE)),guest,$(PROFILE))
directory = $(if $(filter dev,$(1)),debug,$(1))
programs = $(CARGO_TARGET_DIR)/$(call directory,$(PROFILE))
agent = $(CARGO_TARGET_DIR)/$(guest_target)/$(call directory,$(guest_profile))/kata-like-agent
# Another profile than what is shipped has folders of its own: what one builds never ends up in the other.
suffix = $(if $(filter release,$(PROFILE)),,-$(PROFILE))
guest = $(CARGO_TARGET_DIR)/guest-files$(suffix)
installed = $(CARGO_TARGET_DIR)/installed$(suffix)
run_tests := $(CARGO) run --quiet --locked -p kata-like-tests --bin run-tests --

.PHONY: help setup run test faults check bench fuzz shell logs build agent probe raw-guest kernel image stage install uninstall clean
.DEFAULT_GOAL := help

help: ## shows this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup:
	@tools/setup

# Its profile is quick to compile. Make hands PROFILE on to what `tools/run` calls.
run: export PROFILE := quick
run: ## runs one container through a real containerd, in a test host, and shows its kernel
	@tools/run $(installed) $(programs)

check: setup ## what one runs before each commit: formatting, lints, unit tests, the rules of the house
	@$(run_tests) --check

# It builds and installs through this file.
test: setup ## runs all tests in test hosts, after check; with TEST=BINARY::TEST only that one, in a minute
	@$(run_tests) $(if $(TEST),--only '$(TEST)')

# With COMPARE=FILE it says what has changed since the results in that file.
bench: ## measures kata-like beside runc and others in one run; ROUNDS=11, COMPARE=FILE
	@tools/setup bench
	@$(run_tests) --bench $(or $(ROUNDS),11)
	@$(if $(COMPARE),$(CARGO_TARGET_DIR)/debug/bench compare $(COMPARE) $(CARGO_TARGET_DIR)/bench/bench.json)

# Cases and rounds of which `make test` takes a sample.
faults: export KATA_LIKE_FAULTS := all
faults: export KATA_LIKE_KILL_ROUNDS ?= 200
faults: stage ## the whole series of faults, which takes hours
	@$(run_tests) $(installed) fail_points swapper faults worst_moment

shell: setup ## a test host with containerd up and a shell in it; with TEST=BINARY only that test binary is built
	@$(run_tests) --shell $(TEST)

logs: ## shows what the last failure of a test left
	@$(run_tests) --logs

fuzz: setup ## throws bytes at each target for SECONDS (60); with TARGET=NAME only at that one
	@tools/fuzz $(or $(SECONDS),60) $(TARGET)

build: setup ## builds the programs of the host, and the agent of the guest
	$(CARGO) build --profile $(PROFILE) --locked -p containerd-shim-kata-like-v2 -p kata-like-vmm \
		-p kata-like-fsd -p kata-like-proxy -p kata-like -p guest-image -p sbom
	$(MAKE) --no-print-directory agent

# The flags hold for what runs in the guest only, since a target is named: macros and build scripts are shared with the
# programs of the host that have the same profile.
agent: setup
	RUSTFLAGS='$(agent_flags)' LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=/usr/lib/x86_64-linux-gnu \
		$(CARGO) build --profile $(guest_profile) --locked -p kata-like-agent --target $(guest_target)

# What the tests run in containers, whose roots hold nothing else: static as the agent is.
probe:
	RUSTFLAGS='$(agent_flags)' \
		$(CARGO) build --profile $(guest_profile) --locked -p kata-like-probe --target $(guest_target)

# A guest of the tests' own without a kernel: fixed in memory, and without what a C library's start brings.
raw_flags := -C relocation-model=static -C target-feature=+crt-static -C panic=abort -C force-unwind-tables=no

raw-guest:
	RUSTFLAGS='$(raw_flags)' $(CARGO) build --profile $(guest_profile) --locked -p kata-like-raw-guest --features image \
		--target $(guest_target)

kernel: setup ## builds the guest's kernel, or takes it from the cache
	@mkdir -p $(guest)
	@set -e; kernel=$$(kernel-config/build); \
	for file in vmlinux printk.json provenance.json; do \
		cp "$${kernel%/*}/$$file" $(guest)/$$file.new; mv $(guest)/$$file.new $(guest)/$$file; \
	done

image: build ## builds the guest's image, whose only program is the agent
	@mkdir -p $(guest)
	$(programs)/guest-image --agent $(agent) --output $(guest)/initrd.img \
		$(if $(filter release,$(PROFILE)),,--limit 33554432)

# An installed tree within the build directory: programs find their parts by where they lie themselves.
stage: build kernel image
	@$(MAKE) --no-print-directory copy DESTDIR= PREFIX=$(installed) SYSCONFDIR=$(installed)/etc

install: build kernel image ## installs below DESTDIR, in PREFIX
	@$(MAKE) --no-print-directory copy
	$(if $(DESTDIR),,@tools/huge-pages)

# Whatever runs keeps its file: each new one gets its name by a rename.
define put
	@mkdir -p $(dir $(DESTDIR)$(3))
	@install -m $(1) $(2) $(DESTDIR)$(3).new
	@mv -f $(DESTDIR)$(3).new $(DESTDIR)$(3)

endef

.PHONY: copy
copy:
	$(call put,755,$(programs)/containerd-shim-kata-like-v2,$(PREFIX)/bin/containerd-shim-kata-like-v2)
	$(call put,755,$(programs)/kata-like,$(PREFIX)/bin/kata-like)
	$(call put,755,$(programs)/kata-like-vmm,$(PREFIX)/libexec/kata-like/kata-like-vmm)
	$(call put,755,$(programs)/kata-like-fsd,$(PREFIX)/libexec/kata-like/kata-like-fsd)
	$(call put,755,$(programs)/kata-like-proxy,$(PREFIX)/libexec/kata-like/kata-like-proxy)
	$(call put,644,$(guest)/vmlinux,$(PREFIX)/share/kata-like/vmlinux)
	$(call put,644,$(guest)/printk.json,$(PREFIX)/share/kata-like/printk.json)
	$(call put,644,$(guest)/initrd.img,$(PREFIX)/share/kata-like/initrd.img)
	@# What all of this was made of: sbom.json and provenance.json.
	@$(programs)/sbom --prefix $(DESTDIR)$(PREFIX) --kernel $(guest)/provenance.json --agent $(agent) --profile $(PROFILE)
	$(call put,644,tools/tmpfiles.conf,$(PREFIX)/lib/tmpfiles.d/kata-like.conf)
	@# An operator's configuration is never replaced.
	$(if $(wildcard $(DESTDIR)$(SYSCONFDIR)/kata-like/config.toml),,$(call \
		put,644,shim-v2/config/config.toml,$(SYSCONFDIR)/kata-like/config.toml))
	@echo "installed in $(DESTDIR)$(PREFIX)"

uninstall: ## removes what install put there, but not a changed configuration
	rm -f $(DESTDIR)$(PREFIX)/bin/containerd-shim-kata-like-v2 $(DESTDIR)$(PREFIX)/bin/kata-like
	rm -f $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/kata-like.conf
	rm -rf $(DESTDIR)$(PREFIX)/libexec/kata-like $(DESTDIR)$(PREFIX)/share/kata-like
	@if cmp -s shim-v2/config/config.toml $(DESTDIR)$(SYSCONFDIR)/kata-like/config.toml; then \
		rm -f $(DESTDIR)$(SYSCONFDIR)/kata-like/config.toml; \
		rmdir --ignore-fail-on-non-empty $(DESTDIR)$(SYSCONFDIR)/kata-like 2>/dev/null || true; \
	fi

clean: ## removes what was built here; kernels and test hosts stay in ~/.cache/kata-like
	$(CARGO) clean
