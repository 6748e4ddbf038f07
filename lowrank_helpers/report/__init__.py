"""What shows a run: its pages, the index, the pages of sweeps, and the explorer. Nothing here executes."""
