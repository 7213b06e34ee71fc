"""Multi-token prediction: heads by model family, drafting, verification, rollback, depth.

Knows nothing of disks; `streamer.speculate` puts the parts together.
"""
