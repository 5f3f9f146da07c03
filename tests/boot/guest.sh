#!/bin/bash
# Runs in the guest at each boot, as root, for the phase that the kernel's command line names: phase=NAME. `guest.sh
# before` makes what the boot is to find, before anything reads it; `guest.sh` does the phase when the boot has come to
# its end, and tells on the second serial line what it sees: name=value. On the third is what it did, and after how many
# seconds.
exec 2>/dev/ttyS2
PS4='+ ${SECONDS}s '
set -x
FILE=/proc/sys/vm/unprivileged_userfaultfd
CONFIGURATION=/etc/uffdguard.toml
SYSCTL=/etc/sysctl.d/50-test.conf
UDEV=/etc/udev/rules.d/50-test.rules
PYTHON=/usr/bin/python3
DROP_INS=/run/systemd/system/uffdguard-knob.service.d

tell() { printf '%s=%s\n' "$1" "$(tr '\n' ';' <<<"$2" | sed 's/;*$//')" >/dev/ttyS1; }
as() { local user=$1; shift; runuser -u "$user" -- "$@"; }
units() { systemctl is-active uffdguard uffdguard-knob uffdguard-log; }
served() { for _ in $(seq 200); do grep -q kvm $FILE && [ "$(units)" = $'active\nactive\nactive' ] && break; sleep 0.2; done; }
logged() { journalctl -b -o cat UFFDGUARD_VERDICT=refused "$@" | sed 's/pid [0-9]*/pid N/'; }
settle() { for _ in $(seq 1000); do [ "$(systemctl is-system-running)" = starting ] || break; sleep 0.1; done; }
# Until systemd has nothing left to do: what a failure starts comes after the command that failed.
idle() { for _ in $(seq 100); do [ "$(systemctl list-jobs --no-legend)" ] || break; sleep 0.1; done; }
failed() { systemctl --failed --plain --no-legend | cut -d ' ' -f 1; }
# Past whatever covers it.
native() { unshare -m sh -c "mount -t proc proc /proc && cat $FILE"; }
fallback() { journalctl -b -o cat -u uffdguard-fallback | grep '^uffdguard.service has failed'; }

before() {
	rm -f $SYSCTL $CONFIGURATION /etc/modules-load.d/hardened.conf $UDEV
	if [ -e $PYTHON.away ]; then mv $PYTHON.away $PYTHON; fi
	if [ "$(type -t "before_$1")" ]; then "before_$1"; fi
}

# What the package is for, in short.
smoke() {
	dpkg -i /root/uffdguard.deb
	tell installed $?
	served
	tell units "$(units)"
	tell file "$(cat $FILE)"
	echo kvm >$FILE
	tell status "$(uffdguard status | sed -n 's/^\(policy\|mode\|interface file\) *//p' | sed 's/ since.*//')"
	tell refused "$(as stranger /root/actor syscall device)"
	tell allowed "$(as user /root/actor open:/dev/kvm syscall device)"
	for _ in $(seq 50); do logged | grep -q . && break; sleep 0.2; done
	tell logged "$(logged)"
	removed
}

# An installation where no BPF LSM is, on a machine that libvirt has opened.
incapable() {
	echo 1 >$FILE
	dpkg -i /root/uffdguard_1_amd64.deb
	tell installed $?
	tell units "$(units)"
	tell journal "$(journalctl -b -o cat -u uffdguard)"
	tell file "$(cat $FILE)"
	tell fallback "$(fallback)"
}

before_off() { echo 'vm.unprivileged_userfaultfd = 1' >$SYSCTL; }
off() {
	tell units "$(units)"
	tell file "$(cat $FILE)"
	tell failed "$(failed)"
	tell fallback "$(fallback)"
}

# What a boot at which the start has failed leaves, and in which order things happened, in microseconds since the boot.
closed() {
	tell units "$(units)"
	tell file "$(cat $FILE)"
	tell failed "$(failed)"
	tell journal "$(journalctl -b -o cat -u uffdguard)"
	tell fallback "$(fallback)"
	tell order "$(systemctl show -P InactiveExitTimestampMonotonic uffdguard) \
		$(systemctl show -P ExecMainExitTimestampMonotonic systemd-sysctl) \
		$(systemctl show -P ExecMainStartTimestampMonotonic uffdguard-fallback) \
		$(systemctl show -P ExecMainExitTimestampMonotonic uffdguard-fallback) \
		$(systemctl show -P ActiveEnterTimestampMonotonic sysinit.target)"
	tell refused "$(as stranger /root/actor syscall)"
}

# libvirt's line, in libvirt's way.
before_without_lsm() { echo '-vm.unprivileged_userfaultfd = 1' >$SYSCTL; }
without_lsm() { closed; }

# Without BPF, by the backend native; with what would open the knob and the device.
before_native() {
	printf 'backend = "native"\nmode = "kvm"\n' >$CONFIGURATION
	echo 'vm.unprivileged_userfaultfd = 1' >$SYSCTL
	echo 'SUBSYSTEM=="misc", KERNEL=="userfaultfd", MODE="0666"' >$UDEV
}
native() {
	tell units "$(units)"
	tell failed "$(failed)"
	by_native at-boot
	tell status "$(uffdguard status >/tmp/status 2>&1; echo $?; sed -n 's/^\(policy\|backend\|device\|problem\) *//p' /tmp/status | sed 's/ since.*//')"
	apply
	by_native applied
	systemctl reload uffdguard
	tell reload "$?"
	by_native reloaded
	uffdguard mode disabled
	apply
	by_native disabled
	systemctl restart uffdguard
	by_native restarted
	systemctl stop uffdguard
	tell stopped "$(cat $FILE);$(stat -c '%U:%G %a' /dev/userfaultfd);$(ls /run/udev/rules.d/*uffdguard* /run/sysctl.d/*uffdguard*)"
	apply
	tell given-back "$(cat $FILE);$(stat -c '%U:%G %a' /dev/userfaultfd)"
}
by_native() {
	tell "$1" "$(cat $FILE);$(stat -c '%U:%G %a' /dev/userfaultfd);$(as stranger /root/actor syscall) $(as user /root/actor syscall);$(as stranger /root/actor device 2>&1 | grep -v '^+');$(as user /root/actor device 2>&1 | grep -v '^+')"
}
# All rules of udev and all of sysctl.d, as an installation of some package has them applied.
apply() {
	udevadm trigger --action=add --settle --subsystem-match=misc
	/lib/systemd/systemd-sysctl
}

before_without_python() {
	echo 'vm.unprivileged_userfaultfd = 1' >$SYSCTL
	mv $PYTHON $PYTHON.away
}
without_python() { closed; }

before_typo() {
	echo 'vm.unprivileged_userfaultfd = 1' >$SYSCTL
	echo 'mode = "kwm"' >$CONFIGURATION
}
typo() {
	closed
	echo 1 >$FILE
	systemctl restart uffdguard
	status=$?; idle
	tell again "$status;$(cat $FILE)"

	echo 'mode = "kvm"' >$CONFIGURATION
	systemctl start uffdguard
	served
	tell corrected "$(cat $FILE);$(units);$(failed)"

	echo 'mode = "kwm"' >$CONFIGURATION
	systemctl reload uffdguard
	tell reload "$?;$(cat $FILE);$(native);$(units);$(fallback | wc -l)"

	systemctl restart uffdguard
	status=$?; idle
	tell restart "$status;$(timeout 60 cat $FILE);$(native);$(units);$(failed)"
	tell restart-fallback "$(fallback | tail -n +3)"
	tell restart-decides "$(as stranger /root/actor syscall) $(as user /root/actor open:/dev/kvm syscall)"

	echo 'mode = "kvm"' >$CONFIGURATION
	systemctl start uffdguard
	served
	mv $PYTHON $PYTHON.away
	systemctl stop uffdguard
	idle
	tell stop "$(timeout 60 cat $FILE);$(native);$(failed | grep -x uffdguard.service)"
	tell stop-decides "$(as stranger /root/actor syscall) $(as user /root/actor open:/dev/kvm syscall)"

	# No program is left that decides.
	rm -r /sys/fs/bpf/uffdguard
	systemctl start uffdguard
	status=$?; idle
	tell gone "$status;$(cat $FILE)"
}

# What hardening guides have, in one file; and what it needs where no module can be loaded later.
before_hardened() {
	cat >$SYSCTL <<-END
		kernel.ftrace_enabled = 0
		net.core.bpf_jit_harden = 2
		kernel.unprivileged_bpf_disabled = 1
		kernel.kptr_restrict = 2
		kernel.perf_event_paranoid = 3
		kernel.yama.ptrace_scope = 3
		user.max_user_namespaces = 0
		kernel.modules_disabled = 1
		vm.unprivileged_userfaultfd = 0
	END
	echo fuse >/etc/modules-load.d/hardened.conf
	echo 'mode = "kvm"' >$CONFIGURATION
}
hardened() {
	tell units "$(units)"
	tell sysctl "$(sed -n 's/ =.*//p' $SYSCTL | grep -v '^vm' | xargs sysctl)"
	tell sysctl-journal "$(journalctl -b -o cat -u systemd-sysctl)"
	tell failed "$(failed)"
	enforced at-boot
	systemctl reload uffdguard
	tell reload "$?"
	enforced reloaded
	tell journal "$(journalctl -b -o cat -u uffdguard -u uffdguard-log | sed 's/pid [0-9]*/pid N/')"
}
enforced() {
	tell "$1" "$(as stranger /root/actor syscall device) $(as user /root/actor open:/dev/kvm syscall device)"
	tell "$1-status" "$(uffdguard status >/tmp/status 2>&1; echo $?; sed -n 's/^\(policy\|mode\|native knob\|interface file\|problem\) *//p' /tmp/status | sed 's/ since.*//')"
}

before_without_jit() {
	before_hardened
	echo 'net.core.bpf_jit_enable = 0' >>$SYSCTL
}
# Compiled before sysctl.d is applied; then anew, without the compiler.
without_jit() {
	hardened
	systemctl restart uffdguard-knob
	systemctl stop uffdguard
	systemctl start uffdguard
	status=$?; idle
	tell start "$status;$(units)"
	enforced started
	tell start-journal "$(journalctl -b -o cat -u uffdguard | tail -5)"
	tell fallback "$(fallback)"
}

before_on() { echo 'vm.unprivileged_userfaultfd = kvm' >$SYSCTL; }
on() {
	tell units "$(units)"
	tell file "$(cat $FILE)"
	tell knob-journal "$(journalctl -b -o cat -u uffdguard-knob)"
	tell status "$(uffdguard status | sed -n 's/^\(policy\|mode\|interface file\) *//p' | sed 's/ since.*//')"
	tell refused "$(as stranger /root/actor syscall syscall:1)"
	tell allowed "$(as user /root/actor open:/dev/kvm syscall syscall:1 fork syscall)"
	for _ in $(seq 50); do logged UFFDGUARD_USER=user | grep -q . && break; sleep 0.2; done
	tell logged "$(logged)"
	tell report "$(uffdguard report | head -1)"
	tell metrics "$(uffdguard metrics 2>&1)"
	tell mode-for-users "$(as stranger uffdguard mode)"
	tell security "$(systemd-analyze security uffdguard-knob.service | tail -1)"
	tell resident "$(systemctl show -p MainPID --value uffdguard-knob | xargs -I{} grep ^Rss: /proc/{}/smaps_rollup)"
	tell fresh-procfs "$(as user unshare -Urpf --mount-proc echo mounted)"
	tell container "$(container)"

	echo nonsense >$FILE
	tell wrong-word "$?;$(journalctl -b -o cat -u uffdguard-knob | grep -c 'refused to write')"

	# As a container has the file that began before.
	unshare -m --propagation private sleep infinity &
	other=$!
	until [ "$(readlink /proc/$other/ns/mnt)" != "$(readlink /proc/self/ns/mnt)" ]; do sleep 0.1; done
	copied=()

	crash
	served
	tell killed "$(cat $FILE);$(units)"
	copied+=("$(in_other)")
	systemctl restart uffdguard-knob
	copied+=("$(in_other)")

	echo enabled >$FILE
	systemctl reload uffdguard
	tell reloaded "$(cat $FILE)"
	copied+=("$(in_other)")
	systemctl restart uffdguard
	served
	tell restarted "$(cat $FILE);$(units)"
	copied+=("$(in_other)")
	echo kvm >$FILE

	upgrade
	tell after-upgrade "$(cat $FILE);$(units);$(dpkg-query -W -f '${Version}' uffdguard)"
	copied+=("$(in_other)")
	tell copied "$(printf '%s\n' "${copied[@]}")"

	systemctl stop uffdguard
	tell stopped "$(cat $FILE);$(units)"
	systemctl start uffdguard
	served
	tell started "$(cat $FILE);$(units)"

	# Stopped while it is about to be started anew.
	mkdir -p $DROP_INS
	printf '[Service]\nRestartSec=1h\n' >$DROP_INS/test.conf
	systemctl daemon-reload
	crash
	until [ "$(systemctl show -P SubState uffdguard-knob)" = auto-restart ]; do sleep 0.1; done
	systemctl stop uffdguard-knob
	idle
	tell crashed-stopped "$(timeout 60 cat $FILE);$(ls -d /run/uffdguard.proc);$(units)"
	rm -r $DROP_INS
	systemctl daemon-reload

	# One that cannot begin, as after a broken upgrade; somebody asks meanwhile.
	systemctl start uffdguard-knob
	served
	mv $PYTHON $PYTHON.away
	crash
	timeout 60 cat $FILE >&2
	tell waited "$?"
	for _ in $(seq 300); do systemctl -q is-failed uffdguard-knob && break; sleep 0.2; done
	idle
	tell given-up "$(timeout 60 cat $FILE);$(ls -d /run/uffdguard.proc);$(units)"
	mv $PYTHON.away $PYTHON
	systemctl reset-failed uffdguard-knob
	systemctl start uffdguard-knob
	served
	tell begun-again "$(cat $FILE);$(units);$(failed)"

	removed
}

removed() {
	dpkg --purge uffdguard >&2
	tell removed "$?;$(cat $FILE);$(find / -xdev -name '*uffdguard*' -not -path '/root/*' -not -path '/var/log/*' \
		-not -path '/proc/*' -not -path '/sys/*')"
	tell pins "$(ls -A /sys/fs/bpf; ls -A /run/uffdguard)"
}

crash() { kill -9 "$(systemctl show -P MainPID uffdguard-knob)"; }
in_other() { timeout 60 nsenter -m -t "$other" cat $FILE 2>&1; }

container() {
	cd /tmp || return
	export HOME=/home/user XDG_RUNTIME_DIR=/tmp/user
	install -d -o user -m 700 $XDG_RUNTIME_DIR image image/bin
	cp /bin/busybox image/bin/sh
	as user timeout 300 podman --storage-driver vfs --cgroup-manager cgroupfs run --rm --network none --rootfs /tmp/image \
		/bin/sh -c 'echo started'
}

# A stranger asks all the time, and must never be allowed; one who is granted asks all the time, and must never be refused.
upgrade() {
	as stranger bash -c 'while [ ! -e /tmp/upgraded ]; do /root/actor syscall device; sleep 0.02; done' >/tmp/stranger &
	local askers=$!
	as user /root/actor open:/dev/kvm loop:/tmp/upgraded >/tmp/granted &
	askers+=" $!"
	asked
	dpkg -i /root/uffdguard_2_amd64.deb >&2
	asked
	touch /tmp/upgraded
	wait $askers
	tell upgrade-refused "$(sort -u /tmp/stranger)"
	tell upgrade-granted "$(sort -u /tmp/granted)"
	tell upgrade-asked "$(wc -l </tmp/stranger) $(grep -c . /tmp/granted)"
}

# Wait until each of the two has asked some times more.
asked() {
	local stranger granted
	stranger=$(wc -l </tmp/stranger)
	granted=$(wc -l </tmp/granted)
	for _ in $(seq 600); do
		[ "$(wc -l </tmp/stranger)" -gt $((stranger + 5)) ] && [ "$(wc -l </tmp/granted)" -gt $((granted + 5)) ] && break
		sleep 0.1
	done
}

phase=$(sed 's/.*phase=\([a-z_]*\).*/\1/' /proc/cmdline)
if [ "$1" = before ]; then before "$phase"; exit; fi
[ "$phase" = native ] || chmod 666 /dev/userfaultfd
settle
"$phase"
tell end 1
sync
systemctl poweroff --force
