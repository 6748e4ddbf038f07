"""What shows a run: its pages, the index, the pages of sweeps, and the panel in a notebook. Nothing here executes."""
