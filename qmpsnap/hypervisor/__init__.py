"""Everything that speaks to, or starts, a QEMU."""
