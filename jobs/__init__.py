"""What `ray job submit` runs: thin drivers that fan the library's work out over a Ray cluster."""
