"""QEMU's block layer: graph, transactions, overlays, jobs."""
