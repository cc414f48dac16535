"""Many adapters on a Ray cluster. jobs/train_adapters.py is the entry.

Reads from top to bottom: `plan` (what is to be done, what it takes, whether it can be), `fan_out` (from the plan to the
cards), `groups` (worker groups, each a Ray Train run: started, watched, replaced), `work` (what a worker does), `queue` (who
has which adapter, and what came of it), `table` (how it is shown while it lasts), `report` (what is told at the end).
"""
