"""What compares recorded outputs with new ones: the rules, nbval's plugin, the tolerances. Nothing here renders."""
