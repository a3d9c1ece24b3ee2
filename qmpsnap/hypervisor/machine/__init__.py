"""The QEMU process: its command line, its start, its inventory."""
