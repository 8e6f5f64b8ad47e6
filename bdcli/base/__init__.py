"""Ground of the house: errors, interrupts, files, devices, provenance, statistics, and the console."""
