"""What `auto` takes on this very machine: measured in a process of its own, and stored; docs/ops/auto.md."""
