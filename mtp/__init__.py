"""Multi-token prediction: heads by model family, drafting, verification, rollback.

Empty so far. Will depend on `kernels`; knows nothing of disks.
"""
