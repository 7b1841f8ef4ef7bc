"""What jbn costs, measured; `benchmarks.traffic` needs no accelerator."""
