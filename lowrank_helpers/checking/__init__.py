"""What compares recorded outputs with new ones: the rules, and the plugin of nbval. Nothing here renders."""
