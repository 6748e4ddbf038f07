"""What shows a run: its pages, the index, the pages of sweeps, and the explorer in a notebook. Nothing here executes."""
