"""What runs notebooks: parameters, the run that a notebook holds, its store and results, execution, sweeps.

Nothing here renders pages or compares outputs.
"""
