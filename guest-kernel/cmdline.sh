#!/bin/sh
# Prints the guest kernel's command line for a platform: cmdline.sh kvm | kvm-emulated | qemu [console]
# Why each word is there: README.md, "Command line". Frequencies and devices are for the caller to add.
set -eu

always="noreplace-smp rootfstype=ramfs no_timer_check lapic_khz=1000000 memhp_default_state=online_kernel"
emulated="syscall_by_fault tick_stretch=5 mitigations=off noxsaves noxsaveopt clearcpuid=smap,fsgsbase,rdrand,rdseed,popcnt,umip,smep,pcid,invpcid,erms,fsrm,rdtscp,rdpid,cx16,clflushopt,clwb,xsavec,xsaves,xsaveopt"
case "${2:-}" in
console) console="8250.nr_uarts=1 console=ttyS0" ;;
"") console="quiet loglevel=0" ;;
*) set -- ;;
esac
case "${1:-}" in
kvm) echo "reboot=k $always $console" ;;
kvm-emulated) echo "reboot=k $always $emulated $console" ;;
qemu) echo "reboot=t $always $console" ;;
*)
    echo "usage: $0 kvm | kvm-emulated | qemu [console]" >&2
    exit 2
    ;;
esac
