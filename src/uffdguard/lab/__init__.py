"""The lab: a stock Debian kernel in a micro-VM on this machine's root file system."""
