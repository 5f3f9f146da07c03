#!/bin/bash
# Runs in the guest at each boot, as root, and tells on the second serial line what it sees: name=value.
# What it is to do is on the kernel's command line: phase=NAME.
exec 2>/root/guest.log
set -x
FILE=/proc/sys/vm/unprivileged_userfaultfd

tell() { printf '%s=%s\n' "$1" "$(tr '\n' ';' <<<"$2" | sed 's/;*$//')" >/dev/ttyS1; }
as() { local user=$1; shift; runuser -u "$user" -- "$@"; }
units() { systemctl is-active uffdguard uffdguard-knob uffdguard-log; }
served() { for _ in $(seq 200); do grep -q kvm $FILE && [ "$(units)" = $'active\nactive\nactive' ] && break; sleep 0.2; done; }
logged() { journalctl -b -o cat UFFDGUARD_VERDICT=refused "$@" | sed 's/pid [0-9]*/pid N/'; }
settle() { for _ in $(seq 100); do [ "$(systemctl is-system-running)" = starting ] || break; sleep 1; done; }

# Whoever installs it where no BPF LSM is.
incapable() {
	dpkg -i /root/uffdguard_1_amd64.deb
	tell installed $?
	tell units "$(units)"
	tell journal "$(journalctl -b -o cat -u uffdguard)"
	tell file "$(cat $FILE)"
	echo 'vm.unprivileged_userfaultfd = kvm' >/etc/sysctl.d/50-userfaultfd.conf
}

off() {
	tell units "$(units)"
	tell file "$(cat $FILE)"
}

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

	kill -9 "$(systemctl show -p MainPID --value uffdguard-knob)"
	served
	tell killed "$(cat $FILE);$(units)"

	echo enabled >$FILE
	systemctl reload uffdguard
	tell reloaded "$(cat $FILE)"
	systemctl restart uffdguard
	served
	tell restarted "$(cat $FILE);$(units)"
	echo kvm >$FILE

	upgrade
	tell after-upgrade "$(cat $FILE);$(units);$(dpkg-query -W -f '${Version}' uffdguard)"

	systemctl stop uffdguard
	tell stopped "$(cat $FILE);$(units)"
	systemctl start uffdguard
	served
	tell started "$(cat $FILE);$(units)"

	apt-get -qy purge uffdguard >&2
	tell removed "$?;$(cat $FILE);$(find / -xdev -name '*uffdguard*' -not -path '/root/*' -not -path '/var/log/*' \
		-not -path '/proc/*' -not -path '/sys/*')"
	tell pins "$(ls -A /sys/fs/bpf; ls -A /run/uffdguard)"
}

container() {
	cd /tmp && mkdir -p /tmp/image/bin && cp /bin/busybox /tmp/image/bin/sh && tar -C /tmp/image -cf /tmp/image.tar . || return
	export HOME=/home/user XDG_RUNTIME_DIR=/tmp/user
	install -d -o user -m 700 $XDG_RUNTIME_DIR
	as user timeout 300 podman --storage-driver vfs import -q /tmp/image.tar contained >/dev/null
	as user timeout 300 podman --storage-driver vfs --cgroup-manager cgroupfs run --rm --network none contained /bin/sh -c 'echo started'
}

# A stranger asks all the time, and must never be allowed; one who is granted asks all the time, and must never be refused.
upgrade() {
	(while [ ! -e /tmp/upgraded ]; do as stranger /root/actor syscall device; done >/tmp/stranger) &
	as user /root/actor open:/dev/kvm loop:/tmp/upgraded >/tmp/granted &
	sleep 5
	dpkg -i /root/uffdguard_2_amd64.deb >&2
	sleep 5
	touch /tmp/upgraded
	wait
	tell upgrade-refused "$(sort -u /tmp/stranger)"
	tell upgrade-granted "$(sort -u /tmp/granted)"
	tell upgrade-asked "$(wc -l </tmp/stranger) $(grep -c . /tmp/granted)"
}

chmod 666 /dev/userfaultfd
settle
for word in $(cat /proc/cmdline); do
	case $word in phase=*) "${word#phase=}" ;; esac
done
tell end 1
sync
systemctl poweroff --force
