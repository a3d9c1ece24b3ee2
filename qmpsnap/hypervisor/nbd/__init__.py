"""NBD: what QEMU's own server tells of a frozen disk, read through libnbd."""
