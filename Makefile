# make demo: all it needs, and the main job shown. make test: all it needs, and the tests passed.

PYTHON ?= python3
# The kernels on which `make test` runs SUITES, at the same time: a VM keeps one core busy.
KERNELS ?= oldest newest
# The kernel of `make test-vm` and `make demo`.
KERNEL ?= 6.12
# The suites for a kernel on which the policy can be in force.
SUITES = tests/vm tests/clients

DEBIAN_PACKAGES = busybox-static chromium clang crun file groff-base kmod libbpf-dev libc6-dev podman procps \
	prometheus python3-venv qemu-system-x86 stress-ng systemd xz-utils

# What this machine runs: debian12 bookworm, say.
SYSTEM := $(shell . /etc/os-release && echo $$ID$$VERSION_ID $$VERSION_CODENAME)

# What `make deb` and `make test-boot` need on top. Debian 12 has no msgspec.
DEB_PACKAGES = build-essential clang debhelper debootstrap dh-python dpkg-dev e2fsprogs libbpf-dev libc6-dev lintian \
	python3-click python3-pip $(if $(filter debian12,$(SYSTEM)),,python3-msgspec)

# What arm64 in the lab needs on top: QEMU, and what compiles for it.
ARM64_PACKAGES = binutils-arm-linux-gnueabihf e2fsprogs gcc-aarch64-linux-gnu libc6-dev-arm64-cross \
	linux-libc-dev-armhf-cross qemu-system-arm

# Seconds that `make fuzz` takes for each of its TARGETS; all without a name.
SECONDS ?= 60

# What a dependency group of pyproject.toml lists.
group = $$($(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['$(1)'])")

# Of the package; a test of the upgrade builds a second one.
VERSION ?= $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/uffdguard/__init__.py)

VENV = .venv/bin
OBJECTS = src/uffdguard/kernel/guard.bpf.o src/uffdguard/kernel/inspect.bpf.o
# Seconds that a VM may take.
TIMEOUT = 4800
# What an emulated kernel does without: it then takes two thirds of the processor's time. None of it decides anything.
QUICK = rcupdate.rcu_expedited=1 mitigations=off init_on_alloc=0 hardened_usercopy=off randomize_kstack_offset=off \
	no5lvl nokaslr
# With the system calls of x32, which Debian's kernels have but turn off, so that they are tried too.
LAB = $(VENV)/uffdguard lab --cpus 2 --memory 2G $(addprefix --append ,syscall.x32=y $(QUICK)) \
	--timeout $(TIMEOUT) --kernel
LAB64 = $(VENV)/uffdguard lab --arch arm64 --cpus 2 --memory 2G $(addprefix --append ,$(filter-out no5lvl,$(QUICK))) \
	--timeout $(TIMEOUT) --kernel

# The VM cannot write beside the sources: it would compile them anew at each start of Python, and the tests once more
# than that, as pytest has them. What does not compile fails there.
COMPILE = $(VENV)/python -m compileall -q src tests; \
	env -u PYTHONDONTWRITEBYTECODE $(VENV)/pytest --collect-only -q $(SUITES) >/dev/null || :

.PHONY: all setup packages packages-arm64 packages-deb demo test test-unit test-host test-vm test-cost test-long test-clients-long \
	test-arm64 test-matrix test-mutations test-boot bench bench-programs dashboard fuzz lint format wheel deb deb-arm64 clean

all: setup $(OBJECTS) build/actor build/driver build/driver32

setup: packages .venv/ready

# One line and an end where a package is missing and we are not root.
packages:
	@missing=$$(for p in $(DEBIAN_PACKAGES); do \
		dpkg-query -W -f '$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$missing; \
	else echo "missing Debian packages; as root: apt-get install" $$missing >&2; exit 1; fi

.venv/ready: pyproject.toml hatch_build.py
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install -q -e '.[lab]' $(call group,dev)
	touch $@

.venv/fuzz-ready: .venv/ready
	$(VENV)/python -m pip install -q $(call group,fuzz)
	touch $@

%.bpf.o: %.bpf.c $(wildcard src/uffdguard/kernel/*.h src/uffdguard/kernel/arch/*.h) hatch_build.py | packages
	$(PYTHON) hatch_build.py $< $@

build/subjects.bpf.o: bench/subjects.bpf.c src/uffdguard/kernel/structures.h src/uffdguard/kernel/grants.h hatch_build.py | packages
	@mkdir -p build
	$(PYTHON) hatch_build.py $< $@

build/actor: tests/vm/actor.c
build/measure: bench/measure.c
build/actor build/measure: | packages
	@mkdir -p build
	clang -O1 -g -Wall -Wextra -Werror -pthread -static -o $@ $<

# A 64-bit and a 32-bit program that need no C library: the headers are the kernel's own.
build/driver build/driver32: tests/vm/driver.c | packages
	@mkdir -p build
	clang $(if $(filter %32,$@),-m32) -O1 -g -Wall -Wextra -Werror -ffreestanding -fno-stack-protector -fno-pic -static \
		-nostdlib -idirafter /usr/include/x86_64-linux-gnu -o $@ $<

# The same for arm64; the 32-bit one is of its own instruction set.
build/arm64/actor: tests/vm/actor.c | packages-arm64
	@mkdir -p $(@D)
	clang --target=aarch64-linux-gnu -O1 -g -Wall -Wextra -Werror -pthread -static -o $@ $<

build/arm64/driver: CROSS = --target=aarch64-linux-gnu -idirafter /usr/aarch64-linux-gnu/include
build/arm64/driver32: CROSS = --target=armv7ve-linux-gnueabihf -idirafter /usr/arm-linux-gnueabihf/include \
	--ld-path=/usr/bin/arm-linux-gnueabihf-ld
build/arm64/driver build/arm64/driver32: tests/vm/driver.c | packages-arm64
	@mkdir -p $(@D)
	clang $(CROSS) -O1 -g -Wall -Wextra -Werror -ffreestanding -fno-stack-protector -fno-pic -static -nostdlib -o $@ $<

# The environment serves arm64 too: what is compiled of its modules has the machine in its name and lies beside.
.venv/arm64-ready: .venv/ready | packages-arm64
	rm -rf build/arm64/python
	$(VENV)/python -m pip install -q --target build/arm64/python --no-deps --only-binary :all: \
		--platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64 \
		$$($(VENV)/python -m pip freeze --exclude-editable | grep -E '^(hypothesis|msgspec)==')
	cd build/arm64/python && find . -name '*.so' -exec cp --parents -t \
		$$($(CURDIR)/$(VENV)/python -c 'from sysconfig import get_path; print(get_path("purelib"))') {} +
	touch $@

# What tests/clients runs and the Debian of this machine does not have.
build/newer build/selftests: tests/clients/fetch.py | setup
	@mkdir -p build
	rm -rf $@ $@.partial
	$(VENV)/python $< $(@F) $@.partial
	mv $@.partial $@

demo: all
	@$(LAB) $(KERNEL) -- $(VENV)/python tests/clients/demo.py $$(test -t 1 && echo --colour)

# Two VMs at once, one for each core of a small machine, and what takes longest first.
test: test-unit build/newer build/selftests bench-programs
	@echo "$(SUITES) on the kernels $(KERNELS), what boots VMs, what counts instructions: half an hour or so"
	@$(MAKE) --no-print-directory -j2 --output-sync=target $(KERNELS:%=test-vm-%) test-host test-cost

test-unit: all
	$(VENV)/pytest tests/unit

# A minute or so. No timeout of pytest's: a clock that counts instructions leaps where the VM waits.
test-cost: bench-programs
	$(VENV)/uffdguard lab --kernel 6.12 --count-instructions --memory 2G --timeout 1200 -- \
		$(VENV)/pytest --timeout 0 tests/cost

# Writes docs/performance.*: ten minutes or so.
bench: bench-programs
	$(VENV)/python -m bench.run $(PARTS)

# Writes docs/dashboard.png: eight minutes or so.
dashboard: all
	@$(MAKE) --no-print-directory packages DEBIAN_PACKAGES="fonts-dejavu-core librsvg2-bin"
	$(LAB) $(KERNEL) -- $(VENV)/python tests/dashboard.py record >build/dashboard.json
	$(VENV)/python tests/dashboard.py draw <build/dashboard.json | rsvg-convert -o docs/dashboard.png

bench-programs: all build/actor build/measure build/subjects.bpf.o

# What boots VMs or installs from the network.
test-host: all
	$(VENV)/pytest tests/host

test-vm: test-vm-$(KERNEL)

test-vm-%: all build/newer build/selftests
	@$(COMPILE)
	$(LAB) $* -- $(VENV)/pytest $(or $(TESTS),$(SUITES))

# On arm64, where the oldest that can is 6.12 and 6.1 is refused: an hour or so.
test-arm64: .venv/arm64-ready
	@$(MAKE) --no-print-directory -j2 --output-sync=target $(KERNELS:%=test-arm64-%)

test-arm64-%: all build/arm64/actor build/arm64/driver build/arm64/driver32 .venv/arm64-ready
	@$(COMPILE)
	$(LAB64) $* -- $(VENV)/pytest $(or $(TESTS),$(SUITES))

# On every kernel line of the lab, those that are refused too: an hour or more. Without TESTS it writes docs/kernels.md.
test-matrix: all build/newer build/selftests | packages-arm64
	$(VENV)/python tests/matrix.py $(or $(TESTS),--write docs/kernels.md $(SUITES) tests/refused)

# The model against the kernel for STEPS steps, and address spaces in the same memory: an hour or so.
STEPS ?= 20000
test-long: all
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-long-6.12 test-long-newest

test-long-%: TIMEOUT = 14400
test-long-%: all
	$(LAB) $* -- $(VENV)/pytest tests/vm/test_model.py tests/vm/test_reuse.py -s --timeout 0 --steps $(STEPS)

# What of docs/programs.md takes too long for every run: 15 minutes or so.
test-clients-long: all build/newer build/selftests
	$(LAB) $(KERNEL) -- $(VENV)/pytest -m long tests/clients

# Faults put into guard.bpf.c, and which tests see them: 10 minutes or so.
test-mutations: all
	PYTHONPATH=. $(VENV)/python tests/mutations.py $(LAB) $(KERNEL) --

# A Debian of its own, booted with systemd, the package installed, upgraded and removed; and Debian 13 from a fresh clone
# of what is committed: 20 minutes or so.
test-boot: packages-deb all
	$(MAKE) --no-print-directory deb
	$(VENV)/pytest tests/boot

# Coverage-guided: docs/fuzzing.md.
fuzz: all .venv/fuzz-ready
	PYTHONPATH=tests $(VENV)/python -m fuzz.run $(SECONDS) $(TARGETS)

lint: all
	$(VENV)/ruff check
	$(VENV)/ruff format --check
	$(VENV)/mypy

format: all
	$(VENV)/ruff check --fix
	$(VENV)/ruff format

wheel: all
	$(VENV)/python -m build --wheel

# The Debian package, in dist/, for the Debian that this machine runs; that of another ARCH is cross-built.
ARCH ?= $(shell dpkg --print-architecture)
deb: packages-deb
	rm -rf build/deb dist/uffdguard_*_$(ARCH).deb
	mkdir -p build/deb/uffdguard dist
	git ls-files -z -co --exclude-standard | xargs -0 cp --parents -t build/deb/uffdguard
	cp -r packaging/debian build/deb/uffdguard/
	printf 'uffdguard (%s+%s) %s; urgency=medium\n\n  * See CHANGELOG.md.\n\n -- %s  %s\n' \
		"$(VERSION)" $(SYSTEM) "uffdguard developers <uffdguard@localhost>" "$$(date -R)" >build/deb/uffdguard/debian/changelog
	cd build/deb/uffdguard && dpkg-buildpackage -us -uc -b -a$(ARCH)
	lintian --fail-on error,warning build/deb/*.deb
	mv build/deb/*.deb dist/

deb-arm64: packages-arm64
	@$(MAKE) --no-print-directory deb ARCH=arm64

packages-arm64:
	@$(MAKE) --no-print-directory packages DEBIAN_PACKAGES="$(ARM64_PACKAGES)"

packages-deb:
	@$(MAKE) --no-print-directory packages DEBIAN_PACKAGES="$(DEB_PACKAGES)"

clean:
	rm -rf .venv build dist $(OBJECTS) .mypy_cache .ruff_cache .hypothesis
