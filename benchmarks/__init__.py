"""Side by side against what a user would pick instead; each module is one command: `python -m benchmarks.NAME --help`."""
