"""What every package uses: errors, interrupts, files, devices, provenance, statistics, and the console."""
